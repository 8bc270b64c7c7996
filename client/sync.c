/* client/sync.c - helpers that run the loop until their own call has ended. */
#include "client/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A call that somebody waits for, on that somebody's stack. */
struct waiting {
    struct gqa *g;
    bool ended;
    int status;
    bool wants_reply;
    struct gqa_reply *reply;
    struct gqa_error error;
    gqa_event_fn event;
    void *arg;
};

static void on_waiting_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct waiting *w = arg;
    if (w->event != NULL) {
        w->event(w->arg, id, event);
    }
}

static void on_waiting_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                            const struct gqa_error *error)
{
    struct waiting *w = arg;
    w->ended = true;
    w->status = status;
    if (status < 0) {
        w->error = *error;
    } else if (w->wants_reply) {
        w->status = client_reply_create(w->g, w->g->frame, w->g->frame_bytes, &w->reply);
        if (w->status < 0) {
            client_fail(&w->error, w->status, "no memory to keep the result");
        }
    }
}

/* Runs the loop until w's call has ended, which its deadline makes sure of. */
static void run_until_ended(struct gqa *g, const struct waiting *w)
{
    client_ref(g);
    gqa_wait(g, UINT64_MAX); /* first: the answer cannot be there yet, and a look costs a call */
    while (!w->ended) {
        /* Errors of either end all calls, ours among them; signals are not ours to act upon. */
        if (gqa_process(g) == 0 && !w->ended) {
            gqa_wait(g, UINT64_MAX);
        }
    }
    client_unref(g);
}

int gqa_call(struct gqa *g, const char *method, const struct gqa_params *params,
             const struct gqa_call_options *options, struct gqa_reply **ret,
             struct gqa_error *ret_error)
{
    struct waiting w = {.g = g, .wants_reply = ret != NULL};
    struct gqa_call_options o;
    if (g->dispatching) {
        return client_fail(ret_error, -EDEADLK, "gqa_call() was used inside a callback");
    }
    int r = client_call_options(options, &o);
    if (r < 0) {
        return client_fail(ret_error, r, "gqa_call(): options without their struct_size");
    }
    if (client_is_own_method(method)) {
        return client_fail(ret_error, -EINVAL, "%s: the library's own: see GQA_F_SHM", method);
    }
    w.event = o.event;
    w.arg = o.arg;
    o.event = on_waiting_event;
    o.done = on_waiting_done;
    o.arg = &w;
    r = gqa_call_async(g, method, params, &o, NULL);
    if (r == -ENOTCONN) {
        return client_fail(ret_error, r, "%s: the connection is lost", method);
    }
    if (r < 0) {
        return client_fail(ret_error, r, "%s: cannot be sent: %s", method != NULL ? method : "call",
                           strerror(-r));
    }
    run_until_ended(g, &w);
    if (w.status < 0) {
        if (ret_error != NULL) {
            *ret_error = w.error;
        }
        return w.status;
    }
    if (ret != NULL) {
        *ret = w.reply;
    }
    return 0;
}

int gqa_ping(struct gqa *g, struct gqa_error *ret_error)
{
    return gqa_call(g, "gqa.ping", NULL, NULL, NULL, ret_error);
}

/* Makes params that begin with the model's name. */
static int model_params(const char *model, struct gqa_params **ret, struct gqa_error *ret_error)
{
    struct gqa_params *p;
    int r = gqa_params_create(&p);
    if (r < 0) {
        return client_fail(ret_error, r, "no memory");
    }
    gqa_params_str(p, "model", model);
    *ret = p;
    return 0;
}

static int nonsense(struct gqa_error *ret_error, const char *method)
{
    return client_fail(ret_error, -EPROTO, "%s: the result is not what the protocol says", method);
}

