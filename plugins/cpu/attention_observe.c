/* plugins/cpu/attention_observe.c - whom a sequence's last rows have looked at: SnapKV's votes.
 *
 * A query's weights over all it sees need its maximum and sum over all segments, so that these come
 * first; then every segment is computed once more, and its weights, scaled to the whole, are added
 * to the votes. Both with the level's own kernels, which are told that V has no dimensions:
 * weights, their maximum and sum are all that is wanted. Tasks share no vote: a segment's are added
 * by one worker, row after row and head after head, whatever chunk a row came in.
 *
 * Source: SnapKV (Li et al., 2024), votes summed over the heads of a group. */
#include "plugins/cpu/attention.h"
#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_job.h"
#include "plugins/cpu/attention_sight.h"

#include <math.h>
#include <string.h>

/* Of one query over all segments. */
struct whole {
    float max, sum;
};

struct watch {
    const struct cpu_attn_job *job;
    struct gqa_attn_layer layer; /* the job's, but without V */
    uint32_t seq;
    uint32_t first_row, n_rows; /* of the sequence */
    uint32_t n_segments, n_votes;
    struct whole *wholes; /* (n_kv_heads, n_rows * group_size) */
    float *votes;
};

static uint32_t n_queries(const struct watch *o)
{
    return o->n_rows * o->job->group_size;
}

static uint32_t pack_size(uint32_t n_left)
{
    return n_left < CPU_ATTN_PACK_MAX ? n_left : CPU_ATTN_PACK_MAX;
}

/* A group's queries [first, first + n) as a pack wants them: (k_dim, n) in w->q. */
static void pack_queries(const struct watch *o, uint32_t group, uint32_t first, uint32_t n,
                         const struct cpu_attn_worker *w)
{
    const struct cpu_attn_job *job = o->job;
    uint32_t k_dim = job->layer->k_dim, r = job->group_size;
    size_t row0 = (size_t)job->batch->seqs[o->seq].first_row + o->first_row;

    for (uint32_t i = 0; i < n; i++) {
        size_t row = row0 + (first + i) / r, head = (size_t)group * r + (first + i) % r;
        const float *q = job->io->q + row * job->io->q_stride + head * k_dim;

        memcpy(w->row, q, k_dim * sizeof(*q));
        if (gqa_kv_rotates(job->layer->k_type)) {
            gqa_kv_rotate(w->row, k_dim);
        }
        for (uint32_t d = 0; d < k_dim; d++) {
            w->q[(size_t)d * n + i] = w->row[d];
        }
    }
}

/* Computes a pack that is packed over one segment: w->scores has the weights, w->parts their maxima
 * and sums. begin, end (n): what is seen. */
static void run_segment(const struct watch *o, uint32_t group, uint32_t segment, uint32_t first,
                        uint32_t n, const struct cpu_attn_worker *w, uint16_t *begin, uint16_t *end)
{
    const struct cpu_attn_job *job = o->job;
    const struct gqa_attn_seq *seq = &job->batch->seqs[o->seq];
    struct cpu_attn_pack pack = {.layer = &o->layer,
                                 .n_queries = n,
                                 .q = w->q,
                                 .begin = begin,
                                 .end = end,
                                 .scores = w->scores,
                                 .next_k = (const char *)w->scores,
                                 .parts = w->parts};

    for (uint32_t b = 0; b < CPU_ATTN_SEGMENT_BLOCKS; b++) {
        struct cpu_attn_home home =
            cpu_attn_home_of(job, o->seq, segment * CPU_ATTN_SEGMENT_BLOCKS + b, group);
        pack.k[b] = pack.v[b] = home.k; /* of V nothing is read */
    }
    for (uint32_t i = 0; i < n; i++) {
        struct cpu_attn_sight sight;
        uint32_t row = o->first_row + (first + i) / job->group_size;
        cpu_attn_sight_of(&sight, job->layer, seq, NULL, row, segment);
        begin[i] = sight.begin;
        end[i] = sight.end;
    }
    job->a->kernels->segment(&pack, 1);
}

/* Maximum and sum of a query's weights: all that a part without V has. */
static const float *end_of_part(const struct cpu_attn_worker *w, uint32_t query)
{
    return w->parts + (size_t)query * cpu_attn_part_floats(0) + cpu_attn_v_pad(0);
}

static struct whole *whole_of(const struct watch *o, uint32_t group, uint32_t query)
{
    return &o->wholes[(size_t)group * n_queries(o) + query];
}

