/* plugins/cpu/linear_quantise.c - activations become int8, for one series of products.
 *
 * A tile's lines, once another core has read them, cost more to write again than to compute: each
 * must be taken back from that core first. So where rows are few every worker quantises all of them
 * for itself, into memory that no other core ever sees; nobody waits for anybody, and the products
 * begin at once. Many rows are shared out, and read by all. */
#include "plugins/cpu/linear_job.h"

#include <errno.h>
#include <string.h>

/* Rows that each worker quantises for itself. With more of them the float32 rows that it reads,
 * four times as wide, cost what the int8 ones would. */
#define OWN_ROWS 8u
/* Strips per worker from which on quantising all rows is at most about a tenth of its work. */
#define OWN_STRIPS 16u
/* Blocks of activations that one worker quantises in about the time that a fork and a join take. */
#define QUANTISE_ALONE_BLOCKS 256u
#define PAGE_BYTES            4096u

/* Scales, sums and totals take four bytes each, lanes eight. */
#define ACT_BYTES (CPU_BLOCK + 4 + 4 + 4 + 4 + 8)

/* q comes first, so that all stay aligned. */
static struct cpu_acts acts_in(void *memory, size_t n_blocks)
{
    struct cpu_acts acts = {.q = memory};

    acts.scale = (float *)(void *)(acts.q + n_blocks * CPU_BLOCK);
    acts.total = acts.scale + n_blocks;
    acts.minus = (int32_t *)(void *)(acts.total + n_blocks);
    acts.halves = (int16_t *)(void *)(acts.minus + n_blocks);
    acts.lanes = acts.halves + n_blocks * 2;
    return acts;
}

static uint32_t own_rows(const struct cpu_linear *lin)
{
    return lin->max_rows < OWN_ROWS ? lin->max_rows : OWN_ROWS;
}

static size_t row_blocks(const struct cpu_linear *lin)
{
    return lin->max_k / CPU_BLOCK;
}

