/* The sampling parameters of text.generate: from the protocol's to the sampler's. */
#include "daemon/handlers_internal.h"
#include "daemon/model/dry_breakers.h"
#include "daemon/model/grammar_schema.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

_Static_assert(PROTO_SAMPLERS_MAX == SAMPLER_CHAIN_MAX, "a chain that may be asked for fits");
_Static_assert(PROTO_BREAKERS_MAX == DRY_BREAKERS_MAX, "as many breakers as may be given");
_Static_assert(PROTO_BREAKER_BYTES_MAX == DRY_BREAKER_BYTES_MAX, "as long as they may be");
_Static_assert(PROTO_GRAMMAR_BYTES_MAX == GRAMMAR_TEXT_BYTES_MAX, "a grammar that may be sent");
_Static_assert(PROTO_SCHEMA_BYTES_MAX == SCHEMA_TEXT_BYTES_MAX, "and a schema");

/* ---- checks ------------------------------------------------------------------------------ */

static bool check_biases(struct call *call)
{
    struct proto_biases biases = call->params.text_generate.logit_bias;
    uint32_t n_vocab = tokenizer_n_vocab(model_tokenizer(call->model));
    for (size_t i = 0; i < biases.count; i++) {
        const struct proto_bias *b = &biases.items[i];
        if (b->token < 0 || (uint32_t)b->token >= n_vocab) {
            call_fail(call, PROTO_E_INVALID_PARAMS,
                      "'logit_bias', item %zu: %d is no token id; the vocabulary has 0 to %u", i,
                      b->token, n_vocab - 1);
            return false;
        }
    }
    return true;
}

/* "a, b, c" of all samplers. */
static void list_samplers(char *text, size_t bytes)
{
    size_t at = 0;
    for (int kind = 0; kind < SAMPLER_KINDS && at < bytes; kind++) {
        at += (size_t)snprintf(text + at, bytes - at, "%s%s", kind > 0 ? ", " : "",
                               sampler_name((enum sampler_kind)kind));
    }
}

static bool check_samplers(struct call *call)
{
    struct proto_strings names = call->params.text_generate.samplers;
    enum sampler_kind kind;
    for (size_t i = 0; i < names.count; i++) {
        struct proto_string name = names.items[i];
        if (sampler_by_name(name.data, name.bytes, &kind) < 0) {
            char known[160];
            list_samplers(known, sizeof(known));
            call_fail(call, PROTO_E_INVALID_PARAMS,
                      "'samplers', item %zu: no sampler is called '%.*s'; there are %s", i,
                      name.bytes < 40 ? (int)name.bytes : 40, name.data, known);
            return false;
        }
    }
    return true;
}

static bool check_breakers(struct call *call)
{
    struct proto_strings texts = call->params.text_generate.dry_sequence_breakers;
    for (size_t i = 0; i < texts.count; i++) {
        if (texts.items[i].bytes > PROTO_BREAKER_BYTES_MAX) {
            call_fail(call, PROTO_E_INVALID_PARAMS,
                      "'dry_sequence_breakers', item %zu: has a length of %zu; it must be 1 to %u",
                      i, texts.items[i].bytes, PROTO_BREAKER_BYTES_MAX);
            return false;
        }
    }
    return true;
}

static bool check_constraint(struct call *call)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    if (p->grammar.bytes > 0 && p->json_schema.bytes > 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "give only one of 'grammar' and 'json_schema'");
        return false;
    }
    return true;
}

bool call_check_sampling(struct call *call)
{
    return check_constraint(call) && check_biases(call) && check_samplers(call) &&
           check_breakers(call);
}

/* ---- the sampler's parameters ------------------------------------------------------------ */

static int copy_biases(struct request *r, struct proto_biases biases)
{
    if (biases.count == 0) {
        return 0;
    }
    struct logit_bias *copy = malloc(biases.count * sizeof(*copy));
    if (!copy) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < biases.count; i++) {
        copy[i] = (struct logit_bias){biases.items[i].token, biases.items[i].bias};
    }
    r->sampling.logit_bias = copy;
    r->sampling.n_logit_bias = biases.count;
    return 0;
}

static void fill_chain(struct sampler_params *s, const struct proto_text_generate *p)
{
    if (!p->has_samplers) {
        return;
    }
    s->n_chain = 0;
    for (size_t i = 0; i < p->samplers.count; i++) {
        enum sampler_kind kind;
        const struct proto_string *name = &p->samplers.items[i];
        if (sampler_by_name(name->data, name->bytes, &kind) == 0) { /* it was checked */
            s->chain[s->n_chain++] = (uint8_t)kind;
        }
    }
}

