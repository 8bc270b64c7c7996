#include "tools/plugin-check/problem.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROBLEM_FREQS 8u /* of the rope: the rest of a head is not rotated */

static const struct problem_spec problems[] = {
    {"one token, multi-head, f32", 4, 4, 16, GQA_TYPE_F32, 0, 0, 0, 0, 1},
    {"groups of 4, decode at 300, f16", 8, 2, 64, GQA_TYPE_F16, 0, 0, 0, 300, 1},
    {"groups of 3, a chunk of 70, f16", 6, 2, 32, GQA_TYPE_F16, 0, 0, 0, 33, 70},
    {"multi-query, a prompt of 130, f32", 7, 1, 80, GQA_TYPE_F32, 0, 0, 0, 0, 130},
    {"window of 16, a chunk over blocks, f16", 4, 2, 32, GQA_TYPE_F16, 16, 0, 0, 120, 40},
    {"soft cap, f16", 4, 2, 64, GQA_TYPE_F16, 0, 4, 0, 90, 3},
    {"sinks and window, f16", 8, 2, 64, GQA_TYPE_F16, 24, 0, 1, 500, 2},
    {"groups of 4, a chunk at 200, q8_0", 8, 2, 64, GQA_TYPE_Q8_0, 0, 0, 0, 200, 40},
    {"groups of 2, a chunk at 200, q4_0", 4, 2, 80, GQA_TYPE_Q4_0, 50, 0, 1, 200, 40},
    {"a tree of 21 guesses, f16", 8, 2, 64, GQA_TYPE_F16, 0, 0, 0, 250, 21, GQA_ATTN_CAP_TREE},
    {"a tree in a window of 4, f32", 4, 2, 32, GQA_TYPE_F32, 4, 0, 1, 3, 70, GQA_ATTN_CAP_TREE},
    {"no commit, a chunk over blocks, f16", 6, 2, 64, GQA_TYPE_F16, 0, 0, 0, 120, 40,
     GQA_ATTN_CAP_NO_COMMIT},
    {"an encoder of 300 rows, f32", 4, 4, 32, GQA_TYPE_F32, 0, 0, 0, 0, 300,
     GQA_ATTN_CAP_MUTUAL | GQA_ATTN_CAP_NO_COMMIT},
    {"an encoder's window of 17, f16", 4, 4, 32, GQA_TYPE_F16, 17, 0, 0, 0, 100,
     GQA_ATTN_CAP_MUTUAL | GQA_ATTN_CAP_NO_COMMIT},
    {"sinks and recent ones, f16", 8, 2, 64, GQA_TYPE_F16, 0, 0, 0, 90, 40, GQA_ATTN_CAP_SPARSE,
     .view = {4, 100, 0, 0}},
    {"a turned view with a gap, f32", 6, 2, 32, GQA_TYPE_F32, 0, 0, 1, 600, 3, GQA_ATTN_CAP_SPARSE,
     .view = {70, 100, 256, 1}},
};

const struct problem_spec *problem_at(uint32_t i)
{
    return i < sizeof(problems) / sizeof(problems[0]) ? &problems[i] : NULL;
}

/* xorshift64*: the same numbers on every machine. Values lie in -1..1. */
static void fill_random(float *values, size_t n, uint64_t seed)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = 0; i < n; i++) {
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        values[i] = (float)((int32_t)((x * 0x2545f4914f6cdd1du) >> 32)) / 2147483648.0f;
    }
}

struct problem {
    const struct problem_spec *spec;
    struct gqa_attn_layer layer;
    uint32_t n_tokens, n_pages;
    float *q, *k, *v, *out, *sinks; /* q, k, v of all tokens; out of the last n_rows */
    uint64_t *mask;                 /* (n_rows, words) of the last n_rows */
    void **pages, **seen;           /* seen: without those that lie before every row's window */
    void **view_pages;              /* the same without those that the view has dropped */
    double freqs[PROBLEM_FREQS];
    struct gqa_rope_table rope;
    float *votes; /* (n_kv_heads, n_votes) of the rows from n_votes on; NULL: nobody votes */
    uint32_t n_votes;
};

