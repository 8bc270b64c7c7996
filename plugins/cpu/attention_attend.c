/* plugins/cpu/attention_attend.c - runs a batch's plan on the host's workers. */
#include "plugins/cpu/attention.h"

#include "plugins/cpu/attention_job.h"
#include "plugins/cpu/attention_sight.h"
#include "plugins/cpu/attention_turn.h"

#include <math.h>
#include <string.h>

/* A piece with what its packs need. Its queries are those of its first group, then the next one's:
 * in a group query i is row i / group_size, head i % group_size. */
struct span {
    const struct cpu_attn_job *job;
    const struct cpu_attn_piece *piece;
    uint32_t n_queries, group_queries;
    size_t part_floats;
    struct cpu_attn_worker w;
};

static struct span span_of(const struct cpu_attn_job *job, const struct cpu_attn_piece *piece,
                           uint32_t worker)
{
    return (struct span){
        .job = job,
        .piece = piece,
        .n_queries = piece->n_groups * piece->n_rows * job->group_size,
        .group_queries = piece->n_rows * job->group_size,
        .part_floats = cpu_attn_part_floats(job->layer->v_dim),
        .w = cpu_attn_worker_of(job, worker),
    };
}

/* Of the pack that begins with this query. */
static uint32_t pack_size(const struct span *span, uint32_t first)
{
    uint32_t n_left = span->group_queries - first % span->group_queries;

    return n_left < CPU_ATTN_PACK_MAX ? n_left : CPU_ATTN_PACK_MAX;
}

static uint32_t group_of(const struct span *span, uint32_t query)
{
    return span->piece->group + query / span->group_queries;
}

static size_t row_of(const struct span *span, uint32_t query)
{
    return (size_t)span->piece->first_row + query % span->group_queries / span->job->group_size;
}

static uint32_t head_of(const struct span *span, uint32_t query)
{
    return group_of(span, query) * span->job->group_size + query % span->job->group_size;
}

