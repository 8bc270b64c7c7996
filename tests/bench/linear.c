/* tests/bench/linear.c - how near the products come to what the machine can do.
 *
 *   bench_linear [-t threads] [-s isa] [-y type] [-m outputs,inputs] [-r rows] [-n rounds]
 *
 * Each round measures read bandwidth and the peak of the level's unit (roofline.h: of int8, or of
 * float32 for float weights) and then the product, so that a neighbour's load hits all of them. The
 * limit of a product is the longer of reading its weights and of computing; printed are the best of
 * all rounds and the median of the rounds' shares of the limit. Weights rotate through copies far
 * larger than the last cache. */
#include "plugins/cpu/linear.h"

#include "format/types.h"
#include "roofline/roofline.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define THREADS_MAX   64u
#define ROUNDS_MAX    101u
#define COPIES_BYTES  (384u << 20)
#define ONE_COPY_ROWS 64u /* from here on one product takes long enough to be timed */

/* ---- a pool: the caller and n - 1 threads that spin -------------------------------------- */

struct pool {
    uint32_t n_threads;
    gqa_task_fn fn;
    void *arg;
    uint32_t n_tasks;
    atomic_uint next, generation, busy;
    atomic_int stop;
    pthread_t threads[THREADS_MAX];
};

struct member {
    struct pool *pool;
    uint32_t worker;
};

static void work(struct pool *p, uint32_t worker)
{
    uint32_t index;

    while ((index = atomic_fetch_add(&p->next, 1)) < p->n_tasks) {
        p->fn(p->arg, index, worker);
    }
}

/* Two spinning threads on one core would wait for each other: each gets its own, as the daemon's
 * pool does. Where that is refused, figures are worse and nothing else. */
static void pin(uint32_t worker)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(worker, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

static void *member_main(void *arg)
{
    struct member m = *(struct member *)arg;
    uint32_t seen = 0;

    free(arg);
    pin(m.worker);
    while (!atomic_load(&m.pool->stop)) {
        if (atomic_load(&m.pool->generation) == seen) {
#if defined(__x86_64__)
            _mm_pause();
#endif
            continue;
        }
        seen++;
        work(m.pool, m.worker);
        atomic_fetch_sub(&m.pool->busy, 1);
    }
    return NULL;
}

static void pool_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    struct pool *p = data;

    p->fn = fn;
    p->arg = arg;
    p->n_tasks = n_tasks;
    atomic_store(&p->next, 0);
    atomic_store(&p->busy, p->n_threads - 1);
    atomic_fetch_add(&p->generation, 1);
    work(p, 0);
    while (atomic_load(&p->busy) > 0) {
    }
}

static int pool_start(struct pool *p, uint32_t n_threads)
{
    memset(p, 0, sizeof(*p));
    p->n_threads = n_threads;
    for (uint32_t i = 1; i < n_threads; i++) {
        struct member *m = malloc(sizeof(*m));
        if (m == NULL) {
            return -ENOMEM;
        }
        *m = (struct member){p, i};
        int r = pthread_create(&p->threads[i], NULL, member_main, m);
        if (r != 0) {
            free(m);
            return -r;
        }
    }
    pin(0); /* not before: threads inherit it, and would wait for this one */
    return 0;
}

static void pool_stop(struct pool *p)
{
    atomic_store(&p->stop, 1);
    for (uint32_t i = 1; i < p->n_threads; i++) {
        pthread_join(p->threads[i], NULL);
    }
}

/* ---- memory, time ------------------------------------------------------------------------ */

static void *allocate(void *data, size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    madvise(memory, bytes, MADV_HUGEPAGE);
    memset(memory, 0, bytes);
    return memory;
}