static void problem_finish(struct problem *p)
{
    for (uint32_t i = 0; p->pages != NULL && i < p->n_pages; i++) {
        free(p->pages[i]);
    }
    free(p->pages);
    free(p->view_pages);
    free(p->votes);
    free(p->seen);
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->sinks);
    free(p->mask);
    free(p->out);
}

static void describe_layer(struct problem *p)
{
    const struct problem_spec *s = p->spec;
    uint64_t head_bytes = gqa_kv_head_bytes(s->kv_type, s->dim);
    p->layer = (struct gqa_attn_layer){
        .struct_size = sizeof(p->layer),
        .n_heads = s->n_heads,
        .n_kv_heads = s->n_kv_heads,
        .k_dim = s->dim,
        .v_dim = s->dim,
        .k_type = s->kv_type,
        .v_type = s->kv_type,
        .window = s->window,
        .scale = 1 / sqrtf((float)s->dim),
        .softcap = s->softcap,
        .sinks = s->with_sinks ? p->sinks : NULL,
        .v_offset = s->n_kv_heads * head_bytes,
        .k_head_bytes = head_bytes,
        .v_head_bytes = head_bytes,
    };
    for (uint32_t i = 0; i < PROBLEM_FREQS; i++) {
        p->freqs[i] = pow(100, -(double)i / PROBLEM_FREQS);
    }
    p->rope = (struct gqa_rope_table){PROBLEM_FREQS, p->freqs, 1};
    if (s->caps & GQA_ATTN_CAP_SPARSE) {
        p->layer.rope = &p->rope;
        p->layer.rope_kind = s->dim % 64 == 0 ? GQA_ROPE_HALF : GQA_ROPE_NEIGHBOUR;
    }
}

