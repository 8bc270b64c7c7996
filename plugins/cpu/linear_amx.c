/* plugins/cpu/linear_amx.c - products of quantised weights of class D with tiles of int8.
 *
 * A block's vectors, unpacked to signed bytes, are the rows of one operand (8 x 16 outputs x 4 k),
 * a tile of activations is the other; the unit gives the same exact sums as VPDPBUSD does, and what
 * follows them is strip_avx512.h's: the same bits as the AVX-512 level's. Sums of four parts
 * (blocks, or halves of blocks where these have scales of their own) are in work at once, since
 * each is finished in ordinary registers, which tiles reach through memory only.
 *
 * Few rows leave most of the unit idle: they are the AVX-512 level's. */
#include "plugins/cpu/amx.h"
#include "plugins/cpu/linear.h"
#include "plugins/cpu/strip_avx512.h"

/* Not measured: from here on the unit has more to do than the unpacking that it costs. */
#define ROWS_MIN 8u

/* How far ahead of the block in work to ask for the strip's bytes: the hardware's own prefetch
 * stops at each page. Not measured either. */
#define PREFETCH_BYTES 4096u

#define PARTS       4u
#define BLOCK_BYTES (8 * CPU_BLOCK_LINE)

/* Parts of blocks, unpacked, and their sums. */
struct parts {
    uint8_t w[PARTS * BLOCK_BYTES];
    int32_t sums[PARTS][CPU_TILE_ROWS][CPU_STRIP_ROWS];
};

/* Tiles 0..3: sums. 4 and 5: activations. 6 and 7: weights. */
static void configure(const struct cpu_layout *l, uint32_t n_rows)
{
    const uint32_t k = cpu_layout_has_halves(l) ? CPU_BLOCK / 2 : CPU_BLOCK;
    struct amx_shapes s = amx_no_shapes();

    for (uint32_t t = 0; t < 4; t++) {
        amx_shape(&s, t, n_rows, CPU_STRIP_ROWS * sizeof(int32_t));
    }
    amx_shape(&s, 4, n_rows, k);
    amx_shape(&s, 5, n_rows, k);
    amx_shape(&s, 6, k / 4, CPU_BLOCK_LINE);
    amx_shape(&s, 7, k / 4, CPU_BLOCK_LINE);
    amx_configure(&s);
}

#define SUM_PART(i, acts, weights)                                                         \
    do {                                                                                   \
        amx_load(acts, a + (i) / parts * step + (i) % parts * (CPU_BLOCK / 2), CPU_BLOCK); \
        amx_load(weights, p->w + (i) * (BLOCK_BYTES / parts), CPU_BLOCK_LINE);             \
        amx_zero(i);                                                                       \
        amx_multiply_int8(i, acts, weights);                                               \
        amx_store(i, p->sums[i], sizeof(p->sums[i][0]));                                   \
    } while (0)

/* The sums of n_blocks blocks whose weights are unpacked. a: the first block's rows, step bytes
 * from one block to the next. */
CPU_SPECIALISE void sum_parts(const uint32_t parts, struct parts *p, const int8_t *a, size_t step,
                              uint32_t n_blocks)
{
    uint32_t n = n_blocks * parts;

    SUM_PART(0, 4, 6);
    if (n > 1) {
        SUM_PART(1, 5, 7);
    }
    if (n > 2) {
        SUM_PART(2, 4, 6);
    }
    if (n > 3) {
        SUM_PART(3, 5, 7);
    }
}

/* Unpacks one block to signed bytes; its scales go to w. */
CPU_SPECIALISE void unpack_signed(const struct cpu_layout *l, __m512i levels,
                                  struct cpu_place *place, struct cpu_block *w, uint8_t *bytes)
{
    const __m512i offset = _mm512_set1_epi8((char)cpu_offset_of(l));

    for (uint32_t i = 0; i < cpu_layout_block_bytes(l); i += CPU_BLOCK_LINE) {
        _mm_prefetch((const char *)place->at + PREFETCH_BYTES + i, _MM_HINT_T0);
    }
    cpu_unpack_block(l, levels, place, w);
    CPU_UNROLL
    for (int v = 0; v < 8; v++) {
        _mm512_store_si512(bytes + v * (int)CPU_BLOCK_LINE, _mm512_sub_epi8(w->q[v], offset));
    }
}

/* Adds one block's sums of all rows to their outputs. sums: of its first part. */
CPU_SPECIALISE void add_sums(const struct cpu_layout *l, const uint32_t parts,
                             const struct cpu_block *w, const struct cpu_row *rows, uint32_t n_rows,
                             const int32_t (*sums)[CPU_TILE_ROWS][CPU_STRIP_ROWS], __m512 *acc)
{
    CPU_UNROLL
    for (uint32_t r = 0; r < CPU_TILE_ROWS; r++) {
        if (r < n_rows) {
            const struct cpu_row row = cpu_row_at(rows, r);
            const __m512i two[2] = {_mm512_load_si512(sums[0][r]),
                                    _mm512_load_si512(sums[parts - 1][r])};
            acc[r] = cpu_add_block(l, w, two, &row, acc[r]);
        }
    }
}

/* out (n_rows, 16) */
CPU_SPECIALISE void multiply_strip(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                                   const uint8_t *strip, float *out)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    const uint32_t parts = cpu_layout_has_halves(l) ? 2 : 1, most = PARTS / parts;
    const size_t step = (size_t)tile->n_tile_rows * CPU_BLOCK;
    const __m512i levels = cpu_load_levels(l);
    struct cpu_row rows = cpu_tile_row(tile, 0);
    struct cpu_place place = {.at = strip};
    _Alignas(64) struct parts p;
    __m512 acc[CPU_TILE_ROWS];

    CPU_UNROLL
    for (uint32_t r = 0; r < CPU_TILE_ROWS; r++) {
        acc[r] = _mm512_setzero_ps();
    }
    for (uint32_t b = 0; b < tile->n_blocks;) {
        uint32_t left = tile->n_blocks - b, n = left < most ? left : most;
        struct cpu_block w[PARTS];

        for (uint32_t i = 0; i < n; i++, b++) {
            if (b % (l->unit / CPU_BLOCK) == 0) {
                cpu_enter_unit(l, &place);
            }
            unpack_signed(l, levels, &place, &w[i], p.w + i * BLOCK_BYTES);
        }
        sum_parts(parts, &p, rows.q, step, n);
        for (uint32_t i = 0; i < n; i++) {
            add_sums(l, parts, &w[i], &rows, tile->n_rows, &p.sums[i * parts], acc);
            rows = cpu_row_after(&rows, tile->n_tile_rows);
        }
    }
    for (uint32_t r = 0; r < tile->n_rows; r++) {
        _mm512_storeu_ps(out + r * CPU_STRIP_ROWS, acc[r]);
    }
}

CPU_SPECIALISE void multiply(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                             const struct cpu_quant_strips *strips, float *out)
{
    if (tile->n_rows < ROWS_MIN) {
        cpu_linear_avx512.quant[id](tile, strips, out);
        return;
    }
    configure(&cpu_layouts[id], tile->n_rows);
    for (uint32_t i = 0; i < strips->n; i++) {
        multiply_strip(id, tile, strips->first + i * strips->bytes,
                       out + (size_t)i * tile->n_rows * CPU_STRIP_ROWS);
    }
    amx_release();
}

CPU_EACH_LAYOUT(CPU_DEFINE_QUANT)

const struct cpu_linear_kernels cpu_linear_amx = {
    .quant = {CPU_EACH_LAYOUT(CPU_QUANT_ENTRY)},
};
