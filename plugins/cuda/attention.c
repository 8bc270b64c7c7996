#include "plugins/cuda/attention.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct cuda_attention {
    struct cuda_context *context;
    struct cuda_plan plan;
    struct cuda_buffer pages, io, sinks;
};

int cuda_attention_create(struct cuda_context *c, struct cuda_attention **ret)
{
    struct cuda_attention *a = calloc(1, sizeof(*a));

    if (a == NULL) {
        return -ENOMEM;
    }
    a->context = c;
    *ret = a;
    return 0;
}

void cuda_attention_destroy(struct cuda_attention *a)
{
    if (a != NULL) {
        cuda_plan_finish(a->context, &a->plan);
        cuda_buffer_finish(a->context, &a->pages);
        cuda_buffer_finish(a->context, &a->io);
        cuda_buffer_finish(a->context, &a->sinks);
        free(a);
    }
}

static int refuse(struct gqa_reason *reason, const char *what, uint32_t value)
{
    snprintf(reason->text, sizeof(reason->text), "%s: %u", what, value);
    return -ENOTSUP;
}

static bool is_kv_type(uint32_t type)
{
    return type == GQA_TYPE_F16 || type == GQA_TYPE_BF16 || type == GQA_TYPE_Q8_0 ||
           type == GQA_TYPE_Q4_0;
}

int cuda_attention_supports(const struct gqa_attn_layer *l, struct gqa_reason *reason)
{
    uint64_t addresses = l->k_offset | l->v_offset | l->k_head_bytes | l->v_head_bytes;

    if (l->struct_size < GQA_SIZE_TO(struct gqa_attn_layer, flags)) {
        return refuse(reason, "a struct gqa_attn_layer shorter than in ABI 1.0, bytes",
                      l->struct_size);
    }
    if (l->flags != 0) {
        return refuse(reason, "flags of the layer that nobody had defined", l->flags);
    }
    if (l->n_kv_heads == 0 || l->n_heads == 0 || l->n_heads % l->n_kv_heads != 0) {
        return refuse(reason, "query heads are no multiple of the groups", l->n_heads);
    }
    if (!is_kv_type(l->k_type)) {
        return refuse(reason, "K is F16, BF16, Q8_0 or Q4_0 here, not of type", l->k_type);
    }
    if (!is_kv_type(l->v_type)) {
        return refuse(reason, "V is F16, BF16, Q8_0 or Q4_0 here, not of type", l->v_type);
    }
    if (l->k_dim == 0 || l->k_dim > CUDA_DIM_MAX) {
        return refuse(reason, "K heads of 1 to 256 dimensions, not of", l->k_dim);
    }
    if (l->v_dim == 0 || l->v_dim > CUDA_DIM_MAX || l->v_dim % 8 != 0) {
        return refuse(reason, "V heads of 8, 16, .. 256 dimensions, not of", l->v_dim);
    }
    if (l->rope != NULL && l->rope->n_freqs > l->k_dim / 2) {
        return refuse(reason, "a rope of more pairs than the head has", l->rope->n_freqs);
    }
    if (addresses % 16 != 0) {
        return refuse(reason, "K and V start at multiples of 16 bytes; they are off by",
                      (uint32_t)(addresses % 16));
    }
    return 0;
}

/* ---- append, on the host ----------------------------------------------------------------- */

