/* tests/cuda/check_experts.c - mixtures of experts on two plugins: the cpu's reference is the truth
 * for cuda's results, and cuda's bits must not depend on chunks, nor on what is in other rows.
 *
 *   check-experts CPU.so CUDA.so
 *
 * Rows come all at once, 13 at a time and one by one, so that experts have anything from no row to
 * all of them, in one item or several, and launches are made one by one and replayed as graphs.
 * Exit status: 0 right, 1 wrong, 77 no GPU (and it says so). */
#include "format/types.h"
#include "tests/cuda/check_trial.h"

#include <math.h>
#include <stdio.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define ROWS             37u
#define ROW_OF_NO_NUMBER 7u

/* Of the results' root mean square. Quantised products are exact, and differ by float32 roundings
 * alone, unless one makes an activation the next integer; F32 weights are F16 on cuda, which is
 * 2e-3 at worst. Another expert, or another weight, is off by all of it. */
#define TOLERANCE       5e-3f
#define ARRAY_LENGTH(a) (sizeof(a) / sizeof((a)[0]))

enum layout { SEPARATE, FUSED, NO_GATE };

/* Which experts rows are made to choose. */
enum choice {
    AS_IT_COMES,
    ALL_ALIKE, /* expert 3 by all rows, 1 by none */
    TIES,      /* logits in pairs of equals: of two the lower id */
};

struct mixture {
    const char *name;
    uint32_t n_in, n_ff, n_out, n_experts, n_used;
    uint32_t gate_type, up_type, down_type;
    uint32_t gating, renormalise, act;
    enum layout layout;
    enum choice choice;
    bool biases, selection;
    bool out_rows; /* of a register of output rows */
    /* Quantised types that are F16 on cuda: the truth are the float32 values that they stand for,
     * since activations of 8 bits, which the cpu's have, are not cuda's. */
    bool widened;
    float weight_scale;
};

#define F32   GQA_TYPE_F32
#define F16   GQA_TYPE_F16
#define BF16  GQA_TYPE_BF16
#define Q4_0  GQA_TYPE_Q4_0
#define Q8_0  GQA_TYPE_Q8_0
#define Q4_K  GQA_TYPE_Q4_K
#define Q6_K  GQA_TYPE_Q6_K
#define MXFP4 GQA_TYPE_MXFP4