/* From one worker's own activations to the next one's: they share no page. */
static size_t own_bytes(const struct cpu_linear *lin)
{
    size_t bytes = own_rows(lin) * row_blocks(lin) * ACT_BYTES;

    return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

/* Where they begin. A lone worker has none of its own. */
static size_t own_offset(const struct cpu_linear *lin)
{
    size_t bytes = lin->max_rows * row_blocks(lin) * ACT_BYTES;

    return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

int cpu_acts_init(struct cpu_linear *lin)
{
    size_t n_own = lin->host->n_threads > 1 ? lin->host->n_threads : 0;

    if (lin->max_rows == 0 || row_blocks(lin) == 0) {
        return 0;
    }
    lin->memory_bytes = own_offset(lin) + n_own * own_bytes(lin);
    lin->memory = lin->host->allocate(lin->host->data, lin->memory_bytes);
    return lin->memory != NULL ? 0 : -ENOMEM;
}

void cpu_acts_finish(struct cpu_linear *lin)
{
    if (lin->memory != NULL) {
        lin->host->release(lin->host->data, lin->memory, lin->memory_bytes);
        lin->memory = NULL;
    }
}

struct cpu_acts cpu_acts_of_worker(const struct cpu_linear_job *job, uint32_t worker)
{
    const struct cpu_linear *lin = job->lin;
    char *memory = lin->memory;
    struct cpu_acts acts;

    if (job->by_each) {
        acts = acts_in(memory + own_offset(lin) + worker * own_bytes(lin),
                       own_rows(lin) * row_blocks(lin));
    } else {
        acts = acts_in(memory, lin->max_rows * row_blocks(lin));
    }
    acts.n_rows = job->n_rows;
    acts.n_blocks = job->n_blocks;
    return acts;
}

struct cpu_acts cpu_acts_of_group(const struct cpu_linear_job *job, const struct cpu_acts *all,
                                  uint32_t group)
{
    struct cpu_acts acts = *all;
    size_t at = (size_t)cpu_group_first(job, group) * acts.n_blocks;

    acts.n_rows = cpu_group_rows(job, group);
    acts.q += at * CPU_BLOCK;
    acts.scale += at;
    acts.halves += at * 2;
    acts.minus += at;
    acts.total += at;
    acts.lanes += at * 4;
    return acts;
}

/* The last group that begins at or before a row: the one that holds it, since empty groups end
 * where they begin. */
static uint32_t group_of_row(const struct cpu_linear_job *job, uint32_t row)
{
    uint32_t low = 0, high = job->n_groups;

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (cpu_group_first(job, middle) <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Blocks [first, first + n) of one row. */
static void quantise_row(const struct cpu_linear_job *job, const struct cpu_acts *all,
                         uint32_t index, uint32_t first, uint32_t n)
{
    uint32_t group = group_of_row(job, index);
    const struct cpu_acts acts = cpu_acts_of_group(job, all, group);
    uint32_t row = index - cpu_group_first(job, group);
    const struct cpu_act_tile tile = cpu_acts_tile(&acts, row / CPU_TILE_ROWS);
    size_t at = (size_t)first * tile.n_tile_rows + row % CPU_TILE_ROWS;
    at += (size_t)(row - row % CPU_TILE_ROWS) * acts.n_blocks;
    const struct cpu_act_place place = {
        .n_blocks = n,
        .n_tile_rows = tile.n_tile_rows,
        .q = acts.q + at * CPU_BLOCK,
        .scale = acts.scale + at,
        .halves = acts.halves + at * 2,
        .minus = acts.minus + at,
        .total = acts.total + at,
        .lanes = acts.lanes + at * 4,
    };

    job->lin->kernels.quantise(job->x + index * job->x_stride + (size_t)first * CPU_BLOCK, &place);
}

/* ---- by all ------------------------------------------------------------------------------ */

struct sharing {
    const struct cpu_linear_job *job;
    struct cpu_acts acts;
    uint32_t k_pieces, piece_blocks; /* how many pieces of k each tile is cut into */
};

/* As many rows as a tile has: a tile's rows share cache lines, which two workers would take from
 * each other with every block. For the same reason a piece of k is a multiple of 16 blocks. */
static void quantise_piece(void *arg, uint32_t index, uint32_t worker)
{
    const struct sharing *s = arg;
    uint32_t first_row = index / s->k_pieces * CPU_TILE_ROWS;
    uint32_t rows_left = s->job->n_rows - first_row;
    uint32_t n_rows = rows_left < CPU_TILE_ROWS ? rows_left : CPU_TILE_ROWS;
    uint32_t first = index % s->k_pieces * s->piece_blocks;

    if (first >= s->acts.n_blocks) {
        return;
    }
    uint32_t n_left = s->acts.n_blocks - first;
    uint32_t n = n_left < s->piece_blocks ? n_left : s->piece_blocks;
    for (uint32_t r = 0; r < n_rows; r++) {
        quantise_row(s->job, &s->acts, first_row + r, first, n);
    }
}

/* Tiles are shared out whole where there are enough, and else cut along k where that is worth the
 * fork and the join. */
void cpu_quantise_by_all(const struct cpu_linear_job *job)
{
    const struct gqa_host *host = job->lin->host;
    struct sharing s = {.job = job, .acts = cpu_acts_of_worker(job, 0), .k_pieces = 1};
    uint32_t n_tiles = (job->n_rows + CPU_TILE_ROWS - 1) / CPU_TILE_ROWS;

    if (n_tiles < host->n_threads &&
        (uint64_t)job->n_rows * job->n_blocks >= QUANTISE_ALONE_BLOCKS) {
        s.k_pieces = host->n_threads;
    }
    s.piece_blocks = ((job->n_blocks + s.k_pieces - 1) / s.k_pieces + 15) / 16 * 16;
    host->parallel(host->data, quantise_piece, &s, n_tiles * s.k_pieces);
}

/* ---- by each ----------------------------------------------------------------------------- */

void cpu_quantise_plan(struct cpu_linear_job *job, uint64_t n_outs)
{
    uint32_t n_threads = job->lin->host->n_threads;

    job->by_each = n_threads > 1 && job->n_groups == 1 && job->n_rows <= OWN_ROWS &&
                   n_outs >= (uint64_t)OWN_STRIPS * CPU_STRIP_ROWS * n_threads;
}

void cpu_quantise_by_one(const struct cpu_linear_job *job, uint32_t worker)
{
    const struct cpu_acts acts = cpu_acts_of_worker(job, worker);

    for (uint32_t row = 0; row < job->n_rows; row++) {
        quantise_row(job, &acts, row, 0, job->n_blocks);
    }
}
