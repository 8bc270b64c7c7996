/* tests/bench/attention.c - how fast attention reads K and V, against what this machine's memory
 * gives a plain reading loop and its cores a loop of multiply-adds in the same run; and what
 * prefill computes. The limit of decode is the lower of both: f16 costs as many flop per byte as a
 * group has queries, more than some processors multiply while they read one.
 *
 *     bench_attention [seconds per line [kind]]        kind: decode, grid, shared or prefill
 *     bench_attention SECONDS SHAPE...                 decode of GROUPSxQUERIES:TYPE@DEPTH each
 *
 * Decode runs over the layers of a model one after the other, so that K and V come from memory and
 * not from the last-level cache, as in a real step. */
#include "plugins/cpu/unroll.h"
#include "tests/kernels/attention_cpu.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define THREADS_MAX 64u
#define LAYERS_MAX  2048u
/* Tokens that are made for a problem at most, but for its rows; deeper contexts repeat them. */
#define PROBLEM_TOKENS 512u
/* Enough to leave every cache. */
#define KV_BYTES_LEAST (192u << 20)

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- a crew that waits spinning, as the daemon's does within a step ---------------------- */

struct crew {
    struct gqa_host host;
    pthread_t threads[THREADS_MAX];
    gqa_task_fn fn;
    void *arg;
    uint32_t n_tasks;
    atomic_uint next, generation, left, stop;
};

struct hand {
    struct crew *crew;
    uint32_t worker;
};

static void take_tasks(struct crew *c, uint32_t worker)
{
    uint32_t i;

    while ((i = atomic_fetch_add(&c->next, 1)) < c->n_tasks) {
        c->fn(c->arg, i, worker);
    }
    atomic_fetch_sub(&c->left, 1);
}

static void *hand_main(void *arg)
{
    struct hand hand = *(struct hand *)arg;
    unsigned seen = 0;

    free(arg);
    for (;;) {
        while (atomic_load(&hand.crew->generation) == seen) {
            if (atomic_load(&hand.crew->stop)) {
                return NULL;
            }
            sched_yield(); /* the machine may have fewer cores to spare than threads */
        }
        seen++;
        take_tasks(hand.crew, hand.worker);
    }
}

static void crew_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    struct crew *c = data;

    c->fn = fn;
    c->arg = arg;
    c->n_tasks = n_tasks;
    atomic_store(&c->next, 0);
    atomic_store(&c->left, c->host.n_threads);
    atomic_fetch_add(&c->generation, 1);
    take_tasks(c, 0);
    while (atomic_load(&c->left) != 0) {
        sched_yield();
    }
}

static void crew_init(struct crew *c, uint32_t n_threads)
{
    memset(c, 0, sizeof(*c));
    attn_host_init(&c->host, ATTN_HOST_THREADS, n_threads);
    c->host.data = c;
    c->host.parallel = crew_parallel;
    for (uint32_t i = 1; i < n_threads; i++) {
        struct hand *hand = malloc(sizeof(*hand));
        *hand = (struct hand){c, i};
        if (pthread_create(&c->threads[i], NULL, hand_main, hand) != 0) {
            fprintf(stderr, "no more threads\n");
            exit(1);
        }
    }
}

static void crew_finish(struct crew *c)
{
    atomic_store(&c->stop, 1);
    for (uint32_t i = 1; i < c->host.n_threads; i++) {
        pthread_join(c->threads[i], NULL);
    }
}

/* ---- a model's worth of KV --------------------------------------------------------------- */

/* Copies of the problem's pages as the layers', which lie in their blocks as the daemon's do: a
 * layer's parts are as far apart as blocks of all layers. */
struct model {
    struct attn_problem problem;
    struct gqa_page_table layers[LAYERS_MAX];
    uint32_t n_layers;
    char *memory; /* of all layers */
    struct gqa_attn_seq seq;
    struct gqa_attn_batch batch;
    struct gqa_attn_io io;
};