int gqa_tokenize(struct gqa *g, const char *model, const void *text, size_t bytes, uint32_t flags,
                 int32_t **ret_ids, size_t *ret_count, struct gqa_error *ret_error)
{
    struct gqa_params *p = NULL;
    struct gqa_reply *reply;
    int r = model_params(model, &p, ret_error);
    if (r < 0) {
        return r;
    }
    gqa_params_text(p, "text", text, bytes);
    gqa_params_bool(p, "add_special", (flags & GQA_TOKENIZE_NO_SPECIAL) == 0);
    gqa_params_bool(p, "parse_special", (flags & GQA_TOKENIZE_NO_PARSE_SPECIAL) == 0);
    r = gqa_call(g, "text.tokenize", p, NULL, &reply, ret_error);
    gqa_params_destroy(p);
    if (r < 0) {
        return r;
    }
    const struct gqa_value *tokens = gqa_value_get(gqa_reply_value(reply), "tokens");
    size_t count = gqa_value_count(tokens);
    int32_t *ids = malloc((count > 0 ? count : 1) * sizeof(*ids));
    if (ids == NULL) {
        r = client_fail(ret_error, -ENOMEM, "no memory for %zu tokens", count);
    } else if (gqa_value_tokens(tokens, ids, count, &count) < 0) {
        r = nonsense(ret_error, "text.tokenize");
    }
    gqa_reply_destroy(reply);
    if (r < 0) {
        free(ids);
        return r;
    }
    *ret_ids = ids;
    *ret_count = count;
    return 0;
}

int gqa_detokenize(struct gqa *g, const char *model, const int32_t *ids, size_t count,
                   uint32_t flags, char **ret_text, size_t *ret_bytes, struct gqa_error *ret_error)
{
    struct gqa_params *p = NULL;
    struct gqa_reply *reply;
    int r = model_params(model, &p, ret_error);
    if (r < 0) {
        return r;
    }
    gqa_params_tokens(p, "tokens", ids, count);
    gqa_params_bool(p, "special", (flags & GQA_DETOKENIZE_SPECIAL) != 0);
    r = gqa_call(g, "text.detokenize", p, NULL, &reply, ret_error);
    gqa_params_destroy(p);
    if (r < 0) {
        return r;
    }
    const char *data = NULL;
    size_t bytes = 0;
    char *text = NULL;
    if (gqa_value_bytes(gqa_value_get(gqa_reply_value(reply), "text"), &data, &bytes) < 0) {
        r = nonsense(ret_error, "text.detokenize");
    } else if ((text = malloc(bytes + 1)) == NULL) {
        r = client_fail(ret_error, -ENOMEM, "no memory for %zu bytes", bytes);
    } else {
        memcpy(text, data, bytes);
        text[bytes] = '\0';
        *ret_text = text;
        *ret_bytes = bytes;
    }
    gqa_reply_destroy(reply);
    return r;
}

struct generation {
    struct gqa *g;
    gqa_text_fn fn;
    gqa_sample_fn sample_fn; /* one of both, or none */
    void *arg;
    int32_t *ids;
    size_t capacity;
    int error; /* the first thing that went wrong in an event */
};

static int hand_on(struct generation *s, const struct gqa_value *event, const char *text,
                   size_t bytes, size_t n_ids)
{
    uint64_t sample = 0; /* absent where there is one */
    if (s->fn != NULL) {
        return s->fn(s->arg, text, bytes, s->ids, n_ids);
    }
    gqa_value_u64(gqa_value_get(event, "sample"), &sample);
    return s->sample_fn(s->arg, (uint32_t)sample, text, bytes, s->ids, n_ids);
}

