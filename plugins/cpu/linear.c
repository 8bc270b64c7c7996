/* plugins/cpu/linear.c - plans products and lends them to the host's workers.
 *
 * A task is a run of strips of one matrix, against all rows. Strips of a run lie one after the
 * other in memory, so that decode streams; with many rows the run is small enough to stay in L2
 * while the tiles of activations pass by. Which task runs where changes no result. */
#include "plugins/cpu/linear_job.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Weights per task. For few rows a task is a microsecond or two of reading, so that workers end
 * together; for many its strips share the activations that pass by, and still fit in L2. */
#define TASK_BYTES_FEW_ROWS  32768u
#define TASK_BYTES_MANY_ROWS 131072u
/* Tasks per worker to aim at, so that a late worker leaves little behind. */
#define TASKS_PER_WORKER 4u

void cpu_linear_kernels(enum cpu_isa isa, struct cpu_linear_kernels *ret)
{
    static const struct cpu_linear_kernels *const levels[CPU_ISA_COUNT] = {
        [CPU_ISA_C] = &cpu_linear_c,
#if defined(__x86_64__)
        [CPU_ISA_AVX2] = &cpu_linear_avx2,
        [CPU_ISA_AVXVNNI] = &cpu_linear_avxvnni,
        [CPU_ISA_AVX512] = &cpu_linear_avx512,
        [CPU_ISA_AMX] = &cpu_linear_amx,
#endif
    };

    memset(ret, 0, sizeof(*ret));
    for (int level = (int)isa; level >= 0; level = cpu_isa_below((enum cpu_isa)level)) {
        const struct cpu_linear_kernels *from = levels[level];
        if (from == NULL) {
            continue;
        }
        if (ret->quantise == NULL) {
            ret->quantise = from->quantise;
        }
        for (uint32_t i = 0; i < CPU_LAYOUT_COUNT; i++) {
            if (ret->quant[i] == NULL) {
                ret->quant[i] = from->quant[i];
            }
        }
        for (uint32_t i = 0; i < CPU_FLOAT_COUNT; i++) {
            if (ret->real[i] == NULL) {
                ret->real[i] = from->real[i];
            }
        }
    }
}

static int float_type_of(uint32_t type, enum cpu_float_type *ret)
{
    switch (type) {
    case GQA_TYPE_F32:
        *ret = CPU_FLOAT_F32;
        return 0;
    case GQA_TYPE_F16:
        *ret = CPU_FLOAT_F16;
        return 0;
    case GQA_TYPE_BF16:
        *ret = CPU_FLOAT_BF16;
        return 0;
    default:
        return -ENOTSUP;
    }
}

static int matrix_init_packed(struct cpu_matrix *m, const struct gqa_weight *weight,
                              struct gqa_reason *reason)
{
    uint64_t bytes = cpu_weights_packed_bytes(weight);

    if (bytes == 0) {
        snprintf(reason->text, sizeof(reason->text),
                 "%" PRIu64 " inputs are no multiple of the type's block", weight->ne[0]);
        return -EINVAL;
    }
    if (weight->packed == NULL || weight->packed_bytes != bytes) {
        snprintf(reason->text, sizeof(reason->text),
                 "packed form has %" PRIu64 " bytes instead of %" PRIu64,
                 weight->packed != NULL ? weight->packed_bytes : 0, bytes);
        return -EINVAL;
    }
    m->data = weight->packed;
    m->strip_bytes = bytes / ((m->n + CPU_STRIP_ROWS - 1) / CPU_STRIP_ROWS);
    return 0;
}

int cpu_matrix_init(struct cpu_matrix *ret, const struct gqa_weight *weight,
                    struct gqa_reason *reason)
{
    struct cpu_matrix m = {.layout = cpu_layout_of(weight->type)};

