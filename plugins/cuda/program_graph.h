/* plugins/cuda/program_graph.h - a step's launches as one, by CUDA graphs.
 *
 * A step of few rows is some hundred kernels of a few microseconds: starting each by itself takes
 * as long as they do. What they are told is the same from token to token (what changes lies in
 * buffers: plans, angles, embeddings), until a sequence comes or goes, or a table grows beyond its
 * room. So the launches of a range of ops are captured when a shape is first seen twice, and
 * replayed as long as everything that they were told is the same. A graph that cannot be made is no
 * error: the launches are made one by one.
 *
 * So are those of a step that the host cuts behind its attention, to hear of votes: a prompt's last
 * chunk is like no other, and its ranges, one of each layer, would push out the graphs of all who
 * generate. */
#ifndef PLUGINS_CUDA_PROGRAM_GRAPH_H
#define PLUGINS_CUDA_PROGRAM_GRAPH_H

#include "plugins/cuda/driver.h"

#include <stdbool.h>

struct cuda_program;

#define CUDA_GRAPHS_MAX 16u
/* Steps of more rows are long enough. */
#define CUDA_GRAPH_ROWS_MAX 128u

/* All that a range's launches depend on, as one number of 64 bits for each thing; owned. */
struct cuda_graph {
    uint64_t *key; /* (n) NULL: free */
    uint32_t n;
    uint32_t n_seen;  /* steps with this key */
    uint64_t used;    /* when last */
    CUgraphExec exec; /* NULL: not captured yet, or it failed */
    bool failed;
};

struct cuda_graphs {
    struct cuda_graph all[CUDA_GRAPHS_MAX];
    uint64_t clock;
    bool capturing; /* what is started now goes into a graph */
};

/* Runs ops [first, last) by run(), or by the graph of what it did. */
int cuda_graphs_run(struct cuda_program *p, uint32_t first, uint32_t last,
                    int (*run)(struct cuda_program *p, uint32_t first, uint32_t last));
void cuda_graphs_finish(struct cuda_program *p);

#endif
