/* plugins/cpu/attention.c - checks a batch, and runs its plan on the host's workers. */
#include "plugins/cpu/attention.h"

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_plan.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CPU_ATTN_DIM_MAX   1024u
#define CPU_ATTN_HEADS_MAX 4096u
#define CPU_ATTN_ROWS_MAX  (1u << 20)
/* Values that append() hands to a worker at once: a few microseconds of work. */
#define CPU_ATTN_APPEND_VALUES 16384u

/* One worker's memory, one after the other in a 64-byte aligned allocation. */
struct worker {
    float *scores; /* (CPU_ATTN_PACK_MAX, GQA_ATTN_SEGMENT_TOKENS) */
    float *parts;  /* (CPU_ATTN_PACK_MAX, part) */
    float *q;      /* (queries of a piece, k_dim), pack by pack; also append's row */
    float *states; /* (queries of a piece, part) */
};

struct cpu_attention {
    const struct gqa_host *host;
    const struct cpu_attn_kernels *kernels;
    struct cpu_attn_plan plan;
    void *scratch; /* (n_threads, worker_floats) */
    size_t scratch_bytes;
};

/* What the workers of one append() or attend() read. */
struct job {
    struct cpu_attention *a;
    const struct gqa_attn_layer *layer;
    const struct gqa_attn_batch *batch;
    const struct gqa_attn_io *io;
    uint32_t group_size;
    uint32_t append_rows; /* per task */
    size_t worker_floats;
};

static const struct cpu_attn_kernels *kernels_of(enum cpu_isa isa)
{
#if defined(__x86_64__)
    if (isa == CPU_ISA_AVX512) {
        return &cpu_attn_kernels_avx512;
    }
    if (isa == CPU_ISA_AVX2) {
        return &cpu_attn_kernels_avx2;
    }
#endif
    return isa == CPU_ISA_C ? &cpu_attn_kernels_c : NULL;
}

int cpu_attention_create(const struct gqa_host *host, enum cpu_isa isa, struct cpu_attention **ret)
{
    const struct cpu_attn_kernels *kernels = kernels_of(isa);

    if (kernels == NULL || !cpu_isa_usable(isa)) {
        return -ENOTSUP;
    }
    struct cpu_attention *a = calloc(1, sizeof(*a));
    if (a == NULL) {
        return -ENOMEM;
    }
    a->host = host;
    a->kernels = kernels;
    cpu_attn_plan_init(&a->plan, host);
    *ret = a;
    return 0;
}

void cpu_attention_destroy(struct cpu_attention *a)
{
    if (a == NULL) {
        return;
    }
    if (a->scratch != NULL) {
        a->host->release(a->host->data, a->scratch, a->scratch_bytes);
    }
    cpu_attn_plan_finish(&a->plan);
    free(a);
}

/* ---- checks --------------------------------------------------------------------------------- */

static const char *unsupported(const struct gqa_attn_layer *layer)
{
    uint32_t k_bytes = cpu_kv_type_bytes(layer->k_type);
    uint32_t v_bytes = cpu_kv_type_bytes(layer->v_type);

    if (layer->struct_size != sizeof(*layer)) {
        return "struct gqa_attn_layer has another size";
    }
    if (k_bytes == 0 || v_bytes == 0) {
        return "KV types other than F32, F16 and BF16";
    }
    if (layer->k_dim - 1 >= CPU_ATTN_DIM_MAX || layer->v_dim - 1 >= CPU_ATTN_DIM_MAX) {
        return "head dimensions outside 1..1024";
    }
    if (layer->n_kv_heads == 0 || layer->n_heads == 0 || layer->n_heads > CPU_ATTN_HEADS_MAX ||
        layer->n_heads % layer->n_kv_heads != 0) {
        return "heads that are not a multiple of the groups, or more than 4096";
    }
    if (layer->k_offset % k_bytes != 0 || layer->k_head_bytes % k_bytes != 0 ||
        layer->v_offset % v_bytes != 0 || layer->v_head_bytes % v_bytes != 0) {
        return "K or V at offsets that are not a multiple of their element";
    }
    if (!isfinite(layer->scale) || !isfinite(layer->softcap) || layer->softcap < 0.0f) {
        return "a scale or softcap that is not finite, or a negative softcap";
    }
    return NULL;
}