static uint16_t to_half(float f, bool bf16)
{
    uint32_t bits = gqa_float_bits(f);

    if (!bf16) {
        return gqa_f32_to_f16(f);
    }
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Values as the type stores them: rotated, where it wants that. */
static const float *rotated(uint32_t type, const float *x, uint32_t dim, float *room)
{
    if (!gqa_kv_rotates(type)) {
        return x;
    }
    memcpy(room, x, dim * sizeof(*x));
    gqa_kv_rotate(room, dim);
    return room;
}

static void store_k(uint32_t type, char *head, uint32_t dim, uint32_t token, const float *x)
{
    float room[CUDA_DIM_MAX];

    if (cuda_kv_is_quantised(type)) {
        gqa_k_store_quants(type, head, dim, token, rotated(type, x, dim, room));
        return;
    }
    for (uint32_t d = 0; d < dim; d++) {
        ((uint16_t *)head)[gqa_k_index(dim, token, d)] = to_half(x[d], type == GQA_TYPE_BF16);
    }
}

static void store_v(uint32_t type, char *head, uint32_t dim, uint32_t token, const float *x)
{
    float room[CUDA_DIM_MAX];

    if (cuda_kv_is_quantised(type)) {
        gqa_v_store_quants(type, head, dim, token, rotated(type, x, dim, room));
        return;
    }
    for (uint32_t d = 0; d < dim; d++) {
        ((uint16_t *)head)[gqa_v_index(dim, token, d)] = to_half(x[d], type == GQA_TYPE_BF16);
    }
}

static void store_row(const struct gqa_attn_layer *l, char *page, uint32_t token, const float *k,
                      const float *v)
{
    for (uint32_t g = 0; g < l->n_kv_heads; g++) {
        store_k(l->k_type, page + l->k_offset + g * l->k_head_bytes, l->k_dim, token,
                k + g * l->k_dim);
        store_v(l->v_type, page + l->v_offset + g * l->v_head_bytes, l->v_dim, token,
                v + g * l->v_dim);
    }
}

int cuda_attention_append(struct cuda_context *c, const struct gqa_attn_layer *layer,
                          const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    for (uint32_t i = 0; batch->commit && i < batch->n_seqs; i++) {
        const struct gqa_attn_seq *s = &batch->seqs[i];
        const struct gqa_page_table *table = plugin_table(layer, s);
        int r = plugin_check_sight(layer, s);

        for (uint32_t row = 0; r == 0 && row < s->n_rows; row++) {
            uint32_t place = plugin_past(layer, s) + row;
            if (place / CUDA_PAGE >= table->n_pages || table->pages[place / CUDA_PAGE] == NULL) {
                return -EINVAL;
            }
            store_row(layer, table->pages[place / CUDA_PAGE], place % CUDA_PAGE,
                      io->k + (s->first_row + row) * io->k_stride,
                      io->v + (s->first_row + row) * io->v_stride);
        }
        if (r < 0) {
            return r;
        }
    }
    return 0;
}

/* ---- attend, over copies ----------------------------------------------------------------- */

/* A layer's part of a block. */
struct extent {
    uint64_t first, bytes; /* of what is used */
    uint64_t room;         /* and on the device */
};

static struct extent extent_of(const struct gqa_attn_layer *l)
{
    uint64_t k_end = l->k_offset + l->n_kv_heads * l->k_head_bytes;
    uint64_t v_end = l->v_offset + l->n_kv_heads * l->v_head_bytes;
    uint64_t first = l->k_offset < l->v_offset ? l->k_offset : l->v_offset;
    uint64_t bytes = (k_end > v_end ? k_end : v_end) - first;

    return (struct extent){first, bytes, (bytes + 255) & ~(uint64_t)255};
}

/* Copies a sequence's pages; the addresses are those of the blocks' starts, as kernels want them.
 */
static int upload_seq(struct cuda_attention *a, const struct gqa_attn_layer *layer,
                      const struct gqa_attn_batch *batch, const struct gqa_attn_seq *s,
                      CUdeviceptr room, uint64_t *addresses)
{
    struct extent e = extent_of(layer);
    const struct gqa_page_table *table = plugin_table(layer, s);
    uint64_t past = plugin_past(layer, s), n_there = batch->commit ? past + s->n_rows : past;
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < cuda_seq_pages(layer, s); i++) {
        CUdeviceptr at = room + i * e.room;

        addresses[i] = 0;
        if ((uint64_t)i * CUDA_PAGE >= n_there) { /* of new rows that come from io */
            addresses[i] = at - e.first;
        } else if (cuda_page_is_seen(layer, s, i)) {
            const char *page = i < table->n_pages ? table->pages[i] : NULL;
            addresses[i] = at - e.first;
            r = page != NULL ? cuda_upload(a->context, at, page + e.first, e.bytes) : -EINVAL;
        }
    }
    return r;
}

static int upload_pages(struct cuda_attention *a, const struct gqa_attn_layer *layer,
                        const struct gqa_attn_batch *batch)
{
    struct extent e = extent_of(layer);
    size_t n_pages = 0, used = 0;
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < batch->n_seqs; i++) {
        r = plugin_check_sight(layer, &batch->seqs[i]);
        n_pages += r == 0 ? cuda_seq_pages(layer, &batch->seqs[i]) : 0;
    }
    if (r < 0) {
        return r;
    }
    uint64_t *addresses = calloc(n_pages + 1, sizeof(*addresses));
    const uint64_t **of_seq = calloc(batch->n_seqs + 1, sizeof(*of_seq));
    r = addresses == NULL || of_seq == NULL
            ? -ENOMEM
            : cuda_buffer_reserve(a->context, &a->pages, n_pages * e.room);
    for (uint32_t i = 0; r == 0 && i < batch->n_seqs; i++) {
        of_seq[i] = addresses + used;
        r = upload_seq(a, layer, batch, &batch->seqs[i], a->pages.at + used * e.room,
                       addresses + used);
        used += cuda_seq_pages(layer, &batch->seqs[i]);
    }
    if (r == 0) {
        r = cuda_plan_make(a->context, &a->plan, layer, batch, of_seq);
    }
    free(addresses);
    free(of_seq);
    return r;
}

