/* client/cli/bench_serve.h - gqa bench serve in parts: the load of one process, rows of streams,
 * and the whole. */
#ifndef CLI_BENCH_SERVE_H
#define CLI_BENCH_SERVE_H

#include "client/cli/bench.h"

#include <sys/types.h>

#define SERVE_PROCESSES_MAX 64u
#define SERVE_RECORDS_MAX   (1u << 16) /* requests of one process */
#define SERVE_GAPS_MAX      (1u << 20) /* times between tokens of one process */
#define SERVE_PENDING_MAX   256u       /* requests of one process at once */

struct serve_range {
    uint32_t least, most;
};

/* What one process does. */
struct serve_load {
    const char *model;
    uint32_t n_vocab;
    struct serve_range prompt, gen; /* tokens, drawn evenly */
    uint32_t n_prefix;              /* tokens with which all prompts begin */
    const int32_t *prefix;
    uint32_t concurrency; /* requests at once; with a rate, at most */
    double rate;          /* of a Poisson process, per second; 0: the next when one has ended */
    double duration_us;
    uint64_t seed;
    uid_t uid; /* for the records */
};

struct serve_record {
    double sent_us, first_us, end_us;
    uint32_t n_prompt, n_tokens;
    int status;
};

/* What came of it; in memory that the processes share. */
struct serve_outcome {
    uid_t uid;
    int code; /* exit code of the process */
    double begin_us, end_us;
    uint32_t n_records, n_gaps, n_late; /* late: not sent, since too many were pending */
    struct serve_record records[SERVE_RECORDS_MAX];
    float gaps_ms[SERVE_GAPS_MAX];
};

/* Runs the load on a connection of its own. Prints and returns an exit code. */
int serve_run(struct cli *c, const struct serve_load *load, struct serve_outcome *o);

/* The rows of --streams. */
int serve_streams(struct cli *c, const char *model, uint32_t n_vocab, uint32_t n_streams,
                  uint32_t n_long);

#endif
