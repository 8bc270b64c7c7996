/* text.generate and text.logits: from the params to a request that the engine runs. */
#include "daemon/handlers_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a result with stream=false may take in one message; logprobs and many samples make it large.
 */
#define COLLECTED_BYTES_MAX (PROTO_FRAME_BYTES_MAX / 2)
#define PACKED_PROB_BYTES   16u

/* ---- shared by both ---------------------------------------------------------------------- */

struct prompt_params {
    struct proto_string prompt;
    struct proto_tokens tokens;
    bool has_prompt, has_tokens, add_special, parse_special;
};

bool call_check_decoder(struct call *call)
{
    if (model_is_encoder(call->model)) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "model '%s' is an encoder (%s) and has no next token: see text.embed",
                  model_name(call->model), model_shape(call->model)->arch->name);
        return false;
    }
    return true;
}

static struct prompt_params prompt_of(const struct call *call)
{
    if (call->method == PROTO_TEXT_GENERATE) {
        const struct proto_text_generate *p = &call->params.text_generate;
        return (struct prompt_params){p->prompt,     p->tokens,      p->has_prompt,
                                      p->has_tokens, p->add_special, p->parse_special};
    }
    if (call->method == PROTO_KV_PIN) {
        const struct proto_kv_pin *p = &call->params.kv_pin;
        return (struct prompt_params){p->prompt,     p->tokens,      p->has_prompt,
                                      p->has_tokens, p->add_special, p->parse_special};
    }
    if (call->method == PROTO_KV_EXPORT) {
        const struct proto_kv_export *p = &call->params.kv_export;
        return (struct prompt_params){p->prompt,     p->tokens,      p->has_prompt,
                                      p->has_tokens, p->add_special, p->parse_special};
    }
    const struct proto_text_logits *p = &call->params.text_logits;
    return (struct prompt_params){p->prompt,     p->tokens,      p->has_prompt,
                                  p->has_tokens, p->add_special, p->parse_special};
}

bool call_check_prompt(struct call *call)
{
    struct prompt_params p = prompt_of(call);
    if (p.has_prompt == p.has_tokens) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "give exactly one of 'prompt' and 'tokens'");
        return false;
    }
    if (p.has_tokens && p.tokens.count == 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'tokens' needs at least one");
        return false;
    }
    return true;
}

void call_take_prompt(struct call *call, void (*then)(struct call *))
{
    struct prompt_params p = prompt_of(call);
    if (p.has_prompt) {
        call_tokenise(call, &(struct call_encode){.field = "prompt",
                                                  .text = p.prompt,
                                                  .add_special = p.add_special,
                                                  .parse_special = p.parse_special,
                                                  .then = then});
        return;
    }
    if (!call_check_tokens(call, "tokens", p.tokens)) {
        return;
    }
    call->tokens = malloc(p.tokens.count * sizeof(*call->tokens));
    if (!call->tokens) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a prompt of %zu tokens", p.tokens.count);
        return;
    }
    memcpy(call->tokens, p.tokens.ids, p.tokens.count * sizeof(*call->tokens));
    call->n_tokens = p.tokens.count;
    then(call);
}

/* Where all that is seen is in a window, the context does not bound the prompt. */
static bool check_context(struct call *call, uint32_t n_more, enum kv_policy_kind policy)
{
    struct model_facts facts;
    model_facts(call->model, &facts);
    if (call->n_tokens == 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'prompt' gives no token");
        return false;
    }
    if (policy != KV_POLICY_WINDOW && call->n_tokens + n_more > facts.n_ctx) {
        call_fail(call, PROTO_E_CONTEXT_EXCEEDED,
                  "the prompt has %zu tokens%s; the context has room for %u", call->n_tokens,
                  n_more ? " and needs one more" : "", facts.n_ctx);
        return false;
    }
    return true;
}

/* Cached prompts are shared within a realm: a uid's own, or the one that the administrator named.
 */
void call_realm(const struct call *call, char realm[KV_REALM_BYTES])
{
    const struct service *s = call->service;
    if (s->realm[0]) {
        snprintf(realm, KV_REALM_BYTES, "shared-%.40s", s->realm);
    } else {
        snprintf(realm, KV_REALM_BYTES, "uid-%u", (unsigned)call->uid);
    }
}