/* A task is one pack of one group over all segments. */
static void whole_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct watch *o = arg;
    const struct gqa_attn_layer *layer = o->job->layer;
    struct cpu_attn_worker w = cpu_attn_worker_of(o->job, worker);
    uint32_t n_packs = (n_queries(o) + CPU_ATTN_PACK_MAX - 1) / CPU_ATTN_PACK_MAX;
    uint32_t group = index / n_packs, first = index % n_packs * CPU_ATTN_PACK_MAX;
    uint32_t n = pack_size(n_queries(o) - first);
    uint16_t begin[CPU_ATTN_PACK_MAX], end[CPU_ATTN_PACK_MAX];

    pack_queries(o, group, first, n, &w);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t head = group * o->job->group_size + (first + i) % o->job->group_size;
        float sink = layer->sinks != NULL ? layer->sinks[head] : -INFINITY;
        *whole_of(o, group, first + i) = (struct whole){sink, sink != -INFINITY ? 1.0f : 0.0f};
    }
    for (uint32_t s = 0; s < o->n_segments; s++) {
        run_segment(o, group, s, first, n, &w, begin, end);
        for (uint32_t i = 0; i < n; i++) {
            const float *part = end_of_part(&w, i);
            struct whole *all = whole_of(o, group, first + i);
            float max = part[0] > all->max ? part[0] : all->max;

            if (part[0] != -INFINITY) {
                float before = all->max == -INFINITY ? 0.0f : all->sum * expf(all->max - max);
                *all = (struct whole){max, before + part[1] * expf(part[0] - max)};
            }
        }
    }
}

/* A task is one segment of one group, for all queries. */
static void vote_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct watch *o = arg;
    struct cpu_attn_worker w = cpu_attn_worker_of(o->job, worker);
    uint32_t n_segments = (o->n_votes + GQA_ATTN_SEGMENT_TOKENS - 1) / GQA_ATTN_SEGMENT_TOKENS;
    uint32_t group = index / n_segments, segment = index % n_segments;
    uint32_t base = segment * GQA_ATTN_SEGMENT_TOKENS, left = o->n_votes - base, n;
    float *votes = o->votes + (size_t)group * o->n_votes + base;
    uint16_t begin[CPU_ATTN_PACK_MAX], end[CPU_ATTN_PACK_MAX];

    for (uint32_t first = 0; first < n_queries(o); first += n) {
        n = pack_size(n_queries(o) - first);
        pack_queries(o, group, first, n, &w);
        run_segment(o, group, segment, first, n, &w, begin, end);
        for (uint32_t i = 0; i < n; i++) {
            const float *part = end_of_part(&w, i);
            const struct whole *all = whole_of(o, group, first + i);
            float share = part[0] == -INFINITY ? 0.0f : expf(part[0] - all->max) / all->sum;

            for (uint32_t t = begin[i]; t < end[i] && t < left; t++) {
                votes[t] += w.scores[(size_t)i * GQA_ATTN_SEGMENT_TOKENS + t] * share;
            }
        }
    }
}

static int watch_init(struct watch *o, struct cpu_attn_job *job, uint32_t seq, uint32_t n_observed,
                      uint32_t n_votes, float *votes)
{
    const struct gqa_attn_batch *batch = job->batch;
    int rc = plugin_check_observed(job->layer, batch, seq, n_observed, n_votes);

    if (rc < 0) {
        return rc;
    }
    *o = (struct watch){.job = job,
                        .layer = *job->layer,
                        .seq = seq,
                        .first_row = batch->seqs[seq].n_rows - n_observed,
                        .n_rows = n_observed,
                        .n_votes = n_votes,
                        .votes = votes};
    o->layer.v_dim = 0;
    o->n_segments = plugin_last_seen(job->layer, &batch->seqs[seq], batch->seqs[seq].n_rows - 1) /
                        GQA_ATTN_SEGMENT_TOKENS +
                    1;
    rc = cpu_attn_grow(job->a->host, &job->a->wholes, &job->a->wholes_bytes,
                       (size_t)n_queries(o) * job->layer->n_kv_heads * sizeof(struct whole));
    o->wholes = job->a->wholes;
    return rc;
}

int cpu_attention_observe(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                          const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                          uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes)
{
    struct cpu_attn_job job;
    struct watch o;
    int rc = cpu_attn_job_init(&job, a, layer, batch, io);

    rc = rc < 0 ? rc : watch_init(&o, &job, seq, n_observed, n_votes, votes);
    if (rc < 0) {
        return rc;
    }
    uint32_t n_packs = (n_queries(&o) + CPU_ATTN_PACK_MAX - 1) / CPU_ATTN_PACK_MAX;
    uint32_t n_segments = (n_votes + GQA_ATTN_SEGMENT_TOKENS - 1) / GQA_ATTN_SEGMENT_TOKENS;
    a->host->parallel(a->host->data, whole_task, &o, n_packs * layer->n_kv_heads);
    a->host->parallel(a->host->data, vote_task, &o, n_segments * layer->n_kv_heads);
    return 0;
}