/* Hands one event on; a callback that has enough, or a failure, cancels. */
static void on_generation_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct generation *s = arg;
    const struct gqa_value *tokens = gqa_value_get(event, "tokens");
    const char *text = "";
    size_t bytes = 0, count = gqa_value_count(tokens);
    if ((s->fn == NULL && s->sample_fn == NULL) || s->error < 0) {
        return;
    }
    if (count > s->capacity) {
        int32_t *ids = realloc(s->ids, count * sizeof(*ids));
        if (ids == NULL) {
            s->error = -ENOMEM;
            gqa_cancel(s->g, id);
            return;
        }
        s->ids = ids;
        s->capacity = count;
    }
    int r = gqa_value_bytes(gqa_value_get(event, "text"), &text, &bytes);
    int r_ids = gqa_value_tokens(tokens, s->ids, s->capacity, &count);
    if ((r < 0 && r != -ENOENT) || (r_ids < 0 && r_ids != -ENOENT)) {
        s->error = -EPROTO;
        gqa_cancel(s->g, id);
    } else if (hand_on(s, event, text, bytes, count) != 0) {
        gqa_cancel(s->g, id);
    }
}

static int generate(struct generation *s, const struct gqa_params *params,
                    const struct gqa_call_options *options, struct gqa_reply **ret,
                    struct gqa_error *ret_error)
{
    struct gqa_reply *reply = NULL;
    struct gqa_call_options o;
    int r = client_call_options(options, &o);
    if (r < 0) {
        return client_fail(ret_error, r, "gqa_generate(): options without their struct_size");
    }
    o.event = on_generation_event;
    o.arg = s;
    r = gqa_call(s->g, "text.generate", params, &o, ret != NULL ? &reply : NULL, ret_error);
    free(s->ids);
    if (s->error < 0) {
        gqa_reply_destroy(reply);
        return client_fail(ret_error, s->error, "text.generate: an event could not be read: %s",
                           strerror(-s->error));
    }
    if (r == 0 && ret != NULL) {
        *ret = reply;
    }
    return r;
}

int gqa_generate(struct gqa *g, const struct gqa_params *params,
                 const struct gqa_call_options *options, gqa_text_fn fn, void *arg,
                 struct gqa_reply **ret, struct gqa_error *ret_error)
{
    struct generation s = {.g = g, .fn = fn, .arg = arg};
    return generate(&s, params, options, ret, ret_error);
}

int gqa_generate_samples(struct gqa *g, const struct gqa_params *params,
                         const struct gqa_call_options *options, gqa_sample_fn fn, void *arg,
                         struct gqa_reply **ret, struct gqa_error *ret_error)
{
    struct generation s = {.g = g, .sample_fn = fn, .arg = arg};
    return generate(&s, params, options, ret, ret_error);
}

struct load {
    gqa_progress_fn fn;
    void *arg;
};

static void on_load_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct load *l = arg;
    char stage[64] = "";
    const char *data;
    size_t bytes;
    uint64_t done = 0, total = 0;
    if (gqa_value_bytes(gqa_value_get(event, "stage"), &data, &bytes) == 0) {
        bytes = bytes < sizeof(stage) - 1 ? bytes : sizeof(stage) - 1;
        memcpy(stage, data, bytes);
        stage[bytes] = '\0';
    }
    gqa_value_u64(gqa_value_get(event, "done"), &done);
    gqa_value_u64(gqa_value_get(event, "total"), &total);
    l->fn(l->arg, stage, done, total);
}

int gqa_model_load(struct gqa *g, const struct gqa_params *params, gqa_progress_fn fn, void *arg,
                   struct gqa_reply **ret, struct gqa_error *ret_error)
{
    struct load l = {.fn = fn, .arg = arg};
    struct gqa_call_options o = {
        .struct_size = sizeof(o),
        .event = fn != NULL ? on_load_event : NULL,
        .arg = &l,
    };
    return gqa_call(g, "model.load", params, &o, ret, ret_error);
}

int gqa_model_unload(struct gqa *g, const char *model, struct gqa_error *ret_error)
{
    struct gqa_params *p = NULL;
    int r = model_params(model, &p, ret_error);
    if (r < 0) {
        return r;
    }
    r = gqa_call(g, "model.unload", p, NULL, NULL, ret_error);
    gqa_params_destroy(p);
    return r;
}