bool call_fill_scheduling(struct call *call, int32_t priority, uint32_t deadline_ms)
{
    bool admin = call->caller && call->caller->admin;
    if (priority > 0 && !admin) {
        call_fail(call, PROTO_E_ACCESS_DENIED, "'priority' is %d; above 0 is for administrators",
                  priority);
        return false;
    }
    call->request->priority = priority;
    call->request->deadline_ms = deadline_ms;
    return true;
}

struct request *call_begin_request(struct call *call, enum request_kind kind)
{
    struct request *r = request_create(kind, call->model);
    if (!r) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a request");
        return NULL;
    }
    r->uid = call->uid;
    call_realm(call, r->realm);
    r->owner = call;
    r->tokens = call->tokens;
    r->n_tokens = call->n_tokens;
    call->tokens = NULL;
    struct quota_user *user = quota_user(call->service->quotas, call->uid);
    r->is_unread = user ? &user->is_unread : NULL; /* the call is held by it for longer */
    r->area = call->caller ? area_ref(call->caller->area) : NULL;
    call->request = r;
    return r;
}

/* What a request holds until its prompt is computed, and until it ends. */
static struct quota_amounts amounts_of(const struct request *r)
{
    uint64_t n_tokens = r->n_tokens;
    for (size_t i = 0; i < r->embed.n_inputs; i++) {
        n_tokens += r->embed.inputs[i].n_tokens;
    }
    uint64_t n_sequences = r->kind == REQUEST_EMBED ? r->embed.n_inputs : r->n_samples;
    return (struct quota_amounts){.of = {[QUOTA_QUEUED_REQUESTS] = 1,
                                         [QUOTA_QUEUED_TOKENS] = n_tokens,
                                         [QUOTA_SEQUENCES] = n_sequences}};
}

void call_submit(struct call *call)
{
    struct quota_amounts wanted = amounts_of(call->request);
    struct ipc_error e;
    if (call_take(call, &wanted, &e) < 0) {
        call_fail_error(call, &e);
        return;
    }
    call->request->submitted_ns = clock_now_ns();
    int rc = engine_submit(call->service->engine, call->request);
    if (rc == -EAGAIN) {
        ipc_error_set(&e, PROTO_E_BUSY, "the queue is full");
        e.retry_after_ms = engine_retry_ms(call->service->engine);
        call_fail_error(call, &e);
    } else if (rc == -ESHUTDOWN) {
        call_fail(call, PROTO_E_DRAINING, "the daemon is about to end");
    } else if (rc < 0) {
        call_fail(call, PROTO_E_INTERNAL, "the engine refused the request: %s", strerror(-rc));
    } else {
        call->wait = CALL_WAIT_ENGINE;
        call_release_message(call); /* the request has copies of all it needs */
    }
}

/* ---- text.generate ----------------------------------------------------------------------- */

static bool check_generate(struct call *call)
{
    struct proto_text_generate *p = &call->params.text_generate;
    if (!call_check_prompt(call)) {
        return false;
    }
    if (p->has_max_tokens) {
        if (p->has_n_predict && p->n_predict != p->max_tokens) {
            call_fail(call, PROTO_E_INVALID_PARAMS,
                      "'max_tokens' is another name of 'n_predict', and they differ: %u and %u",
                      p->max_tokens, p->n_predict);
            return false;
        }
        p->n_predict = p->max_tokens;
    }
    bool large = p->n_probs > 0 || p->n > 1;
    uint64_t bytes = (uint64_t)p->n * p->n_predict * (p->n_probs + 1) * PACKED_PROB_BYTES;
    if (!p->stream && large && bytes > COLLECTED_BYTES_MAX) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'%s': with 'n_predict' %u the result would not fit a message; use 'stream'",
                  p->n_probs > 0 ? "n_probs" : "n", p->n_predict);
        return false;
    }
    return true;
}

/* A window lets a generation go on beyond the context, which bounds all others. */
static bool check_windowed_result(struct call *call)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    uint64_t n_max = COLLECTED_BYTES_MAX / PACKED_PROB_BYTES / (p->n_probs + 1) / p->n;
    if (!p->stream && p->n_predict > n_max) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'n_predict' is %u; without 'stream' it must be 0 to %" PRIu64
                  " where 'kv_policy' "
                  "is 'window', so that the result fits a message",
                  p->n_predict, n_max);
        return false;
    }
    return true;
}

