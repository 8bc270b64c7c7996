/* Where K and V of every layer lie in a block. */
#include "daemon/kv/numbers.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct kv_layer_desc layer(uint32_t window, uint32_t n_kv_heads, uint32_t dim, uint32_t type)
{
    return (struct kv_layer_desc){window, n_kv_heads, dim, dim, type, type};
}

/* Two layers of 2 groups, K of 4 dimensions in f16 and V of 8 in f32, byte by byte:
 *
 *   0     layer 0: K of group 0 (64 * 4 * 2), K of group 1
 *   1024           V of group 0 (64 * 8 * 4), V of group 1
 *   5120  layer 1, the same; the block ends at 10240 */
Test(kv_layout, a_block_byte_by_byte)
{
    const struct kv_layer_desc d = {0, 2, 4, 8, GQA_TYPE_F16, GQA_TYPE_F32};
    const struct kv_layer_desc layers[] = {d, d};
    struct kv_layout l;
    cr_assert(eq(int, kv_layout_init(&l, layers, 2), 0));
    cr_expect(eq(u32, l.n_classes, 1));
    cr_expect(eq(u64, l.classes[0].k_head_bytes, 512));
    cr_expect(eq(u64, l.classes[0].v_head_bytes, 2048));
    cr_expect(eq(u64, l.classes[0].layer_bytes, 5120));
    cr_expect(eq(u64, l.classes[0].block_bytes, 10240));
    cr_expect(eq(u64, kv_layout_token_bytes(&l), 160));
    const uint64_t k_offsets[] = {0, 5120};
    const uint64_t v_offsets[] = {1024, 6144};
    for (uint32_t i = 0; i < 2; i++) {
        struct gqa_attn_layer a = {.layer = 77};
        kv_layout_describe(&l, i, &a);
        cr_expect(eq(u64, a.k_offset, k_offsets[i]));
        cr_expect(eq(u64, a.v_offset, v_offsets[i]));
        cr_expect(eq(u64, a.k_head_bytes, 512));
        cr_expect(eq(u64, a.v_head_bytes, 2048));
        cr_expect(eq(u32, a.layer_class, 0));
        cr_expect(eq(u32, a.n_kv_heads, 2));
        cr_expect(eq(u32, a.k_dim, 4));
        cr_expect(eq(u32, a.v_dim, 8));
        cr_expect(eq(u32, a.k_type, GQA_TYPE_F16));
        cr_expect(eq(u32, a.v_type, GQA_TYPE_F32));
        cr_expect(eq(u32, a.layer, 77)); /* not the layout's to set */
    }
    kv_layout_finish(&l);
    cr_expect(l.layer_class == NULL);
}

Test(kv_layout, windows_make_classes)
{
    struct kv_layer_desc layers[6];
    for (uint32_t i = 0; i < 6; i++) {
        layers[i] = layer(i % 3 == 2 ? 0 : 512, 4, 64, GQA_TYPE_F16);
    }
    struct kv_layout l;
    cr_assert(eq(int, kv_layout_init(&l, layers, 6), 0));
    const uint32_t classes[] = {0, 0, 1, 0, 0, 1};
    const uint64_t places[] = {0, 1, 0, 2, 3, 1};
    const uint64_t layer_bytes = 4 * 2 * 64 * 64 * 2;
    cr_expect(eq(u32, l.n_classes, 2));
    cr_expect(eq(u32, l.classes[0].n_layers, 4));
    cr_expect(eq(u32, l.classes[1].n_layers, 2));
    cr_expect(eq(u64, l.classes[0].block_bytes, 4 * layer_bytes));
    for (uint32_t i = 0; i < 6; i++) {
        struct gqa_attn_layer a = {0};
        kv_layout_describe(&l, i, &a);
        cr_expect(eq(u32, a.layer_class, classes[i]));
        cr_expect(eq(u64, a.k_offset, places[i] * layer_bytes));
        cr_expect(eq(u32, a.window, classes[i] == 0 ? 512 : 0));
    }
    kv_layout_finish(&l);
}

/* Every part starts at a multiple of a cache line, at every type and odd dimension. */
Test(kv_layout, parts_are_aligned)
{
    const char *types[] = {"f32", "f16", "bf16", "q8_0", "q4_0"};
    for (uint32_t dim = 1; dim <= 96; dim += 5) {
        for (size_t t = 0; t < 5; t++) {
            uint32_t type;
            cr_assert(eq(int, kv_type_by_name(types[t], &type), 0));
            cr_expect(eq(int, strcmp(kv_type_name(type), types[t]), 0));
            const struct kv_layer_desc layers[] = {layer(0, 3, dim, type), layer(0, 3, dim, type)};
            struct kv_layout l;
            struct gqa_attn_layer a = {0};
            cr_assert(eq(int, kv_layout_init(&l, layers, 2), 0));
            kv_layout_describe(&l, 1, &a);
            cr_expect(eq(u64, a.k_offset % KV_ALIGN_BYTES, 0));
            cr_expect(eq(u64, a.v_offset % KV_ALIGN_BYTES, 0));
            cr_expect(eq(u64, a.k_head_bytes % KV_ALIGN_BYTES, 0));
            cr_expect(eq(u64, l.classes[0].block_bytes % KV_ALIGN_BYTES, 0));
            uint64_t quants = (dim + 31) / 32;
            const uint64_t token_bytes[] = {4 * dim, 2 * dim, 2 * dim, 34 * quants, 18 * quants};
            cr_expect(eq(u64, a.k_head_bytes, 64 * token_bytes[t]));
            kv_layout_finish(&l);
        }
    }
}

