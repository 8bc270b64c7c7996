#include "daemon/sched/batch.h"

#include "daemon/sched/draw.h"
#include "daemon/sched/embed.h"
#include "daemon/sched/order.h"
#include "daemon/sched/shared.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int batch_init(struct batch *b, uint32_t max_rows, uint32_t max_seqs)
{
    memset(b, 0, sizeof(*b));
    b->max_rows = max_rows;
    b->max_seqs = max_seqs;
    b->members = calloc(max_seqs, sizeof(*b->members));
    b->tokens = calloc(max_rows, sizeof(*b->tokens));
    b->positions = calloc(max_rows, sizeof(*b->positions));
    b->row_class = calloc(max_rows, sizeof(*b->row_class));
    b->out_rows = calloc(max_rows, sizeof(*b->out_rows));
    b->seqs = calloc(max_seqs, sizeof(*b->seqs));
    b->shared = calloc(max_seqs / 2 + 1, sizeof(*b->shared));
    b->observers = calloc(max_seqs, sizeof(*b->observers));
    b->claims = calloc(max_seqs, sizeof(*b->claims));
    b->claimants = calloc(max_seqs, sizeof(*b->claimants));
    b->draws = calloc(max_seqs, sizeof(*b->draws));
    if (b->members == NULL || b->tokens == NULL || b->positions == NULL || b->row_class == NULL ||
        b->out_rows == NULL || b->seqs == NULL || b->shared == NULL || b->observers == NULL ||
        b->claims == NULL || b->claimants == NULL || b->draws == NULL) {
        batch_finish(b);
        return -ENOMEM;
    }
    return 0;
}

void batch_finish(struct batch *b)
{
    free(b->members);
    free(b->tokens);
    free(b->positions);
    free(b->row_class);
    free(b->out_rows);
    free(b->seqs);
    free(b->shared);
    free(b->observers);
    free(b->claims);
    free(b->claimants);
    free(b->draws);
    memset(b, 0, sizeof(*b));
}

/* Whether outputs of the sequence's token at that index are wanted. */
static bool wants_out(const struct sequence *s, size_t index)
{
    if (s->request->kind == REQUEST_GENERATE) {
        return index + 1 == s->n_tokens;
    }
    if (s->request->kind == REQUEST_EMBED) {
        return embed_wants_row(s, index);
    }
    bool last_without_next = s->request->logprobs && index + 1 == s->n_tokens;
    return index >= s->request->first_row && index >= s->n_taken && !last_without_next;
}

/* The class follows the place: complete blocks of the prompt are P, everything else is D. */
static uint8_t row_class(const struct sequence *s, size_t index)
{
    size_t prompt_blocks = sequence_text(s).n_prompt / GQA_KV_BLOCK_TOKENS;
    return index < prompt_blocks * GQA_KV_BLOCK_TOKENS ? GQA_ROW_P : GQA_ROW_D;
}

/* Memory for so many more of the sequence's tokens, and for the votes of those that have one. */
static int reserve(struct sequence *s, uint32_t n, uint32_t *ret_voters)
{
    int rc = kv_view_votes(&s->kv, n, ret_voters);
    return rc < 0 ? rc : kv_sequence_reserve(&s->kv, n);
}

/* The step's last member keeps a view of its tokens, or is about to choose one. */
static void note_view(struct batch *b, struct sequence *s, uint32_t n_voters)
{
    b->caps |= s->kv.view.begun ? GQA_ATTN_CAP_SPARSE : 0;
    if (n_voters > 0) {
        const struct kv_view *v = &s->kv.view;
        b->caps |= GQA_ATTN_CAP_OBSERVE;
        b->observers[b->n_observers++] =
            (struct model_observer){.seq = b->n_seqs - 1,
                                    .n_rows = n_voters,
                                    .n_votes = kv_policy_n_votes(&v->policy, v->n_prompt),
                                    .votes = v->votes};
    }
}

/* Adds up to max_rows of the sequence's pending tokens; fewer where the output rows run out. What
 * must be seen at once comes whole, in this step or in one that has room for it. */
