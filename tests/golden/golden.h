/* tests/golden/golden.h - golden models, run straight on the model layer, without daemon. */
#ifndef TESTS_GOLDEN_GOLDEN_H
#define TESTS_GOLDEN_GOLDEN_H

#include "daemon/kv/sequence.h"
#include "daemon/model/model.h"

/* One golden model's files. */
struct golden {
    char dir[4096];
    char name[64];
    uint32_t n_vocab;
    struct golden_seq {
        char name[16];
        int32_t *ids;
        size_t n_ids;
        float *truth; /* (n_ids, n_vocab) */
    } seqs[4];
    size_t n_seqs;
    int32_t *greedy; /* after sequence a */
    size_t n_greedy;
    /* By sequence: the better engine's mean and median KL with an f16 cache, or 0. */
    double engine_kl[4], engine_median_kl[4];
    bool quantised; /* 8-bit activations are used: some matrix is neither F32, F16 nor BF16 */
    bool bf16;
};

/* 0, or -1 with a word on standard error. */
int golden_open(const char *root, const char *name, struct golden *ret);
void golden_close(struct golden *g);

/* What all runs share. */
struct rig {
    struct pool *pool;
    struct io *io;
    struct backend_catalogue *catalogue;
    struct kv_cache *cache;
};
int rig_init(struct rig *r, uint32_t n_threads, const char *plugins, const char *minimal,
             const char *check_program);
void rig_finish(struct rig *r);

struct run_options {
    const char *backend;   /* "cpu:isa=avx2" */
    const char *attention; /* or NULL */
    uint32_t kv_type;
    uint32_t n_ctx;
};
int rig_load(struct rig *r, const struct golden *g, const struct run_options *o,
             struct model **ret);

/* A sequence that is fed by hand. */
struct feed {
    struct model *model;
    struct kv_sequence kv;
    int32_t *tokens;
    size_t n_prompt; /* for sequences that share */
};

/* One step: n rows of each of n_feeds sequences (the next n tokens of each), logits of all rows to
 * ret_logits[i] (n, n_vocab). 0 or -errno. */
int feed_step(struct feed *const *feeds, uint32_t n_feeds, uint32_t n, float *const *ret_logits);

/* All logits of ids, fed in chunks of the given size. */
int run_chunked(struct rig *r, struct model *m, const int32_t *ids, size_t n_ids, uint32_t chunk,
                float *ret_logits);

/* Over positions, of KL(truth || candidate) in nats. */
double mean_kl(const float *truth, const float *candidate, size_t n_rows, uint32_t n_vocab);
double median_kl(const float *truth, const float *candidate, size_t n_rows, uint32_t n_vocab);

#define RIG_MAX_ROWS 512

#endif