/* How the rows in question see the pages. */
static struct gqa_page_table view_of(const struct problem *p)
{
    const struct problem_spec *s = p->spec;
    uint32_t n_kept = (s->view.n_sinks + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS;
    uint32_t n_gone = s->view.n_dropped / GQA_KV_BLOCK_TOKENS;
    for (uint32_t i = 0; i < p->n_pages - n_gone; i++) {
        p->view_pages[i] = p->pages[i < n_kept ? i : i + n_gone];
    }
    return (struct gqa_page_table){.n_pages = p->n_pages - n_gone,
                                   .pages = p->view_pages,
                                   .n_dropped = s->view.n_dropped,
                                   .n_sinks = s->view.n_sinks,
                                   .recent = s->view.recent,
                                   .turned = s->view.turned};
}

#define FRAME_ROWS 8u

static void fill_mask(enum problem_mask kind, uint64_t *mask, uint32_t n_rows)
{
    size_t n_words = (n_rows + 63) / 64;
    for (uint32_t i = 0; kind == PROBLEM_FRAMES && i < n_rows; i++) {
        for (uint32_t j = 0; j < n_rows && j / FRAME_ROWS <= i / FRAME_ROWS; j++) {
            mask[i * n_words + j / 64] |= (uint64_t)1 << j % 64;
        }
    }
    for (uint32_t i = 0; kind == PROBLEM_TREE && i < n_rows; i++) {
        for (size_t w = 0; i > 0 && w < n_words; w++) {
            mask[i * n_words + w] = mask[i / 2 * n_words + w];
        }
        mask[i * n_words + i / 64] |= (uint64_t)1 << i % 64;
    }
}

/* Blocks start as NaN everywhere: whoever reads what was never written shows it. */
static int problem_init(struct problem *p, const struct problem_spec *s)
{
    memset(p, 0, sizeof(*p));
    p->spec = s;
    p->n_tokens = s->n_past + s->n_rows;
    p->n_pages = (p->n_tokens + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS;
    size_t q_floats = (size_t)p->n_tokens * s->n_heads * s->dim;
    size_t kv_floats = (size_t)p->n_tokens * s->n_kv_heads * s->dim;
    p->q = calloc(q_floats, sizeof(float));
    p->k = calloc(kv_floats, sizeof(float));
    p->v = calloc(kv_floats, sizeof(float));
    p->sinks = calloc(s->n_heads, sizeof(float));
    p->out = calloc((size_t)s->n_rows * s->n_heads * s->dim, sizeof(float));
    p->pages = calloc(p->n_pages, sizeof(*p->pages));
    p->seen = calloc(p->n_pages, sizeof(*p->seen));
    p->view_pages = calloc(p->n_pages, sizeof(*p->view_pages));
    p->mask = calloc((size_t)s->n_rows * ((s->n_rows + 63) / 64), sizeof(*p->mask));
    if (p->q == NULL || p->k == NULL || p->v == NULL || p->sinks == NULL || p->out == NULL ||
        p->pages == NULL || p->seen == NULL || p->view_pages == NULL || p->mask == NULL) {
        return -ENOMEM;
    }
    fill_random(p->q, q_floats, 1);
    fill_random(p->k, kv_floats, 2);
    fill_random(p->v, kv_floats, 3);
    fill_random(p->sinks, s->n_heads, 4);
    fill_mask(s->mask, p->mask, s->n_rows);
    describe_layer(p);
    size_t page_bytes = (size_t)(p->layer.v_offset + s->n_kv_heads * p->layer.v_head_bytes);
    for (uint32_t i = 0; i < p->n_pages; i++) {
        p->pages[i] = aligned_alloc(64, (page_bytes + 63) & ~(size_t)63);
        if (p->pages[i] == NULL) {
            return -ENOMEM;
        }
        memset(p->pages[i], 0xff, page_bytes);
    }
    return 0;
}

/* The pages as a host hands them over: what no row from first on can see may be gone. */
static void hide_pages(struct problem *p, uint32_t first)
{
    for (uint32_t i = 0; i < p->n_pages; i++) {
        uint32_t end = (i + 1) * GQA_KV_BLOCK_TOKENS;
        bool hidden = p->spec->window > 0 && end + p->spec->window <= first + 1;
        p->seen[i] = hidden ? NULL : p->pages[i];
    }
}

/* Appends tokens [first, first + n); where out is not NULL, these are the rows in question: attends
 * them too, with all that caps ask for. */
static int run_rows(struct problem *p, const struct gqa_attention *attention, void *context,
                    uint32_t first, uint32_t n, float *out)
{
    const struct problem_spec *s = p->spec;
    struct gqa_page_table table = {.n_pages = p->n_pages, .pages = p->seen};
    hide_pages(p, first);
    uint32_t caps = out != NULL ? s->caps : 0;
    table = caps & GQA_ATTN_CAP_SPARSE ? view_of(p) : table;
    struct gqa_attn_seq seq = {.n_rows = n,
                               .n_past = first,
                               .mutual = (caps & GQA_ATTN_CAP_MUTUAL) != 0,
                               .tables = &table,
                               .new_mask = caps & GQA_ATTN_CAP_TREE ? p->mask : NULL};
    uint8_t *row_class = calloc(n, 1);
    if (row_class == NULL) {
        return -ENOMEM;
    }
    struct gqa_attn_batch batch = {
        .struct_size = sizeof(batch),
        .n_rows = n,
        .n_seqs = 1,
        .commit = (caps & GQA_ATTN_CAP_NO_COMMIT) == 0,
        .seqs = &seq,
        .row_class = row_class,
    };
    size_t q_stride = (size_t)s->n_heads * s->dim;
    size_t kv_stride = (size_t)s->n_kv_heads * s->dim;
    struct gqa_attn_io io = {
        .q = p->q + first * q_stride,
        .k = p->k + first * kv_stride,
        .v = p->v + first * kv_stride,
        .out = out,
        .q_stride = q_stride,
        .k_stride = kv_stride,
        .v_stride = kv_stride,
        .out_stride = q_stride,
    };
    int rc = attention->append(context, &p->layer, &batch, &io);
    if (rc == 0 && out != NULL) {
        rc = attention->attend(context, &p->layer, &batch, &io);
    }
    if (rc == 0 && p->votes != NULL && first >= p->n_votes) {
        rc = attention->observe(context, &p->layer, &batch, &io, 0, n, p->n_votes, p->votes);
    }
    free(row_class);
    return rc;
}

static float *copies(const float *rows, size_t n, uint32_t n_copies)
{
    float *all = malloc(n_copies * n * sizeof(*all));
    for (uint32_t i = 0; all != NULL && i < n_copies; i++) {
        memcpy(all + i * n, rows, n * sizeof(*all));
    }
    return all;
}

#define COPIES_MAX 4u

/* The hints of what n copies share; returns how many. Of four: one block is common to all, and to
 * the two in the middle all that is whole. */
static uint32_t share(uint32_t n, uint32_t n_past, struct gqa_attn_shared ret[2])
{
    uint32_t whole = n_past / GQA_KV_BLOCK_TOKENS * GQA_KV_BLOCK_TOKENS;
    if (n < COPIES_MAX || whole <= GQA_KV_BLOCK_TOKENS) {
        ret[0] = (struct gqa_attn_shared){whole, 0, n - 1};
        return whole > 0;
    }
    ret[0] = (struct gqa_attn_shared){GQA_KV_BLOCK_TOKENS, 0, n - 1};
    ret[1] = (struct gqa_attn_shared){whole, 1, 2};
    return 2;
}

/* Attends rows that were appended once more, as the second of several sequences that are alike; but
 * for a view, which only the second has. */
static int attend_in_company(struct problem *p, const struct problem_way *way,
                             const struct gqa_attention *attention, void *context, float *out)
{
    const struct problem_spec *s = p->spec;
    const size_t q_stride = (size_t)s->n_heads * s->dim, kv_stride = (size_t)s->n_kv_heads * s->dim;
    const struct gqa_page_table table = {.n_pages = p->n_pages, .pages = p->seen};
    const struct gqa_page_table view = view_of(p);
    const uint32_t n = way->n_copies;
    const bool is_view = s->caps & GQA_ATTN_CAP_SPARSE;
    struct gqa_attn_shared hints[2];
    struct gqa_attn_seq seqs[COPIES_MAX];
    uint8_t *row_class = calloc((size_t)n * s->n_rows, 1);
    float *q = copies(p->q + s->n_past * q_stride, s->n_rows * q_stride, n);
    float *k = copies(p->k + s->n_past * kv_stride, s->n_rows * kv_stride, n);
    float *v = copies(p->v + s->n_past * kv_stride, s->n_rows * kv_stride, n);
    float *all = calloc((size_t)n * s->n_rows * q_stride, sizeof(*all));
    int rc = row_class == NULL || q == NULL || k == NULL || v == NULL || all == NULL ? -ENOMEM : 0;
    hide_pages(p, s->n_past);
    for (uint32_t i = 0; i < n; i++) {
        seqs[i] = (struct gqa_attn_seq){.first_row = i * s->n_rows,
                                        .n_rows = s->n_rows,
                                        .n_past = s->n_past,
                                        .tables = i == 1 && is_view ? &view : &table};
    }
    if (rc == 0) {
        const struct gqa_attn_batch batch = {
            .struct_size = sizeof(batch),
            .n_rows = n * s->n_rows,
            .n_seqs = n,
            .commit = 1,
            .seqs = seqs,
            .row_class = row_class,
            .n_shared = way->shared ? share(n, s->n_past, hints) : 0,
            .shared = hints,
        };
        const struct gqa_attn_io io = {q, k, v, all, q_stride, kv_stride, kv_stride, q_stride};
        rc = attention->attend(context, &p->layer, &batch, &io);
        memcpy(out, all + s->n_rows * q_stride, s->n_rows * q_stride * sizeof(*out));
    }
    free(row_class);
    free(q);
    free(k);
    free(v);
    free(all);
    return rc;
}

/* The rows in question, all at once or in chunks. */
static int run_in_chunks(struct problem *p, uint32_t chunk, const struct gqa_attention *attention,
                         void *context)
{
    const struct problem_spec *s = p->spec;
    size_t q_stride = (size_t)s->n_heads * s->dim;
    uint32_t step = chunk > 0 ? chunk : s->n_rows;
    int rc = 0;
    for (uint32_t done = 0; rc == 0 && done < s->n_rows; done += step) {
        uint32_t n = s->n_rows - done < step ? s->n_rows - done : step;
        rc = run_rows(p, attention, context, s->n_past + done, n, p->out + done * q_stride);
    }
    return rc;
}

/* Whether the plugin promises what a problem takes. */
static int check_caps(uint32_t needed, uint32_t has, struct gqa_reason *reason)
{
    static const char *const names[] = {"SHARED",    "SPARSE",  "TREE",
                                        "NO_COMMIT", "OBSERVE", "MUTUAL"};
    for (uint32_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if ((needed & ~has) >> i & 1) {
            snprintf(reason->text, sizeof(reason->text), "its caps are without GQA_ATTN_CAP_%s",
                     names[i]);
            return -ENOTSUP;
        }
    }
    return 0;
}

int problem_run_as(const struct problem_spec *spec, const struct problem_way *way,
                   const struct gqa_attention *attention, void *context, float **ret_out,
                   struct gqa_reason *reason)
{
    struct problem p;
    int rc = problem_init(&p, spec);
    rc = rc < 0 ? rc : attention->supports(context, &p.layer, reason);
    rc = rc < 0 ? rc : check_caps(spec->caps, attention->caps, reason);
    if (rc == 0 && spec->n_past > 0) {
        rc = run_rows(&p, attention, context, 0, spec->n_past, NULL);
    }
    rc = rc < 0 ? rc : run_in_chunks(&p, way->chunk, attention, context);
    if (rc == 0 && way->n_copies > 1) {
        rc = attend_in_company(&p, way, attention, context, p.out);
    }
    if (rc == 0) {
        *ret_out = p.out;
        p.out = NULL;
    }
    problem_finish(&p);
    return rc;
}

int problem_run(const struct problem_spec *spec, const struct gqa_attention *attention,
                void *context, float **ret_out, struct gqa_reason *reason)
{
    const struct problem_way plain = {0};
    return problem_run_as(spec, &plain, attention, context, ret_out, reason);
}

int problem_vote(const struct problem_spec *spec, uint32_t chunk,
                 const struct gqa_attention *attention, void *context, float **ret_votes,
                 uint32_t *ret_count, struct gqa_reason *reason)
{
    struct problem p;
    uint32_t n_rows = spec->n_rows < 20 ? spec->n_rows : 20;
    int rc = problem_init(&p, spec);
    rc = rc < 0 ? rc : attention->supports(context, &p.layer, reason);
    rc = rc < 0 ? rc : check_caps(GQA_ATTN_CAP_OBSERVE, attention->caps, reason);
    if (rc == 0) {
        p.n_votes = p.n_tokens - n_rows;
        p.votes = calloc((size_t)p.n_votes * spec->n_kv_heads, sizeof(float));
        rc = p.votes != NULL ? run_rows(&p, attention, context, 0, p.n_votes, NULL) : -ENOMEM;
    }
    for (uint32_t at = p.n_votes, n; rc == 0 && at < p.n_tokens; at += n) {
        n = p.n_tokens - at < chunk ? p.n_tokens - at : chunk;
        rc = run_rows(&p, attention, context, at, n, NULL);
    }
    if (rc == 0) {
        *ret_votes = p.votes;
        *ret_count = p.n_votes * spec->n_kv_heads;
        p.votes = NULL;
    }
    problem_finish(&p);
    return rc;
}
