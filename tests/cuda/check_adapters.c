/* tests/cuda/check_adapters.c - adapters (LoRA) on two plugins: the cpu's reference is the truth
 * for cuda's results, and cuda's bits must not depend on chunks, nor on what other rows carry.
 *
 *   check-adapters CPU.so CUDA.so
 *
 * Two LINEARs, of all rows and of output rows, with adapters of several ranks and types, of which
 * some change one of them only. Exit status: 0 right, 1 wrong, 77 no GPU (and it says so). */
#include "format/types.h"
#include "tests/cuda/check_trial.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROWS  37u
#define WIDTH 96u
#define OUT   300u /* more than the threads of a block */

/* Of the results' root mean square. Floats differ by roundings; quantised products are exact,
 * unless one makes an activation the next integer. F32 weights are F16 on cuda; adapters stay F32.
 */
#define TOLERANCE 5e-3f

#define F32  GQA_TYPE_F32
#define F16  GQA_TYPE_F16
#define BF16 GQA_TYPE_BF16

#define ARRAY_LENGTH(a) (sizeof(a) / sizeof((a)[0]))

/* What rows carry, in turns: three adapters, the last of which changes the second matrix alone. */
static const uint32_t ids[] = {5, GQA_NONE, 4000000000u, 5, 9, GQA_NONE, 4000000000u};

struct kind {
    const char *name;
    uint32_t type;               /* of the matrices */
    uint32_t first_rank, second; /* ranks of the two that change the first matrix */
    uint32_t a_type, b_type;
};

static const struct kind kinds[] = {
    {"ranks 8 and 3, F32", GQA_TYPE_Q4_0, 8, 3, F32, F32},
    {"ranks 1 and 70, F16 and BF16", GQA_TYPE_Q8_0, 1, 70, F16, BF16},
    {"ranks 64 and 65, BF16 and F16", F16, 64, 65, BF16, F16},
    {"ranks 4 and 130, BF16 and F32, of F32", F32, 4, 130, BF16, F32},
};

static void add_adapter(struct trial *t, uint32_t id, uint32_t weight, uint32_t rank,
                        const struct kind *k)
{
    uint32_t n_in = (uint32_t)t->weights[weight].ne[0], n_out = (uint32_t)t->weights[weight].ne[1];

    t->adapters[t->n_adapters++] = (struct gqa_adapter){
        .id = id,
        .weight = weight,
        .a = trial_weight(t, k->a_type, n_in, rank, 0, 0.2f),
        .b = trial_weight(t, k->b_type, rank, n_out, 0, 0.2f),
        .scale = 1.5f,
    };
}

static struct gqa_op *add_linear(struct trial *t, uint32_t src, uint32_t dst, uint32_t weight)
{
    struct gqa_op *op = trial_op(t, GQA_OP_LINEAR);

    op->src = trial_view(src, 0, t->regs[src].width);
    op->dst = trial_view(dst, 0, t->regs[dst].width);
    op->weight = weight;
    op->u.linear.adapters = 1;
    return op;
}

static void make(struct trial *t, const struct kind *k, uint64_t seed)
{
    trial_init(t, ROWS, WIDTH, true, seed);
    snprintf(t->name, sizeof(t->name), "%s", k->name);
    uint32_t first = trial_weight(t, k->type, WIDTH, WIDTH, 0, 0.2f);
    uint32_t second = trial_weight(t, k->type, WIDTH, OUT, 0, 0.2f);
    uint32_t hidden = trial_reg(t, WIDTH, 0);
    add_linear(t, 0, hidden, first);
    trial_gather(t, hidden);
    uint32_t gathered = t->result;
    t->result = trial_reg(t, OUT, GQA_REG_OUT);
    add_linear(t, gathered, t->result, second);
    add_adapter(t, 4000000000u, first, k->second, k);
    add_adapter(t, 5, first, k->first_rank, k);
    add_adapter(t, 5, second, k->first_rank, k);
    add_adapter(t, 9, second, 16, k);
    t->row_adapters = calloc(ROWS, sizeof(*t->row_adapters));
    t->no_memory = t->no_memory || t->row_adapters == NULL;
    for (uint32_t i = 0; !t->no_memory && i < ROWS; i++) {
        t->row_adapters[i] = ids[i % ARRAY_LENGTH(ids)];
    }
}

/* Rows keep their bits when others carry something else; all of one adapter, then none, which is
 * what no adapters give. */
static bool keeps_to_its_row(struct trial *t, const struct side *cuda, const float *mixed)
{
    size_t row_bytes = OUT * sizeof(float);
    bool right = true;

    for (uint32_t k = 0; k < 3 && right; k++) {
        uint32_t id = ids[k];
        for (uint32_t i = 0; i < ROWS; i++) {
            t->row_adapters[i] = id;
        }
        float *all = trial_results(t, cuda, 0);
        right = all != NULL;
        for (uint32_t i = k; right && i < ROWS; i += ARRAY_LENGTH(ids)) {
            right = memcmp(all + i * OUT, mixed + i * OUT, row_bytes) == 0;
        }
        uint32_t *carried = t->row_adapters;
        t->row_adapters = NULL;
        float *none = right && id == GQA_NONE ? trial_results(t, cuda, 0) : NULL;
        t->row_adapters = carried;
        if (id == GQA_NONE) {
            right = right && none != NULL && memcmp(all, none, ROWS * row_bytes) == 0;
        }
        free(none);
        free(all);
    }
    return right;
}

/* An id that no adapter has. */
static bool refuses(struct trial *t, const struct side *cuda)
{
    struct gqa_reason reason = {""};
    float *y = NULL;

    t->row_adapters[ROWS - 1] = 6;
    int r = trial_run(t, cuda->program, cuda->context, 0, &y, &reason);
    free(y);
    return r < 0;
}

static bool check_kind(const struct side *cpu, const struct side *cuda, size_t index)
{
    const struct kind *k = &kinds[index];
    const uint64_t seed = index + 1;
    struct trial t;

    make(&t, k, seed);
    size_t n = (size_t)ROWS * OUT;
    float *truth = trial_results(&t, cpu, 0), *got = trial_results(&t, cuda, 0);
    float *some = trial_results(&t, cuda, 13), *one = trial_results(&t, cuda, 1);
    bool right = truth != NULL && got != NULL && some != NULL && one != NULL;
    if (right) {
        float error = check_distance(truth, got, n);
        bool bits =
            memcmp(got, some, n * sizeof(*got)) == 0 && memcmp(got, one, n * sizeof(*got)) == 0;
        bool alone = keeps_to_its_row(&t, cuda, got), refused = refuses(&t, cuda);
        right = error <= TOLERANCE && bits && alone && refused;
        printf("%-42s %s %.3g of %.3g, %s, %s, %s\n", k->name, error <= TOLERANCE ? "ok" : "WRONG",
               (double)error, (double)TOLERANCE,
               bits ? "same bits in chunks" : "OTHER BITS in chunks",
               alone ? "and in company" : "and OTHER BITS in company",
               refused ? "unknown ids refused" : "unknown ids TAKEN");
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
    return sides_check(argc, argv, ARRAY_LENGTH(kinds), check_kind);
}
