/* plugins/cpu/panels.h - products of class P rows on units that multiply bf16.
 *
 * Prompts are bound by arithmetic, not by memory: the weights of two strips are unpacked once, into
 * a panel that stays in the worker's L2 cache, and all rows of class P pass by it, 32 at a time.
 * Sums are float32 and stay in the unit for all of k.
 *
 *     w = bf16(q * scale)  or  bf16(fma(q, scale, minimum))     x = bf16(x)
 *     out = sum of w x: by the unit's rule within 32 values of k, then in ascending k
 *
 * with scale and minimum as linear.h says; bf16() rounds to nearest even. A row's result depends on
 * the row alone, and on the unit: numerics of class P are the level's own. Quantised weights and
 * BF16 have panels: they bear more noise than bf16 activations bring. Those of F16 and F32 do not,
 * and their rows of class P are computed as those of class D. */
#ifndef PLUGINS_CPU_PANELS_H
#define PLUGINS_CPU_PANELS_H

#include "plugins/cpu/isa.h"
#include "plugins/cpu/weights.h"

#include <gqa/plugin.h>

#define CPU_PANEL_STRIPS 2u
#define CPU_PANEL_OUTS   (CPU_PANEL_STRIPS * CPU_STRIP_ROWS)
#define CPU_PANEL_ROWS   32u   /* rows that pass by at once */
#define CPU_PANEL_BLOCK  1024u /* bytes of 16 outputs x 32 k */

struct cpu_matrix;
struct cpu_product;

/* What one call of the kernel multiplies. */
struct cpu_panel_product {
    const uint8_t *panel; /* (n_blocks, CPU_PANEL_STRIPS, 16 pairs of k, 16 outputs, 2) bf16 */
    const uint16_t *x;    /* (n_rows, n_blocks * 32) bf16 */
    uint32_t n_blocks;
    uint32_t n_rows; /* 1..CPU_PANEL_ROWS */
};

struct cpu_panel_kernels {
    /* Rounds k values to bf16; zeros up to the next multiple of 32. */
    void (*round_row)(const float *x, uint32_t k, uint16_t *dst);
    /* One strip's blocks of the matrix, to panel, CPU_PANEL_STRIPS * CPU_PANEL_BLOCK bytes from one
     * to the next; outputs past the matrix's last are zeros. */
    void (*unpack_strip)(const struct cpu_matrix *m, uint32_t strip, uint8_t *panel);
    /* out (n_rows, CPU_PANEL_OUTS) */
    void (*multiply)(const struct cpu_panel_product *p, float *out);
};

extern const struct cpu_panel_kernels cpu_panels_amx;

/* What a program's products of class P need: made once. */
struct cpu_panels {
    const struct gqa_host *host;
    const struct cpu_panel_kernels *kernels; /* NULL: this level has none */
    uint32_t *rows;                          /* (max_rows): the batch's rows of class P */
    uint32_t n_rows;
    uint16_t *x;    /* (max_rows, max_k) bf16, 64-byte aligned */
    uint8_t *panel; /* (host->n_threads, panel_bytes) */
    size_t panel_bytes;
    void *memory;
    size_t memory_bytes;
};

/* Nothing is allocated where the level has no kernels, or max_k is 0. max_k: of all matrices that
 * have panels. 0 or -ENOMEM; it can be finished in both cases. */
int cpu_panels_init(struct cpu_panels *panels, const struct gqa_host *host, enum cpu_isa isa,
                    uint32_t max_rows, uint32_t max_k);
void cpu_panels_finish(struct cpu_panels *panels);

/* Whether this level computes the matrix's class P rows from panels. */
int cpu_panels_take(const struct cpu_panels *panels, const struct cpu_matrix *m);

/* Every product's rows of class P: dst = x matrix^T + bias; other rows are left alone. All matrices
 * have the same k and have panels. row_class (n_rows) enum gqa_row_class. */
void cpu_panels_run(struct cpu_panels *panels, const float *x, size_t x_stride,
                    const uint8_t *row_class, uint32_t n_rows, const struct cpu_product *products,
                    uint32_t n_products);

#endif