static void add_rows(struct batch *b, struct sequence *s, size_t max_rows)
{
    int rc = kv_view_begin(&s->kv);
    if (rc < 0) {
        s->hold = rc == -EAGAIN ? SEQUENCE_WAITING : SEQUENCE_STARVED;
        return;
    }
    size_t first = s->kv.n_tokens, most = kv_view_rows_max(&s->kv);
    size_t n = sequence_pending(s);
    n = n < max_rows ? n : max_rows;
    n = n < most ? n : most;
    n = n < b->max_rows - b->n_rows ? n : b->max_rows - b->n_rows;
    uint32_t outs = 0;
    size_t taken = 0;
    while (taken < n) {
        bool out = wants_out(s, first + taken);
        if (out && b->n_outs + outs == b->max_outs) {
            break;
        }
        outs += out;
        taken++;
    }
    bool whole = taken == sequence_pending(s);
    if (taken == 0 || (!whole && model_is_encoder(s->request->model))) {
        return;
    }
    uint32_t n_voters;
    if (reserve(s, (uint32_t)taken, &n_voters) < 0) {
        s->hold = SEQUENCE_STARVED;
        return;
    }
    s->step_first_row = b->n_rows;
    s->step_rows = (uint32_t)taken;
    s->step_first_out = b->n_outs;
    s->step_outs = outs;
    for (size_t i = 0; i < taken; i++) {
        uint32_t row = b->n_rows++;
        b->tokens[row] = s->tokens[first + i];
        b->positions[row] = (uint32_t)(first + i);
        b->row_class[row] = row_class(s, first + i);
        if (wants_out(s, first + i)) {
            b->out_rows[b->n_outs++] = row;
        }
    }
    bool encoder = model_is_encoder(s->request->model);
    b->seqs[b->n_seqs] = (struct gqa_attn_seq){
        .first_row = s->step_first_row,
        .n_rows = s->step_rows,
        .n_past = s->kv.n_tokens,
        .mutual = encoder,
        .tables = encoder ? NULL : s->kv.tables,
    };
    b->members[b->n_seqs++] = s;
    note_view(b, s, n_voters);
    b->wants |= s->request->kind == REQUEST_EMBED ? embed_wants(s) : MODEL_WANTS_LOGITS;
}

/* Whether one that came before is about to compute what this one needs next: then it waits for that
 * and adopts it, and a prefix that many requests share is computed once. */
static bool follows_another(const struct sequence *s, const struct sequence *running)
{
    const struct kv_text text = sequence_text(s);
    for (const struct sequence *other = running; other != s; other = other->next) {
        const struct kv_text others = sequence_text(other);
        if (other->has_place && other->hold != SEQUENCE_STARVED && sequence_is_prefilling(other) &&
            !request_is_paused(other->request) &&
            kv_sequence_follows(&s->kv, &text, sequence_adopt_limit(s), &other->kv, &others,
                                sequence_give_limit(other))) {
            return true;
        }
    }
    return false;
}

/* Takes from the cache what is there. False: the sequence waits. */
static bool adopt(struct sequence *s, const struct sequence *running, bool alone)
{
    const struct kv_text text = sequence_text(s);
    if (kv_view_prepare(&s->kv) < 0) {
        s->hold = SEQUENCE_STARVED;
        return false;
    }
    if (kv_sequence_adopt(&s->kv, &text, sequence_adopt_limit(s), alone) == -EAGAIN ||
        follows_another(s, running)) {
        s->hold = SEQUENCE_WAITING;
        return false;
    }
    return true;
}

static bool takes_part(const struct sequence *s, const struct model *model, bool prefill)
{
    return s->has_place && !s->finished && !s->barred && s->request->model == model &&
           sequence_is_prefilling(s) == prefill && !request_is_paused(s->request);
}