    if (weight->n_dims != 2 || weight->ne[0] == 0 || weight->ne[0] > INT32_MAX ||
        weight->ne[1] == 0 || weight->ne[1] > INT32_MAX) {
        snprintf(reason->text, sizeof(reason->text), "not a matrix");
        return -EINVAL;
    }
    m.k = (uint32_t)weight->ne[0];
    m.n = (uint32_t)weight->ne[1];
    if (m.layout != CPU_LAYOUT_COUNT) {
        int r = matrix_init_packed(&m, weight, reason);
        if (r < 0) {
            return r;
        }
    } else {
        if (float_type_of(weight->type, &m.real) < 0) {
            snprintf(reason->text, sizeof(reason->text), "no product for this type");
            return -ENOTSUP;
        }
        if (weight->data == NULL) {
            snprintf(reason->text, sizeof(reason->text), "has no data");
            return -EINVAL;
        }
        uint64_t value_bytes = m.real == CPU_FLOAT_F32 ? 4 : 2;
        m.data = weight->data;
        m.strip_bytes = CPU_STRIP_ROWS * value_bytes * m.k;
    }
    *ret = m;
    return 0;
}

int cpu_linear_init(struct cpu_linear *lin, const struct gqa_host *host, enum cpu_isa isa,
                    uint32_t max_rows, uint32_t max_k)
{
    memset(lin, 0, sizeof(*lin));
    lin->host = host;
    lin->max_rows = max_rows;
    lin->max_k = max_k;
    cpu_linear_kernels(isa, &lin->kernels);
    lin->shares = host->allocate(host->data, host->n_threads * sizeof(*lin->shares));
    if (lin->shares == NULL) {
        return -ENOMEM;
    }
    return cpu_acts_init(lin);
}

void cpu_linear_finish(struct cpu_linear *lin)
{
    if (lin->shares != NULL) {
        lin->host->release(lin->host->data, lin->shares,
                           lin->host->n_threads * sizeof(*lin->shares));
        lin->shares = NULL;
    }
    cpu_acts_finish(lin);
}

/* The rows of a tile: acts is the group's, of float matrices only its n_rows is set. */
static uint32_t tile_rows(const struct cpu_acts *acts, uint32_t tile)
{
    uint32_t left = acts->n_rows - tile * CPU_TILE_ROWS;
    return left < CPU_TILE_ROWS ? left : CPU_TILE_ROWS;
}

struct cpu_act_tile cpu_acts_tile(const struct cpu_acts *acts, uint32_t tile)
{
    uint32_t n = tile_rows(acts, tile);
    size_t at = (size_t)tile * CPU_TILE_ROWS * acts->n_blocks;

    return (struct cpu_act_tile){
        .n_rows = n,
        .n_tile_rows = n,
        .n_blocks = acts->n_blocks,
        .q = acts->q + at * CPU_BLOCK,
        .scale = acts->scale + at,
        .halves = acts->halves + at * 2,
        .minus = acts->minus + at,
        .total = acts->total + at,
        .lanes = acts->lanes + at * 4,
    };
}

/* Writes a kernel's outputs to their places. out (n_rows, 16) */
static void store(const struct cpu_product *p, uint32_t first_out, uint32_t n_outs,
                  uint32_t first_row, uint32_t n_rows, const float *out)
{
    const float *bias = p->matrix->bias;

    for (uint32_t r = 0; r < n_rows; r++) {
        float *dst = p->dst + (first_row + r) * p->dst_stride + first_out;
        const float *src = out + r * CPU_STRIP_ROWS;
        if (bias == NULL && n_outs == CPU_STRIP_ROWS) { /* nearly always: one vector */
            memcpy(dst, src, CPU_STRIP_ROWS * sizeof(*dst));
            continue;
        }
        for (uint32_t o = 0; o < n_outs; o++) {
            dst[o] = bias != NULL ? src[o] + bias[first_out + o] : src[o];
        }
    }
}

/* The outputs of a strip: fewer than CPU_STRIP_ROWS in the last one only. */
static uint32_t strip_outs(const struct cpu_matrix *m, uint32_t strip)
{
    uint32_t left = m->n - strip * CPU_STRIP_ROWS;
    return left < CPU_STRIP_ROWS ? left : CPU_STRIP_ROWS;
}

static void run_quant_strips(const struct cpu_linear_job *job, const struct cpu_product *p,
                             const struct cpu_acts *acts, uint32_t first, uint32_t n, uint32_t tile)
{
    const struct cpu_matrix *m = p->matrix;
    const struct cpu_quant_strips strips = {m->data + first * m->strip_bytes, m->strip_bytes, n};
    const struct cpu_act_tile rows = cpu_acts_tile(acts, tile);
    _Alignas(64) float out[CPU_STRIPS_MAX * CPU_TILE_ROWS * CPU_STRIP_ROWS];

    job->lin->kernels.quant[m->layout](&rows, &strips, out);
    for (uint32_t i = 0; i < n; i++) {
        store(p, (first + i) * CPU_STRIP_ROWS, strip_outs(m, first + i), tile * CPU_TILE_ROWS,
              rows.n_rows, out + (size_t)i * rows.n_rows * CPU_STRIP_ROWS);
    }
}

