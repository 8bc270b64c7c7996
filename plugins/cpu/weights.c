/* plugins/cpu/weights.c - packs weights from a file's blocks into strips (see weights.h).
 *
 * Each type's reader takes one unit of one output apart into plain integers; one writer places
 * them. The file's blocks may lie at any address. */
#include "plugins/cpu/weights.h"

#include <errno.h>
#include <string.h>

/* One unit of one output: what its blocks say, nothing multiplied. */
struct unit {
    uint16_t scale, min;                  /* f16 bits; the scale may be an exponent */
    uint8_t scales[CPU_SUPER_BLOCK / 16]; /* integer scales: per block, or per half of one */
    uint8_t mins[CPU_SUPER_BLOCK / 16];
    uint8_t q[CPU_SUPER_BLOCK]; /* stored values in the order of k */
};

static uint16_t load_u16(const uint8_t *at)
{
    uint16_t v;
    memcpy(&v, at, sizeof(v));
    return v;
}

/* The plain types of 4 and 5 bits, and IQ4_XS's blocks: byte j holds value j in its low half and
 * value j + 16 in its high half; fifth is NULL or 32 bits, one for each value. */
static void read_nibbles(const uint8_t *nibbles, const uint8_t *fifth, uint8_t *q)
{
    uint32_t high = 0;

    if (fifth != NULL) {
        memcpy(&high, fifth, sizeof(high));
    }
    for (uint32_t j = 0; j < 16; j++) {
        q[j] = (uint8_t)((nibbles[j] & 0xf) | (high >> j & 1) << 4);
        q[j + 16] = (uint8_t)(nibbles[j] >> 4 | (high >> (j + 16) & 1) << 4);
    }
}

static void read_q4_0(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    read_nibbles(src + 2, NULL, u->q);
}

static void read_q4_1(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    u->min = load_u16(src + 2);
    read_nibbles(src + 4, NULL, u->q);
}

static void read_q5_0(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    read_nibbles(src + 6, src + 2, u->q);
}

static void read_q5_1(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    u->min = load_u16(src + 2);
    read_nibbles(src + 8, src + 4, u->q);
}

static void read_q8_0(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    memcpy(u->q, src + 2, CPU_BLOCK);
}

static void read_iq4_nl(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    read_nibbles(src + 2, NULL, u->q);
}

static void read_mxfp4(const uint8_t *src, struct unit *u)
{
    u->scale = src[0];
    read_nibbles(src + 1, NULL, u->q);
}

/* Q2_K and Q3_K: bits 2j, 2j + 1 of byte l of a half's 32 bytes are value 32 j + l of the half's
 * 128; bit b of third[l] is the third bit of value 32 b + l of all 256. */
static void read_k_pairs(const uint8_t *pairs, const uint8_t *third, uint8_t *q)
{
    for (uint32_t v = 0; v < CPU_SUPER_BLOCK; v++) {
        uint32_t low = pairs[v / 128 * 32 + v % 32] >> (v % 128 / 32 * 2) & 3;
        uint32_t high = third != NULL ? third[v % 32] >> v / 32 & 1 : 0;
        q[v] = (uint8_t)(low | high << 2);
    }
}

static void read_q2_k(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src + 80);
    u->min = load_u16(src + 82);
    for (uint32_t s = 0; s < 16; s++) {
        u->scales[s] = src[s] & 0xf;
        u->mins[s] = src[s] >> 4;
    }
    read_k_pairs(src + 16, NULL, u->q);
}

/* The scales have six bits and 32 too much. Their low nibbles: bytes 0..7 of twelve, the low halves
 * for the first eight, the high halves for the others; the top two bits of scale s: bits
 * 2 (s / 4).. of byte 8 + s % 4. */
static void read_q3_k(const uint8_t *src, struct unit *u)
{
    const uint8_t *packed = src + 96;

    u->scale = load_u16(src + 108);
    for (uint32_t s = 0; s < 16; s++) {
        uint32_t low = packed[s % 8] >> s / 8 * 4 & 0xf;
        uint32_t high = packed[8 + s % 4] >> s / 4 * 2 & 3;
        u->scales[s] = (uint8_t)((low | high << 4) - 32);
    }
    read_k_pairs(src + 32, src, u->q);
}

/* The six-bit scales and minimums of Q4_K and Q5_K: the first four of each in bits 0..5 of bytes
 * 0..3 and 4..7; the last four with their low nibbles in bytes 8..11 (scale low half, minimum high
 * half) and their top two bits in the top two bits of bytes 0..3 and 4..7. */
static void read_k_scales(const uint8_t *packed, struct unit *u)
{
    for (uint32_t s = 0; s < 4; s++) {
        uint8_t low = packed[8 + s];
        u->scales[s] = packed[s] & 63;
        u->mins[s] = packed[4 + s] & 63;
        u->scales[4 + s] = (uint8_t)((low & 0xf) | packed[s] >> 6 << 4);
        u->mins[4 + s] = (uint8_t)(low >> 4 | packed[4 + s] >> 6 << 4);
    }
}