static void release(void *data, void *memory, size_t bytes)
{
    munmap(memory, bytes);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the machine's limits ---------------------------------------------------------------- */

#define READ_PIECE (1u << 20)

struct read_job {
    const uint8_t *from;
    uint64_t sums[THREADS_MAX];
};

/* Adds over every byte, quick enough to wait for memory only; asks for the next page as the kernels
 * do. */
#if defined(__x86_64__)
__attribute__((target("avx2"))) static uint64_t add_all(const uint8_t *from)
{
    __m256i a = _mm256_setzero_si256(), b = a;

    for (size_t i = 0; i < READ_PIECE; i += 64) {
        const __m256i *at = (const __m256i *)(const void *)(from + i);
        _mm_prefetch((const char *)(from + i + 4096), _MM_HINT_T0);
        a = _mm256_add_epi64(a, _mm256_loadu_si256(at));
        b = _mm256_add_epi64(b, _mm256_loadu_si256(at + 1));
    }
    return (uint64_t)_mm256_extract_epi64(_mm256_add_epi64(a, b), 0);
}
#else
static uint64_t add_all(const uint8_t *from)
{
    const uint64_t *at = (const uint64_t *)(const void *)from;
    uint64_t sum = 0;

    for (size_t i = 0; i < READ_PIECE / sizeof(*at); i++) {
        sum += at[i];
    }
    return sum;
}
#endif

static void read_piece(void *arg, uint32_t index, uint32_t worker)
{
    struct read_job *job = arg;
    job->sums[worker] += add_all(job->from + (size_t)index * READ_PIECE);
}

/* Bytes per second, all threads together. */
static double read_bandwidth(struct pool *p, const uint8_t *from, size_t bytes)
{
    static struct read_job job;
    double start = seconds();

    job.from = from;
    pool_parallel(p, read_piece, &job, (uint32_t)(bytes / READ_PIECE));
    return (double)bytes / (seconds() - start);
}

struct peak_job {
    roofline_kernel_fn kernel;
};

static void peak_task(void *arg, uint32_t index, uint32_t worker)
{
    struct peak_job *job = arg;
    job->kernel();
}

/* The unit that a level computes with. */
static const char *unit_of(enum cpu_isa isa, int floats)
{
    switch (isa) {
    case CPU_ISA_AVX2:
        return floats ? "f32-avx2" : "int8-avx2";
    case CPU_ISA_AVXVNNI:
        return floats ? "f32-avx2" : "int8-avxvnni";
    case CPU_ISA_AVX512:
    case CPU_ISA_AMX:
        return floats ? "f32-avx512" : "int8-vnni512";
    default:
        return floats ? "f32" : "";
    }
}

/* Operations per second of all threads together; 0 for a unit without a yardstick. */
static double peak_ops(struct pool *p, const char *unit)
{
    double ops;
    struct peak_job job = {roofline_kernel(unit, &ops)};

    if (job.kernel == NULL) {
        return 0.0;
    }
    double start = seconds();
    pool_parallel(p, peak_task, &job, p->n_threads);
    return ops * p->n_threads / (seconds() - start);
}

/* ---- the products ------------------------------------------------------------------------ */

struct shape {
    uint32_t n, k;
};

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, uint32_t n)
{
    qsort(values, n, sizeof(*values), compare_doubles);
    return values[n / 2];
}

/* Weights of random bits with small scales: bytes of the file's layout for quantised types. */
static int make_weight(struct gqa_weight *w, uint32_t type, struct shape shape)
{
    const struct fmt_type_info *info = fmt_type_info(type);
    size_t bytes = fmt_type_bytes(info, shape.k) * shape.n;
    uint8_t *file = allocate(NULL, bytes);
    uint64_t state = 88172645463325252u;

    if (file == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < bytes; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file[i] = (uint8_t)state & 0x2f; /* no exponent of all ones in any f16 */
    }
    *w = (struct gqa_weight){
        .type = type, .n_dims = 2, .ne = {shape.k, shape.n, 1, 1}, .data = file};
    return 0;
}

/* Copies of a matrix, one after the other, packed where the type is. */
struct copies {
    struct cpu_matrix matrix;
    uint8_t *memory;
    size_t bytes_each;
    uint32_t n;
};

static int make_copies(struct copies *c, uint32_t type, struct shape shape)
{
    struct gqa_weight w;
    struct gqa_reason reason = {""};
    size_t file_bytes = fmt_type_bytes(fmt_type_info(type), shape.k) * shape.n;

    int r = make_weight(&w, type, shape);
    if (r < 0) {
        return r;
    }
    uint64_t packed = cpu_weights_packed_bytes(&w);
    c->bytes_each = packed != 0 ? packed : file_bytes;
    c->n = (uint32_t)(COPIES_BYTES / c->bytes_each) + 1;
    c->memory = allocate(NULL, c->n * c->bytes_each);
    if (c->memory == NULL) {
        return -ENOMEM;
    }
    if (packed != 0) {
        cpu_weights_pack(&w, 0, shape.n, c->memory);
    } else {
        memcpy(c->memory, w.data, file_bytes);
    }
    for (uint32_t i = 1; i < c->n; i++) {
        memcpy(c->memory + i * c->bytes_each, c->memory, c->bytes_each);
    }
    w.packed = packed != 0 ? c->memory : NULL;
    w.packed_bytes = packed;
    r = cpu_matrix_init(&c->matrix, &w, &reason);
    c->matrix.data = c->memory;
    release(NULL, (void *)w.data, file_bytes);
    return r;
}

/* Seconds per product, over all copies or, with many rows, over one. */
static double time_products(struct cpu_linear *lin, const struct copies *c, const float *x,
                            uint32_t n_rows, float *y)
{
    uint32_t n = n_rows >= ONE_COPY_ROWS ? 1 : c->n;
    double start = seconds();

    for (uint32_t i = 0; i < n; i++) {
        struct cpu_matrix m = c->matrix;
        m.data = c->memory + i * c->bytes_each;
        struct cpu_product product = {.matrix = &m, .dst = y, .dst_stride = m.n};
        cpu_linear_run(lin, x, m.k, n_rows, &product, 1);
    }
    return (seconds() - start) / n;
}