int cpu_attention_supports(const struct gqa_attn_layer *layer, struct gqa_reason *reason)
{
    const char *what = unsupported(layer);

    if (what == NULL) {
        return 0;
    }
    if (reason != NULL) {
        snprintf(reason->text, sizeof(reason->text), "cpu attention, layer %u: no support for %s",
                 layer->layer, what);
    }
    return -ENOTSUP;
}

/* Rows in order and inside the batch, and every page that they touch present. */
static int check_seq(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                     const struct gqa_attn_seq *seq, uint32_t expected_row)
{
    const struct gqa_page_table *table = &seq->tables[layer->layer_class];
    uint64_t n_tokens = (uint64_t)seq->n_past + seq->n_rows;

    if (seq->new_mask != NULL || table->positions != NULL) {
        return -ENOTSUP;
    }
    if (seq->first_row != expected_row || seq->n_rows > batch->n_rows - expected_row ||
        n_tokens > (uint64_t)table->n_pages * GQA_KV_BLOCK_TOKENS || n_tokens > UINT32_MAX) {
        return -EINVAL;
    }
    if (seq->n_rows == 0) {
        return 0;
    }
    for (uint32_t i = cpu_attn_first_visible(layer, seq->n_past) / GQA_KV_BLOCK_TOKENS;
         i < (n_tokens + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS; i++) {
        if (table->pages[i] == NULL) {
            return -EINVAL;
        }
    }
    return 0;
}

static int check(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch)
{
    uint32_t row = 0;

    if (unsupported(layer) != NULL || !batch->commit) {
        return -ENOTSUP;
    }
    if (batch->struct_size != sizeof(*batch) || batch->n_rows > CPU_ATTN_ROWS_MAX) {
        return -EINVAL;
    }
    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        int rc = check_seq(layer, batch, &batch->seqs[s], row);
        if (rc < 0) {
            return rc;
        }
        row += batch->seqs[s].n_rows;
    }
    return row == batch->n_rows ? 0 : -EINVAL;
}

/* ---- scratch --------------------------------------------------------------------------------- */

static size_t round_floats(size_t n)
{
    return (n + 15) & ~(size_t)15;
}

static struct worker worker_of(const struct job *job, uint32_t index)
{
    float *base = (float *)job->a->scratch + index * job->worker_floats;
    uint32_t part = cpu_attn_part_floats(job->layer->v_dim);
    struct worker w;

    w.scores = base;
    w.parts = w.scores + CPU_ATTN_PACK_MAX * GQA_ATTN_SEGMENT_TOKENS;
    w.states = w.parts + CPU_ATTN_PACK_MAX * part;
    w.q = w.states + (size_t)cpu_attn_piece_queries_max(job->group_size) * part;
    return w;
}

/* Lays out and, when a layer needs more than any before it, grows the workers' memory. */
static int prepare(struct job *job)
{
    const struct gqa_attn_layer *layer = job->layer;
    size_t part = cpu_attn_part_floats(layer->v_dim);
    size_t n_queries = cpu_attn_piece_queries_max(job->group_size);
    uint32_t wider = layer->k_dim > layer->v_dim ? layer->k_dim : layer->v_dim;

    job->worker_floats = CPU_ATTN_PACK_MAX * (GQA_ATTN_SEGMENT_TOKENS + part) + n_queries * part +
                         round_floats(n_queries * wider);
    return cpu_attn_grow(job->a->host, &job->a->scratch, &job->a->scratch_bytes,
                         job->worker_floats * sizeof(float) * job->a->host->n_threads);
}

/* ---- append ---------------------------------------------------------------------------------- */