/* 32 bytes hold two blocks, one in the low and one in the high nibbles; bit s of fifth[l] is the
 * fifth bit of value l of block s. */
static void read_k_values(const uint8_t *nibbles, const uint8_t *fifth, uint8_t *q)
{
    for (uint32_t v = 0; v < CPU_SUPER_BLOCK; v++) {
        uint32_t s = v / CPU_BLOCK, l = v % CPU_BLOCK;
        uint32_t low = nibbles[s / 2 * CPU_BLOCK + l] >> (s % 2 * 4) & 0xf;
        uint32_t high = fifth != NULL ? fifth[l] >> s & 1 : 0;
        q[v] = (uint8_t)(low | high << 4);
    }
}

static void read_q4_k(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    u->min = load_u16(src + 2);
    read_k_scales(src + 4, u);
    read_k_values(src + 16, NULL, u->q);
}

static void read_q5_k(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src);
    u->min = load_u16(src + 2);
    read_k_scales(src + 4, u);
    read_k_values(src + 48, src + 16, u->q);
}

/* Each half of 128 values: value 32 j + l has its low nibble in byte 32 (j % 2) + l of the half's
 * 64 (low half of the byte for j < 2, high half after) and its top two bits in bits 2j.. of byte l
 * of the half's 32. */
static void read_q6_k(const uint8_t *src, struct unit *u)
{
    u->scale = load_u16(src + 208);
    memcpy(u->scales, src + 192, 16);
    for (uint32_t v = 0; v < CPU_SUPER_BLOCK; v++) {
        uint32_t half = v / 128, j = v % 128 / 32, l = v % 32;
        uint32_t low = src[half * 64 + j % 2 * 32 + l] >> (j / 2 * 4) & 0xf;
        uint32_t high = src[128 + half * 32 + l] >> (2 * j) & 3;
        u->q[v] = (uint8_t)(low | high << 4);
    }
}

/* The scales have six bits and 32 too much: four in the nibbles of bytes 4..7, two in the 16 bits
 * at byte 2. */
static void read_iq4_xs(const uint8_t *src, struct unit *u)
{
    uint32_t high_bits = load_u16(src + 2);

    u->scale = load_u16(src);
    for (uint32_t s = 0; s < 8; s++) {
        uint32_t low = src[4 + s / 2] >> s % 2 * 4 & 0xf;
        u->scales[s] = (uint8_t)((low | (high_bits >> 2 * s & 3) << 4) - 32);
        read_nibbles(src + 8 + s * 16, NULL, u->q + s * CPU_BLOCK);
    }
}

/* A type's row: bytes of a unit in the file, and its reader. Its layout is in weights.h. */
static const struct {
    uint32_t file_bytes;
    void (*read)(const uint8_t *src, struct unit *u);
} readers[CPU_LAYOUT_COUNT] = {
    [CPU_LAYOUT_Q4_0] = {18, read_q4_0},     [CPU_LAYOUT_Q4_1] = {20, read_q4_1},
    [CPU_LAYOUT_Q5_0] = {22, read_q5_0},     [CPU_LAYOUT_Q5_1] = {24, read_q5_1},
    [CPU_LAYOUT_Q8_0] = {34, read_q8_0},     [CPU_LAYOUT_Q2_K] = {84, read_q2_k},
    [CPU_LAYOUT_Q3_K] = {110, read_q3_k},    [CPU_LAYOUT_Q4_K] = {144, read_q4_k},
    [CPU_LAYOUT_Q5_K] = {176, read_q5_k},    [CPU_LAYOUT_Q6_K] = {210, read_q6_k},
    [CPU_LAYOUT_IQ4_NL] = {18, read_iq4_nl}, [CPU_LAYOUT_IQ4_XS] = {136, read_iq4_xs},
    [CPU_LAYOUT_MXFP4] = {17, read_mxfp4},
};

enum cpu_layout_id cpu_layout_of(uint32_t type)
{
    for (uint32_t i = 0; i < CPU_LAYOUT_COUNT; i++) {
        if (cpu_layouts[i].type == type) {
            return (enum cpu_layout_id)i;
        }
    }
    return CPU_LAYOUT_COUNT;
}

/* Outputs of all of a weight's matrices, or 0 for a shape that is not packed. */
static uint64_t packed_rows(const struct gqa_weight *weight)
{
    uint64_t rows = weight->ne[1];

    if (weight->n_dims == 3 && (weight->ne[1] % CPU_STRIP_ROWS != 0 ||
                                __builtin_mul_overflow(rows, weight->ne[2], &rows))) {
        return 0;
    }
    return weight->n_dims < 2 || weight->n_dims > 3 || rows > UINT64_MAX - CPU_STRIP_ROWS ? 0
                                                                                          : rows;
}

