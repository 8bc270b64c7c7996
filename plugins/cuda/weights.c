#include "plugins/cuda/weights.h"

#include "format/types.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum cuda_weight_type cuda_weight_type_of(uint32_t type)
{
    switch (type) {
    case GQA_TYPE_Q4_0:
        return CUDA_W_Q4_0;
    case GQA_TYPE_Q8_0:
        return CUDA_W_Q8_0;
    case GQA_TYPE_Q4_K:
        return CUDA_W_Q4_K;
    case GQA_TYPE_Q6_K:
        return CUDA_W_Q6_K;
    case GQA_TYPE_MXFP4:
        return CUDA_W_MXFP4;
    case GQA_TYPE_BF16:
        return CUDA_W_BF16;
    default:
        return CUDA_W_F16;
    }
}

uint32_t cuda_block_bytes(enum cuda_weight_type type)
{
    static const uint32_t bytes[CUDA_W_COUNT] = {
        [CUDA_W_Q4_0] = 64 + 512,
        [CUDA_W_Q8_0] = 64 + 1024,
        [CUDA_W_Q4_K] = 64 + 64 + 32 + 32 + 512,
        [CUDA_W_Q6_K] = 64 + 64 + 512 + 256,
        [CUDA_W_MXFP4] = 32 + 512,
        [CUDA_W_F16] = 2048,
        [CUDA_W_BF16] = 2048,
    };
    return bytes[type];
}

uint64_t cuda_weights_rows(const struct gqa_weight *w)
{
    return w->ne[1] * (w->n_dims > 2 ? w->ne[2] : 1);
}

uint64_t cuda_weights_packed_bytes(const struct gqa_weight *w)
{
    const struct fmt_type_info *info = fmt_type_info(w->type);
    uint64_t bytes;

    if ((w->n_dims != 2 && w->n_dims != 3) || info == NULL || info->dequantise == NULL ||
        w->ne[0] > UINT32_MAX / 2 || w->ne[1] > UINT32_MAX / 2 ||
        (w->n_dims == 3 && (w->ne[2] > UINT32_MAX || cuda_weights_rows(w) > UINT32_MAX / 2)) ||
        fmt_type_bytes(info, w->ne[0]) == 0) {
        return 0;
    }
    uint64_t n_blocks = (w->ne[0] + CUDA_BLOCK - 1) / CUDA_BLOCK;
    uint64_t n_strips = (cuda_weights_rows(w) + CUDA_STRIP - 1) / CUDA_STRIP;
    if (__builtin_mul_overflow(n_strips * n_blocks, cuda_block_bytes(cuda_weight_type_of(w->type)),
                               &bytes)) {
        return 0;
    }
    return bytes;
}

uint64_t cuda_strip_bytes(const struct gqa_weight *w)
{
    uint64_t n_blocks = (w->ne[0] + CUDA_BLOCK - 1) / CUDA_BLOCK;
    return n_blocks * cuda_block_bytes(cuda_weight_type_of(w->type));
}

/* ---- quants ------------------------------------------------------------------------------ */

/* 32 values of one output as the file has them, in plain numbers. */
struct block {
    uint8_t code[32];       /* Q8_0: two's complement */
    uint16_t scale, min;    /* F16 */
    uint8_t scales, mins;   /* Q4_K: integers of 6 bits; MXFP4: the exponent */
    uint8_t half_scales[2]; /* Q6_K: two's complement */
};

static uint16_t load_16(const uint8_t *at)
{
    return (uint16_t)(at[0] | at[1] << 8);
}

static void nibbles(const uint8_t *q, uint32_t n, uint32_t shift, uint8_t *code)
{
    for (uint32_t i = 0; i < n; i++) {
        code[i] = q[i] >> shift & 15;
    }
}

/* d, dmin, 12 bytes of 8 pairs of 6 bits, 128 bytes: pairs of blocks in the two nibbles of 32. */
static void read_q4_k(const uint8_t *row, uint32_t index, struct block *ret)
{
    const uint8_t *super = row + (size_t)(index / 8) * 144, *s = super + 4;
    uint32_t j = index % 8;

    ret->scale = load_16(super);
    ret->min = load_16(super + 2);
    ret->scales = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    ret->mins = j < 4 ? s[j + 4] & 63 : (uint8_t)(s[j + 4] >> 4 | s[j] >> 6 << 4);
    nibbles(super + 16 + j / 2 * 32, 32, j % 2 * 4, ret->code);
}

