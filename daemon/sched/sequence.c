#include "daemon/sched/sequence.h"

#include "daemon/model/constraint.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* What the next sequence of a request begins with: one that is still to come. */
static struct request_input next_prompt(const struct request *r)
{
    return r->kind == REQUEST_EMBED ? r->embed.inputs[r->next_input]
                                    : (struct request_input){r->tokens, r->n_tokens};
}

size_t sequence_count_of(const struct request *r)
{
    return r->kind == REQUEST_EMBED ? r->embed.n_inputs : 1;
}

uint64_t sequence_tokens_first(const struct request *r)
{
    return next_prompt(r).n_tokens;
}

uint32_t sequence_positions_max(const struct request *r)
{
    bool endless = r->kind == REQUEST_GENERATE && kv_policy_is_endless(&r->kv_policy);
    return endless || r->kv_policy.kind == KV_POLICY_WINDOW ? UINT32_MAX : model_n_ctx(r->model);
}

/* Of which a policy chooses: all before the first token that is to be predicted. */
static uint32_t prompt_of_policy(const struct request *r, uint64_t n_prompt)
{
    return r->kind == REQUEST_LOGITS ? r->first_row : (uint32_t)n_prompt;
}

struct kv_extent sequence_extent(const struct request *r, const struct sequence *s,
                                 uint64_t n_tokens, uint32_t step_rows)
{
    uint64_t n_prompt = s != NULL ? s->n_prompt : next_prompt(r).n_tokens;
    return (struct kv_extent){.policy = &r->kv_policy,
                              .n_prompt = prompt_of_policy(r, n_prompt),
                              .n_tokens = n_tokens,
                              .step_rows = step_rows,
                              .begun = s != NULL && s->kv.view.begun};
}

uint64_t sequence_tokens_most(const struct request *r, const struct sequence *s)
{
    uint32_t n_ctx = sequence_positions_max(r);
    uint64_t n_tokens = s != NULL ? s->n_prompt : next_prompt(r).n_tokens;
    if (r->kind == REQUEST_GENERATE) {
        n_tokens += r->n_predict;
    }
    return n_tokens < n_ctx ? n_tokens : n_ctx;
}

void sequence_note_spared(struct sequence *s)
{
    if (!s->spared.known) {
        s->spared.known = true;
        s->spared.n_tokens = s->kv.n_adopted_tokens;
        s->spared.n_blocks = s->kv.n_adopted_blocks;
        s->spared.n_from_store = s->kv.n_from_store;
    }
}

/* A prompt's blocks that it computed itself may be gone by then, and others' generations have left
 * some with the same tokens: these will not do, unless it had such before. */
void sequence_yield(struct sequence *s)
{
    sequence_note_spared(s);
    s->kv.exact = s->kv.exact || !s->kv.took_generated;
    kv_sequence_reset(&s->kv);
}

/* What a policy leaves of the limit: what is the same for all, and not the rows that vote. */
static uint32_t limit_by_policy(const struct sequence *s, size_t limit)
{
    const struct kv_view *v = &s->kv.view;
    uint32_t n_votes = kv_policy_n_votes(&v->policy, v->n_prompt);
    uint32_t most = n_votes > 0 ? n_votes : kv_view_n_common(&v->policy, v->n_prompt);
    return limit < most ? (uint32_t)limit : most;
}

uint32_t sequence_adopt_limit(const struct sequence *s)
{
    const struct request *r = s->request;
    if (r->kind == REQUEST_LOGITS) {
        return limit_by_policy(s, s->n_taken > r->first_row ? s->n_taken : r->first_row);
    }
    bool last_row_only = r->embed.pooling == POOLING_LAST || r->embed.pooling == POOLING_RANK;
    if (r->kind == REQUEST_EMBED && !last_row_only) {
        return (uint32_t)s->n_taken;
    }
    return limit_by_policy(s, s->n_tokens - 1);
}

/* End-of-generation tokens of the vocabulary, for ignore_eos. *ret_ids is malloc'ed. */
static int find_eog(const struct tokenizer *t, int32_t **ret_ids, size_t *ret_count)
{
    size_t count = 0;
    uint32_t n_vocab = tokenizer_n_vocab(t);
    for (uint32_t i = 0; i < n_vocab; i++) {
        count += tokenizer_is_eog(t, (int32_t)i);
    }
    int32_t *ids = calloc(count + 1, sizeof(*ids));
    if (ids == NULL) {
        return -ENOMEM;
    }
    count = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        if (tokenizer_is_eog(t, (int32_t)i)) {
            ids[count++] = (int32_t)i;
        }
    }
    *ret_ids = ids;
    *ret_count = count;
    return 0;
}

