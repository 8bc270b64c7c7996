/* plugins/cpu/attention_attend.c - runs a batch's plan on the host's workers. */
#include "plugins/cpu/attention.h"

#include "plugins/cpu/attention_job.h"
#include "plugins/cpu/attention_sight.h"
#include "plugins/cpu/attention_turn.h"

#include <math.h>
#include <string.h>

/* A piece with what its packs need; query i is row i / group_size, head i % group_size. */
struct span {
    const struct cpu_attn_job *job;
    const struct cpu_attn_piece *piece;
    uint32_t n_queries;
    size_t part_floats;
    struct cpu_attn_worker w;
};

static struct span span_of(const struct cpu_attn_job *job, const struct cpu_attn_piece *piece,
                           uint32_t worker)
{
    return (struct span){
        .job = job,
        .piece = piece,
        .n_queries = piece->n_rows * job->group_size,
        .part_floats = cpu_attn_part_floats(job->layer->v_dim),
        .w = cpu_attn_worker_of(job, worker),
    };
}

static uint32_t pack_size(uint32_t n_left)
{
    return n_left < CPU_ATTN_PACK_MAX ? n_left : CPU_ATTN_PACK_MAX;
}

/* One query as the segments want it: io's, or a changed copy in the worker's memory. */
static const float *query_of(const struct span *span, uint32_t query)
{
    const struct cpu_attn_job *job = span->job;
    const struct gqa_attn_layer *layer = job->layer;
    size_t row = (size_t)span->piece->first_row + query / job->group_size;
    uint32_t head = span->piece->group * job->group_size + query % job->group_size;
    const float *q = job->io->q + row * job->io->q_stride + (size_t)head * layer->k_dim;
    const struct gqa_attn_seq *seq = &job->batch->seqs[span->piece->seq];
    int turns = span->piece->sinks && plugin_turns(layer, seq);

    if (turns || gqa_kv_rotates(layer->k_type)) {
        q = memcpy(span->w.row, q, layer->k_dim * sizeof(*q));
    }
    if (turns) {
        if (query % job->group_size == 0) { /* a row's heads turn alike */
            plugin_find_turn(layer, seq, (uint32_t)row - seq->first_row, span->w.stored);
        }
        cpu_attn_turn(layer, span->w.stored, span->w.row);
    }
    if (gqa_kv_rotates(layer->k_type)) {
        gqa_kv_rotate(span->w.row, layer->k_dim);
    }
    return q;
}

/* Lays the queries out pack by pack, each (k_dim, n): one dimension's values side by side. */
static void pack_queries(const struct span *span)
{
    uint32_t k_dim = span->job->layer->k_dim;

    for (uint32_t first = 0, n; first < span->n_queries; first += n) {
        float *pack = span->w.q + (size_t)first * k_dim;

        n = pack_size(span->n_queries - first);
        for (uint32_t i = 0; i < n; i++) {
            const float *q = query_of(span, first + i);

            for (uint32_t d = 0; d < k_dim; d++) {
                pack[(size_t)d * n + i] = q[d];
            }
        }
    }
}

/* What a pack's queries see of a segment, as kernels want it. */
struct sights {
    uint16_t begin[CPU_ATTN_PACK_MAX], end[CPU_ATTN_PACK_MAX];
    uint64_t seen[CPU_ATTN_PACK_MAX * CPU_ATTN_SEGMENT_BLOCKS];
};

/* Fills in what queries [first, first + pack->n_queries) see. Whether any of them sees anything. */
static int look(const struct span *span, uint32_t segment, uint32_t first, struct sights *sights,
                struct cpu_attn_pack *pack)
{
    const struct cpu_attn_job *job = span->job;
    const struct gqa_attn_seq *seq = &job->batch->seqs[span->piece->seq];
    struct cpu_attn_sight sight = {0};
    int any = 0;

    for (uint32_t i = 0; i < pack->n_queries; i++) {
        if (i == 0 || (first + i) % job->group_size == 0) { /* a row's heads see the same */
            uint32_t row = span->piece->first_row + (first + i) / job->group_size;
            while (row >= seq->first_row + seq->n_rows) {
                seq++;
            }
            const uint32_t *depths = job->depths != NULL ? job->depths + seq->first_row : NULL;
            if (span->piece->sinks) {
                cpu_attn_sight_of_sinks(&sight, job->layer, seq, segment);
            } else {
                cpu_attn_sight_of(&sight, job->layer, seq, depths, row - seq->first_row, segment);
            }
        }
        sights->begin[i] = sight.begin;
        sights->end[i] = sight.end;
        memcpy(sights->seen + i * CPU_ATTN_SEGMENT_BLOCKS, sight.seen, sizeof(sight.seen));
        any |= sight.begin < sight.end;
    }
    pack->begin = sights->begin;
    pack->end = sights->end;
    /* Rows of one sequence are masked in a segment all or none, those of several none. */
    pack->seen = sight.masked ? sights->seen : NULL;
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
    const struct cpu_attn_job *job = span->job;
    const struct gqa_attn_layer *layer = job->layer;
    uint32_t group = span->piece->group, block = segment * CPU_ATTN_SEGMENT_BLOCKS;
    struct cpu_attn_pack pack = {
        .layer = layer, .scores = span->w.scores, .weights = span->w.weights};
    struct sights sights;