static void run_float_strip(const struct cpu_linear_job *job, const struct cpu_product *p,
                            const struct cpu_acts *acts, uint32_t strip, uint32_t tile)
{
    const struct cpu_matrix *m = p->matrix;
    uint32_t first_row = tile * CPU_TILE_ROWS;
    const struct cpu_float_strip s = {
        .w = m->data + strip * m->strip_bytes,
        .w_stride = m->strip_bytes / CPU_STRIP_ROWS,
        .n_outs = strip_outs(m, strip),
        .k = m->k,
        .x = job->x + (cpu_group_first(job, p->group) + first_row) * job->x_stride,
        .x_stride = job->x_stride,
        .n_rows = tile_rows(acts, tile),
    };
    _Alignas(64) float out[CPU_TILE_ROWS * CPU_STRIP_ROWS];

    job->lin->kernels.real[m->real](&s, out);
    store(p, strip * CPU_STRIP_ROWS, s.n_outs, first_row, s.n_rows, out);
}

/* One tile's rows against strips [first, last). */
static void run_tile(const struct cpu_linear_job *job, const struct cpu_product *p,
                     const struct cpu_acts *acts, uint32_t first, uint32_t last, uint32_t tile)
{
    if (p->matrix->layout == CPU_LAYOUT_COUNT) {
        for (uint32_t strip = first; strip < last; strip++) {
            run_float_strip(job, p, acts, strip, tile);
        }
        return;
    }
    for (uint32_t strip = first; strip < last; strip += CPU_STRIPS_MAX) {
        uint32_t n = last - strip < CPU_STRIPS_MAX ? last - strip : CPU_STRIPS_MAX;
        run_quant_strips(job, p, acts, strip, n, tile);
    }
}

/* Deals the tasks out: every worker gets a run of neighbours, so that it reads memory as one
 * stream and the processor can fetch ahead of it. */
static void share_out(struct cpu_linear *lin, uint32_t n_tasks)
{
    uint32_t n = lin->host->n_threads;

    for (uint32_t w = 0; w < n; w++) {
        uint32_t first = (uint32_t)((uint64_t)n_tasks * w / n);
        atomic_store_explicit(&lin->shares[w].next, first, memory_order_relaxed);
        lin->shares[w].end = (uint32_t)((uint64_t)n_tasks * (w + 1) / n);
    }
}

/* The next task of the worker's own share or, when that is used up, of another's. */
static uint32_t take_task(const struct cpu_linear *lin, uint32_t worker)
{
    uint32_t n = lin->host->n_threads;

    for (uint32_t i = 0; i < n; i++) {
        struct cpu_share *s = &lin->shares[(worker + i) % n];
        if (atomic_load_explicit(&s->next, memory_order_relaxed) < s->end) {
            uint32_t task = atomic_fetch_add_explicit(&s->next, 1, memory_order_relaxed);
            if (task < s->end) {
                return task;
            }
        }
    }
    return GQA_NONE;
}

/* The last product whose tasks begin at or before a task; every product has some. */
static const struct cpu_product *product_of_task(const struct cpu_linear_job *job, uint32_t task)
{
    uint32_t low = 0, high = job->n_products;

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (job->products[middle].first_task <= task) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return &job->products[low];
}

/* all: the activations that the worker reads. */
static void run_task(const struct cpu_linear_job *job, const struct cpu_acts *all, uint32_t index)
{
    const struct cpu_product *p = product_of_task(job, index);
    struct cpu_acts acts = {.n_rows = cpu_group_rows(job, p->group)};
    uint32_t n_strips = (p->matrix->n + CPU_STRIP_ROWS - 1) / CPU_STRIP_ROWS;
    uint32_t first = (index - p->first_task) * p->task_strips;
    uint32_t last = n_strips - first < p->task_strips ? n_strips : first + p->task_strips;
    uint32_t n_tiles = (acts.n_rows + CPU_TILE_ROWS - 1) / CPU_TILE_ROWS;

    if (p->matrix->layout != CPU_LAYOUT_COUNT) {
        acts = cpu_acts_of_group(job, all, p->group);
    }
    for (uint32_t tile = 0; tile < n_tiles; tile++) {
        run_tile(job, p, &acts, first, last, tile);
    }
}

