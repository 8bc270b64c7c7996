/* plugins/cpu/experts_route.c - which experts a row goes to, and how much each counts. */
#include "plugins/cpu/experts.h"

#include <math.h>

/* Sum of exp(logit - max): the largest term is 1, so neither overflow nor a sum of zero. */
struct softmax {
    double max, sum;
};

/* Over n logits; ids: which ones, or NULL for the first n. */
static struct softmax softmax_of(const float *logits, const uint32_t *ids, uint32_t n)
{
    struct softmax s = {-INFINITY, 0.0};

    for (uint32_t i = 0; i < n; i++) {
        double logit = (double)logits[ids != NULL ? ids[i] : i];
        s.max = logit > s.max ? logit : s.max;
    }
    for (uint32_t i = 0; i < n; i++) {
        s.sum += exp((double)logits[ids != NULL ? ids[i] : i] - s.max);
    }
    return s;
}

static double softmax_at(const struct softmax *s, float logit)
{
    return exp((double)logit - s->max) / s->sum;
}

static double sigmoid(float logit)
{
    return 1.0 / (1.0 + exp(-(double)logit));
}

/* What the choice goes by. Without a bias the logits themselves: their order is the scores', and
 * they are not rounded together. Not a number is less than anything. */
static float key_of(const struct gqa_op_experts *op, const struct softmax *all, float logit,
                    const float *bias)
{
    double key = (double)logit;

    if (bias != NULL && op->gating == GQA_GATING_SOFTMAX) {
        key = softmax_at(all, logit);
    } else if (bias != NULL && op->gating == GQA_GATING_SIGMOID) {
        key = sigmoid(logit);
    }
    float sum = (float)(bias != NULL ? key + (double)*bias : key);
    return isnan(sum) ? -INFINITY : sum;
}

/* The n_used best, best first; of equals the lowest id, since a later one does not pass it. keys
 * (n_used) is room. */
static void choose(const struct gqa_op_experts *op, const struct softmax *all, const float *logits,
                   const float *selection_bias, uint32_t *ids, float *keys)
{
    uint32_t n = 0;

    for (uint32_t e = 0; e < op->n_experts; e++) {
        float key = key_of(op, all, logits[e], selection_bias != NULL ? &selection_bias[e] : NULL);
        if (n == op->n_used && !(key > keys[n - 1])) {
            continue;
        }
        uint32_t at = n < op->n_used ? n++ : n - 1;
        for (; at > 0 && key > keys[at - 1]; at--) {
            keys[at] = keys[at - 1];
            ids[at] = ids[at - 1];
        }
        keys[at] = key;
        ids[at] = e;
    }
}

static void sort_ids(uint32_t *ids, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++) {
        uint32_t id = ids[i], at = i;
        for (; at > 0 && ids[at - 1] > id; at--) {
            ids[at] = ids[at - 1];
        }
        ids[at] = id;
    }
}

/* Renormalised softmax scores are the softmax over the chosen. */
static void weigh_softmax(const struct gqa_op_experts *op, const struct softmax *all,
                          const float *logits, const uint32_t *ids, float *ret)
{
    int chosen_only = op->gating == GQA_GATING_SOFTMAX_CHOSEN || op->renormalise;
    struct softmax s = chosen_only ? softmax_of(logits, ids, op->n_used) : *all;

    for (uint32_t i = 0; i < op->n_used; i++) {
        ret[i] = (float)(softmax_at(&s, logits[ids[i]]) * (double)op->weight_scale);
    }
}

/* Where all scores underflow the weights are zeros. */
static void weigh_sigmoid(const struct gqa_op_experts *op, const float *logits, const uint32_t *ids,
                          float *ret)
{
    double sum = 0.0;

    for (uint32_t i = 0; i < op->n_used; i++) {
        sum += sigmoid(logits[ids[i]]);
    }
    double factor = op->renormalise && sum > 0.0 ? 1.0 / sum : 1.0;
    for (uint32_t i = 0; i < op->n_used; i++) {
        ret[i] = (float)(sigmoid(logits[ids[i]]) * factor * (double)op->weight_scale);
    }
}

void cpu_experts_route(const struct gqa_op_experts *op, const float *logits,
                       const float *selection_bias, uint32_t *ret_ids, float *ret_weights)
{
    struct softmax all = {0.0, 1.0};

    if (op->gating == GQA_GATING_SOFTMAX && (selection_bias != NULL || !op->renormalise)) {
        all = softmax_of(logits, NULL, op->n_experts);
    }
    choose(op, &all, logits, selection_bias, ret_ids, ret_weights);
    sort_ids(ret_ids, op->n_used);
    if (op->gating == GQA_GATING_SIGMOID) {
        weigh_sigmoid(op, logits, ret_ids, ret_weights);
    } else {
        weigh_softmax(op, &all, logits, ret_ids, ret_weights);
    }
}
