/* plugins/cpu/panels_amx.c - panels of bf16, and their products with tiles.
 *
 * Two tiles of rows meet two tiles of outputs: four tiles of sums, four loads for four products,
 * each of which takes the unit longer than a load takes the cache. */
#include "plugins/cpu/amx.h"
#include "plugins/cpu/linear.h"
#include "plugins/cpu/panels.h"
#include "plugins/cpu/strip_avx512.h"

#include <string.h>

#define PAIRS      16u /* of k, in a block */
#define STEP_BYTES ((size_t)CPU_PANEL_STRIPS * CPU_PANEL_BLOCK)

/* Two registers of 16 float32 as bf16: first's in the low half of the result. */
CPU_SPECIALISE __m512i round_two(__m512 first, __m512 second)
{
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

static void round_row(const float *x, uint32_t k, uint16_t *dst)
{
    for (uint32_t i = 0; i < k; i += CPU_BLOCK) {
        uint32_t left = k - i;
        __mmask16 low = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
        __mmask16 high = left >= 32   ? 0xffff
                         : left <= 16 ? 0
                                      : (__mmask16)((1u << (left - 16)) - 1);
        _mm512_storeu_si512(dst + i, round_two(_mm512_maskz_loadu_ps(low, x + i),
                                               _mm512_maskz_loadu_ps(high, x + i + 16)));
    }
}

/* What a block's values are multiplied with, of each half. */
struct factors {
    __m512 scale[2], min[2];
};

CPU_SPECIALISE void load_factors(const struct cpu_layout *l, const struct cpu_block *w,
                                 struct factors *ret)
{
    CPU_UNROLL
    for (int half = 0; half < 2; half++) {
        ret->scale[half] = w->scale;
        ret->min[half] = w->min;
        if (cpu_layout_has_halves(l)) {
            ret->scale[half] = _mm512_mul_ps(w->scale, w->half_scale[half]);
        }
    }
    if (l->scales == CPU_SCALES_HALVES_MIN) {
        const __m512i low = _mm512_set1_epi32(0xffff);
        __m512 first = _mm512_cvtepi32_ps(_mm512_and_si512(w->half_min, low));
        __m512 second = _mm512_cvtepi32_ps(_mm512_srli_epi32(w->half_min, 16));
        ret->min[0] = _mm512_mul_ps(w->min, first);
        ret->min[1] = _mm512_mul_ps(w->min, second);
    }
}

/* Value j of each output's four in a vector of signed bytes, multiplied out. */
CPU_SPECIALISE __m512 value_of(const struct cpu_layout *l, __m512i q, int j, __m512 scale,
                               __m512 min)
{
    __m512 f =
        _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(q, (unsigned)(24 - 8 * j)), 24));
    return l->has_min ? _mm512_fmadd_ps(f, scale, min) : _mm512_mul_ps(f, scale);
}

CPU_SPECIALISE void unpack_block(const struct cpu_layout *l, const struct cpu_block *w,
                                 __m512i interleave, uint8_t *panel)
{
    const __m512i offset = _mm512_set1_epi8((char)cpu_offset_of(l));
    struct factors f;

    load_factors(l, w, &f);
    CPU_UNROLL
    for (int v = 0; v < 8; v++) {
        __m512i q = _mm512_sub_epi8(w->q[v], offset);
        __m512 scale = f.scale[v / 4], min = f.min[v / 4];
        CPU_UNROLL
        for (int pair = 0; pair < 2; pair++) {
            __m512i two = round_two(value_of(l, q, 2 * pair, scale, min),
                                    value_of(l, q, 2 * pair + 1, scale, min));
            _mm512_store_si512(panel + (2 * v + pair) * (int)CPU_BLOCK_LINE,
                               _mm512_permutexvar_epi16(interleave, two));
        }
    }
}

/* Words 0, 16, 1, 17...: the pair of each output side by side. */
CPU_SPECIALISE __m512i interleaving(void)
{
    _Alignas(64) uint16_t words[2 * CPU_STRIP_ROWS];

    for (uint16_t o = 0; o < CPU_STRIP_ROWS; o++) {
        words[2 * o] = o;
        words[2 * o + 1] = (uint16_t)(CPU_STRIP_ROWS + o);
    }
    return _mm512_load_si512(words);
}

CPU_SPECIALISE void unpack_quant(const enum cpu_layout_id id, const uint8_t *strip,
                                 uint32_t n_blocks, uint8_t *panel)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    const __m512i levels = cpu_load_levels(l), interleave = interleaving();
    struct cpu_place place = {.at = strip};

    for (uint32_t b = 0; b < n_blocks; b++, panel += STEP_BYTES) {
        struct cpu_block w;

        if (b % (l->unit / CPU_BLOCK) == 0) {
            cpu_enter_unit(l, &place);
        }
        cpu_unpack_block(l, levels, &place, &w);
        unpack_block(l, &w, interleave, panel);
    }
}

/* 32 values of a row of the file: what lies past n is zeros and not read. */
CPU_SPECIALISE __m512i load_bf16(const uint8_t *at, uint32_t n)
{
    __mmask16 low = n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1);
    __mmask16 high = n >= 32 ? 0xffff : n <= 16 ? 0 : (__mmask16)((1u << (n - 16)) - 1);
    __m256i first = _mm256_maskz_loadu_epi16(low, at);
    __m256i second = _mm256_maskz_loadu_epi16(high, at + 32);

    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

