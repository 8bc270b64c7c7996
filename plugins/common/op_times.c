#include "plugins/common/op_times.h"

#include "format/types.h"

#include <stdatomic.h>
#include <time.h>

uint64_t plugin_now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* One thread writes: a plain addition, whose result others see whole. */
static void add(_Atomic uint64_t *counter, uint64_t n)
{
    uint64_t old = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, old + n, memory_order_relaxed);
}

void plugin_op_times_count(struct plugin_op_times *t, uint32_t kind, uint32_t n_ops, uint64_t rows,
                           uint64_t ns, uint64_t bytes)
{
    add(&t->kinds[kind].calls, n_ops);
    add(&t->kinds[kind].rows, rows);
    add(&t->kinds[kind].ns, ns);
    add(&t->kinds[kind].bytes, bytes);
}

void plugin_op_times_add(struct plugin_op_times *t, uint32_t kind, uint32_t n_ops, uint64_t rows,
                         uint64_t bytes, uint64_t *at)
{
    uint64_t now = plugin_now_ns();

    plugin_op_times_count(t, kind, n_ops, rows, now - *at, bytes);
    *at = now;
}

uint32_t plugin_op_times_read(const struct plugin_op_times *t, struct gqa_op_time *ret,
                              uint32_t max)
{
    uint32_t n = 0;

    for (uint32_t kind = 0; kind < PLUGIN_OP_KINDS; kind++) {
        struct gqa_op_time one = {
            .kind = kind,
            .calls = atomic_load_explicit(&t->kinds[kind].calls, memory_order_relaxed),
            .rows = atomic_load_explicit(&t->kinds[kind].rows, memory_order_relaxed),
            .ns = atomic_load_explicit(&t->kinds[kind].ns, memory_order_relaxed),
            .bytes = atomic_load_explicit(&t->kinds[kind].bytes, memory_order_relaxed),
        };
        if (one.calls > 0) {
            if (n < max) {
                ret[n] = one;
            }
            n++;
        }
    }
    return n;
}

static uint64_t row_bytes(uint32_t type, uint32_t dim)
{
    const struct fmt_type_info *info = fmt_type_info(type);
    return info != NULL ? fmt_type_bytes(info, dim) : 0;
}

uint64_t plugin_attention_bytes(const struct gqa_attn_layer *layer,
                                const struct gqa_attn_batch *batch)
{
    uint64_t tokens = 0;

    for (uint32_t i = 0; i < batch->n_seqs; i++) {
        const struct gqa_attn_seq *seq = &batch->seqs[i];
        const struct gqa_page_table none = {0};
        const struct gqa_page_table *table =
            seq->tables != NULL ? &seq->tables[layer->layer_class] : &none;
        uint64_t seen = (uint64_t)seq->n_past - table->n_dropped + seq->n_rows;
        uint64_t most = (uint64_t)layer->window + seq->n_rows;
        uint64_t view = (uint64_t)table->n_sinks + table->recent + seq->n_rows - 1;
        seen = table->recent > 0 && view < seen ? view : seen;
        tokens += layer->window > 0 && most < seen ? most : seen;
    }
    return tokens * layer->n_kv_heads *
           (row_bytes(layer->k_type, layer->k_dim) + row_bytes(layer->v_type, layer->v_dim));
}
