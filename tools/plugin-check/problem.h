/* tools/plugin-check/problem.h - small random attention problems, run on any gqa.attention.0. */
#ifndef TOOLS_PLUGIN_CHECK_PROBLEM_H
#define TOOLS_PLUGIN_CHECK_PROBLEM_H

#include <gqa/plugin.h>
#include <stdbool.h>

/* Which new rows a tree's row sees. */
enum problem_mask {
    PROBLEM_TREE,  /* itself, and what row i / 2 sees */
    PROBLEM_BLANK, /* nothing at all */
    PROBLEM_FRAMES /* all rows of its frame of 8 and of those before: block-causal */
};

struct problem_spec {
    const char *name;
    uint32_t n_heads, n_kv_heads, dim; /* dim of K and V heads */
    uint32_t kv_type;
    uint32_t window;
    float softcap;
    uint32_t with_sinks;
    uint32_t n_past, n_rows; /* of the one sequence: past is appended first */
    uint32_t caps;           /* enum gqa_attn_caps that it uses: a tree, mutual rows, no commit */
    enum problem_mask mask;  /* of a tree */
    /* GQA_ATTN_CAP_SPARSE: how gqa_page_table has the rows; whole blocks are dropped, the first one
     * after the sinks. */
    struct {
        uint32_t n_sinks, recent, n_dropped, turned;
    } view;
};

/* The table of the matrix: i-th problem, or NULL past the end. */
const struct problem_spec *problem_at(uint32_t i);

/* Appends and attends on the interface; *ret_out (n_rows, n_heads, dim) is malloc'ed. The same spec
 * gives the same inputs every time. -ENOTSUP when supports() declines, or caps lacks something. */
int problem_run(const struct problem_spec *spec, const struct gqa_attention *attention,
                void *context, float **ret_out, struct gqa_reason *reason);

/* Appends all, and has the last rows, at most 20, vote on those before: *ret_votes (n_kv_heads,
 * *ret_count) is malloc'ed. The last chunk of way counts. */
int problem_vote(const struct problem_spec *spec, uint32_t chunk,
                 const struct gqa_attention *attention, void *context, float **ret_votes,
                 uint32_t *ret_count, struct gqa_reason *reason);

/* How the rows are handed over: results must not depend on it. */
struct problem_way {
    uint32_t chunk;    /* so many rows at a time; 0: all */
    uint32_t n_copies; /* above 1: in a batch of so many sequences over the same pages */
    bool shared;       /* and with the hint that they share what lies before; of four the two in the
                          middle share more, in a segment within that of all */
};
int problem_run_as(const struct problem_spec *spec, const struct problem_way *way,
                   const struct gqa_attention *attention, void *context, float **ret_out,
                   struct gqa_reason *reason);

#endif