/* A block of 16 outputs as they lie in the file, one after the other, becomes one of pairs. */
static void unpack_bf16(const struct cpu_matrix *m, const uint8_t *rows, uint32_t n_outs,
                        uint8_t *panel)
{
    const size_t stride = m->strip_bytes / CPU_STRIP_ROWS;

    for (uint32_t k = 0; k < m->k; k += CPU_BLOCK, panel += STEP_BYTES) {
        _Alignas(64) uint32_t pairs[CPU_STRIP_ROWS][PAIRS];
        uint32_t *to = (uint32_t *)(void *)panel;

        memset(pairs, 0, sizeof(pairs));
        for (uint32_t o = 0; o < n_outs; o++) {
            _mm512_store_si512(pairs[o], load_bf16(rows + o * stride + (size_t)k * 2, m->k - k));
        }
        for (uint32_t p = 0; p < PAIRS; p++) {
            for (uint32_t o = 0; o < CPU_STRIP_ROWS; o++) {
                to[p * CPU_STRIP_ROWS + o] = pairs[o][p];
            }
        }
    }
}

#define CASE_QUANT(type)                                      \
    case CPU_LAYOUT_##type:                                   \
        unpack_quant(CPU_LAYOUT_##type, at, n_blocks, panel); \
        break;

static void unpack_strip(const struct cpu_matrix *m, uint32_t strip, uint8_t *panel)
{
    const uint32_t n_blocks = (m->k + CPU_BLOCK - 1) / CPU_BLOCK;
    const uint8_t *at = m->data + strip * m->strip_bytes;

    if (strip * CPU_STRIP_ROWS >= m->n) {
        for (uint32_t b = 0; b < n_blocks; b++) {
            memset(panel + b * STEP_BYTES, 0, CPU_PANEL_BLOCK);
        }
        return;
    }
    uint32_t left = m->n - strip * CPU_STRIP_ROWS;
    uint32_t n_outs = left < CPU_STRIP_ROWS ? left : CPU_STRIP_ROWS;

    switch (m->layout) {
        CPU_EACH_LAYOUT(CASE_QUANT)
    case CPU_LAYOUT_COUNT:
        unpack_bf16(m, at, n_outs, panel);
        break;
    }
}

/* Tiles 0..3: sums, (rows, strip) = (0, 0) (0, 1) (1, 0) (1, 1). 4 and 5: rows. 6 and 7: strips. */
static void configure(uint32_t n_first, uint32_t n_second)
{
    struct amx_shapes s = amx_no_shapes();

    amx_shape(&s, 0, n_first, AMX_ROW_BYTES);
    amx_shape(&s, 1, n_first, AMX_ROW_BYTES);
    amx_shape(&s, 4, n_first, AMX_ROW_BYTES);
    if (n_second > 0) {
        amx_shape(&s, 2, n_second, AMX_ROW_BYTES);
        amx_shape(&s, 3, n_second, AMX_ROW_BYTES);
        amx_shape(&s, 5, n_second, AMX_ROW_BYTES);
    }
    amx_shape(&s, 6, PAIRS, AMX_ROW_BYTES);
    amx_shape(&s, 7, PAIRS, AMX_ROW_BYTES);
    amx_configure(&s);
}

static void multiply(const struct cpu_panel_product *p, float *out)
{
    const size_t row_bytes = (size_t)p->n_blocks * CPU_BLOCK * sizeof(*p->x);
    const size_t out_bytes = CPU_PANEL_OUTS * sizeof(*out);
    const uint32_t n_first = p->n_rows < AMX_ROWS ? p->n_rows : AMX_ROWS;
    const int both = p->n_rows > AMX_ROWS;
    const uint16_t *x = p->x, *second = x + AMX_ROWS * (size_t)p->n_blocks * CPU_BLOCK;
    const uint8_t *panel = p->panel;

    configure(n_first, p->n_rows - n_first);
    amx_zero(0);
    amx_zero(1);
    if (both) {
        amx_zero(2);
        amx_zero(3);
    }
    for (uint32_t b = 0; b < p->n_blocks; b++, x += CPU_BLOCK, panel += STEP_BYTES) {
        amx_load(6, panel, CPU_BLOCK_LINE);
        amx_load(7, panel + CPU_PANEL_BLOCK, CPU_BLOCK_LINE);
        amx_load(4, x, row_bytes);
        amx_multiply_bf16(0, 4, 6);
        amx_multiply_bf16(1, 4, 7);
        if (both) {
            amx_load(5, second, row_bytes);
            amx_multiply_bf16(2, 5, 6);
            amx_multiply_bf16(3, 5, 7);
            second += CPU_BLOCK;
        }
    }
    amx_store(0, out, out_bytes);
    amx_store(1, out + CPU_STRIP_ROWS, out_bytes);
    if (both) {
        out += AMX_ROWS * CPU_PANEL_OUTS;
        amx_store(2, out, out_bytes);
        amx_store(3, out + CPU_STRIP_ROWS, out_bytes);
    }
    amx_release();
}

const struct cpu_panel_kernels cpu_panels_amx = {
    .round_row = round_row,
    .unpack_strip = unpack_strip,
    .multiply = multiply,
};
