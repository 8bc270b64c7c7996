/* client/cli/bench_serve_load.c - the requests of one process of gqa bench serve. */
#include "client/cli/bench_serve.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct pending {
    struct worker *worker;
    struct serve_record *record; /* NULL: free */
    double last_us;
};

struct worker {
    struct cli *c;
    const struct serve_load *load;
    struct serve_outcome *o;
    uint64_t seed;
    uint32_t n_pending;
    int32_t *ids; /* (prefix + longest prompt) */
    struct pending pending[SERVE_PENDING_MAX];
};

/* In (0, 1]. */
static double draw(struct worker *w)
{
    int32_t id;
    bench_random_tokens(&id, 1, 1u << 30, &w->seed);
    return ((double)id + 1) / (double)(1u << 30);
}

static uint32_t draw_from(struct worker *w, struct serve_range r)
{
    double span = (double)(r.most - r.least) + 1;
    uint32_t more = (uint32_t)(draw(w) * span);
    return r.least + (more < r.most - r.least ? more : r.most - r.least);
}

static void on_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct pending *p = arg;
    struct serve_outcome *o = p->worker->o;
    double now = cli_now_us();
    size_t n = gqa_value_count(gqa_value_get(event, "tokens"));
    if (n == 0) {
        return;
    }
    if (p->record->n_tokens == 0) {
        p->record->first_us = now;
    } else if (o->n_gaps < SERVE_GAPS_MAX) {
        o->gaps_ms[o->n_gaps++] = (float)((now - p->last_us) / 1e3);
    }
    p->record->n_tokens += (uint32_t)n;
    p->last_us = now;
}

static void on_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                    const struct gqa_error *error)
{
    struct pending *p = arg;
    p->record->end_us = cli_now_us();
    p->record->status = status;
    p->record = NULL;
    p->worker->n_pending--;
}

static int send_one(struct worker *w)
{
    const struct serve_load *l = w->load;
    struct pending *p = w->pending;
    while (p->record != NULL) {
        p++;
    }
    uint32_t n = draw_from(w, l->prompt);
    bench_random_tokens(w->ids + l->n_prefix, n, l->n_vocab, &w->seed);
    struct gqa_params *params = cli_model_params(l->model);
    gqa_params_tokens(params, "tokens", w->ids, l->n_prefix + n);
    gqa_params_u64(params, "n_predict", draw_from(w, l->gen));
    gqa_params_f64(params, "temperature", 0);
    gqa_params_bool(params, "ignore_eos", true);
    p->worker = w;
    p->record = &w->o->records[w->o->n_records];
    *p->record = (struct serve_record){.sent_us = cli_now_us(), .n_prompt = l->n_prefix + n};
    const struct gqa_call_options options = {
        .struct_size = sizeof(options), .event = on_event, .done = on_done, .arg = p};
    int rc = gqa_call_async(w->c->g, "text.generate", params, &options, NULL);
    gqa_params_destroy(params);
    if (rc < 0) {
        p->record = NULL;
        return cli_error(CLI_FAILED, "text.generate: cannot be sent: %s", strerror(-rc));
    }
    w->o->n_records++;
    w->n_pending++;
    return CLI_OK;
}

/* Sends what is due; *due_us: when the next is. */
static int send_due(struct worker *w, double *due_us)
{
    const struct serve_load *l = w->load;
    double now = cli_now_us(), end = w->o->begin_us + l->duration_us;
    int code = CLI_OK;
    while (code == CLI_OK && now < end && w->o->n_records < SERVE_RECORDS_MAX) {
        bool room = w->n_pending < l->concurrency;
        if (l->rate > 0 && now < *due_us) {
            break;
        }
        if (!room && l->rate <= 0) {
            break;
        }
        if (room) {
            code = send_one(w);
        } else {
            w->o->n_late++;
        }
        *due_us += l->rate > 0 ? -log(draw(w)) / l->rate * 1e6 : 0;
    }
    return code;
}

static void wait_until(struct worker *w, double due_us)
{
    double end = w->o->begin_us + w->load->duration_us, now = cli_now_us();
    double until = w->load->rate > 0 && due_us < end ? due_us : end;
    until = now < end ? until : now + 1e6;
    gqa_wait(w->c->g, until > now ? (uint64_t)(until - now) : 0);
}

int serve_run(struct cli *c, const struct serve_load *load, struct serve_outcome *o)
{
    struct worker *w = calloc(1, sizeof(*w));
    int32_t *ids = malloc((load->n_prefix + load->prompt.most) * sizeof(*ids));
    int code = w != NULL && ids != NULL ? CLI_OK : cli_error(EX_OSERR, "bench: no memory");
    double due_us = cli_now_us();
    o->uid = load->uid;
    o->begin_us = due_us;
    if (code == CLI_OK) {
        *w = (struct worker){.c = c, .load = load, .o = o, .seed = load->seed, .ids = ids};
        if (load->n_prefix > 0) {
            memcpy(ids, load->prefix, load->n_prefix * sizeof(*ids));
        }
        code = send_due(w, &due_us);
    }
    while (code == CLI_OK && (w->n_pending > 0 || cli_now_us() < o->begin_us + load->duration_us)) {
        int rc = gqa_process(c->g);
        if (rc == 0) {
            wait_until(w, due_us);
        }
        code = rc < 0 ? cli_error(EX_UNAVAILABLE, "bench: the daemon went away: %s", strerror(-rc))
                      : send_due(w, &due_us);
        code = cli_interrupted() ? CLI_INTERRUPTED : code;
    }
    o->end_us = cli_now_us();
    free(ids);
    free(w);
    return code;
}