/* 128 bytes of low nibbles, 64 of two bits, 16 scales, d. */
static void read_q6_k(const uint8_t *row, uint32_t index, struct block *ret)
{
    const uint8_t *super = row + (size_t)(index / 8) * 210;
    uint32_t half = index % 8 / 4, quarter = index % 4;
    const uint8_t *high = super + 128 + half * 32;

    nibbles(super + half * 64 + quarter % 2 * 32, 32, quarter / 2 * 4, ret->code);
    for (uint32_t i = 0; i < 32; i++) {
        ret->code[i] |= (uint8_t)((high[i] >> 2 * quarter & 3) << 4);
    }
    memcpy(ret->half_scales, super + 192 + half * 8 + quarter * 2, 2);
    ret->scale = load_16(super + 208);
}

static void read_block(enum cuda_weight_type type, const uint8_t *row, uint32_t index,
                       struct block *ret)
{
    uint32_t bytes = type == CUDA_W_Q8_0 ? 34 : type == CUDA_W_MXFP4 ? 17 : 18;
    const uint8_t *at = row + (size_t)index * bytes;

    switch (type) {
    case CUDA_W_Q8_0:
        ret->scale = load_16(at);
        memcpy(ret->code, at + 2, 32);
        break;
    case CUDA_W_Q4_K:
        read_q4_k(row, index, ret);
        break;
    case CUDA_W_Q6_K:
        read_q6_k(row, index, ret);
        break;
    case CUDA_W_MXFP4:
        ret->scales = at[0];
        nibbles(at + 1, 16, 0, ret->code);
        nibbles(at + 1, 16, 4, ret->code + 16);
        break;
    default:
        ret->scale = load_16(at);
        nibbles(at + 2, 16, 0, ret->code);
        nibbles(at + 2, 16, 4, ret->code + 16);
        break;
    }
}

/* Where what is one an output goes: that of outputs g, g + 8, g + 16, g + 24 side by side. */
static uint32_t slot_of(uint32_t output)
{
    return output % 8 * 4 + output / 8;
}

static void store_16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

/* Byte of value k (0..15 of a plane) of an output: lane, word of its 16 bytes, byte. */
static uint32_t plane_byte(uint32_t output, uint32_t k)
{
    return (output % 8 * 4 + k / 4) * 16 + output / 8 * 4 + k % 4;
}

static void store_codes(enum cuda_weight_type type, uint8_t *to, uint32_t output,
                        const uint8_t *code)
{
    for (uint32_t k = 0; k < 16; k++) {
        uint32_t at = plane_byte(output, k);
        if (type == CUDA_W_Q8_0) {
            to[at] = code[k];
            to[512 + at] = code[16 + k];
            continue;
        }
        to[at] = (uint8_t)((code[k] & 15) | (code[16 + k] & 15) << 4);
        if (type == CUDA_W_Q6_K) {
            uint8_t *bits = to + 512 + (output % 8 * 4 + k / 4) * 8 + k % 4;
            bits[0] |= (uint8_t)(code[k] >> 4 << output / 8 * 2);
            bits[4] |= (uint8_t)(code[16 + k] >> 4 << output / 8 * 2);
        }
    }
}

/* Four nibbles of either half in a row, as __byte_perm takes them. */
static void store_levels(uint8_t *to, uint32_t output, const uint8_t *code)
{
    for (uint32_t k = 0; k < 32; k++) {
        uint32_t lane = output % 8 * 4 + k % 16 / 4;
        to[lane * 16 + output / 8 * 4 + k / 16 * 2 + k % 4 / 2] |= (uint8_t)(code[k] << k % 2 * 4);
    }
}

static void pack_quants(enum cuda_weight_type type, const uint8_t *row, uint32_t index,
                        uint32_t output, uint8_t *to)
{
    struct block b = {{0}};
    uint32_t slot = slot_of(output);

    read_block(type, row, index, &b);
    if (type == CUDA_W_MXFP4) {
        to[slot] = b.scales;
        store_levels(to + 32, output, b.code);
        return;
    }
    store_16(to + 2 * slot, b.scale);
    to += 64;
    if (type == CUDA_W_Q4_K) {
        store_16(to + 2 * slot, b.min);
        to[64 + slot] = b.scales;
        to[96 + slot] = b.mins;
        to += 128;
    }
    if (type == CUDA_W_Q6_K) {
        to[slot] = b.half_scales[0];
        to[32 + slot] = b.half_scales[1];
        to += 64;
    }
    store_codes(type, to, output, b.code);
}

