/* plugins/cpu/panels.c - plans products of class P rows and lends them to the host's workers.
 *
 * A task is a panel of one matrix against all rows of class P. Which task runs where changes no
 * result. */
#include "plugins/cpu/panels.h"

#include "plugins/cpu/linear.h"

#include <errno.h>
#include <string.h>

#define CACHE_LINE 64u

static const struct cpu_panel_kernels *kernels_of(enum cpu_isa isa)
{
#if defined(__x86_64__)
    return isa == CPU_ISA_AMX ? &cpu_panels_amx : NULL;
#else
    (void)isa;
    return NULL;
#endif
}

static uint32_t blocks_of(uint32_t k)
{
    return k / CPU_BLOCK + (k % CPU_BLOCK != 0);
}

static uint8_t *aligned(uint8_t *at)
{
    return at + (CACHE_LINE - (uintptr_t)at % CACHE_LINE) % CACHE_LINE;
}

int cpu_panels_init(struct cpu_panels *panels, const struct gqa_host *host, enum cpu_isa isa,
                    uint32_t max_rows, uint32_t max_k)
{
    const struct cpu_panel_kernels *kernels = kernels_of(isa);
    size_t n_blocks = blocks_of(max_k);
    size_t x_bytes = (size_t)max_rows * n_blocks * CPU_BLOCK * sizeof(uint16_t);

    *panels = (struct cpu_panels){.host = host};
    if (kernels == NULL || n_blocks == 0) {
        return 0;
    }
    panels->panel_bytes = n_blocks * CPU_PANEL_STRIPS * CPU_PANEL_BLOCK;
    panels->memory_bytes = host->n_threads * panels->panel_bytes + x_bytes +
                           max_rows * sizeof(*panels->rows) + CACHE_LINE;
    panels->memory = host->allocate(host->data, panels->memory_bytes);
    if (panels->memory == NULL) {
        return -ENOMEM;
    }
    panels->kernels = kernels;
    panels->panel = aligned(panels->memory);
    panels->x = (uint16_t *)(void *)(panels->panel + host->n_threads * panels->panel_bytes);
    panels->rows = (uint32_t *)(void *)((uint8_t *)panels->x + x_bytes);
    return 0;
}

void cpu_panels_finish(struct cpu_panels *panels)
{
    if (panels->memory != NULL) {
        panels->host->release(panels->host->data, panels->memory, panels->memory_bytes);
        panels->memory = NULL;
    }
}

int cpu_panels_take(const struct cpu_panels *panels, const struct cpu_matrix *m)
{
    return panels->kernels != NULL && (m->layout != CPU_LAYOUT_COUNT || m->real == CPU_FLOAT_BF16);
}

/* One call of cpu_panels_run: what all its tasks read. */
struct job {
    const struct cpu_panels *panels;
    const float *x;
    size_t x_stride;
    uint32_t k, n_blocks;
    const struct cpu_product *products;
    uint32_t n_products;
};

static void round_rows(void *arg, uint32_t index, uint32_t worker)
{
    const struct job *job = arg;
    const struct cpu_panels *p = job->panels;

    (void)worker;
    for (uint32_t i = index * CPU_PANEL_ROWS; i < p->n_rows && i < (index + 1) * CPU_PANEL_ROWS;
         i++) {
        p->kernels->round_row(job->x + p->rows[i] * job->x_stride, job->k,
                              p->x + (size_t)i * job->n_blocks * CPU_BLOCK);
    }
}

/* Writes what passed by to its places. out (n_rows, CPU_PANEL_OUTS) */
static void store(const struct cpu_product *p, uint32_t first_out, const uint32_t *rows,
                  uint32_t n_rows, const float *out)
{
    const float *bias = p->matrix->bias;
    uint32_t left = p->matrix->n - first_out;
    uint32_t n_outs = left < CPU_PANEL_OUTS ? left : CPU_PANEL_OUTS;

    for (uint32_t r = 0; r < n_rows; r++) {
        float *dst = p->dst + rows[r] * p->dst_stride + first_out;
        const float *src = out + r * CPU_PANEL_OUTS;
        for (uint32_t o = 0; o < n_outs; o++) {
            dst[o] = bias == NULL ? src[o] : src[o] + bias[first_out + o];
        }
    }
}

static uint32_t panels_of(const struct cpu_matrix *m)
{
    return (m->n + CPU_PANEL_OUTS - 1) / CPU_PANEL_OUTS;
}

static void run_panel(void *arg, uint32_t index, uint32_t worker)
{
    const struct job *job = arg;
    const struct cpu_panels *p = job->panels;
    const struct cpu_product *product = job->products;
    uint8_t *panel = p->panel + worker * p->panel_bytes;
    _Alignas(CACHE_LINE) float out[CPU_PANEL_ROWS * CPU_PANEL_OUTS];

    while (index >= panels_of(product->matrix)) {
        index -= panels_of(product->matrix);
        product++;
    }
    for (uint32_t s = 0; s < CPU_PANEL_STRIPS; s++) {
        p->kernels->unpack_strip(product->matrix, index * CPU_PANEL_STRIPS + s,
                                 panel + s * CPU_PANEL_BLOCK);
    }
    for (uint32_t row = 0; row < p->n_rows; row += CPU_PANEL_ROWS) {
        uint32_t left = p->n_rows - row;
        const struct cpu_panel_product now = {
            .panel = panel,
            .x = p->x + (size_t)row * job->n_blocks * CPU_BLOCK,
            .n_blocks = job->n_blocks,
            .n_rows = left < CPU_PANEL_ROWS ? left : CPU_PANEL_ROWS,
        };
        p->kernels->multiply(&now, out);
        store(product, index * CPU_PANEL_OUTS, p->rows + row, now.n_rows, out);
    }
}

void cpu_panels_run(struct cpu_panels *panels, const float *x, size_t x_stride,
                    const uint8_t *row_class, uint32_t n_rows, const struct cpu_product *products,
                    uint32_t n_products)
{
    const struct gqa_host *host = panels->host;
    struct job job = {
        .panels = panels,
        .x = x,
        .x_stride = x_stride,
        .k = products[0].matrix->k,
        .n_blocks = blocks_of(products[0].matrix->k),
        .products = products,
        .n_products = n_products,
    };
    uint32_t n_tasks = 0;

    panels->n_rows = 0;
    for (uint32_t r = 0; r < n_rows; r++) {
        if (row_class[r] == GQA_ROW_P) {
            panels->rows[panels->n_rows++] = r;
        }
    }
    if (panels->n_rows == 0) {
        return;
    }
    for (uint32_t i = 0; i < n_products; i++) {
        n_tasks += panels_of(products[i].matrix);
    }
    host->parallel(host->data, round_rows, &job,
                   (panels->n_rows + CPU_PANEL_ROWS - 1) / CPU_PANEL_ROWS);
    host->parallel(host->data, run_panel, &job, n_tasks);
}