/* One row's K and V of one group into its page; row is scratch for k_dim converted values. */
static void append_row(const struct job *job, const struct gqa_attn_seq *seq, uint32_t seq_row,
                       uint32_t group, void *row)
{
    const struct gqa_attn_layer *layer = job->layer;
    const struct gqa_attn_io *io = job->io;
    size_t batch_row = (size_t)seq->first_row + seq_row;
    uint32_t position = seq->n_past + seq_row, token = position % GQA_KV_BLOCK_TOKENS;
    char *page = seq->tables[layer->layer_class].pages[position / GQA_KV_BLOCK_TOKENS];
    const float *k = io->k + batch_row * io->k_stride + (size_t)group * layer->k_dim;
    const float *v = io->v + batch_row * io->v_stride + (size_t)group * layer->v_dim;
    char *k_page = page + layer->k_offset + group * layer->k_head_bytes;
    char *v_page = page + layer->v_offset + group * layer->v_head_bytes;
    size_t first = gqa_k_index(layer->k_dim, token, 0);

    job->a->kernels->store(layer->k_type, k, row, layer->k_dim);
    if (cpu_kv_type_bytes(layer->k_type) == 2) {
        uint16_t *tile = (uint16_t *)k_page + first;
        for (uint32_t d = 0; d < layer->k_dim; d++) {
            tile[d * GQA_KV_TILE_TOKENS] = ((const uint16_t *)row)[d];
        }
    } else {
        float *tile = (float *)k_page + first;
        for (uint32_t d = 0; d < layer->k_dim; d++) {
            tile[d * GQA_KV_TILE_TOKENS] = ((const float *)row)[d];
        }
    }
    job->a->kernels->store(layer->v_type, v,
                           v_page + gqa_v_index(layer->v_dim, token, 0) *
                                        cpu_kv_type_bytes(layer->v_type),
                           layer->v_dim);
}

/* A task is append_rows rows of the batch in all groups, whatever sequences they belong to. */
static void append_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct job *job = arg;
    struct worker w = worker_of(job, worker);
    const struct gqa_attn_batch *batch = job->batch;
    uint32_t first = index * job->append_rows;
    uint32_t end =
        batch->n_rows - first < job->append_rows ? batch->n_rows : first + job->append_rows;

    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        const struct gqa_attn_seq *seq = &batch->seqs[s];
        uint32_t seq_end = seq->first_row + seq->n_rows;

        for (uint32_t row = first > seq->first_row ? first : seq->first_row;
             row < end && row < seq_end; row++) {
            for (uint32_t group = 0; group < job->layer->n_kv_heads; group++) {
                append_row(job, seq, row - seq->first_row, group, w.q);
            }
        }
    }
}

int cpu_attention_append(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                         const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    int rc = check(layer, batch);
    if (rc < 0 || batch->n_rows == 0) {
        return rc;
    }
    struct job job = {.a = a,
                      .layer = layer,
                      .batch = batch,
                      .io = io,
                      .group_size = layer->n_heads / layer->n_kv_heads};
    rc = prepare(&job);
    if (rc < 0) {
        return rc;
    }
    job.append_rows =
        1 + CPU_ATTN_APPEND_VALUES / (layer->n_kv_heads * (layer->k_dim + layer->v_dim));
    uint32_t n_tasks = (batch->n_rows + job.append_rows - 1) / job.append_rows;
    if (n_tasks == 1) {
        append_task(&job, 0, 0); /* not worth waking anybody */
    } else {
        a->host->parallel(a->host->data, append_task, &job, n_tasks);
    }
    return 0;
}

/* ---- attend ---------------------------------------------------------------------------------- */

/* A piece with what its packs need; query i is row i / group_size, head i % group_size. */
struct span {
    const struct job *job;
    const struct cpu_attn_piece *piece;
    const struct gqa_attn_seq *seq;
    uint32_t n_queries;
    size_t part_floats;
    struct worker w;
};