/* ---- halves ------------------------------------------------------------------------------ */

/* Registers a0..a3 of m16n8k16: rows g and g + 8, then the same with k + 8. */
static void pack_halves(const uint16_t *values, uint32_t n, uint32_t output, uint8_t *to)
{
    for (uint32_t k = 0; k < n; k++) {
        uint32_t plane = output / 16 * 2 + k / 16, in = k % 16;
        uint32_t lane = output % 8 * 4 + in % 8 / 2, reg = output % 16 / 8 + in / 8 * 2;
        store_16(to + plane * 512 + lane * 16 + reg * 4 + in % 2 * 2, values[k]);
    }
}

/* Up to 32 values of a row from block index on. */
static void read_halves(const struct fmt_type_info *info, const uint8_t *row, uint32_t first,
                        uint32_t n, uint16_t *ret)
{
    float values[FMT_MAX_BLOCK_VALUES];
    uint32_t skipped = first % info->n_block;

    if (info->type == GQA_TYPE_F16 || info->type == GQA_TYPE_BF16) {
        for (uint32_t i = 0; i < n; i++) {
            ret[i] = load_16(row + 2 * (size_t)(first + i));
        }
        return;
    }
    uint32_t n_read = info->n_block > n ? info->n_block : n;
    info->dequantise(row + (size_t)(first / info->n_block) * info->block_bytes, values, n_read);
    for (uint32_t i = 0; i < n; i++) {
        ret[i] = fmt_f32_to_f16(values[skipped + i]);
    }
}

static void pack_row(const struct gqa_weight *w, uint64_t output, uint8_t *strip)
{
    const struct fmt_type_info *info = fmt_type_info(w->type);
    enum cuda_weight_type type = cuda_weight_type_of(w->type);
    const uint8_t *row = (const uint8_t *)w->data + output * fmt_type_bytes(info, w->ne[0]);
    uint32_t n_blocks = (uint32_t)((w->ne[0] + CUDA_BLOCK - 1) / CUDA_BLOCK);

    for (uint32_t b = 0; b < n_blocks; b++) {
        uint8_t *to = strip + (size_t)b * cuda_block_bytes(type);
        if (type == CUDA_W_F16 || type == CUDA_W_BF16) {
            uint64_t left = w->ne[0] - (uint64_t)b * CUDA_BLOCK;
            uint32_t n = left < CUDA_BLOCK ? (uint32_t)left : CUDA_BLOCK;
            uint16_t values[CUDA_BLOCK];
            read_halves(info, row, b * CUDA_BLOCK, n, values);
            pack_halves(values, n, output % CUDA_STRIP, to);
        } else {
            pack_quants(type, row, b, output % CUDA_STRIP, to);
        }
    }
}

int cuda_weights_pack(const struct gqa_weight *w, uint64_t first_row, uint64_t n_rows, void *dst)
{
    uint64_t end = first_row + n_rows;

    if (cuda_weights_packed_bytes(w) == 0 || first_row % CUDA_STRIP != 0 ||
        end > cuda_weights_rows(w) || (end % CUDA_STRIP != 0 && end != cuda_weights_rows(w))) {
        return -EINVAL;
    }
    uint64_t strip_bytes = cuda_strip_bytes(w);
    for (uint64_t row = first_row; row < end; row++) {
        uint8_t *strip = (uint8_t *)dst + row / CUDA_STRIP * strip_bytes;
        if (row % CUDA_STRIP == 0) {
            memset(strip, 0, strip_bytes);
        }
        pack_row(w, row, strip);
    }
    return 0;
}

int cuda_weights_packed(const struct gqa_weight *w, const void **ret, void **ret_made)
{
    *ret = w->packed;
    *ret_made = NULL;
    if (w->packed != NULL) {
        return 0;
    }
    *ret = *ret_made = malloc(cuda_weights_packed_bytes(w));
    return *ret_made == NULL ? -ENOMEM : cuda_weights_pack(w, 0, cuda_weights_rows(w), *ret_made);
}
