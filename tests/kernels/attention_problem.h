/* tests/kernels/attention_problem.h - random attention problems, a host to run them on, and the
 * truth in float64. Shared by the tests and by the bench. */
#ifndef TESTS_KERNELS_ATTENTION_PROBLEM_H
#define TESTS_KERNELS_ATTENTION_PROBLEM_H

#include <gqa/plugin.h>

#define ATTN_SEQS_MAX 8u

struct attn_spec {
    uint32_t n_heads, n_kv_heads, k_dim, v_dim;
    uint32_t k_type, v_type;
    uint32_t window;
    float softcap;
    int sinks;
    float magnitude; /* of q; K and V are about 1 */
    int no_commit;   /* the rows that are attended are not appended */
    int unrotated;   /* the truth only: Q4_0 without its rotation, as it should not be */
    uint32_t n_seqs;
    struct {
        uint32_t n_past, n_rows;
        uint32_t mutual;
        const uint64_t *mask; /* of the n_rows, which then must come in one step */
    } seqs[ATTN_SEQS_MAX];
    uint64_t seed;
};

/* One sequence: everything it will ever hold, and its pages. */
struct attn_problem_seq {
    uint32_t n_tokens;
    float *q; /* (n_tokens, n_heads, k_dim) */
    float *k; /* (n_tokens, n_kv_heads, k_dim) */
    float *v; /* (n_tokens, n_kv_heads, v_dim) */
    uint32_t n_pages;
    void **pages;
};

struct attn_problem {
    struct attn_spec spec;
    struct gqa_attn_layer layer;
    size_t page_bytes;
    float *sinks;
    uint32_t n_rows; /* of all sequences, in spec order */
    struct attn_problem_seq seqs[ATTN_SEQS_MAX];
};

/* A table of functions with its context, whoever made them. */
struct attn_backend {
    void *context;
    int (*append)(void *context, const struct gqa_attn_layer *layer,
                  const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);
    int (*attend)(void *context, const struct gqa_attn_layer *layer,
                  const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);
};

/* Random values; pages are filled with NaN, and nothing is in them yet. Exits when out of memory.
 */
void attn_problem_init(struct attn_problem *p, const struct attn_spec *spec);
void attn_problem_finish(struct attn_problem *p);
/* NaN in all pages again, and all of them there. */
void attn_problem_forget(struct attn_problem *p);

/* Appends tokens [0, n_past) of each sequence, frees what lies before the window of its next row,
 * then appends and attends its n_rows in chunks of at most chunk rows (all sequences together in
 * each step). out (n_rows, n_heads, v_dim). 0 or the backend's error. */
int attn_problem_run(struct attn_problem *p, const struct attn_backend *backend, uint32_t chunk,
                     float *out);

/* The truth, from K and V rounded to their types. bound[i]: how far a float32 result may be off:
 * see the definition. Both (n_rows, n_heads, v_dim). */
void attn_problem_truth(const struct attn_problem *p, double *out, double *bound);

/* Hosts: tasks one by one in descending order with every worker's number in use, or on threads. */
enum attn_host_kind { ATTN_HOST_BACKWARDS, ATTN_HOST_THREADS };
void attn_host_init(struct gqa_host *host, enum attn_host_kind kind, uint32_t n_threads);

/* 64-byte aligned; exits when out of memory. */
void *attn_allocate(size_t bytes);

/* splitmix64, and floats from it. */
uint64_t attn_random(uint64_t *state);
float attn_random_normal(uint64_t *state); /* a sum of uniform ones: |x| < 3.5, variance 1 */

#endif