/* After the prompt, which the grammar does not see. */
static int constrain(struct sequence *s)
{
    const struct request *r = s->request;
    struct constraint *c = NULL;
    if (r->grammar == NULL) {
        return 0;
    }
    int rc = constraint_create(r->grammar, model_tokenizer(r->model), &c);
    rc = rc < 0 ? rc : sampler_constrain(s->sampler, c);
    if (rc < 0) {
        constraint_destroy(c);
    }
    return rc;
}

static int create_sampler(struct sequence *s)
{
    struct request *r = s->request;
    struct sampler_params params = r->sampling;
    int32_t *eog = NULL;
    params.seed = request_seed(r, (uint32_t)s->part);
    if (r->ignore_eos) {
        size_t n_eog = 0;
        int rc = find_eog(model_tokenizer(r->model), &eog, &n_eog);
        if (rc < 0) {
            return rc;
        }
        params.ignore_eos = true;
        params.eog = eog;
        params.n_eog = n_eog;
    }
    int rc = sampler_create(&params, model_shape(r->model)->n_vocab, &s->sampler);
    free(eog);
    for (size_t i = 0; rc == 0 && i < r->n_tokens; i++) {
        rc = sampler_accept(s->sampler, r->tokens[i]);
    }
    return rc < 0 ? rc : constrain(s);
}

static int create(struct request *r, size_t part, struct request_input prompt,
                  struct kv_cache *cache, struct kv_space *space, struct sequence **ret)
{
    struct sequence *s = calloc(1, sizeof(*s));
    if (s == NULL) {
        return -ENOMEM;
    }
    s->request = r;
    s->part = part;
    kv_sequence_init(&s->kv, model_kv_layout(r->model), cache, space, r->cache_exact);
    s->kv.view.policy = r->kv_policy;
    s->kv.view.n_prompt = prompt_of_policy(r, prompt.n_tokens);
    s->capacity = prompt.n_tokens + 64;
    s->tokens = malloc(s->capacity * sizeof(*s->tokens));
    int rc = s->tokens == NULL ? -ENOMEM : 0;
    if (rc == 0) {
        memcpy(s->tokens, prompt.tokens, prompt.n_tokens * sizeof(*s->tokens));
        s->n_tokens = s->n_prompt = prompt.n_tokens;
    }
    if (rc == 0 && r->kind == REQUEST_EMBED && r->embed.pooling == POOLING_MEAN) {
        s->sums = calloc(model_shape(r->model)->n_embd, sizeof(*s->sums));
        rc = s->sums == NULL ? -ENOMEM : 0;
    }
    if (rc == 0 && r->kind == REQUEST_GENERATE) {
        rc = create_sampler(s);
        rc = rc < 0 ? rc
                    : text_stream_create((const char *const *)r->stops, r->stop_bytes, r->n_stops,
                                         &s->text);
    }
    if (rc < 0) {
        sequence_destroy(s);
        return rc;
    }
    *ret = s;
    return 0;
}

int sequence_create(struct request *r, struct kv_cache *cache, struct kv_space *space,
                    struct sequence **ret)
{
    return create(r, r->next_input, next_prompt(r), cache, space, ret);
}

int sequence_create_sample(const struct sequence *s, size_t sample, struct sequence **ret)
{
    struct request_input prompt = {s->tokens, s->n_prompt};
    int rc = create(s->request, sample, prompt, s->kv.cache, s->kv.space, ret);
    if (rc == 0) {
        (*ret)->kv.exact = s->kv.exact;
        if (s->kv.detached) {
            kv_sequence_detach(&(*ret)->kv);
        }
        (*ret)->spared = s->spared;
        (*ret)->started_ns = s->started_ns;
        (*ret)->prompt_done_ns = s->prompt_done_ns;
        (*ret)->last_turn = s->last_turn;
    }
    return rc;
}

void sequence_end_sample(struct sequence *s, enum request_finish how)
{
    struct request_sample *sample = sequence_sample(s);
    if (sample->finish == FINISH_NONE) {
        sample->finish = how;
    }
    s->finished = true;
}

void sequence_destroy(struct sequence *s)
{
    if (s == NULL) {
        return;
    }
    kv_sequence_finish(&s->kv);
    sampler_destroy(s->sampler);
    text_stream_destroy(s->text);
    free(s->tokens);
    free(s->sums);
    free(s->begins.logits);
    free(s);
}

int sequence_append(struct sequence *s, int32_t token)
{
    if (s->n_tokens == s->capacity) {
        int32_t *tokens = realloc(s->tokens, s->capacity * 2 * sizeof(*tokens));
        if (tokens == NULL) {
            return -ENOMEM;
        }
        s->tokens = tokens;
        s->capacity *= 2;
    }
    s->tokens[s->n_tokens++] = token;
    return 0;
}