/* The problem's pages over and over, n_pages of them for each layer. */
static void copy_layers(struct model *m, uint32_t n_pages, size_t bytes_least)
{
    const struct attn_problem_seq *s = &m->problem.seqs[0];
    const size_t page_bytes = m->problem.page_bytes, layer_bytes = n_pages * page_bytes;

    m->n_layers = (uint32_t)((bytes_least + layer_bytes - 1) / layer_bytes);
    m->n_layers = m->n_layers < 1 ? 1 : m->n_layers > LAYERS_MAX ? LAYERS_MAX : m->n_layers;
    size_t bytes = (m->n_layers * layer_bytes | ((1u << 21) - 1)) + 1;
    m->memory = aligned_alloc(1u << 21, bytes); /* huge pages, as the daemon's arena has */
    if (m->memory == NULL || madvise(m->memory, bytes, MADV_HUGEPAGE) != 0) {
        fprintf(stderr, "no huge pages\n");
        exit(1);
    }
    for (uint32_t l = 0; l < m->n_layers; l++) {
        void **pages = calloc(n_pages, sizeof(*pages));
        for (uint32_t i = 0; i < n_pages; i++) {
            pages[i] = memcpy(m->memory + ((size_t)i * m->n_layers + l) * page_bytes,
                              s->pages[i % s->n_pages], page_bytes);
        }
        m->layers[l] = (struct gqa_page_table){.n_pages = n_pages, .pages = pages};
    }
}

