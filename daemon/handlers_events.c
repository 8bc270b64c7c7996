/* What the engine publishes, as the client sees it: events and the result.
 *
 * Flow control: the engine pauses a sequence whose undelivered_bytes are above its bound. An event
 * counts as delivered once it is packed, unless the caller is congested; then its bytes are held
 * against the request until the caller's output has drained. */
#include "daemon/handlers_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- tokens ------------------------------------------------------------------------------ */

static void pack_logprob(struct ipc_buffer *b, const struct sampled_token *t)
{
    ipc_pack_map(b, 3);
    pack_kv_i64(b, "token", t->token);
    pack_kv_f64(b, "logprob", t->logprob);
    pack_kv_array(b, "top", t->n_probs);
    for (uint32_t i = 0; i < t->n_probs; i++) {
        ipc_pack_array(b, 2);
        ipc_pack_i64(b, t->probs[i].token);
        ipc_pack_f64(b, t->probs[i].logprob);
    }
}

static void send_tokens(struct call *call, const struct request_event *ev)
{
    bool with_probs = call->params.text_generate.n_probs > 0;
    bool with_sample = call->params.text_generate.n > 1;
    struct ipc_buffer *b = call_begin_event(call);
    ipc_pack_map(b, 2u + with_probs + with_sample);
    if (with_sample) {
        pack_kv_u64(b, "sample", ev->part);
    }
    ipc_pack_str(b, "text");
    ipc_pack_text(b, ev->text_bytes ? ev->text : "", ev->text_bytes);
    pack_kv_array(b, "tokens", ev->n_tokens);
    for (uint32_t i = 0; i < ev->n_tokens; i++) {
        ipc_pack_i64(b, ev->tokens[i].token);
    }
    if (with_probs) {
        pack_kv_array(b, "logprobs", ev->n_tokens);
        for (uint32_t i = 0; i < ev->n_tokens; i++) {
            pack_logprob(b, &ev->tokens[i]);
        }
    }
    call_end_event(call);
}

static int grow(void **data, size_t *capacity, size_t needed, size_t item_bytes)
{
    if (needed <= *capacity) {
        return 0;
    }
    size_t n = *capacity ? *capacity * 2 : 64;
    n = n < needed ? needed : n;
    void *bigger = realloc(*data, n * item_bytes);
    if (!bigger) {
        return -ENOMEM;
    }
    *data = bigger;
    *capacity = n;
    return 0;
}

static struct call_collected *collected_of(struct call *call, uint32_t sample)
{
    uint32_t n = call->params.text_generate.n;
    if (!call->collected) {
        call->collected = calloc(n, sizeof(*call->collected));
        call->n_collected = call->collected ? n : 0;
        for (uint32_t i = 0; i < call->n_collected; i++) {
            ipc_buffer_init(&call->collected[i].logprobs);
        }
    }
    return call->collected ? &call->collected[sample] : NULL;
}

void call_drop_collected(struct call *call)
{
    for (uint32_t i = 0; i < call->n_collected; i++) {
        free(call->collected[i].text);
        free(call->collected[i].tokens);
        ipc_buffer_finish(&call->collected[i].logprobs);
    }
    free(call->collected);
}

static int collect_tokens(struct call *call, const struct request_event *ev)
{
    struct call_collected *c = collected_of(call, ev->part);
    if (!c) {
        return -ENOMEM;
    }
    if (grow((void **)&c->text, &c->text_capacity, c->text_bytes + ev->text_bytes, 1) < 0 ||
        grow((void **)&c->tokens, &c->tokens_capacity, c->n_tokens + ev->n_tokens,
             sizeof(*c->tokens)) < 0) {
        return -ENOMEM;
    }
    if (ev->text_bytes) {
        memcpy(c->text + c->text_bytes, ev->text, ev->text_bytes);
        c->text_bytes += ev->text_bytes;
    }
    for (uint32_t i = 0; i < ev->n_tokens; i++) {
        c->tokens[c->n_tokens++] = ev->tokens[i].token;
        if (call->params.text_generate.n_probs > 0) {
            pack_logprob(&c->logprobs, &ev->tokens[i]);
        }
    }
    return c->logprobs.error;
}

static void deliver_tokens(struct call *call, const struct request_event *ev)
{
    if (call->params.text_generate.stream) {
        send_tokens(call, ev);
    } else if (collect_tokens(call, ev) < 0 && !call->collecting_failed) {
        call->collecting_failed = true;
        engine_cancel(call->service->engine, call->request);
    }
}

/* ---- rows -------------------------------------------------------------------------------- */

