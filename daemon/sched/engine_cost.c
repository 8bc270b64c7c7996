/* daemon/sched/engine_cost.c - what steps take, by model, and what prompts may take of them. */
#include "daemon/sched/engine_internal.h"

static struct engine_cost *find(struct engine *e, const struct model *m)
{
    struct engine_cost *oldest = &e->costs[0];
    for (uint32_t i = 0; i < ENGINE_COSTS_MAX; i++) {
        struct engine_cost *c = &e->costs[i];
        if (c->model == m) {
            c->used = e->turn;
            return c;
        }
        oldest = c->used < oldest->used ? c : oldest;
    }
    /* The model may be gone, and another have its address: that is learned over within steps. */
    *oldest = (struct engine_cost){.model = m, .used = e->turn};
    return oldest;
}

const struct cost *engine_cost(struct engine *e, const struct model *m)
{
    return &find(e, m)->cost;
}

void engine_learn_cost(struct engine *e, uint64_t step_ns)
{
    const struct batch *b = &e->batch;
    struct cost_work work = {0};
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        uint32_t rows = b->seqs[i].n_rows;
        *(i < b->n_decoding ? &work.decode_rows : &work.prefill_rows) += rows;
        work.depth_tokens += (double)rows * ((double)b->seqs[i].n_past + (double)rows / 2);
    }
    cost_learn(&find(e, b->model)->cost, &work, (double)step_ns / 1e6);
}

static bool decodes(const struct sequence *s)
{
    return s->has_place && !sequence_is_prefilling(s) && !request_is_paused(s->request);
}

/* What one token for all that decode of a model takes. */
static double decode_ms(struct engine *e, const struct model *m)
{
    struct cost_work work = {0};
    for (const struct sequence *s = e->running; s != NULL; s = s->next) {
        if (s->request->model == m && decodes(s)) {
            work.decode_rows++;
            work.depth_tokens += s->kv.n_tokens;
        }
    }
    const struct cost *c = engine_cost(e, m);
    return work.decode_rows > 0 && cost_knows_decode(c) ? cost_ms(c, &work) : 0;
}

/* Models take turns: the tokens of one wait for the steps of the others. */
void engine_fill_rules(struct engine *e, const struct model *m, struct batch_rules *ret)
{
    struct engine_cost *c = find(e, m);
    *ret =
        (struct batch_rules){.cost = &c->cost, .n_mixed = &c->n_mixed, .now_ns = engine_now_ns()};
    ret->budget.target_ms = e->options.step_ms_target;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        bool first_of_model = decodes(s);
        for (const struct sequence *o = e->running; first_of_model && o != s; o = o->next) {
            first_of_model = !(decodes(o) && o->request->model == s->request->model);
        }
        if (first_of_model) {
            double ms = decode_ms(e, s->request->model);
            ret->budget.decoding = true;
            ret->budget.alone_ms += ms;
            ret->budget.own_ms = s->request->model == m ? ms : ret->budget.own_ms;
        }
    }
}