/* One query as the segments want it: io's, or a changed copy in the worker's memory. */
static const float *query_of(const struct span *span, uint32_t query)
{
    const struct cpu_attn_job *job = span->job;
    const struct gqa_attn_layer *layer = job->layer;
    size_t row = row_of(span, query);
    const float *q =
        job->io->q + row * job->io->q_stride + (size_t)head_of(span, query) * layer->k_dim;
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
static void pack_queries(const struct span *span, uint32_t piece)
{
    uint32_t k_dim = span->job->layer->k_dim;

    if (*span->w.packed == piece) {
        return;
    }
    *span->w.packed = piece;

    for (uint32_t first = 0, n; first < span->n_queries; first += n) {
        float *pack = span->w.q + (size_t)first * k_dim;

        n = pack_size(span, first);
        for (uint32_t i = 0; i < n; i++) {
            const float *q = query_of(span, first + i);

            for (uint32_t d = 0; d < k_dim; d++) {
                pack[(size_t)d * n + i] = q[d];
            }
        }
    }
}

/* What a pack's queries see of a segment, as kernels want it; in every group the same. */
struct sights {
    int any, masked; /* whether anything is seen; whether seen counts */
    uint16_t begin[CPU_ATTN_PACK_MAX], end[CPU_ATTN_PACK_MAX];
    uint64_t seen[CPU_ATTN_PACK_MAX * CPU_ATTN_SEGMENT_BLOCKS];
};

/* Fills in what queries [first, first + n) of each group see. */
static void look(const struct span *span, uint32_t segment, uint32_t first, uint32_t n,
                 struct sights *sights)
{
    const struct cpu_attn_job *job = span->job;
    const struct gqa_attn_seq *seq = &job->batch->seqs[span->piece->seq];
    struct cpu_attn_sight sight = {0};

    sights->any = 0;
    for (uint32_t i = 0; i < n; i++) {
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
        sights->any |= sight.begin < sight.end;
    }
    /* Rows of one sequence are masked in a segment all or none, those of several none. */
    sights->masked = sight.masked;
}

/* Packs of one group that go through a segment together. */
#define SIGHTS_MAX (CPU_ATTN_PIECE_QUERIES / CPU_ATTN_PACK_MAX)

static void set_empty(float *parts, uint32_t n, uint32_t v_dim)
{
    size_t part_floats = cpu_attn_part_floats(v_dim);

    memset(parts, 0, n * part_floats * sizeof(*parts));
    for (uint32_t i = 0; i < n; i++) {
        parts[i * part_floats + cpu_attn_v_pad(v_dim)] = -INFINITY;
    }
}

/* K and V of a pack's group in a segment. */
static void find_homes(const struct span *span, uint32_t segment, uint32_t group,
                       struct cpu_attn_pack *pack)
{
    for (uint32_t b = 0; b < CPU_ATTN_SEGMENT_BLOCKS; b++) {
        struct cpu_attn_home home = cpu_attn_home_of(span->job, span->piece->seq,
                                                     segment * CPU_ATTN_SEGMENT_BLOCKS + b, group);
        pack->k[b] = home.k;
        pack->v[b] = home.v;
    }
}

/* Where the segment after this one begins. */
static const char *find_next(const struct span *span, uint32_t segment)
{
    const struct cpu_attn_piece *piece = span->piece;
    struct cpu_attn_home home = {NULL, NULL};

    if (segment + 1 < piece->first_segment + piece->n_segments) {
        home = cpu_attn_home_of(span->job, piece->seq, (segment + 1) * CPU_ATTN_SEGMENT_BLOCKS,
                                piece->group);
    }
    return home.k != NULL ? home.k : (const char *)span->w.scores;
}

/* Of the span's queries from first on as many as go through a segment together: their packs into
 * packs, but for those that see nothing, whose parts (of the first one on) are made here. Returns
 * the number of queries. */
static uint32_t gather(const struct span *span, uint32_t segment, uint32_t first, float *parts,
                       struct cpu_attn_pack *packs, struct sights *sights, uint32_t *ret_packs)
{
    const struct gqa_attn_layer *layer = span->job->layer;
    const char *next_k = find_next(span, segment);
    uint32_t n = 0, n_packs = 0, size;

    for (; first + n < span->n_queries && n_packs < CPU_ATTN_PACKS_MAX; n += size) {
        uint32_t query = first + n, in_group = query % span->group_queries;
        struct sights *sight = &sights[in_group / CPU_ATTN_PACK_MAX % SIGHTS_MAX];

        size = pack_size(span, query);
        if (n + size > CPU_ATTN_PIECE_QUERIES) {
            break;
        }
        if (query == in_group || n == 0) {
            look(span, segment, in_group, size, sight);
        }
        if (!sight->any) {
            set_empty(parts + n * span->part_floats, size, layer->v_dim);
            continue;
        }
        struct cpu_attn_pack *pack = &packs[n_packs++];
        *pack = (struct cpu_attn_pack){
            .layer = layer,
            .next_k = next_k,
            .n_queries = size,
            .q = span->w.q + (size_t)query * layer->k_dim,
            .begin = sight->begin,
            .end = sight->end,
            .seen = sight->masked ? sight->seen : NULL,
            .scores = span->w.scores + (size_t)n * GQA_ATTN_SEGMENT_TOKENS,
            .parts = parts + n * span->part_floats,
        };
        find_homes(span, segment, group_of(span, query), pack);
    }
    *ret_packs = n_packs;
    return n;
}

/* All queries of the span over one segment. parts (n_queries): where each one's part goes; NULL:
 * into the worker's memory, and at once into its states. */
static void run_segment(const struct span *span, uint32_t segment, float *parts)
{
    const struct cpu_attn_kernels *kernels = span->job->a->kernels;
    struct cpu_attn_pack packs[CPU_ATTN_PACKS_MAX];
    struct sights sights[SIGHTS_MAX];

    for (uint32_t first = 0, n, n_packs; first < span->n_queries; first += n) {
        float *to = parts != NULL ? parts + first * span->part_floats : span->w.parts;

        n = gather(span, segment, first, to, packs, sights, &n_packs);
        if (n_packs > 0) {
            kernels->segment(packs, n_packs);
        }
        if (parts == NULL) {
            kernels->merge(span->w.states + first * span->part_floats, to, n,
                           span->job->layer->v_dim);
        }
    }
}

/* Where a query's state waits between a shared piece and its own sequence's. */
static float *kept_state(const struct span *span, uint32_t query)
{
    const struct cpu_attn_job *job = span->job;

    return job->a->plan.states +
           (row_of(span, query) * job->layer->n_heads + head_of(span, query)) * span->part_floats;
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
        uint32_t head = head_of(span, i);
        float *out =
            job->io->out + row_of(span, i) * job->io->out_stride + (size_t)head * layer->v_dim;

        job->a->kernels->finish(span->w.states + i * span->part_floats,
                                layer->sinks != NULL ? &layer->sinks[head] : NULL, layer->v_dim,
                                out);
        if (gqa_kv_rotates(layer->v_type)) {
            gqa_kv_rotate(out, layer->v_dim); /* back: it is its own inverse */
        }
    }
}