static struct span span_of(const struct job *job, const struct cpu_attn_piece *piece,
                           uint32_t worker)
{
    return (struct span){
        .job = job,
        .piece = piece,
        .seq = &job->batch->seqs[piece->seq],
        .n_queries = piece->n_rows * job->group_size,
        .part_floats = cpu_attn_part_floats(job->layer->v_dim),
        .w = worker_of(job, worker),
    };
}

static uint32_t pack_size(uint32_t n_left)
{
    return n_left < CPU_ATTN_PACK_MAX ? n_left : CPU_ATTN_PACK_MAX;
}

/* Lays the queries out pack by pack, each (k_dim, n): one dimension's values side by side. */
static void pack_queries(const struct span *span)
{
    const struct job *job = span->job;
    uint32_t k_dim = job->layer->k_dim;
    size_t first_row = (size_t)span->seq->first_row + span->piece->first_row;
    uint32_t first_head = span->piece->group * job->group_size;

    for (uint32_t first = 0, n; first < span->n_queries; first += n) {
        float *pack = span->w.q + (size_t)first * k_dim;

        n = pack_size(span->n_queries - first);
        for (uint32_t i = 0; i < n; i++) {
            size_t row = first_row + (first + i) / job->group_size;
            uint32_t head = first_head + (first + i) % job->group_size;
            const float *q = job->io->q + row * job->io->q_stride + (size_t)head * k_dim;

            for (uint32_t d = 0; d < k_dim; d++) {
                pack[(size_t)d * n + i] = q[d];
            }
        }
    }
}

/* Fills begin and end (n): what queries [first, first + n) see of the segment. Whether any does. */
static int visible_ranges(const struct span *span, uint32_t segment, uint32_t first, uint32_t n,
                          uint16_t *begin, uint16_t *end)
{
    int64_t segment_first = (int64_t)segment * GQA_ATTN_SEGMENT_TOKENS;
    int any = 0;

    for (uint32_t i = 0; i < n; i++) {
        uint32_t row = span->piece->first_row + (first + i) / span->job->group_size;
        uint32_t position = span->seq->n_past + row;
        int64_t from = cpu_attn_first_visible(span->job->layer, position) - segment_first;
        int64_t to = (int64_t)position + 1 - segment_first;

        from = from < 0 ? 0 : from;
        to = to > GQA_ATTN_SEGMENT_TOKENS ? GQA_ATTN_SEGMENT_TOKENS : to;
        begin[i] = from < to ? (uint16_t)from : 0;
        end[i] = from < to ? (uint16_t)to : 0;
        any |= from < to;
    }
    return any;
}

static void set_empty(float *parts, uint32_t n, uint32_t v_dim)
{
    size_t part_floats = cpu_attn_part_floats(v_dim);

    memset(parts, 0, n * part_floats * sizeof(*parts));
    for (uint32_t i = 0; i < n; i++) {
        parts[i * part_floats + cpu_attn_v_pad(v_dim)] = -INFINITY;
    }
}

/* All packs of the span over one segment. parts (n_queries): where each one's part goes; NULL: into
 * the worker's memory, and at once into its states. */
