#include "plugins/cuda/program_graph.h"

#include "plugins/cuda/program.h"

#include <stdlib.h>
#include <string.h>

/* Numbers of a key: the range and the rows, then those of each kind's plan. */
#define KEY_HEAD 8u
#define KEY_PLAN 11u

static void fill_key(const struct cuda_program *p, uint32_t first, uint32_t last, uint64_t *key)
{
    const struct gqa_batch *b = p->step.batch;

    *key++ = first;
    *key++ = last;
    *key++ = b->n_rows;
    *key++ = b->n_out;
    *key++ = b->attention != NULL && b->attention->commit;
    *key++ = p->step.adapted;
    *key++ = p->times.on;
    *key++ = p->n_kinds;
    for (uint32_t i = 0; i < p->n_kinds; i++) {
        const struct cuda_plan *plan = &p->plans[i];
        *key++ = (uintptr_t)plan->batch.seqs;
        *key++ = (uintptr_t)plan->batch.row_seq;
        *key++ = (uintptr_t)plan->batch.pages;
        *key++ = (uintptr_t)plan->batch.masks;
        *key++ = (uintptr_t)plan->batch.depths;
        *key++ = (uintptr_t)plan->batch.turns;
        *key++ = (uintptr_t)plan->items;
        *key++ = (uintptr_t)plan->merge_rows;
        *key++ = plan->n_items;
        *key++ = plan->merges;
        *key++ = plan->parts.at;
    }
}

static void forget(struct cuda_program *p, struct cuda_graph *g)
{
    if (g->exec != NULL) {
        CUDA(&p->context->driver, cuGraphExecDestroy)(g->exec);
    }
    free(g->key);
    *g = (struct cuda_graph){0};
}

/* The graph with that key, which it takes over; the one that was not used for longest gives way. */
static struct cuda_graph *find(struct cuda_program *p, uint64_t *key, uint32_t n)
{
    struct cuda_graphs *graphs = &p->graphs;
    struct cuda_graph *oldest = &graphs->all[0];

    for (uint32_t i = 0; i < CUDA_GRAPHS_MAX; i++) {
        struct cuda_graph *g = &graphs->all[i];
        if (g->key != NULL && g->n == n && memcmp(g->key, key, n * sizeof(*key)) == 0) {
            free(key);
            return g;
        }
        oldest = g->used < oldest->used ? g : oldest;
    }
    forget(p, oldest);
    oldest->key = key;
    oldest->n = n;
    return oldest;
}

/* Nothing runs while it is captured; the graph runs once afterwards. */
static int capture(struct cuda_program *p, struct cuda_graph *g, uint32_t first, uint32_t last,
                   int (*run)(struct cuda_program *p, uint32_t first, uint32_t last))
{
    const struct cuda_driver *d = &p->context->driver;
    CUstream stream = p->context->stream;
    CUgraph graph = NULL;

    g->failed = true;
    if (CUDA(d, cuStreamBeginCapture)(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) !=
        CUDA_SUCCESS) {
        return run(p, first, last);
    }
    p->graphs.capturing = true;
    int r = run(p, first, last);
    p->graphs.capturing = false;
    CUresult result = CUDA(d, cuStreamEndCapture)(stream, &graph);
    if (r == 0 && result == CUDA_SUCCESS) {
        result = CUDA(d, cuGraphInstantiateWithFlags)(&g->exec, graph, 0);
    }
    if (graph != NULL) {
        CUDA(d, cuGraphDestroy)(graph);
    }
    if (r < 0 || result != CUDA_SUCCESS) {
        g->exec = NULL;
        return r < 0 ? r : run(p, first, last);
    }
    g->failed = false;
    return cuda_check(p->context, CUDA(d, cuGraphLaunch)(g->exec, stream), "starting a graph");
}

/* Whether a range begins or ends behind an ATTENTION that is not the last op: see above. */
static bool is_cut(const struct cuda_program *p, uint32_t first, uint32_t last)
{
    return (first > 0 && p->ops[first - 1].op.kind == GQA_OP_ATTENTION) ||
           (last < p->n_ops && p->ops[last - 1].op.kind == GQA_OP_ATTENTION);
}

/* Whether what is to run may be a graph: few rows, all of which go the same way in every step of
 * this shape. */
static bool may_be_graph(const struct cuda_program *p, uint32_t first, uint32_t last)
{
    return p->step.batch->n_rows <= CUDA_GRAPH_ROWS_MAX && last > first + 1 && !p->step.apart &&
           !is_cut(p, first, last);
}

int cuda_graphs_run(struct cuda_program *p, uint32_t first, uint32_t last,
                    int (*run)(struct cuda_program *p, uint32_t first, uint32_t last))
{
    uint32_t n = KEY_HEAD + KEY_PLAN * p->n_kinds;
    uint64_t *key = may_be_graph(p, first, last) ? malloc(n * sizeof(*key)) : NULL;

    if (key == NULL) {
        return run(p, first, last);
    }
    fill_key(p, first, last, key);
    struct cuda_graph *g = find(p, key, n);
    g->used = ++p->graphs.clock;
    if (g->exec != NULL) {
        CUresult result = CUDA(&p->context->driver, cuGraphLaunch)(g->exec, p->context->stream);
        return cuda_check(p->context, result, "starting a graph");
    }
    if (g->failed || g->n_seen++ == 0) {
        return run(p, first, last);
    }
    return capture(p, g, first, last, run);
}

void cuda_graphs_finish(struct cuda_program *p)
{
    for (uint32_t i = 0; i < CUDA_GRAPHS_MAX; i++) {
        forget(p, &p->graphs.all[i]);
    }
}