    for (uint32_t b = 0; b < CPU_ATTN_SEGMENT_BLOCKS; b++) {
        struct cpu_attn_home home = cpu_attn_home_of(job, span->piece->seq, block + b, group);
        pack.k[b] = home.k;
        pack.v[b] = home.v;
    }
    if (!is_last) {
        block += CPU_ATTN_SEGMENT_BLOCKS;
        pack.next_k = cpu_attn_home_of(job, span->piece->seq, block, group).k;
    }
    if (pack.next_k == NULL) {
        pack.next_k = (const char *)span->w.scores;
    }
    for (uint32_t first = 0; first < span->n_queries; first += pack.n_queries) {
        pack.n_queries = pack_size(span->n_queries - first);
        pack.q = span->w.q + (size_t)first * layer->k_dim;
        pack.parts = parts != NULL ? parts + first * span->part_floats : span->w.parts;
        if (look(span, segment, first, &sights, &pack)) {
            job->a->kernels->segment(&pack);
        } else {
            set_empty(pack.parts, pack.n_queries, layer->v_dim);
        }
        if (parts == NULL) {
            job->a->kernels->merge(span->w.states + first * span->part_floats, pack.parts,
                                   pack.n_queries, layer->v_dim);
        }
    }
}

/* Where a query's state waits between a shared piece and its own sequence's. */
static float *kept_state(const struct span *span, uint32_t query)
{
    const struct cpu_attn_job *job = span->job;
    size_t row = (size_t)span->piece->first_row + query / job->group_size;
    uint32_t head = span->piece->group * job->group_size + query % job->group_size;

    return job->a->plan.states + (row * job->layer->n_heads + head) * span->part_floats;
}

static void start_states(const struct span *span)
{
    if (!span->piece->resumes) {
        set_empty(span->w.states, span->n_queries, span->job->layer->v_dim);
        return;
    }
    for (uint32_t i = 0; i < span->n_queries; i++) {
        memcpy(span->w.states + i * span->part_floats, kept_state(span, i),
               span->part_floats * sizeof(float));
    }
}

static void keep_states(const struct span *span)
{
    for (uint32_t i = 0; i < span->n_queries; i++) {
        memcpy(kept_state(span, i), span->w.states + i * span->part_floats,
               span->part_floats * sizeof(float));
    }
}

static void write_out(const struct span *span)
{
    const struct cpu_attn_job *job = span->job;
    const struct gqa_attn_layer *layer = job->layer;

    for (uint32_t i = 0; i < span->n_queries; i++) {
        size_t row = (size_t)span->piece->first_row + i / job->group_size;
        uint32_t head = span->piece->group * job->group_size + i % job->group_size;

        float *out = job->io->out + row * job->io->out_stride + (size_t)head * layer->v_dim;

        job->a->kernels->finish(span->w.states + i * span->part_floats,
                                layer->sinks != NULL ? &layer->sinks[head] : NULL, layer->v_dim,
                                out);
        if (gqa_kv_rotates(layer->v_type)) {
            gqa_kv_rotate(out, layer->v_dim); /* back: it is its own inverse */
        }
    }
}

/* Merges what the items of a cut piece have left, in ascending order of segments. */
static void merge_piece(const struct span *span)
{
    const struct cpu_attn_job *job = span->job;
    const float *part = job->a->plan.parts + span->piece->parts;

    for (uint32_t s = 0; s < span->piece->n_segments; s++) {
        job->a->kernels->merge(span->w.states, part, span->n_queries, job->layer->v_dim);
        part += span->n_queries * span->part_floats;
    }
}

static void attend_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;
    const struct cpu_attn_item *item = &job->a->plan.items[index];
    struct cpu_attn_piece *piece = &job->a->plan.pieces[item->piece];
    struct span span = span_of(job, piece, worker);
    size_t segment_floats = span.n_queries * span.part_floats;
    float *parts = NULL;

    pack_queries(&span);
    start_states(&span);
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
    if (piece->shared) {
        keep_states(&span);
    } else {
        write_out(&span);
    }
}

static void attend_own_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;

    attend_task(arg, job->a->plan.n_shared_items + index, worker);
}

/* The depths of all rows of sequences with masks. 0 or -ENOMEM. */
static int count_depths(struct cpu_attn_job *job)
{
    struct cpu_attention *a = job->a;
    const struct gqa_attn_batch *batch = job->batch;

    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        if (batch->seqs[s].new_mask == NULL) {
            continue;
        }
        if (job->depths == NULL) {
            int rc = cpu_attn_grow(a->host, (void **)&a->depths, &a->depths_bytes,
                                   batch->n_rows * sizeof(*a->depths));
            if (rc < 0) {
                return rc;
            }
            job->depths = a->depths;
        }
        plugin_count_depths(&batch->seqs[s], a->depths + batch->seqs[s].first_row);
    }
    return 0;
}

int cpu_attention_attend(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                         const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    struct cpu_attn_job job;
    int rc = cpu_attn_job_init(&job, a, layer, batch, io);

    if (rc < 0 || batch->n_rows == 0) {
        return rc;
    }
    rc = count_depths(&job);
    if (rc == 0 && !batch->commit) {
        rc = cpu_attn_fresh_make(&job);
    }
    if (rc == 0) {
        rc = cpu_attn_plan_make(&a->plan, layer, batch);
    }
    if (rc < 0) {
        return rc;
    }
    uint32_t n_own_items = a->plan.n_items - a->plan.n_shared_items;
    if (a->plan.n_shared_items > 0) {
        a->host->parallel(a->host->data, attend_task, &job, a->plan.n_shared_items);
    }
    if (n_own_items == 1) {
        attend_own_task(&job, 0, 0);
    } else {
        a->host->parallel(a->host->data, attend_own_task, &job, n_own_items);
    }
    return 0;
}