static int bench_shape(struct pool *p, enum cpu_isa isa, uint32_t type, struct shape shape,
                       uint32_t n_rows, uint32_t rounds)
{
    struct gqa_host host = {sizeof(host), p->n_threads, p, NULL, pool_parallel, allocate, release};
    struct copies c;
    struct cpu_linear lin;
    double ratios[ROUNDS_MAX], best = 0.0, best_bandwidth = 0.0, best_peak = 0.0;
    double ops = 2.0 * shape.n * shape.k * n_rows;
    uint32_t n_compute = 0;

    int r = make_copies(&c, type, shape);
    if (r < 0) {
        return r;
    }
    r = cpu_linear_init(&lin, &host, isa, n_rows, shape.k);
    float *x = malloc((size_t)n_rows * shape.k * sizeof(*x));
    float *y = malloc((size_t)n_rows * shape.n * sizeof(*y));
    if (r < 0 || x == NULL || y == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < (size_t)n_rows * shape.k; i++) {
        x[i] = (float)((int)(i * 2654435761u >> 24) - 128) / 64.0f;
    }
    time_products(&lin, &c, x, n_rows, y);
    for (uint32_t i = 0; i < rounds; i++) {
        size_t read_bytes = c.n * c.bytes_each / READ_PIECE * READ_PIECE;
        double bandwidth = read_bandwidth(p, c.memory, read_bytes);
        double peak = peak_ops(p, unit_of(isa, c.matrix.layout == CPU_LAYOUT_COUNT));
        double rate = 1.0 / time_products(&lin, &c, x, n_rows, y);
        double by_bytes = rate * (double)c.bytes_each / bandwidth;
        double by_ops = peak > 0.0 ? rate * ops / peak : 0.0;
        best = rate > best ? rate : best;
        best_bandwidth = bandwidth > best_bandwidth ? bandwidth : best_bandwidth;
        best_peak = peak > best_peak ? peak : best_peak;
        ratios[i] = by_ops > by_bytes ? by_ops : by_bytes;
        n_compute += by_ops > by_bytes;
    }
    printf("%-6s %-6s %6u x %-5u %4u rows  %6.1f of %6.1f GB/s  %7.1f of %7.1f GOP/s  median %4.0f "
           "%% of %s\n",
           cpu_isa_name(isa), fmt_type_info(type)->name, shape.n, shape.k, n_rows,
           best * (double)c.bytes_each * 1e-9, best_bandwidth * 1e-9, best * ops * 1e-9,
           best_peak * 1e-9, 100.0 * median(ratios, rounds),
           2 * n_compute > rounds ? "compute" : "bandwidth");
    fflush(stdout);
    cpu_linear_finish(&lin);
    release(NULL, c.memory, c.n * c.bytes_each);
    free(x);
    free(y);
    return 0;
}

int main(int argc, char **argv)
{
    /* The matrices of a Llama of 1.1 thousand million weights. */
    static const struct shape shapes[] = {{2048, 2048}, {5632, 2048}, {2048, 5632}, {32000, 2048}};
    uint32_t n_threads = 2, rounds = 7, n_rows = 0, type = GQA_TYPE_Q4_0;
    enum cpu_isa isa = cpu_isa_best();
    struct shape only = {0, 0};
    struct pool pool;
    int option, r = 0;

    while ((option = getopt(argc, argv, "t:s:y:m:r:n:")) != -1) {
        switch (option) {
        case 't':
            n_threads = (uint32_t)atoi(optarg);
            break;
        case 's':
            r = cpu_isa_by_name(optarg, &isa) < 0 || !cpu_isa_usable(isa) ? -EINVAL : r;
            break;
        case 'y':
            r = fmt_type_by_name(optarg) == NULL ? -EINVAL : r;
            type = r == 0 ? fmt_type_by_name(optarg)->type : type;
            break;
        case 'm':
            r = sscanf(optarg, "%u,%u", &only.n, &only.k) == 2 ? r : -EINVAL;
            break;
        case 'r':
            n_rows = (uint32_t)atoi(optarg);
            break;
        case 'n':
            rounds = (uint32_t)atoi(optarg);
            break;
        default:
            r = -EINVAL;
        }
    }
    if (r < 0 || n_threads == 0 || n_threads > THREADS_MAX || rounds == 0 || rounds > ROUNDS_MAX) {
        fprintf(stderr, "usage: bench_linear [-t threads] [-s isa] [-y type] [-m outputs,inputs] "
                        "[-r rows] [-n rounds]\n");
        return 64;
    }
    if (pool_start(&pool, n_threads) < 0) {
        return 1;
    }
    for (size_t i = 0; r == 0 && i < (only.n > 0 ? 1 : sizeof(shapes) / sizeof(shapes[0])); i++) {
        struct shape shape = only.n > 0 ? only : shapes[i];
        r = bench_shape(&pool, isa, type, shape, n_rows > 0 ? n_rows : 1, rounds);
        if (r == 0 && n_rows == 0) {
            r = bench_shape(&pool, isa, type, shape, 512, rounds);
        }
    }
    pool_stop(&pool);
    return r < 0 ? 1 : 0;
}