static void leave(const struct span *span)
{
    if (span->piece->shared) {
        keep_states(span);
    } else {
        write_out(span);
    }
}

/* Merges what the items of a cut piece have left for one group, in ascending order of segments. */
static void merge_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;
    const struct cpu_attn_merger *merger = &job->a->plan.mergers[index];
    const struct cpu_attn_piece *whole = &job->a->plan.pieces[merger->piece];
    struct cpu_attn_piece piece = *whole;

    piece.group = merger->group;
    piece.n_groups = 1;
    struct span span = span_of(job, &piece, worker);
    const size_t group_floats = span.n_queries * span.part_floats;
    const float *part =
        job->a->plan.parts + whole->parts + (piece.group - whole->group) * group_floats;

    start_states(&span);
    for (uint32_t s = 0; s < piece.n_segments; s++) {
        job->a->kernels->merge(span.w.states, part, span.n_queries, job->layer->v_dim);
        part += whole->n_groups * group_floats;
    }
    leave(&span);
}

static void attend_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;
    const struct cpu_attn_item *item = &job->a->plan.items[index];
    const struct cpu_attn_piece *piece = &job->a->plan.pieces[item->piece];
    struct span span = span_of(job, piece, worker);
    size_t segment_floats = span.n_queries * span.part_floats;
    float *parts = NULL;

    pack_queries(&span, item->piece);
    if (piece->n_items == 1) {
        start_states(&span);
    } else {
        parts = job->a->plan.parts + piece->parts +
                (item->first_segment - piece->first_segment) * segment_floats;
    }
    for (uint32_t s = 0; s < item->n_segments; s++) {
        run_segment(&span, item->first_segment + s, parts);
        parts = parts != NULL ? parts + segment_floats : NULL;
    }
    if (piece->n_items == 1) {
        leave(&span);
    }
}

static void attend_own_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;

    attend_task(arg, job->a->plan.n_shared_items + index, worker);
}

static void merge_own_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;

    merge_task(arg, job->a->plan.n_shared_mergers + index, worker);
}

/* Lends out n tasks; a lone one is done here. */
static void run(struct cpu_attn_job *job, gqa_task_fn task, uint32_t n)
{
    if (n == 1) {
        task(job, 0, 0);
    } else if (n > 1) {
        job->a->host->parallel(job->a->host->data, task, job, n);
    }
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
    run(&job, attend_task, a->plan.n_shared_items);
    run(&job, merge_task, a->plan.n_shared_mergers);
    run(&job, attend_own_task, a->plan.n_items - a->plan.n_shared_items);
    run(&job, merge_own_task, a->plan.n_mergers - a->plan.n_shared_mergers);
    return 0;
}