static int copy_stops(struct request *r, struct proto_strings stops)
{
    if (stops.count == 0) {
        return 0;
    }
    r->stops = calloc(stops.count, sizeof(*r->stops));
    r->stop_bytes = calloc(stops.count, sizeof(*r->stop_bytes));
    if (!r->stops || !r->stop_bytes) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < stops.count; i++) {
        r->stops[i] = malloc(stops.items[i].bytes + 1);
        if (!r->stops[i]) {
            return -ENOMEM;
        }
        memcpy(r->stops[i], stops.items[i].data, stops.items[i].bytes);
        r->stops[i][stops.items[i].bytes] = '\0';
        r->stop_bytes[i] = stops.items[i].bytes;
        r->n_stops++;
    }
    return 0;
}

static void generate_submit(struct call *call)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    if (p->has_numerics && (p->numerics.bytes != 6 || memcmp(p->numerics.data, "strict", 6) != 0)) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'numerics' is '%.*s'; 'strict' is known",
                  (int)p->numerics.bytes, p->numerics.data);
        return;
    }
    struct kv_policy policy;
    if (!call_read_policy(call, &policy) || !check_context(call, 1, policy.kind) ||
        (policy.kind == KV_POLICY_WINDOW && !check_windowed_result(call)) ||
        !call_check_sampling(call)) {
        return;
    }
    struct request *r = call_begin_request(call, REQUEST_GENERATE);
    if (!r) {
        return;
    }
    r->n_predict = p->n_predict;
    r->kv_policy = policy;
    r->wants_kept = p->kv_kept;
    r->ignore_eos = p->ignore_eos;
    r->t_max_predict_ms = p->t_max_predict_ms;
    r->cache_exact = p->cache_exact;
    r->strict = p->has_numerics;
    if (!p->cache_prompt) {
        r->realm[0] = '\0';
    }
    if (!call_fill_scheduling(call, p->priority, p->deadline_ms)) {
        return;
    }
    if (request_set_samples(r, p->n) < 0 || call_fill_sampling(call) < 0 ||
        copy_stops(r, p->stop) < 0) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a request");
        return;
    }
    call_prepare_sampling(call, call_submit);
}

static void generate_with_model(struct call *call)
{
    if (call_check_decoder(call)) {
        call_take_prompt(call, generate_submit);
    }
}

void handle_text_generate(struct call *call)
{
    if (check_generate(call)) {
        call_with_model(call, call->params.text_generate.model, generate_with_model);
    }
}

/* ---- kv.pin: a generation of nothing, whose prompt stays --------------------------------- */

static void pin_submit(struct call *call)
{
    if (!check_context(call, 1, KV_POLICY_FULL)) {
        return;
    }
    struct request *r = call_begin_request(call, REQUEST_GENERATE);
    if (r) {
        r->pin = call->params.kv_pin.pinned ? 1 : -1;
        call_submit(call);
    }
}

static void pin_with_model(struct call *call)
{
    if (call_check_decoder(call)) {
        call_take_prompt(call, pin_submit);
    }
}

void handle_kv_pin(struct call *call)
{
    if (call_check_prompt(call)) {
        call_with_model(call, call->params.kv_pin.model, pin_with_model);
    }
}

/* ---- text.logits ------------------------------------------------------------------------- */

static void logits_submit(struct call *call)
{
    const struct proto_text_logits *p = &call->params.text_logits;
    struct kv_policy policy;
    if (!call_read_policy(call, &policy) || !check_context(call, 0, policy.kind)) {
        return;
    }
    if (p->first_row >= call->n_tokens) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'first_row' is %u; the prompt has %zu tokens",
                  p->first_row, call->n_tokens);
        return;
    }
    struct request *r = call_begin_request(call, REQUEST_LOGITS);
    if (!r) {
        return;
    }
    r->first_row = p->first_row;
    r->kv_policy = policy;
    r->logprobs = p->logprobs;
    if (!p->cache_prompt) {
        r->realm[0] = '\0';
    }
    if (call_fill_scheduling(call, p->priority, p->deadline_ms)) {
        call_submit(call);
    }
}

static void logits_with_model(struct call *call)
{
    if (call_check_decoder(call)) {
        call_take_prompt(call, logits_submit);
    }
}

void handle_text_logits(struct call *call)
{
    if (call_check_prompt(call)) {
        call_with_model(call, call->params.text_logits.model, logits_with_model);
    }
}