Test(kv_layout, what_has_no_layout_is_refused)
{
    struct kv_layout l = {.n_layers = 99};
    struct kv_layer_desc d = layer(0, 2, 64, GQA_TYPE_Q4_K);
    uint32_t type = 7;
    cr_expect(eq(int, kv_layout_init(&l, &d, 1), -ENOTSUP));
    d = layer(0, 0, 64, GQA_TYPE_F16);
    cr_expect(eq(int, kv_layout_init(&l, &d, 1), -EINVAL));
    d = layer(0, 2, (1u << 16) + 1, GQA_TYPE_F16);
    cr_expect(eq(int, kv_layout_init(&l, &d, 1), -EINVAL));
    cr_expect(eq(int, kv_layout_init(&l, &d, 0), -EINVAL));
    struct kv_layer_desc many[KV_MAX_CLASSES + 1];
    for (uint32_t i = 0; i <= KV_MAX_CLASSES; i++) {
        many[i] = layer(i, 2, 64, GQA_TYPE_F16);
    }
    cr_expect(eq(int, kv_layout_init(&l, many, KV_MAX_CLASSES + 1), -E2BIG));
    cr_expect(eq(u32, l.n_layers, 99)); /* untouched by failures */
    cr_assert(eq(int, kv_layout_init(&l, many, KV_MAX_CLASSES), 0));
    kv_layout_finish(&l);
    cr_expect(eq(int, kv_type_by_name("q4_k", &type), -EINVAL));
    cr_expect(eq(u32, type, 7));
    cr_expect(eq(int, strcmp(kv_type_name(12345), "unknown"), 0));
}

/* ---- numbers ----------------------------------------------------------------------------- */

/* Where a value, or the scale of its quant, lies in its group's K or V. */
static size_t place_of(uint32_t type, uint32_t n_dims, uint32_t token, uint32_t dim, bool is_v)
{
    bool quant = type == GQA_TYPE_Q8_0 || type == GQA_TYPE_Q4_0;
    size_t bytes = type == GQA_TYPE_F32 ? 4 : 2;
    if (quant) {
        return is_v ? gqa_v_quant_scale(type, n_dims, token, dim)
                    : gqa_k_quant_scale(type, n_dims, token, dim);
    }
    return bytes * (is_v ? gqa_v_index(n_dims, token, dim) : gqa_k_index(n_dims, token, dim));
}

/* Of every type: the bits of a number, and how many bytes. */
static uint32_t bits_of(uint32_t type, float x, size_t *ret_bytes)
{
    uint32_t bits = gqa_float_bits(x);
    *ret_bytes = type == GQA_TYPE_F32 ? 4 : 2;
    return type == GQA_TYPE_F32 ? bits : type == GQA_TYPE_BF16 ? bits >> 16 : gqa_f32_to_f16(x);
}

static void check_numbers(uint32_t type, uint32_t n_dims)
{
    const struct kv_layer_desc all = layer(0, 2, n_dims, type), some = layer(64, 1, n_dims, type);
    const struct kv_layer_desc layers[] = {all, some, all};
    struct kv_layout l;
    cr_assert(eq(int, kv_layout_init(&l, layers, 3), 0));
    char *block = malloc(l.classes[0].block_bytes);
    /* Bytes of quants may be anything: only their scales are numbers. */
    memset(block, type == GQA_TYPE_Q8_0 || type == GQA_TYPE_Q4_0 ? 0x7b : 0,
           l.classes[0].block_bytes);
    cr_expect(kv_numbers_are_sound(&l, 0, block), "type %u", type);
    for (uint32_t i = 0; i < 400; i++) {
        struct gqa_attn_layer a;
        const float odd[] = {__builtin_nanf(""), __builtin_inff(), -__builtin_inff(),
                             type == GQA_TYPE_F32 || type == GQA_TYPE_BF16 ? 65536.0f
                                                                           : __builtin_inff()};
        uint32_t token = i * 7 % 64, dim = i * 11 % n_dims, group = i % 2;
        kv_layout_describe(&l, i % 3 == 0 ? 0 : 2, &a);
        size_t at =
            i % 4 < 2 ? a.k_offset + group * a.k_head_bytes : a.v_offset + group * a.v_head_bytes;
        at += place_of(type, n_dims, token, dim, i % 4 >= 2);
        size_t bytes;
        char before[4];
        uint32_t bits = bits_of(type, odd[i / 4 % 4], &bytes);
        memcpy(before, block + at, bytes);
        memcpy(block + at, &bits, bytes);
        cr_expect(not(kv_numbers_are_sound(&l, 0, block)), "type %u: %u", type, i);
        memcpy(block + at, before, bytes);
        bits = bits_of(type, i % 2 ? 65472.0f : -65280.0f, &bytes);
        memcpy(block + at, &bits, bytes);
        cr_expect(kv_numbers_are_sound(&l, 0, block), "type %u: %u", type, i);
    }
    free(block);
    kv_layout_finish(&l);
}

Test(kv_layout, blocks_of_others_hold_numbers)
{
    const uint32_t types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0,
                              GQA_TYPE_Q4_0};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        check_numbers(types[i], 64);
        check_numbers(types[i], 40);
    }
}