/* logits (n_rows, n_vocab), or logprobs (n_rows); the engine keeps them far below a frame. */
static void deliver_rows(struct call *call, const struct request_event *ev)
{
    bool logprobs = call->request->logprobs;
    const uint64_t shape[2] = {ev->n_rows, model_shape(call->request->model)->n_vocab};
    struct ipc_buffer *b = call_begin_event(call);
    ipc_pack_map(b, 2);
    pack_kv_u64(b, "first_row", ev->first_row);
    ipc_pack_str(b, logprobs ? "logprobs" : "logits");
    call_pack_rows(call, b, ev, shape, logprobs ? 1 : 2);
    call_end_event(call);
}

/* ---- the result -------------------------------------------------------------------------- */

static double per_second(uint64_t count, double ms)
{
    return ms > 0 ? (double)count * 1000.0 / ms : 0;
}

static void pack_timings(struct ipc_buffer *b, const struct request *r)
{
    const struct request_timings *t = &r->timings;
    pack_kv_map(b, "timings", 12);
    pack_kv_f64(b, "queue_ms", t->queue_ms);
    pack_kv_f64(b, "prompt_ms", t->prompt_ms);
    pack_kv_f64(b, "first_token_ms", t->first_token_ms);
    pack_kv_f64(b, "predict_ms", t->predict_ms);
    pack_kv_f64(b, "prompt_per_second", per_second(r->n_prompt - r->n_cached, t->prompt_ms));
    /* predict_ms runs from the first tokens, which the prompt gave, to the last one. */
    uint32_t n_later = r->n_generated > r->n_samples ? r->n_generated - r->n_samples : 0;
    pack_kv_f64(b, "predicted_per_second", per_second(n_later, t->predict_ms));
    pack_kv_f64(b, "prefill_ms", t->prefill_ms);
    pack_kv_f64(b, "decode_ms", t->decode_ms);
    pack_kv_f64(b, "sampling_ms", t->sampling_ms);
    pack_kv_f64(b, "delivery_ms", r->delivery_ms);
    pack_kv_u64(b, "steps", r->n_steps);
    pack_kv_u64(b, "n_preempted", r->n_preempted);
}

static const struct call_collected nothing_collected;

/* The text, tokens and logprobs of a sample. */
static void pack_collected(struct call *call, struct ipc_buffer *b, uint32_t sample)
{
    const struct call_collected *c =
        call->collected ? &call->collected[sample] : &nothing_collected;
    ipc_pack_str(b, "text");
    ipc_pack_text(b, c->text_bytes ? c->text : "", c->text_bytes);
    ipc_pack_str(b, "tokens");
    ipc_pack_tokens(b, c->tokens, c->n_tokens);
    if (call->params.text_generate.n_probs > 0) {
        pack_kv_array(b, "logprobs", c->n_tokens);
        ipc_pack_raw(b, c->logprobs.data, c->logprobs.bytes);
    }
}

/* Where the adopted blocks came from. */
static const char *cache_source(const struct request *r)
{
    if (r->hit_blocks == 0) {
        return r->n_cached > 0 ? "memory" : "none";
    }
    return r->store_blocks == 0 ? "memory" : r->store_blocks == r->hit_blocks ? "store" : "mixed";
}

static size_t n_collected_keys(const struct proto_text_generate *p)
{
    return p->stream ? 0 : p->n_probs > 0 ? 3 : 2;
}

/* How a sample ended: finish, and stop where that was why. */
static void pack_finish(struct ipc_buffer *b, const struct request *r, uint32_t sample)
{
    const struct request_sample *s = &r->samples[sample];
    pack_kv_str(b, "finish", request_finish_name(s->finish));
    if (s->stop_index >= 0) {
        ipc_pack_str(b, "stop");
        ipc_pack_text(b, r->stops[s->stop_index], r->stop_bytes[s->stop_index]);
    }
}

static void pack_samples(struct call *call, struct ipc_buffer *b, const struct request *r)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    pack_kv_array(b, "samples", r->n_samples);
    for (uint32_t i = 0; i < r->n_samples; i++) {
        ipc_pack_map(b, 3 + (r->samples[i].stop_index >= 0) + n_collected_keys(p));
        pack_finish(b, r, i);
        pack_kv_u64(b, "n_generated", r->samples[i].n_generated);
        pack_kv_u64(b, "seed", request_seed(r, i));
        if (!p->stream) {
            pack_collected(call, b, i);
        }
    }
}

static void pack_kept(struct call *call, struct ipc_buffer *b, const struct request *r)
{
    const uint64_t shape[1] = {r->n_prompt};
    pack_kv_map(b, "kv", 3 + (r->kept != NULL));
    pack_kv_str(b, "policy", kv_policy_name(r->kv_policy.kind));
    pack_kv_u64(b, "n_kept", r->n_kept);
    pack_kv_u64(b, "n_dropped", r->n_dropped);
    if (r->kept != NULL) {
        ipc_pack_str(b, "kept");
        call_pack_tensor(call, b, r->kept, shape, 1);
    }
}