static const struct mixture mixtures[] = {
    {.name = "mixtral, Q4_0",
     .n_in = 256,
     .n_ff = 320,
     .n_out = 256,
     .n_experts = 4,
     .n_used = 2,
     .gate_type = Q4_0,
     .up_type = Q4_0,
     .down_type = Q8_0,
     .renormalise = 1},
    {.name = "qwen3moe, Q4_K and Q6_K",
     .n_in = 512,
     .n_ff = 256,
     .n_out = 512,
     .n_experts = 16,
     .n_used = 8,
     .gate_type = Q4_K,
     .up_type = Q4_K,
     .down_type = Q6_K,
     .renormalise = 1},
    {.name = "granite, Q8_0, scores as they are",
     .n_in = 128,
     .n_ff = 64,
     .n_out = 128,
     .n_experts = 40,
     .n_used = 8,
     .gate_type = Q8_0,
     .up_type = Q8_0,
     .down_type = Q8_0,
     .weight_scale = 1.5f},
    {.name = "gpt-oss, MXFP4, biases",
     .n_in = 96,
     .n_ff = 96,
     .n_out = 96,
     .n_experts = 8,
     .n_used = 4,
     .gate_type = MXFP4,
     .up_type = MXFP4,
     .down_type = MXFP4,
     .biases = true,
     .gating = GQA_GATING_SOFTMAX_CHOSEN,
     .act = GQA_ACT_SWIGLU_OAI},
    {.name = "types that become F16",
     .n_in = 64,
     .n_ff = 64,
     .n_out = 64,
     .n_experts = 8,
     .n_used = 2,
     .gate_type = GQA_TYPE_Q5_0,
     .up_type = GQA_TYPE_Q5_0,
     .down_type = GQA_TYPE_Q4_1,
     .widened = true},
    {.name = "biases, strips of two experts, BF16",
     .n_in = 40,
     .n_ff = 29,
     .n_out = 21,
     .n_experts = 5,
     .n_used = 3,
     .gate_type = BF16,
     .up_type = BF16,
     .down_type = BF16,
     .biases = true,
     .gating = GQA_GATING_SOFTMAX_CHOSEN,
     .act = GQA_ACT_SWIGLU_OAI},
    {.name = "sigmoids, the choice moved, F16",
     .n_in = 64,
     .n_ff = 48,
     .n_out = 33,
     .n_experts = 12,
     .n_used = 4,
     .gate_type = F16,
     .up_type = F16,
     .down_type = F16,
     .biases = true,
     .selection = true,
     .gating = GQA_GATING_SIGMOID,
     .renormalise = 1,
     .weight_scale = 2.5f},
    {.name = "sigmoids as they are, F32",
     .n_in = 64,
     .n_ff = 64,
     .n_out = 32,
     .n_experts = 12,
     .n_used = 4,
     .gate_type = F32,
     .up_type = F32,
     .down_type = F32,
     .gating = GQA_GATING_SIGMOID},
    {.name = "softmax, the choice moved, three types",
     .n_in = 256,
     .n_ff = 64,
     .n_out = 64,
     .n_experts = 6,
     .n_used = 2,
     .gate_type = Q4_K,
     .up_type = F16,
     .down_type = BF16,
     .selection = true},
    {.name = "gate and up in one, biases, Q4_0",
     .n_in = 64,
     .n_ff = 64,
     .n_out = 96,
     .n_experts = 4,
     .n_used = 2,
     .layout = FUSED,
     .gate_type = Q4_0,
     .up_type = Q4_0,
     .down_type = F16,
     .biases = true,
     .renormalise = 1,
     .act = GQA_ACT_GELU_TANH},
    {.name = "in one, experts from within a strip, Q8_0",
     .n_in = 64,
     .n_ff = 32,
     .n_out = 48,
     .n_experts = 7,
     .n_used = 3,
     .layout = FUSED,
     .gate_type = Q8_0,
     .up_type = Q8_0,
     .down_type = Q8_0,
     .renormalise = 1},
    {.name = "no gate, all experts, Q8_0",
     .n_in = 64,
     .n_ff = 32,
     .n_out = 48,
     .n_experts = 5,
     .n_used = 5,
     .layout = NO_GATE,
     .gate_type = Q8_0,
     .up_type = Q8_0,
     .down_type = Q8_0,
     .biases = true,
     .act = GQA_ACT_RELU},
    {.name = "one expert, Q6_K",
     .n_in = 256,
     .n_ff = 256,
     .n_out = 64,
     .n_experts = 1,
     .n_used = 1,
     .gate_type = Q6_K,
     .up_type = Q6_K,
     .down_type = Q6_K,
     .act = GQA_ACT_GELU},
    {.name = "more experts than threads, of output rows",
     .n_in = 64,
     .n_ff = 32,
     .n_out = 32,
     .n_experts = 300,
     .n_used = 6,
     .gate_type = Q4_0,
     .up_type = Q4_0,
     .down_type = Q4_0,
     .renormalise = 1,
     .out_rows = true},
    {.name = "all rows to one expert, Q4_0",
     .n_in = 128,
     .n_ff = 64,
     .n_out = 64,
     .n_experts = 16,
     .n_used = 2,
     .choice = ALL_ALIKE,
     .gate_type = Q4_0,
     .up_type = Q4_0,
     .down_type = Q4_0,
     .biases = true,
     .renormalise = 1},
    {.name = "equal logits",
     .n_in = 64,
     .n_ff = 32,
     .n_out = 32,
     .n_experts = 16,
     .n_used = 5,
     .choice = TIES,
     .gate_type = F16,
     .up_type = F16,
     .down_type = F16},
    {.name = "equal scores, the choice moved",
     .n_in = 64,
     .n_ff = 32,
     .n_out = 32,
     .n_experts = 16,
     .n_used = 5,
     .choice = TIES,
     .gate_type = F16,
     .up_type = F16,
     .down_type = F16,
     .selection = true,
     .gating = GQA_GATING_SIGMOID,
     .renormalise = 1},
};

/* ---- the problem ------------------------------------------------------------------------- */

static float *values_of(const struct trial *t, uint32_t weight)
{
    return (float *)(uintptr_t)t->weights[weight].data; /* the trial's own memory */
}

static void add_biases(struct trial *t, const struct mixture *m, struct gqa_op_experts *e)
{
    uint32_t n_up = m->layout == FUSED ? 2 * m->n_ff : m->n_ff;

    e->router_bias = trial_weight(t, F32, m->n_experts, 0, 0, 1);
    e->up_bias = trial_weight(t, F32, n_up, m->n_experts, 0, 1);
    e->down_bias = trial_weight(t, F32, m->n_out, m->n_experts, 0, 1);
    if (m->layout == SEPARATE) {
        e->gate_bias = trial_weight(t, F32, m->n_ff, m->n_experts, 0, 1);
    }
}

static void steer(const struct trial *t, const struct mixture *m, const struct gqa_op_experts *e)
{
    size_t row_bytes = m->n_in * sizeof(float);

    if (m->choice == ALL_ALIKE) {
        values_of(t, e->router_bias)[1] = -1e3f;
        values_of(t, e->router_bias)[3] = 50.0f;
    }
    for (uint32_t i = 0; m->choice == TIES && i < m->n_experts; i += 2) {
        float *router = values_of(t, e->router);
        memcpy(router + (i + 1) * m->n_in, router + i * m->n_in, row_bytes);
        if (m->selection) {
            values_of(t, e->selection_bias)[i + 1] = values_of(t, e->selection_bias)[i];
        }
    }
}