static void model_init(struct model *m, uint32_t n_groups, uint32_t group_size, uint32_t n_past,
                       uint32_t n_rows, uint32_t type, size_t bytes_least)
{
    const uint32_t n_pages = (n_past + n_rows + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS;
    const uint32_t n_least = n_rows > PROBLEM_TOKENS ? n_rows : PROBLEM_TOKENS;
    const uint32_t n_made = (n_least + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS;
    struct attn_spec spec = {.n_heads = n_groups * group_size,
                             .n_kv_heads = n_groups,
                             .k_dim = 64,
                             .v_dim = 64,
                             .k_type = type,
                             .v_type = type,
                             .magnitude = 1.0f,
                             .n_seqs = 1,
                             .seqs = {{n_made * GQA_KV_BLOCK_TOKENS - n_rows, n_rows}},
                             .seed = 1};
    struct attn_problem_seq *s = &m->problem.seqs[0];
    struct gqa_host host;
    struct cpu_attention *a;

    memset(m, 0, sizeof(*m));
    attn_problem_init(&m->problem, &spec);
    size_t n = (size_t)n_rows * spec.n_heads * 64;
    float *out = calloc(n, sizeof(float));
    attn_host_init(&host, ATTN_HOST_BACKWARDS, 1);
    if (out == NULL || cpu_attention_create(&host, cpu_isa_best(), &a) != 0 ||
        attn_cpu_run(&m->problem, a, n_rows, out) != 0) {
        fprintf(stderr, "cannot set up\n");
        exit(1);
    }
    cpu_attention_destroy(a);
    copy_layers(m, n_pages, bytes_least);
    m->seq = (struct gqa_attn_seq){.n_rows = n_rows, .n_past = n_past};
    m->batch = (struct gqa_attn_batch){.struct_size = sizeof(m->batch),
                                       .n_rows = n_rows,
                                       .n_seqs = 1,
                                       .commit = 1,
                                       .seqs = &m->seq};
    m->io = (struct gqa_attn_io){.q = s->q,
                                 .k = s->k,
                                 .v = s->v,
                                 .out = out,
                                 .q_stride = spec.n_heads * 64u,
                                 .k_stride = n_groups * 64u,
                                 .v_stride = n_groups * 64u,
                                 .out_stride = spec.n_heads * 64u};
}

static void model_finish(struct model *m)
{
    for (uint32_t l = 0; l < m->n_layers; l++) {
        free((void *)m->layers[l].pages);
    }
    free(m->memory);
    free(m->io.out);
    attn_problem_finish(&m->problem);
}

static size_t layer_bytes(const struct model *m)
{
    return m->layers[0].n_pages * m->problem.page_bytes;
}

/* ---- measuring --------------------------------------------------------------------------- */

#define READ_TASKS 16u /* per layer */

struct reading {
    const char *from;
    size_t task_bytes;
    atomic_ullong sum; /* so that the loads are wanted */
};

static void read_task(void *arg, uint32_t index, uint32_t worker)
{
    typedef unsigned long long vec __attribute__((vector_size(16)));
    struct reading *r = arg;
    const char *from = r->from + index * r->task_bytes;
    vec a = {0}, b = {0}, c = {0}, d = {0};

    for (const vec *p = (const void *)from; (const char *)p < from + r->task_bytes; p += 4) {
        a ^= p[0];
        b ^= p[1];
        c ^= p[2];
        d ^= p[3];
    }
    a ^= b ^ c ^ d;
    atomic_fetch_add(&r->sum, a[0] ^ a[1]);
}

static void read_layer(struct crew *crew, struct model *m, uint32_t layer, void *arg)
{
    struct reading *r = arg;

    r->from = m->memory + layer * layer_bytes(m);
    r->task_bytes = layer_bytes(m) / READ_TASKS / 64 * 64;
    crew_parallel(crew, read_task, r, READ_TASKS);
}

/* All sequences of the batch have the layer's pages. */
static void attend_shared_layer(struct crew *crew, struct model *m, uint32_t layer, void *arg)
{
    struct gqa_attn_seq *seqs = (struct gqa_attn_seq *)m->batch.seqs;

    for (uint32_t s = 0; s < m->batch.n_seqs; s++) {
        seqs[s] = (struct gqa_attn_seq){
            .first_row = s, .n_rows = 1, .n_past = m->seq.n_past, .tables = &m->layers[layer]};
    }
    if (cpu_attention_attend(arg, &m->problem.layer, &m->batch, &m->io) != 0) {
        fprintf(stderr, "attend failed\n");
        exit(1);
    }
}

static void attend_layer(struct crew *crew, struct model *m, uint32_t layer, void *arg)
{
    m->seq.tables = &m->layers[layer];
    if (cpu_attention_attend(arg, &m->problem.layer, &m->batch, &m->io) != 0) {
        fprintf(stderr, "attend failed\n");
        exit(1);
    }
}

/* Seconds of a pass over all layers, of each layer the best of several: the machine may be busy
 * with something else, and a waiting crew is lost while one of it does not run. */
static double pass_seconds(struct crew *crew, struct model *m, double seconds,
                           void (*run)(struct crew *, struct model *, uint32_t, void *), void *arg)
{
    double best[LAYERS_MAX], sum = 0, until = now() + seconds;

    for (uint32_t l = 0; l < m->n_layers; l++) {
        best[l] = 1e9;
    }
    do {
        for (uint32_t l = 0; l < m->n_layers; l++) {
            double start = now();
            run(crew, m, l, arg);
            double took = now() - start;
            best[l] = took < best[l] ? took : best[l];
        }
    } while (now() < until);
    for (uint32_t l = 0; l < m->n_layers; l++) {
        sum += best[l];
    }
    return sum;
}

/* ---- multiply-adds ----------------------------------------------------------------------- */

#define PEAK_ROUNDS 20000u
#define PEAK_SUMS   12u /* enough chains to hide the latency */

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void multiply_avx512(float *sums)
{
    __m512 s[PEAK_SUMS], x = _mm512_set1_ps(0.5f);

    for (uint32_t i = 0; i < PEAK_SUMS; i++) {
        s[i] = _mm512_set1_ps(sums[i]);
    }
    for (uint32_t round = 0; round < PEAK_ROUNDS; round++) {
        CPU_UNROLL
        for (uint32_t i = 0; i < PEAK_SUMS; i++) {
            s[i] = _mm512_fmadd_ps(s[i], x, x);
        }
    }
    for (uint32_t i = 0; i < PEAK_SUMS; i++) {
        sums[i] = _mm512_cvtss_f32(s[i]);
    }
}

__attribute__((target("avx2,fma"))) static void multiply_avx2(float *sums)
{
    __m256 s[PEAK_SUMS], x = _mm256_set1_ps(0.5f);

    for (uint32_t i = 0; i < PEAK_SUMS; i++) {
        s[i] = _mm256_set1_ps(sums[i]);
    }
    for (uint32_t round = 0; round < PEAK_ROUNDS; round++) {
        CPU_UNROLL
        for (uint32_t i = 0; i < PEAK_SUMS; i++) {
            s[i] = _mm256_fmadd_ps(s[i], x, x);
        }
    }
    for (uint32_t i = 0; i < PEAK_SUMS; i++) {
        sums[i] = _mm256_cvtss_f32(s[i]);
    }
}
#endif

static void multiply_c(float *sums)
{
    for (uint32_t round = 0; round < PEAK_ROUNDS; round++) {
        CPU_UNROLL
        for (uint32_t i = 0; i < PEAK_SUMS; i++) {
            sums[i] = sums[i] * 0.5f + 0.5f;
        }
    }
}

static volatile float wanted; /* by nobody, but the compiler does not know */

/* flop/s of one core with a level's multiply-adds; all cores are taken to be alike. */
static double multiply_rate(enum cpu_isa isa, double seconds)
{
    void (*run)(float *) = multiply_c;
    double lanes = 1, best = 0, until = now() + seconds;

#if defined(__x86_64__)
    const int is_avx2 = isa == CPU_ISA_AVX2 || isa == CPU_ISA_AVXVNNI;
    run = isa == CPU_ISA_AVX512 ? multiply_avx512 : is_avx2 ? multiply_avx2 : run;
    lanes = isa == CPU_ISA_AVX512 ? 16 : is_avx2 ? 8 : 1;
#endif
    do {
        float sums[PEAK_SUMS] = {0};
        double start = now();
        run(sums);
        double rate = 2.0 * lanes * PEAK_SUMS * PEAK_ROUNDS / (now() - start);
        best = rate > best ? rate : best;
        wanted = sums[PEAK_SUMS - 1];
    } while (now() < until);
    return best;
}

/* ---- the lines --------------------------------------------------------------------------- */

static double bandwidth(struct crew *crew, struct model *m, double seconds)
{
    struct reading r = {0};

    return (double)layer_bytes(m) * m->n_layers / pass_seconds(crew, m, seconds, read_layer, &r);
}

static double attend_seconds(struct crew *crew, struct model *m, enum cpu_isa isa, double seconds)
{
    struct cpu_attention *a;

    if (cpu_attention_create(&crew->host, isa, &a) != 0) {
        fprintf(stderr, "cannot create\n");
        exit(1);
    }
    double took = pass_seconds(crew, m, seconds, attend_layer, a);
    cpu_attention_destroy(a);
    return took;
}

static const char *type_name(uint32_t type)
{
    return type == GQA_TYPE_F32    ? "f32"
           : type == GQA_TYPE_F16  ? "f16"
           : type == GQA_TYPE_BF16 ? "bf16"
           : type == GQA_TYPE_Q8_0 ? "q8_0"
                                   : "q4_0";
}

static void bench_decode(uint32_t n_groups, uint32_t group_size, uint32_t depth, uint32_t type,
                         int all_levels, double seconds)
{
    double element_bytes = (double)gqa_kv_token_bytes(type, 64) / 64;
    struct model m;

    model_init(&m, n_groups, group_size, depth - 1, 1, type, KV_BYTES_LEAST);
    for (uint32_t n_threads = 1; n_threads <= 2; n_threads++) {
        struct crew crew;

        crew_init(&crew, n_threads);
        double memory = bandwidth(&crew, &m, seconds);
        for (int i = CPU_ISA_COUNT - 1; i >= CPU_ISA_C; i--) {
            enum cpu_isa isa = (enum cpu_isa)i;
            if (!cpu_isa_usable(isa) || (!all_levels && isa != cpu_isa_best())) {
                continue;
            }
            double bytes = (double)depth * n_groups * 128 * element_bytes * m.n_layers;
            double rate = bytes / attend_seconds(&crew, &m, isa, seconds);
            double multiply =
                n_threads * multiply_rate(isa, seconds / 4) * element_bytes / 2 / group_size;
            double limit = memory < multiply ? memory : multiply;

            printf("| decode %u x r=%u %s @%u | %s | %u | %.2f GB/s | %.2f GB/s | %.2f GB/s | %.1f "
                   "%% |\n",
                   n_groups, group_size, type_name(type), depth, cpu_isa_name(isa), n_threads,
                   rate * 1e-9, memory * 1e-9, multiply * 1e-9, 100 * rate / limit);
            fflush(stdout);
        }
        crew_finish(&crew);
    }
    model_finish(&m);
}

static void bench_prefill(uint32_t group_size, uint32_t n_past, uint32_t n_rows, uint32_t type,
                          double seconds)
{
    struct model m;
    double pairs = (double)n_rows * n_past + (double)n_rows * (n_rows + 1) / 2;

    model_init(&m, 4, group_size, n_past, n_rows, type, 0);
    for (uint32_t n_threads = 1; n_threads <= 2; n_threads++) {
        struct crew crew;

        crew_init(&crew, n_threads);
        for (int i = CPU_ISA_COUNT - 1; i >= CPU_ISA_C; i--) {
            enum cpu_isa isa = (enum cpu_isa)i;
            if (!cpu_isa_usable(isa)) {
                continue;
            }
            double flops = pairs * 4 * group_size * 2 * 128;
            double rate = flops / attend_seconds(&crew, &m, isa, seconds);
            double limit = n_threads * multiply_rate(isa, seconds / 4);

            printf(
                "| prefill r=%u %s %u rows @%u | %s | %u | %.2f GFLOP/s | | %.2f GFLOP/s | %.1f %% "
                "|\n",
                group_size, type_name(type), n_rows, n_past, cpu_isa_name(isa), n_threads,
                rate * 1e-9, limit * 1e-9, 100 * rate / limit);
            fflush(stdout);
        }
        crew_finish(&crew);
    }
    model_finish(&m);
}

#define SHARED_SEQS 16u
#define GRID_HEADS  128u

/* Sequences whose past is the same pages, one row of each: what it spares to say so. */
static void bench_shared(uint32_t group_size, uint32_t depth, double seconds)
{
    struct gqa_attn_seq seqs[SHARED_SEQS];
    struct gqa_attn_shared all = {depth, 0, SHARED_SEQS - 1};
    struct model m;

    model_init(&m, 4, group_size, depth, 1, GQA_TYPE_F16, KV_BYTES_LEAST);
    free(m.io.out);
    m.io.out = calloc((size_t)SHARED_SEQS * m.io.out_stride, sizeof(float));
    m.io.q = m.problem.seqs[0].q; /* any rows will do */
    m.batch.n_rows = m.batch.n_seqs = SHARED_SEQS;
    m.batch.seqs = seqs;
    m.batch.shared = &all;
    for (uint32_t n_threads = 1; n_threads <= 2; n_threads++) {
        struct crew crew;

        crew_init(&crew, n_threads);
        for (int i = CPU_ISA_COUNT - 1; i > CPU_ISA_C; i--) {
            enum cpu_isa isa = (enum cpu_isa)i;
            struct cpu_attention *a;
            double took[2];

            if (cpu_attention_create(&crew.host, isa, &a) != 0) {
                continue;
            }
            for (uint32_t shared = 0; shared < 2; shared++) {
                m.batch.n_shared = shared;
                took[shared] = pass_seconds(&crew, &m, seconds, attend_shared_layer, a);
            }
            cpu_attention_destroy(a);
            printf("| shared r=%u f16 %u x @%u | %s | %u | %.1f us a layer | alone %.1f us | | x "
                   "%.2f |\n",
                   group_size, SHARED_SEQS, depth, cpu_isa_name(isa), n_threads,
                   took[1] / m.n_layers * 1e6, took[0] / m.n_layers * 1e6, took[0] / took[1]);
            fflush(stdout);
        }
        crew_finish(&crew);
    }
    model_finish(&m);
}

/* Decode at the best level: every shape up to GRID_HEADS heads, depth and type. */
static void bench_grid(double seconds)
{
    static const uint32_t sizes[] = {1, 4, 8, 32}, groups[] = {1, 4, 8, 32};
    static const uint32_t depths[] = {512, 4096, 16384}, types[] = {GQA_TYPE_F16, GQA_TYPE_Q8_0};

    for (uint32_t i = 0; i < 4 * 4 * 3 * 2; i++) {
        uint32_t size = sizes[i / 24], n_groups = groups[i / 6 % 4];

        if (size * n_groups <= GRID_HEADS) {
            bench_decode(n_groups, size, depths[i / 2 % 3], types[i % 2], 0, seconds);
        }
    }
}

/* Decode of "4x8:q8_0@4096" at the best level. 0 or -EINVAL. */
static int bench_shape(const char *shape, double seconds)
{
    static const uint32_t types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0,
                                     GQA_TYPE_Q4_0};
    uint32_t n_groups, group_size, depth;
    char name[8];

    if (sscanf(shape, "%" SCNu32 "x%" SCNu32 ":%7[a-z0-9_]@%" SCNu32, &n_groups, &group_size, name,
               &depth) != 4 ||
        n_groups == 0 || group_size == 0 || depth == 0) {
        return -EINVAL;
    }
    for (size_t i = 0; i < sizeof(types) / sizeof(*types); i++) {
        if (strcmp(type_name(types[i]), name) == 0) {
            bench_decode(n_groups, group_size, depth, types[i], 0, seconds);
            return 0;
        }
    }
    return -EINVAL;
}

int main(int argc, char **argv)
{
    const char *kind = argc > 2 ? argv[2] : "";
    double seconds = argc > 1 ? atof(argv[1]) : 0.5;

    printf("| d=64 | isa | threads | rate | memory | multiply-adds | share of the lower |\n"
           "|---|---|---|---|---|---|---|\n");
    if (strchr(kind, '@') != NULL) {
        for (int i = 2; i < argc; i++) {
            if (bench_shape(argv[i], seconds) < 0) {
                fprintf(stderr, "%s is no shape such as 4x8:q8_0@4096\n", argv[i]);
                return 1;
            }
        }
        return 0;
    }
    if (strstr("decode", kind) != NULL) {
        bench_decode(4, 8, 4096, GQA_TYPE_F16, 1, seconds);
        bench_decode(4, 8, 16384, GQA_TYPE_F16, 1, seconds);
        bench_decode(4, 4, 16384, GQA_TYPE_F16, 1, seconds);
        bench_decode(4, 1, 4096, GQA_TYPE_F16, 1, seconds);
        bench_decode(4, 32, 4096, GQA_TYPE_F16, 1, seconds);
        bench_decode(4, 8, 16384, GQA_TYPE_Q8_0, 1, seconds);
        bench_decode(4, 1, 16384, GQA_TYPE_Q8_0, 1, seconds);
        bench_decode(4, 8, 16384, GQA_TYPE_Q4_0, 1, seconds);
        bench_decode(4, 1, 16384, GQA_TYPE_Q4_0, 1, seconds);
    }
    if (strcmp("grid", kind) == 0) {
        bench_grid(seconds);
    }
    if (strstr("shared", kind) != NULL) {
        bench_shared(8, 2048, seconds);
        bench_shared(1, 2048, seconds);
    }
    if (strstr("prefill", kind) != NULL) {
        bench_prefill(8, 0, 512, GQA_TYPE_F16, seconds);
        bench_prefill(8, 4096, 512, GQA_TYPE_F16, seconds);
        bench_prefill(1, 4096, 512, GQA_TYPE_F16, seconds);
        bench_prefill(8, 4096, 512, GQA_TYPE_Q8_0, seconds);
        bench_prefill(8, 4096, 512, GQA_TYPE_Q4_0, seconds);
    }
    return 0;
}