/* What a request of one sample gives; with more the first of them stands there too, so that who
 * does not know of samples is told no nonsense. */
static void answer_generate(struct call *call, const struct request *r)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    bool many = r->n_samples > 1;
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 8 + (r->samples[0].stop_index >= 0) + many + n_collected_keys(p));
    pack_finish(b, r, 0);
    pack_kv_u64(b, "n_prompt", r->n_prompt);
    pack_kv_u64(b, "n_cached", r->n_cached);
    pack_kv_u64(b, "n_generated", r->n_generated);
    pack_kv_u64(b, "seed", r->sampling.seed);
    pack_kept(call, b, r);
    pack_timings(b, r);
    pack_kv_map(b, "cache", 3);
    pack_kv_u64(b, "hit_blocks", r->hit_blocks);
    pack_kv_str(b, "source", cache_source(r));
    pack_kv_str(b, "miss_reason", kv_miss_text(r->miss));
    if (many) {
        pack_samples(call, b, r);
    }
    if (!p->stream) {
        pack_collected(call, b, 0);
    }
    call_end(call);
}

/* Cancelled before the engine had it: the same result, with nothing done. */
void call_finish_cancelled_generate(struct call *call)
{
    struct request_sample samples[REQUEST_SAMPLES_MAX];
    for (uint32_t i = 0; i < REQUEST_SAMPLES_MAX; i++) {
        samples[i] = (struct request_sample){.finish = FINISH_CANCELLED, .stop_index = -1};
    }
    const struct request nothing = {
        .finish = FINISH_CANCELLED, .n_samples = call->params.text_generate.n, .samples = samples};
    answer_generate(call, &nothing);
}

static void answer_pin(struct call *call, const struct request *r)
{
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 3);
    pack_kv_u64(b, "n_prompt", r->n_prompt);
    pack_kv_u64(b, "n_cached", r->n_cached);
    pack_kv_u64(b, "n_pinned", r->n_pinned);
    call_end(call);
}

static void answer_logits(struct call *call, const struct request *r)
{
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 3);
    pack_kv_u64(b, "n_tokens", r->n_tokens);
    pack_kv_u64(b, "n_vocab", model_shape(r->model)->n_vocab);
    pack_timings(b, r);
    call_end(call);
}

static void deliver_done(struct call *call)
{
    const struct request *r = call->request;
    call->wait = CALL_WAIT_NOTHING;
    if (call->collecting_failed) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory to collect the result; use stream");
    } else if (r->finish == FINISH_ERROR) {
        call_fail(call, r->error ? r->error : PROTO_E_INTERNAL, "%s", r->error_message);
    } else if (r->finish == FINISH_CANCELLED &&
               !(call->cancelled && call->method == PROTO_TEXT_GENERATE)) {
        call_fail_cancelled(call);
    } else if (call->method == PROTO_KV_PIN) {
        answer_pin(call, r);
    } else if (r->kind == REQUEST_GENERATE) {
        answer_generate(call, r);
    } else if (r->kind == REQUEST_EMBED) {
        call_answer_embed(call, r);
    } else {
        answer_logits(call, r);
    }
}

/* ---- delivery ---------------------------------------------------------------------------- */

void call_release_held(struct call *call)
{
    if (call->held_bytes > 0) {
        atomic_fetch_sub(&call->request->undelivered_bytes, call->held_bytes);
        call->held_bytes = 0;
    }
}

/* The first of its results means that its prompt is computed, or some text's of an embedding. */
static void leave_queue(struct call *call)
{
    struct quota_table *t = call->service->quotas;
    quota_give_one(t, call->uid, &call->held, QUOTA_QUEUED_REQUESTS);
    quota_give_one(t, call->uid, &call->held, QUOTA_QUEUED_TOKENS);
}

bool call_deliver(struct call *call, struct request_event *ev)
{
    leave_queue(call);
    call->request->delivery_ms += (double)(clock_now_ns() - ev->made_ns) / 1e6;
    if (ev->kind == REQUEST_DONE) {
        deliver_done(call);
        return false;
    }
    if (call->caller) {
        if (ev->kind == REQUEST_TOKENS) {
            deliver_tokens(call, ev);
        } else if (call->request->kind == REQUEST_EMBED) {
            call_deliver_embeddings(call, ev);
        } else {
            deliver_rows(call, ev);
        }
    }
    if (call->caller && call->caller->congested) {
        call->held_bytes += ev->bytes;
        return false;
    }
    atomic_fetch_sub(&call->request->undelivered_bytes, ev->bytes);
    return ev->bytes > 0;
}
