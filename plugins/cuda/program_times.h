/* plugins/cuda/program_times.h - how long ops take on the device, by kind, for whoever asks.
 *
 * The host starts kernels long before they run: only the device can tell. Events stand between the
 * ops where their kind changes, and are read at the step's end, when all has run. In a graph they
 * are nodes of their own, so that a timed step is replayed like any other; by a graph of its own,
 * since those without events stay as they are.
 *
 * Nobody pays who does not ask: steps are timed from the first reading on until CUDA_TIMES_KEEP_NS
 * after the last one. What runs when nobody has asked for so long is not counted. */
#ifndef PLUGINS_CUDA_PROGRAM_TIMES_H
#define PLUGINS_CUDA_PROGRAM_TIMES_H

#include "plugins/common/op_times.h"
#include "plugins/cuda/driver.h"

#include <stdbool.h>

struct cuda_program;

#define CUDA_TIMES_KEEP_NS (600 * 1000000000ull) /* ten minutes: longer than any bench */

/* Ops of one kind, one after the other, from the event of the first to that of what follows. */
struct cuda_span {
    uint32_t first, end, kind;
    uint64_t rows, bytes; /* of all its ops */
    bool closes;          /* a range's last: its end has an event of its own */
};

struct cuda_times {
    struct plugin_op_times counted;
    _Atomic uint64_t asked_ns; /* when somebody read last; 0: never */
    bool on;                   /* in this step */
    /* (2 (n_ops + 1)): before op i, and behind it where it ends a range; NULL until a step is
     * timed. Owned. */
    CUevent *events;
    uint32_t n_events;
    struct cuda_span *spans; /* (n_ops) of this step; owned */
    uint32_t n_spans;
};

/* A step begins: whether it is timed. The context is current. */
void cuda_times_begin(struct cuda_program *p);
/* Between starting ops, also into a graph: op i of a range that begins at first follows, or the
 * range up to end is all started. 0 or -errno, as a kernel's start. */
int cuda_times_mark(struct cuda_program *p, uint32_t first, uint32_t i);
int cuda_times_close(struct cuda_program *p, uint32_t end);
/* The range was started, by itself or by a graph: its ops are this step's. */
void cuda_times_note(struct cuda_program *p, uint32_t first, uint32_t end);
/* All that was started has run: counts. */
void cuda_times_end(struct cuda_program *p);
void cuda_times_finish(struct cuda_program *p);

/* gqa_program.op_times. Any thread. */
uint32_t cuda_times_read(struct cuda_program *p, struct gqa_op_time *ret, uint32_t max);

#endif