static int upload_sinks(struct cuda_attention *a, const struct gqa_attn_layer *l)
{
    if (l->sinks == NULL) {
        return 0;
    }
    int r = cuda_buffer_reserve(a->context, &a->sinks, l->n_heads * sizeof(float));
    return r < 0 ? r : cuda_upload(a->context, a->sinks.at, l->sinks, l->n_heads * sizeof(float));
}

/* The rows of q, k and v as one buffer after the other, and room for out. */
static int upload_io(struct cuda_attention *a, const struct gqa_attn_layer *l, uint32_t n_rows,
                     const struct gqa_attn_io *io, struct gqa_attn_io *ret)
{
    const float *from[3] = {io->q, io->k, io->v};
    size_t strides[3] = {io->q_stride, io->k_stride, io->v_stride};
    size_t widths[4] = {(size_t)l->n_heads * l->k_dim, (size_t)l->n_kv_heads * l->k_dim,
                        (size_t)l->n_kv_heads * l->v_dim, (size_t)l->n_heads * l->v_dim};
    CUdeviceptr at[4];
    uint64_t bytes = 0;

    for (int i = 0; i < 4; i++) {
        bytes += n_rows * widths[i] * sizeof(float);
    }
    int r = cuda_buffer_reserve(a->context, &a->io, bytes);
    at[0] = a->io.at;
    for (int i = 0; r == 0 && i < 3; i++) {
        for (uint32_t row = 0; r == 0 && row < n_rows; row++) {
            r = cuda_upload(a->context, at[i] + row * widths[i] * sizeof(float),
                            from[i] + row * strides[i], widths[i] * sizeof(float));
        }
        at[i + 1] = at[i] + n_rows * widths[i] * sizeof(float);
    }
    if (r == 0) {
        *ret = (struct gqa_attn_io){
            cuda_pointer(at[0]), cuda_pointer(at[1]), cuda_pointer(at[2]), cuda_pointer(at[3]),
            widths[0],           widths[1],           widths[2],           widths[3]};
    }
    return r;
}

int cuda_attention_attend(struct cuda_context *c, const struct gqa_attn_layer *layer,
                          const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    struct cuda_attention *a = c->attention;
    struct gqa_attn_io on_device;
    size_t out_bytes = (size_t)layer->n_heads * layer->v_dim * sizeof(float);

    int r = cuda_enter(c);
    if (r < 0) {
        return r;
    }
    r = upload_pages(a, layer, batch);
    r = r < 0 ? r : upload_io(a, layer, batch->n_rows, io, &on_device);
    r = r < 0 ? r : upload_sinks(a, layer);
    struct cuda_attn_layer l = cuda_layer_of(layer, layer->sinks != NULL ? a->sinks.at : 0);
    if (r == 0 && !batch->commit) { /* into the copies */
        r = cuda_plan_append(c, &a->plan, &l, &on_device, 0);
    }
    r = r < 0 ? r : cuda_plan_attend(c, &a->plan, &l, &on_device);
    for (uint32_t row = 0; r == 0 && row < batch->n_rows; row++) {
        CUdeviceptr from = (CUdeviceptr)(uintptr_t)on_device.out + row * out_bytes;
        r = cuda_download(c, io->out + row * io->out_stride, from, out_bytes);
    }
    int end = cuda_synchronise(c);
    cuda_leave(c);
    return r < 0 ? r : end;
}

/* ---- observe ----------------------------------------------------------------------------- */

int cuda_attention_observe(struct cuda_context *c, const struct gqa_attn_layer *layer,
                           const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                           uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes)
{
    struct cuda_attention *a = c->attention;
    struct gqa_attn_io on_device;
    int r = plugin_check_observed(layer, batch, seq, n_observed, n_votes);

    r = r < 0 ? r : cuda_enter(c);
    if (r < 0) {
        return r;
    }
    struct gqa_attn_seq one = batch->seqs[seq]; /* alone in a batch: no other's pages are copied */
    struct gqa_attn_io rows = *io;
    rows.q += one.first_row * io->q_stride;
    rows.k += one.first_row * io->k_stride;
    rows.v += one.first_row * io->v_stride;
    one.first_row = 0;
    const struct gqa_attn_batch alone = {
        .struct_size = sizeof(alone), .n_rows = one.n_rows, .n_seqs = 1, .commit = 1, .seqs = &one};
    r = upload_pages(a, layer, &alone);
    r = r < 0 ? r : upload_io(a, layer, one.n_rows, &rows, &on_device);
    r = r < 0 ? r : upload_sinks(a, layer);
    struct cuda_attn_layer l = cuda_layer_of(layer, layer->sinks != NULL ? a->sinks.at : 0);
    r = r < 0 ? r
              : cuda_plan_observe(c, &a->plan, layer, &l, &alone, &on_device, 0, n_observed,
                                  n_votes, votes);
    int end = cuda_synchronise(c);
    cuda_leave(c);
    return r < 0 ? r : end;
}
