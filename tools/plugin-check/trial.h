/* tools/plugin-check/trial.h - small programs with random weights, run on any gqa.program.0.
 *
 * A trial embeds given rows, runs the ops in question over them and gathers the result into a
 * register of output rows: a backend on a device takes embeddings in and gives output rows out, so
 * nothing else is asked of it. Whatever a plugin's pack_bytes wants is packed first, as the daemon
 * does. */
#ifndef TOOLS_PLUGIN_CHECK_TRIAL_H
#define TOOLS_PLUGIN_CHECK_TRIAL_H

#include <gqa/plugin.h>
#include <stdbool.h>

#define TRIAL_OPS_MAX      6u
#define TRIAL_REGS_MAX     6u
#define TRIAL_WEIGHTS_MAX  16u
#define TRIAL_ADAPTERS_MAX 4u
#define TRIAL_FREQS_MAX    64u

struct trial {
    char name[96]; /* of the problem, for messages */
    uint32_t n_rows, n_out;
    uint32_t n_ops, n_regs, n_weights, n_adapters, n_ropes;
    struct gqa_op ops[TRIAL_OPS_MAX];
    struct gqa_reg regs[TRIAL_REGS_MAX];
    struct gqa_weight weights[TRIAL_WEIGHTS_MAX]; /* data is the trial's */
    struct gqa_adapter adapters[TRIAL_ADAPTERS_MAX];
    struct gqa_rope_table rope;
    double freqs[TRIAL_FREQS_MAX];
    uint32_t result; /* the register of output rows */
    float *inputs;   /* (n_rows, width of register 0), or NULL: the batch has tokens */
    int32_t *tokens;
    uint32_t *positions, *out_rows, *row_adapters; /* the last is NULL where there are none */
    const uint8_t *row_classes; /* (n_rows) the caller's, or NULL: all of class D */
    uint64_t random;
    bool no_memory; /* something could not be allocated: trial_run() says so */
};

/* Register 0 has width columns; embeddings: of random rows, else of tokens by an EMBED that the
 * caller adds. All rows are output rows, until n_out is made smaller. */
void trial_init(struct trial *t, uint32_t n_rows, uint32_t width, bool embeddings, uint64_t seed);
void trial_finish(struct trial *t);

/* Indices of new ones. Weights are random, about deviation wide, {ne0, ne1, ne2}; 0: no more dims.
 */
uint32_t trial_reg(struct trial *t, uint32_t width, uint32_t flags);
uint32_t trial_weight(struct trial *t, uint32_t type, uint32_t ne0, uint32_t ne1, uint32_t ne2,
                      float deviation);
struct gqa_op *trial_op(struct trial *t, uint32_t kind);
struct gqa_view trial_view(uint32_t reg, uint32_t first, uint32_t width);
/* Gathers the register into output rows: the last op but those that work on these. */
void trial_gather(struct trial *t, uint32_t reg);
/* Rows carry adapter ids 7, none, 9 in turns; both change the weight, with that rank. */
void trial_adapters(struct trial *t, uint32_t weight, uint32_t type, uint32_t rank);

/* Quantised weights become the float32 values that they stand for: from now on it says what they
 * mean, whatever backends make of the activations that meet them. */
void trial_widen(struct trial *t);

/* Runs it, chunk rows at a time (0: all at once). *ret (n_out, width of the result) is malloc'ed.
 * -ENOTSUP where prepare declines, with its reason. */
int trial_run(struct trial *t, const struct gqa_program *p, void *context, uint32_t chunk,
              float **ret, struct gqa_reason *reason);

#endif
