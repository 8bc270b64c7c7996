/* daemon/sched/cost.h - what a step of a model takes, learned from the steps that it has taken.
 *
 *   ms = base + a * (rows that decode) + b * (rows of prompts) + c * (tokens before all rows)
 *
 * fitted by least squares of the relative error over the recent past (each step counts a little
 * less than the next), without negative terms. It follows a machine whose speed changes, and a
 * kernel whose rows cost less in small numbers than in large ones. Plain data, no clock. */
#ifndef DAEMON_SCHED_COST_H
#define DAEMON_SCHED_COST_H

#include <stdbool.h>
#include <stdint.h>

#define COST_TERMS 4u

/* Rows of one step. depth_tokens: of every row the tokens before it, in sum. */
struct cost_work {
    uint32_t decode_rows, prefill_rows;
    double depth_tokens;
};

/* Zeroed: nothing is known. */
struct cost {
    double terms[COST_TERMS];
    double products[COST_TERMS][COST_TERMS], with_ms[COST_TERMS]; /* of the past, fading */
    uint32_t n_decode, n_prefill; /* steps seen that had such rows, up to a bound */
};

void cost_learn(struct cost *c, const struct cost_work *work, double ms);
double cost_ms(const struct cost *c, const struct cost_work *work);
/* Whether enough was seen of prompts, or of decoding, to say something about them. */
bool cost_knows_prefill(const struct cost *c);
bool cost_knows_decode(const struct cost *c);
/* Milliseconds that one more row of a prompt takes, with so many tokens before it. */
double cost_row_ms(const struct cost *c, double depth);

#endif
