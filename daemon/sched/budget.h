/* daemon/sched/budget.h - how many rows of prompts a step may have beside those that decode.
 *
 * Chunked prefill (A. Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
 * Sarathi-Serve", 2024) with a chunk that follows the measured cost of steps: running generations
 * may take BUDGET_STRETCH times as long as without prompts beside them, or until the step takes
 * target_ms, whichever is more. Every BUDGET_PROBE-th step has no prompt, so that what decoding
 * takes by itself stays known. Where nobody decodes, prompts have all of the step. */
#ifndef DAEMON_SCHED_BUDGET_H
#define DAEMON_SCHED_BUDGET_H

#include "daemon/sched/cost.h"

#define BUDGET_STRETCH 1.4 /* 1.5 is what streams are promised; the rest is for noise */
#define BUDGET_PROBE   16u
#define BUDGET_LEAST   2u  /* rows: prompts get on, however slow the machine */
#define BUDGET_UNKNOWN 16u /* rows, while too little is known to predict */

struct budget {
    double alone_ms;  /* that a round of all decoding sequences takes, of all models */
    double own_ms;    /* of these, the step's own model */
    double target_ms; /* 0: none */
    bool decoding;    /* some sequence generates */
};

/* Rows of prompts with so many tokens before them, up to max. n_mixed counts the steps that had
 * both in a row, and is kept up to date. */
uint32_t budget_rows(const struct budget *b, const struct cost *cost, double depth, uint32_t max,
                     uint32_t *n_mixed);

#endif