/* The prompts that could be computed now. Returns their number. */
static uint32_t collect_claims(struct batch *b, const struct model *model, struct sequence *running,
                               const struct batch_rules *rules)
{
    uint32_t n = 0;
    int32_t highest = INT32_MIN;
    for (struct sequence *s = running; s != NULL && n < b->max_seqs - b->n_seqs; s = s->next) {
        if (takes_part(s, model, true) && adopt(s, running, rules->alone)) {
            b->claimants[n++] = s;
            highest = s->request->priority > highest ? s->request->priority : highest;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        const struct request *r = b->claimants[i]->request;
        b->claims[i] = (struct fair_claim){
            .user = r->user,
            .level = order_level(r->priority, r->submitted_ns, highest, rules->now_ns),
            .whole = model_is_encoder(model),
            .wanted = (uint32_t)sequence_pending(b->claimants[i]),
        };
    }
    return n;
}

static void add_prompts(struct batch *b, struct model *model, struct sequence *running,
                        const struct batch_rules *rules)
{
    struct budget budget = rules->budget;
    uint32_t rows = b->max_rows - b->n_rows;
    uint32_t n = rows > 0 ? collect_claims(b, model, running, rules) : 0;
    double depth = 0;
    for (uint32_t i = 0; i < n; i++) {
        depth += b->claimants[i]->kv.n_tokens / (double)n;
    }
    budget.own_ms = b->n_rows > 0 ? budget.own_ms : 0;
    if (n > 0 && !model_is_encoder(model)) { /* whose texts cannot be cut */
        rows = budget_rows(&budget, rules->cost, depth, rows, rules->n_mixed);
    }
    fair_share(b->claims, n, rows);
    for (uint32_t i = 0; i < n; i++) {
        if (b->claims[i].given > 0) {
            add_rows(b, b->claimants[i], b->claims[i].given);
        }
    }
}

uint32_t batch_form(struct batch *b, struct model *model, struct sequence *running,
                    const struct batch_rules *rules)
{
    b->model = model;
    b->max_outs = model_max_out_rows(model);
    b->n_rows = b->n_outs = b->n_seqs = b->wants = b->n_observers = b->caps = 0;
    for (struct sequence *s = running; s != NULL; s = s->next) {
        bool room = b->n_rows < b->max_rows && b->n_seqs < b->max_seqs;
        if (takes_part(s, model, false) && room) {
            add_rows(b, s, 1);
        }
    }
    b->n_decoding = b->n_seqs;
    add_prompts(b, model, running, rules);
    return b->n_rows;
}

void batch_run(struct batch *b, struct plan *plan, struct batch_result *ret)
{
    struct gqa_attn_batch attention = {
        .struct_size = sizeof(attention),
        .n_rows = b->n_rows,
        .n_seqs = b->n_seqs,
        .commit = !model_is_encoder(b->model),
        .seqs = b->seqs,
        .row_class = b->row_class,
        .shared = b->shared,
    };
    if (backend_attention(plan_attention(plan))->caps & GQA_ATTN_CAP_SHARED) {
        attention.n_shared =
            shared_find(b->seqs, b->n_seqs, model_kv_layout(b->model)->n_classes, b->shared);
    }
    struct model_batch step = {
        .n_rows = b->n_rows,
        .n_out = b->n_outs,
        .tokens = b->tokens,
        .positions = b->positions,
        .out_rows = b->out_rows,
        .attention = &attention,
        .wants = b->wants,
        .n_observers = b->n_observers,
        .observers = b->observers,
    };
    /* Of two backends that together gave no numbers, attention is the guest. */
    *ret = (struct batch_result){.blame = plan_attention(plan)};
    ret->rc = plan_step(plan, &step, &ret->outputs, &ret->blame);
    ret->sound = ret->rc == 0 && plan_step_is_sound(plan, &step, &ret->outputs);
}

void batch_spoil_votes(struct batch *b)
{
    for (uint32_t i = 0; i < b->n_observers; i++) {
        b->members[b->observers[i].seq]->kv.view.spoiled = true;
    }
    b->n_observers = 0;
}

void batch_commit(struct batch *b)
{
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        struct sequence *s = b->members[i];
        const struct kv_text text = sequence_text(s);
        kv_sequence_commit(&s->kv, s->step_rows, &text);
    }
}