static void run_segment(const struct span *span, uint32_t segment, int is_last, float *parts)
{
    const struct job *job = span->job;
    const struct gqa_attn_layer *layer = job->layer;
    const struct gqa_page_table *table = &span->seq->tables[layer->layer_class];
    void *const *pages = table->pages + (size_t)segment * CPU_ATTN_SEGMENT_BLOCKS;
    uint16_t begin[CPU_ATTN_PACK_MAX], end[CPU_ATTN_PACK_MAX];
    struct cpu_attn_pack pack = {
        .layer = layer,
        .pages = pages,
        .k_offset = layer->k_offset + span->piece->group * layer->k_head_bytes,
        .v_offset = layer->v_offset + span->piece->group * layer->v_head_bytes,
        .next_page = is_last ? NULL : pages[CPU_ATTN_SEGMENT_BLOCKS],
        .begin = begin,
        .end = end,
        .scores = span->w.scores,
    };

    for (uint32_t first = 0; first < span->n_queries; first += pack.n_queries) {
        pack.n_queries = pack_size(span->n_queries - first);
        pack.q = span->w.q + (size_t)first * layer->k_dim;
        pack.parts = parts != NULL ? parts + first * span->part_floats : span->w.parts;
        if (visible_ranges(span, segment, first, pack.n_queries, begin, end)) {
            job->a->kernels->segment(&pack);
        } else {
            set_empty(pack.parts, pack.n_queries, layer->v_dim);
        }
        for (uint32_t i = 0; parts == NULL && i < pack.n_queries; i++) {
            job->a->kernels->merge(span->w.states + (first + i) * span->part_floats,
                                   pack.parts + i * span->part_floats, layer->v_dim);
        }
    }
}

static void write_out(const struct span *span)
{
    const struct job *job = span->job;
    const struct gqa_attn_layer *layer = job->layer;

    for (uint32_t i = 0; i < span->n_queries; i++) {
        size_t row = (size_t)span->seq->first_row + span->piece->first_row + i / job->group_size;
        uint32_t head = span->piece->group * job->group_size + i % job->group_size;

        job->a->kernels->finish(span->w.states + i * span->part_floats,
                                layer->sinks != NULL ? &layer->sinks[head] : NULL, layer->v_dim,
                                job->io->out + row * job->io->out_stride +
                                    (size_t)head * layer->v_dim);
    }
}

/* Merges what the items of a cut piece have left, in ascending order of segments. */
static void merge_piece(const struct span *span)
{
    const struct job *job = span->job;
    const float *part = job->a->plan.parts + span->piece->parts;

    for (uint32_t s = 0; s < span->piece->n_segments; s++) {
        for (uint32_t i = 0; i < span->n_queries; i++, part += span->part_floats) {
            job->a->kernels->merge(span->w.states + i * span->part_floats, part, job->layer->v_dim);
        }
    }
}

static void attend_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct job *job = arg;
    const struct cpu_attn_item *item = &job->a->plan.items[index];
    struct cpu_attn_piece *piece = &job->a->plan.pieces[item->piece];
    struct span span = span_of(job, piece, worker);
    size_t segment_floats = span.n_queries * span.part_floats;
    float *parts = NULL;

    pack_queries(&span);
    set_empty(span.w.states, span.n_queries, job->layer->v_dim);
    if (piece->n_items > 1) {
        parts = job->a->plan.parts + piece->parts +
                (item->first_segment - piece->first_segment) * segment_floats;
    }
    for (uint32_t s = 0; s < item->n_segments; s++) {
        run_segment(&span, item->first_segment + s, s + 1 == item->n_segments, parts);
        parts = parts != NULL ? parts + segment_floats : NULL;
    }
    if (piece->n_items > 1) {
        /* Releases this item's parts; the last one to come acquires all of the others'. */
        if (atomic_fetch_sub_explicit(&piece->items_left, 1, memory_order_acq_rel) != 1) {
            return;
        }
        merge_piece(&span);
    }
    write_out(&span);
}

int cpu_attention_attend(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                         const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    int rc = check(layer, batch);
    if (rc < 0 || batch->n_rows == 0) {
        return rc;
    }
    struct job job = {.a = a,
                      .layer = layer,
                      .batch = batch,
                      .io = io,
                      .group_size = layer->n_heads / layer->n_kv_heads};
    rc = prepare(&job);
    if (rc < 0) {
        return rc;
    }
    rc = cpu_attn_plan_make(&a->plan, layer, batch);
    if (rc < 0) {
        return rc;
    }
    if (a->plan.n_items == 1) {
        attend_task(&job, 0, 0);
    } else {
        a->host->parallel(a->host->data, attend_task, &job, a->plan.n_items);
    }
    return 0;
}
