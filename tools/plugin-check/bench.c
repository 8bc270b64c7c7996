#include "tools/plugin-check/bench.h"

#include "roofline/roofline.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SAMPLES_MAX  200u
#define SECONDS_LINE 0.6 /* of one line, once it is warm */
#define LAYERS_MAX   256u

/* ---- time -------------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int bench_time(bench_fn fn, void *arg, double *ret_seconds)
{
    double samples[SAMPLES_MAX];
    uint32_t n = 0;
    int rc = fn(arg); /* warm: pages, buffers */
    double begin = now(), last = begin;
    while (rc == 0 && n < SAMPLES_MAX && (n < 3 || last - begin < SECONDS_LINE)) {
        rc = fn(arg);
        double t = now();
        samples[n++] = t - last;
        last = t;
    }
    if (rc == 0) {
        qsort(samples, n, sizeof(samples[0]), by_value);
        *ret_seconds = samples[n / 2];
    }
    return rc;
}

/* ---- attention --------------------------------------------------------------------------- */

#define N_KV_HEADS 4u

struct shape {
    uint32_t ratio, dim, type, n_past, n_rows;
};

/* Layers of K and V, each with pages of its own; rows attend to one after the other. */
struct layers {
    const struct bench *bench;
    struct gqa_attn_layer layer;
    struct gqa_attn_seq seq;
    struct gqa_attn_batch batch;
    struct gqa_attn_io io;
    struct gqa_page_table table;
    uint32_t n_layers, n_pages, now;
    uint64_t page_bytes;
    uint8_t *memory;
    void **pages; /* (n_layers, n_pages) */
    float *floats;
    uint8_t *row_class;
};

static void layers_finish(struct layers *l)
{
    free(l->memory);
    free(l->pages);
    free(l->floats);
    free(l->row_class);
}

static void describe(struct layers *l, const struct shape *s)
{
    const uint64_t head_bytes = gqa_kv_head_bytes(s->type, s->dim);
    l->layer = (struct gqa_attn_layer){
        .struct_size = sizeof(l->layer),
        .n_heads = N_KV_HEADS * s->ratio,
        .n_kv_heads = N_KV_HEADS,
        .k_dim = s->dim,
        .v_dim = s->dim,
        .k_type = s->type,
        .v_type = s->type,
        .scale = 1 / sqrtf((float)s->dim),
        .v_offset = N_KV_HEADS * head_bytes,
        .k_head_bytes = head_bytes,
        .v_head_bytes = head_bytes,
    };
    l->seq = (struct gqa_attn_seq){.n_rows = s->n_rows, .n_past = s->n_past, .tables = &l->table};
    l->batch = (struct gqa_attn_batch){.struct_size = sizeof(l->batch),
                                       .n_rows = s->n_rows,
                                       .n_seqs = 1,
                                       .commit = 1,
                                       .seqs = &l->seq,
                                       .row_class = l->row_class};
    const size_t q = (size_t)N_KV_HEADS * s->ratio * s->dim, kv = (size_t)N_KV_HEADS * s->dim;
    float *at = l->floats;
    l->io = (struct gqa_attn_io){.q = at,
                                 .k = at + s->n_rows * q,
                                 .v = at + s->n_rows * (q + kv),
                                 .out = at + s->n_rows * (q + 2 * kv),
                                 .q_stride = q,
                                 .k_stride = kv,
                                 .v_stride = kv,
                                 .out_stride = q};
}