uint64_t cpu_weights_packed_bytes(const struct gqa_weight *weight)
{
    enum cpu_layout_id id = cpu_layout_of(weight->type);
    uint64_t rows = packed_rows(weight), bytes;

    if (id == CPU_LAYOUT_COUNT || weight->ne[0] == 0 || rows == 0 ||
        weight->ne[0] % cpu_layouts[id].unit != 0) {
        return 0;
    }
    uint64_t strips = (rows + CPU_STRIP_ROWS - 1) / CPU_STRIP_ROWS;
    uint64_t units = weight->ne[0] / cpu_layouts[id].unit;
    if (__builtin_mul_overflow(units, cpu_layout_unit_bytes(&cpu_layouts[id]), &bytes) ||
        __builtin_mul_overflow(bytes, strips, &bytes)) {
        return 0;
    }
    return bytes;
}

/* Places the 32 values of output o of one block; lines start as zeros. */
static void write_block(const struct cpu_layout *l, uint32_t o, const uint8_t *q, uint8_t *lines)
{
    uint32_t below = 0; /* bits in the planes before */

    for (uint32_t width = 8; width > 0; width /= 2) {
        if ((l->bits & width) == 0) {
            continue;
        }
        for (uint32_t k = 0; k < CPU_BLOCK; k++) {
            uint32_t vector = k / 4, at = 4 * o + k % 4;
            uint32_t bits = (uint32_t)q[k] >> below & ((1u << width) - 1);
            uint8_t *byte = lines + vector * width / 8 * CPU_BLOCK_LINE + at;
            *byte |= (uint8_t)(bits << vector * width % 8);
        }
        lines += width * CPU_BLOCK_LINE;
        below += width;
    }
}

/* Places output o's integer scales of block b. */
static void write_scales(const struct cpu_layout *l, uint32_t o, const struct unit *u, uint32_t b,
                         uint8_t *block)
{
    switch (l->scales) {
    case CPU_SCALES_NONE:
        break;
    case CPU_SCALES_BLOCK:
        block[o] = u->scales[b];
        break;
    case CPU_SCALES_BLOCK_MIN:
        block[o] = u->scales[b];
        block[CPU_STRIP_ROWS + o] = u->mins[b];
        break;
    case CPU_SCALES_HALVES:
        block[o] = u->scales[2 * b];
        block[CPU_STRIP_ROWS + o] = u->scales[2 * b + 1];
        break;
    case CPU_SCALES_HALVES_MIN:
        block[o] = (uint8_t)(u->scales[2 * b] | u->mins[2 * b] << 4);
        block[CPU_STRIP_ROWS + o] = (uint8_t)(u->scales[2 * b + 1] | u->mins[2 * b + 1] << 4);
        break;
    }
}

/* Places output o's unit into the strip's unit at dst. */
static void write_unit(const struct cpu_layout *l, uint32_t o, const struct unit *u, uint8_t *dst)
{
    uint8_t *block = dst + cpu_layout_header_bytes(l);

    if (l->has_exps) {
        dst[o] = (uint8_t)u->scale;
    } else {
        memcpy(dst + 2 * o, &u->scale, sizeof(u->scale));
    }
    if (l->has_min) {
        memcpy(dst + cpu_layout_header_scales_bytes(l) + 2 * o, &u->min, sizeof(u->min));
    }
    for (uint32_t b = 0; b < l->unit / CPU_BLOCK; b++, block += cpu_layout_block_bytes(l)) {
        write_scales(l, o, u, b, block);
        write_block(l, o, u->q + b * CPU_BLOCK, block + cpu_layout_scales_bytes(l));
    }
}

int cpu_weights_pack(const struct gqa_weight *weight, uint64_t first_row, uint64_t n_rows,
                     void *dst)
{
    enum cpu_layout_id id = cpu_layout_of(weight->type);
    uint64_t all_rows = packed_rows(weight);

    if (cpu_weights_packed_bytes(weight) == 0 || first_row % CPU_STRIP_ROWS != 0 ||
        first_row > all_rows || n_rows > all_rows - first_row ||
        (n_rows % CPU_STRIP_ROWS != 0 && first_row + n_rows != all_rows)) {
        return -EINVAL;
    }
    const struct cpu_layout *l = &cpu_layouts[id];
    uint64_t units = weight->ne[0] / l->unit;
    uint64_t unit_bytes = cpu_layout_unit_bytes(l);
    uint64_t strips = (n_rows + CPU_STRIP_ROWS - 1) / CPU_STRIP_ROWS;
    const uint8_t *src = (const uint8_t *)weight->data + first_row * units * readers[id].file_bytes;
    uint8_t *strip = (uint8_t *)dst + first_row / CPU_STRIP_ROWS * units * unit_bytes;

    memset(strip, 0, strips * units * unit_bytes);
    for (uint64_t row = 0; row < n_rows; row++) {
        uint8_t *unit = strip + row / CPU_STRIP_ROWS * units * unit_bytes;
        for (uint64_t i = 0; i < units; i++, src += readers[id].file_bytes, unit += unit_bytes) {
            struct unit u;
            readers[id].read(src, &u);
            write_unit(l, (uint32_t)(row % CPU_STRIP_ROWS), &u, unit);
        }
    }
    return 0;
}