/* One call for each worker, which takes tasks until none are left: so the host's counters, which
 * all workers share, are touched once and not with every task. A worker that comes late finds its
 * share done by the others. */
static void run_tasks(void *arg, uint32_t call, uint32_t worker)
{
    const struct cpu_linear_job *job = arg;

    struct cpu_acts acts = {0};
    uint32_t task = take_task(job->lin, worker);

    if (task == GQA_NONE) {
        return;
    }
    if (job->n_blocks > 0) {
        acts = cpu_acts_of_worker(job, worker);
        if (job->by_each) {
            cpu_quantise_by_one(job, worker);
        }
    }
    for (; task != GQA_NONE; task = take_task(job->lin, worker)) {
        run_task(job, &acts, task);
    }
}

/* Strips per task, fewer where that leaves workers idle. */
static uint32_t plan_task_strips(const struct cpu_matrix *m, uint32_t n_rows, uint32_t n_threads)
{
    uint32_t task_bytes = n_rows > CPU_TILE_ROWS ? TASK_BYTES_MANY_ROWS : TASK_BYTES_FEW_ROWS;
    uint64_t n_strips = (m->n + CPU_STRIP_ROWS - 1) / CPU_STRIP_ROWS;
    uint64_t by_bytes = task_bytes / m->strip_bytes;
    uint64_t by_workers = n_strips / ((uint64_t)TASKS_PER_WORKER * n_threads);
    uint64_t strips = by_bytes < by_workers ? by_bytes : by_workers;

    strips -= strips % CPU_STRIPS_MAX;
    return strips > 0 ? (uint32_t)strips : (uint32_t)(n_strips < 2 ? 1 : CPU_STRIPS_MAX);
}

/* Cuts the products into tasks; returns how many there are. */
static uint32_t plan_tasks(const struct cpu_linear_job *job, struct cpu_product *products,
                           uint32_t n_threads)
{
    uint32_t n_tasks = 0;

    for (uint32_t i = 0; i < job->n_products; i++) {
        struct cpu_product *p = &products[i];
        uint32_t n_rows = cpu_group_rows(job, p->group);
        uint32_t n_strips = (p->matrix->n + CPU_STRIP_ROWS - 1) / CPU_STRIP_ROWS;

        p->task_strips = plan_task_strips(p->matrix, n_rows, n_threads);
        p->first_task = n_tasks;
        n_tasks += (n_strips + p->task_strips - 1) / p->task_strips;
    }
    return n_tasks;
}

void cpu_linear_run_groups(struct cpu_linear *lin, const float *x, size_t x_stride,
                           const uint32_t *first_rows, uint32_t n_groups,
                           struct cpu_product *products, uint32_t n_products)
{
    const struct gqa_host *host = lin->host;
    struct cpu_linear_job job = {
        .lin = lin,
        .x = x,
        .x_stride = x_stride,
        .first_rows = first_rows,
        .n_groups = n_groups,
        .n_rows = first_rows[n_groups] - first_rows[0],
        .products = products,
        .n_products = n_products,
    };
    uint64_t n_outs = 0; /* of quantised matrices */

    for (uint32_t i = 0; i < n_products; i++) {
        n_outs += products[i].matrix->layout != CPU_LAYOUT_COUNT ? products[i].matrix->n : 0;
    }
    if (n_outs > 0) {
        job.n_blocks = products[0].matrix->k / CPU_BLOCK;
        cpu_quantise_plan(&job, n_outs);
        if (!job.by_each) {
            cpu_quantise_by_all(&job);
        }
    }
    uint32_t n_tasks = plan_tasks(&job, products, host->n_threads);
    share_out(lin, n_tasks);
    host->parallel(host->data, run_tasks, &job,
                   n_tasks < host->n_threads ? n_tasks : host->n_threads);
}

void cpu_linear_run(struct cpu_linear *lin, const float *x, size_t x_stride, uint32_t n_rows,
                    struct cpu_product *products, uint32_t n_products)
{
    const uint32_t first_rows[2] = {0, n_rows};

    cpu_linear_run_groups(lin, x, x_stride, first_rows, 1, products, n_products);
}
