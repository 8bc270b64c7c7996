/* plugins/common/op_times.h - how long ops take, by kind.
 *
 * The thread that runs steps counts, any other may read: counters are atomic, without order among
 * each other. */
#ifndef PLUGINS_COMMON_OP_TIMES_H
#define PLUGINS_COMMON_OP_TIMES_H

#include <gqa/plugin.h>

#include <stdint.h>

#define PLUGIN_OP_KINDS (GQA_OP_EXPERTS + 1u)

struct plugin_op_times {
    struct {
        _Atomic uint64_t calls, rows, ns, bytes;
    } kinds[PLUGIN_OP_KINDS];
};

uint64_t plugin_now_ns(void);

/* n_ops ops of a kind took so long. */
void plugin_op_times_count(struct plugin_op_times *t, uint32_t kind, uint32_t n_ops, uint64_t rows,
                           uint64_t ns, uint64_t bytes);

/* n_ops ops of a kind ran since *at, which moves on to now. */
void plugin_op_times_add(struct plugin_op_times *t, uint32_t kind, uint32_t n_ops, uint64_t rows,
                         uint64_t bytes, uint64_t *at);

uint32_t plugin_op_times_read(const struct plugin_op_times *t, struct gqa_op_time *ret,
                              uint32_t max);

/* K and V that the batch's rows attend to at least: each sequence's once. */
uint64_t plugin_attention_bytes(const struct gqa_attn_layer *layer,
                                const struct gqa_attn_batch *batch);

#endif