/* Of 32 bits, so that readers whose numbers are doubles, as JSON's, can give it back exactly. */
static uint32_t random_seed(void)
{
    uint32_t seed;
    if (getrandom(&seed, sizeof(seed), GRND_NONBLOCK) != sizeof(seed)) {
        seed = (uint32_t)clock_now_ns(); /* the entropy pool is not ready: early boot */
    }
    return seed;
}

int call_fill_sampling(struct call *call)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    struct request *r = call->request;
    struct sampler_params *s = &r->sampling;
    s->temperature = p->temperature;
    s->dynatemp_range = p->dynatemp_range;
    s->dynatemp_exponent = p->dynatemp_exponent;
    s->top_k = p->top_k;
    s->top_p = p->top_p;
    s->min_p = p->min_p;
    s->typical_p = p->typical_p;
    s->top_n_sigma = p->top_n_sigma;
    s->xtc_probability = p->xtc_probability;
    s->xtc_threshold = p->xtc_threshold;
    s->min_keep = p->min_keep;
    s->repeat_penalty = p->repeat_penalty;
    s->repeat_last_n = p->repeat_last_n;
    s->presence_penalty = p->presence_penalty;
    s->frequency_penalty = p->frequency_penalty;
    s->dry_multiplier = p->dry_multiplier;
    s->dry_base = p->dry_base;
    s->dry_allowed_length = p->dry_allowed_length;
    s->dry_penalty_last_n = p->dry_penalty_last_n;
    s->mirostat = (int32_t)p->mirostat;
    s->mirostat_tau = p->mirostat_tau;
    s->mirostat_eta = p->mirostat_eta;
    s->n_probs = p->n_probs;
    s->ignore_eos = p->ignore_eos;
    s->seed = p->has_seed ? p->seed : random_seed();
    fill_chain(s, p);
    return copy_biases(r, p->logit_bias);
}

/* ---- what takes long, on the task pool --------------------------------------------------- */

static int find_breakers(struct call *call)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    struct gguf_string texts[DRY_BREAKERS_MAX];
    const struct gguf_string *given = dry_breakers_default;
    size_t n = sizeof(dry_breakers_default) / sizeof(dry_breakers_default[0]);
    if (p->has_dry_sequence_breakers) {
        given = texts;
        n = p->dry_sequence_breakers.count;
    }
    for (size_t i = 0; i < p->dry_sequence_breakers.count; i++) {
        const struct proto_string *s = &p->dry_sequence_breakers.items[i];
        texts[i] = (struct gguf_string){s->data, s->bytes};
    }
    struct dry_breakers *breakers = NULL;
    int rc = dry_breakers_create(model_tokenizer(call->model), given, n, &breakers);
    call->request->sampling.dry_breakers = breakers;
    return rc;
}

static int compile_grammar(struct call *call)
{
    const struct proto_text_generate *p = &call->params.text_generate;
    struct fmt_error *err = &call->prepare_error;
    struct grammar **ret = &call->request->grammar;
    char *text = NULL;
    if (p->grammar.bytes > 0) {
        return grammar_compile(p->grammar.data, p->grammar.bytes, ret, err);
    }
    if (p->json_schema.bytes == 0) {
        return 0;
    }
    int rc = grammar_from_schema(p->json_schema.data, p->json_schema.bytes, &text, err);
    rc = rc < 0 ? rc : grammar_compile(text, strlen(text), ret, err);
    free(text);
    return rc;
}

static void prepare_work(struct task *t)
{
    struct call *call = call_of_task(t);
    int rc = compile_grammar(call);
    if (rc == 0 && sampler_params_want_dry(&call->request->sampling)) {
        rc = find_breakers(call);
    }
    call->task_result = rc;
}

static void prepare_done(struct task *t)
{
    struct call *call = call_of_task(t);
    call->wait = CALL_WAIT_NOTHING;
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
    } else if (call->task_result == -EINVAL) {
        bool schema = call->params.text_generate.json_schema.bytes > 0;
        call_fail(call, PROTO_E_INVALID_PARAMS, "'%s': %s", schema ? "json_schema" : "grammar",
                  call->prepare_error.text);
    } else if (call->task_result < 0) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory to prepare the sampling");
    } else {
        call->prepared(call);
    }
}

void call_prepare_sampling(struct call *call, void (*then)(struct call *))
{
    const struct proto_text_generate *p = &call->params.text_generate;
    bool constrained = p->grammar.bytes > 0 || p->json_schema.bytes > 0;
    if (!constrained && !sampler_params_want_dry(&call->request->sampling)) {
        then(call);
        return;
    }
    call->prepared = then;
    call_run(call, prepare_work, prepare_done);
}