static int layers_init(struct layers *l, const struct bench *b, const struct shape *s)
{
    const uint64_t bytes = 2 * N_KV_HEADS * gqa_kv_head_bytes(s->type, s->dim);
    *l = (struct layers){.bench = b};
    l->n_pages = (s->n_past + s->n_rows + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS;
    l->page_bytes = (bytes + 63) & ~63ull;
    uint64_t n = BENCH_SPREAD_BYTES / (l->page_bytes * l->n_pages) + 1;
    l->n_layers = n < LAYERS_MAX ? (uint32_t)n : LAYERS_MAX;
    l->memory = aligned_alloc(4096, ((size_t)l->n_layers * l->n_pages * l->page_bytes + 4095) &
                                        ~(size_t)4095);
    l->pages = calloc((size_t)l->n_layers * l->n_pages, sizeof(*l->pages));
    const size_t per_row = (size_t)(2 * s->ratio + 2) * N_KV_HEADS * s->dim;
    l->floats = calloc(s->n_rows * per_row, sizeof(*l->floats));
    l->row_class = calloc(s->n_rows, 1);
    if (l->memory == NULL || l->pages == NULL || l->floats == NULL || l->row_class == NULL) {
        layers_finish(l);
        return -ENOMEM;
    }
    /* Small numbers of every type: 0x2c2c is 0.06 as F16, and a scale of blocks. */
    memset(l->memory, 0x2c, (size_t)l->n_layers * l->n_pages * l->page_bytes);
    for (uint32_t i = 0; i < l->n_layers * l->n_pages; i++) {
        l->pages[i] = l->memory + i * l->page_bytes;
    }
    for (size_t i = 0; i < s->n_rows * per_row; i++) {
        l->floats[i] = 0.01f * (float)(i % 101);
    }
    describe(l, s);
    return 0;
}

/* One layer: append, and attend. */
static int one_layer(void *arg)
{
    struct layers *l = arg;
    const struct gqa_attention *a = l->bench->attention;
    l->table = (struct gqa_page_table){.n_pages = l->n_pages,
                                       .pages = l->pages + (size_t)l->now * l->n_pages};
    l->now = (l->now + 1) % l->n_layers;
    int rc = a->append(l->bench->context, &l->layer, &l->batch, &l->io);
    return rc < 0 ? rc : a->attend(l->bench->context, &l->layer, &l->batch, &l->io);
}

static const char *type_name(uint32_t type)
{
    return type == GQA_TYPE_F32 ? "f32" : type == GQA_TYPE_F16 ? "f16" : "q8_0";
}

/* Decoding reads all K and V, and can be no faster than memory, nor than the units multiply. */
static void tell(const struct bench *b, const struct bench_limits *l, const struct shape *s,
                 double seconds)
{
    char what[96];
    const double token_bytes = 2.0 * N_KV_HEADS * (double)gqa_kv_token_bytes(s->type, s->dim);
    const double visible = (double)s->n_rows * s->n_past + (double)s->n_rows * (s->n_rows + 1) / 2;
    const double flops = 4.0 * N_KV_HEADS * s->ratio * s->dim * visible;
    struct results_speed speed = {.what = what, .us = seconds * 1e6};
    if (s->n_rows == 1) {
        const double bytes = token_bytes * (s->n_past + 1);
        const double by_units = l->f32_flops * bytes / flops;
        speed.unit = "GB/s";
        speed.rate = bytes / seconds / 1e9;
        speed.limit = (by_units < l->bytes ? by_units : l->bytes) / 1e9;
        snprintf(what, sizeof(what), "attention decode, %s, groups of %u x %u, %u tokens",
                 type_name(s->type), s->ratio, s->dim, s->n_past);
    } else {
        speed.unit = "GFLOP/s";
        speed.rate = flops / seconds / 1e9;
        speed.limit = l->f32_flops / 1e9;
        snprintf(what, sizeof(what), "attention prefill, %s, groups of %u x %u, %u rows after %u",
                 type_name(s->type), s->ratio, s->dim, s->n_rows, s->n_past);
    }
    results_speed(b->results, &speed);
}

static int run_shape(const struct bench *b, const struct bench_limits *limits,
                     const struct shape *s, struct gqa_reason *reason)
{
    struct layers l;
    double seconds;
    int rc = layers_init(&l, b, s);
    if (rc < 0) {
        return rc;
    }
    rc = b->attention->supports(b->context, &l.layer, reason);
    rc = rc < 0 ? rc : bench_time(one_layer, &l, &seconds);
    if (rc == 0) {
        tell(b, limits, s, seconds);
    }
    layers_finish(&l);
    return rc == -ENOTSUP ? 0 : rc;
}

/* ---- all of it --------------------------------------------------------------------------- */

static double first_unit(const char *const *units, size_t n, uint32_t n_threads)
{
    double rate = 0;
    for (size_t i = 0; rate == 0 && i < n; i++) {
        rate = roofline_compute(units[i], n_threads);
    }
    return rate;
}

static struct bench_limits measure_limits(const struct bench *b)
{
    static const char *const f32[] = {"f32-avx512", "f32-avx2", "f32"};
    static const char *const int8[] = {"int8-vnni512", "int8-avxvnni", "int8-avx2"};
    if (b->on_device) {
        return (struct bench_limits){0};
    }
    return (struct bench_limits){.bytes = roofline_bandwidth(b->n_threads),
                                 .f32_flops = first_unit(f32, 3, b->n_threads),
                                 .int8_ops = first_unit(int8, 3, b->n_threads)};
}

int bench_run(const struct bench *b, struct gqa_reason *reason)
{
    static const struct shape shapes[] = {
        {1, 64, GQA_TYPE_F16, 4096, 1},   {4, 64, GQA_TYPE_F16, 4096, 1},
        {8, 64, GQA_TYPE_F16, 4096, 1},   {4, 128, GQA_TYPE_F16, 4096, 1},
        {4, 64, GQA_TYPE_F16, 16384, 1},  {4, 64, GQA_TYPE_Q8_0, 4096, 1},
        {4, 64, GQA_TYPE_F32, 3584, 1},   {4, 64, GQA_TYPE_F16, 0, 512},
        {4, 64, GQA_TYPE_F16, 3584, 512}, {4, 64, GQA_TYPE_F32, 0, 512},
    };
    const struct bench_limits limits = measure_limits(b);
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        rc = run_shape(b, &limits, &shapes[i], reason);
    }
    rc = rc == 0 && b->program != NULL ? bench_program_run(b, &limits, reason) : rc;
    if (rc < 0 && reason->text[0] == '\0') {
        snprintf(reason->text, sizeof(reason->text), "bench: %s", strerror(-rc));
    }
    return rc;
}