static void make(struct trial *t, const struct mixture *m, uint64_t seed)
{
    trial_init(t, ROWS, m->n_in, true, seed);
    snprintf(t->name, sizeof(t->name), "%s", m->name);
    uint32_t src = 0, dst = trial_reg(t, m->n_out, m->out_rows ? GQA_REG_OUT : 0);
    if (m->out_rows) {
        trial_gather(t, 0);
        src = t->result;
    }
    struct gqa_op *op = trial_op(t, GQA_OP_EXPERTS);
    op->src = trial_view(src, 0, m->n_in);
    op->dst = trial_view(dst, 0, m->n_out);
    struct gqa_op_experts *e = &op->u.experts;
    *e = (struct gqa_op_experts){
        .n_experts = m->n_experts,
        .n_used = m->n_used,
        .gating = m->gating,
        .renormalise = m->renormalise,
        .weight_scale = m->weight_scale > 0 ? m->weight_scale : 1,
        .router_bias = GQA_NONE,
        .selection_bias = GQA_NONE,
        .act = m->act,
        .alpha = 1.702f,
        .limit = 0.7f, /* within the values, so that it shows */
        .gate = GQA_NONE,
        .gate_bias = GQA_NONE,
        .up_bias = GQA_NONE,
        .down_bias = GQA_NONE,
        .fused = m->layout == FUSED,
    };
    uint32_t n_up = m->layout == FUSED ? 2 * m->n_ff : m->n_ff;
    e->router = trial_weight(t, F32, m->n_in, m->n_experts, 0, 0.5f);
    e->up = trial_weight(t, m->up_type, m->n_in, n_up, m->n_experts, 0.2f);
    e->down = trial_weight(t, m->down_type, m->n_ff, m->n_out, m->n_experts, 0.2f);
    if (m->layout == SEPARATE) {
        e->gate = trial_weight(t, m->gate_type, m->n_in, m->n_ff, m->n_experts, 0.2f);
    }
    if (m->selection) {
        e->selection_bias = trial_weight(t, F32, m->n_experts, 0, 0, 1);
    }
    if (m->biases) {
        add_biases(t, m, e);
    }
    steer(t, m, e);
    t->result = dst;
    if (!m->out_rows) {
        trial_gather(t, dst);
    }
}

/* ---- comparing --------------------------------------------------------------------------- */

/* A row of NaN is one in the result, and leaves the others alone. */
static bool stays_in_its_row(struct trial *t, const struct side *cuda, const float *clean)
{
    uint32_t n_out = t->regs[t->result].width;
    bool right = true;

    float *value = &t->inputs[(size_t)ROW_OF_NO_NUMBER * t->regs[0].width + 3], was = *value;
    *value = NAN;
    float *got = trial_results(t, cuda, 0);
    *value = was;
    for (uint32_t i = 0; got != NULL && i < ROWS * n_out; i++) {
        right = right &&
                (i / n_out == ROW_OF_NO_NUMBER ? isnan(got[i])
                                               : memcmp(&got[i], &clean[i], sizeof(*got)) == 0);
    }
    right = right && got != NULL;
    free(got);
    return right;
}

static bool check_mixture(const struct side *cpu, const struct side *cuda, size_t index)
{
    const struct mixture *m = &mixtures[index];
    const uint64_t seed = index + 1;
    struct trial t;

    make(&t, m, seed);
    size_t n = (size_t)ROWS * m->n_out;
    float *got = trial_results(&t, cuda, 0), *some = trial_results(&t, cuda, 13);
    float *one = trial_results(&t, cuda, 1);
    bool alone = got != NULL && stays_in_its_row(&t, cuda, got);
    if (m->widened) {
        trial_widen(&t);
    }
    float *truth = trial_results(&t, cpu, 0);
    bool right = truth != NULL && got != NULL && some != NULL && one != NULL;
    if (right) {
        float error = check_distance(truth, got, n);
        bool bits =
            memcmp(got, some, n * sizeof(*got)) == 0 && memcmp(got, one, n * sizeof(*got)) == 0;
        right = error <= TOLERANCE && bits && alone;
        printf("%-42s %s %.3g of %.3g, %s, %s\n", m->name, error <= TOLERANCE ? "ok" : "WRONG",
               (double)error, (double)TOLERANCE,
               bits ? "same bits in chunks" : "OTHER BITS in chunks",
               alone ? "NaN stays in its row" : "NaN LEAVES its row");
    }
    free(truth);
    free(got);
    free(some);
    free(one);
    trial_finish(&t);
    return right;
}

int main(int argc, char **argv)
{
    return sides_check(argc, argv, ARRAY_LENGTH(mixtures), check_mixture);
}
