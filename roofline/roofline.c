/* roofline/roofline.c - measuring the machine: reading memory, and peaks of the units. */
#include "roofline/roofline.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#include <stdbool.h>
#include <sys/syscall.h>
#endif

#define BANDWIDTH_BYTES (768u << 20) /* of all threads together; several times any cache */
#define BANDWIDTH_TRIES 32           /* enough that some fall between other programs' work */
#define COMPUTE_TRIES   128
#define COMPUTE_ROUNDS  (1u << 21)
#define THREADS_MAX     256u

/* ---- kernels: reading. Four sums that do not wait for each other. ------------------------ */

typedef uint64_t (*read_fn)(const uint8_t *data, size_t bytes);
typedef uint64_t u64x2 __attribute__((vector_size(16), may_alias));
typedef float f32x4 __attribute__((vector_size(16)));

static uint64_t read_plain(const uint8_t *data, size_t bytes)
{
    u64x2 a = {0}, b = a, c = a, d = a;
    for (size_t i = 0; i + 64 <= bytes; i += 64) {
        const u64x2 *p = (const u64x2 *)(data + i);
        a ^= p[0];
        b ^= p[1];
        c ^= p[2];
        d ^= p[3];
    }
    a ^= b ^ c ^ d;
    return a[0] ^ a[1];
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static uint64_t read_avx2(const uint8_t *data, size_t bytes)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i + 128 <= bytes; i += 128) {
        const __m256i *p = (const __m256i *)(data + i);
        a = _mm256_xor_si256(a, _mm256_load_si256(p));
        b = _mm256_xor_si256(b, _mm256_load_si256(p + 1));
        c = _mm256_xor_si256(c, _mm256_load_si256(p + 2));
        d = _mm256_xor_si256(d, _mm256_load_si256(p + 3));
    }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    return (uint64_t)_mm256_extract_epi64(a, 0) ^ (uint64_t)_mm256_extract_epi64(a, 1) ^
           (uint64_t)_mm256_extract_epi64(a, 2) ^ (uint64_t)_mm256_extract_epi64(a, 3);
}

__attribute__((target("avx512f"))) static uint64_t read_avx512(const uint8_t *data, size_t bytes)
{
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
        a = _mm512_xor_si512(a, _mm512_load_si512(data + i));
        b = _mm512_xor_si512(b, _mm512_load_si512(data + i + 64));
        c = _mm512_xor_si512(c, _mm512_load_si512(data + i + 128));
        d = _mm512_xor_si512(d, _mm512_load_si512(data + i + 192));
    }
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    return (uint64_t)_mm512_reduce_or_epi64(a);
}
#endif

static read_fn pick_read(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) {
        return read_avx512;
    }
    if (__builtin_cpu_supports("avx2")) {
        return read_avx2;
    }
#endif
    return read_plain;
}

/* ---- kernels: computing. COMPUTE_ROUNDS rounds of twelve chains that do not wait for each other,
 * enough to fill the units whatever their latency; operands stay in registers. The empty asm
 * statements keep the compiler from folding rounds. ---- */

#define CHAINS  12
#define EACH(S) S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7) S(8) S(9) S(10) S(11)

#define DECLARE(k) acc##k = x,
#define KEEP(k)    __asm__ volatile("" : "+" REGISTER(acc##k));
#define ROUNDS(vector, STEP)                        \
    vector EACH(DECLARE) unused = x;                \
    for (unsigned i = 0; i < COMPUTE_ROUNDS; i++) { \
        EACH(STEP)                                  \
        EACH(KEEP)                                  \
    }                                               \
    (void)unused;

#ifdef __x86_64__
#define REGISTER "v"
#else
#define REGISTER "w"
#endif

static void f32_plain(void)
{
    f32x4 x = {0.5f, 0.5f, 0.5f, 0.5f};
#define STEP(k) acc##k = acc##k * x + x;
    ROUNDS(f32x4, STEP)
#undef STEP
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void f32_avx2(void)
{
    __m256 x = _mm256_set1_ps(0.5f);
#define STEP(k) acc##k = _mm256_fmadd_ps(acc##k, x, x);
    ROUNDS(__m256, STEP)
#undef STEP
}

__attribute__((target("avx512f"))) static void f32_avx512(void)
{
    __m512 x = _mm512_set1_ps(0.5f);
#define STEP(k) acc##k = _mm512_fmadd_ps(acc##k, x, x);
    ROUNDS(__m512, STEP)
#undef STEP
}

/* VPMADDUBSW and nothing else: sums of small weights fit 16 bits, where other units of the core add
 * them while this one multiplies on. */
__attribute__((target("avx2"))) static void int8_avx2(void)
{
    __m256i x = _mm256_set1_epi8(3);
#define STEP(k) acc##k = _mm256_maddubs_epi16(x, acc##k);
    ROUNDS(__m256i, STEP)
#undef STEP
}

__attribute__((target("avxvnni"))) static void int8_avxvnni(void)
{
    __m256i x = _mm256_set1_epi32(0x01010101);
#define STEP(k) acc##k = _mm256_dpbusd_avx_epi32(acc##k, x, x);
    ROUNDS(__m256i, STEP)
#undef STEP
}

/* What __builtin_cpu_supports() does not know everywhere. */
static bool has_avxvnni(void)
{
    enum { AVX_VNNI = 1 << 4 };
    unsigned eax, ebx, ecx, edx;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
           (eax & AVX_VNNI);
}

__attribute__((target("avx512f,avx512vnni"))) static void int8_vnni512(void)
{
    __m512i x = _mm512_set1_epi32(0x01010101);
#define STEP(k) acc##k = _mm512_dpbusd_epi32(acc##k, x, x);
    ROUNDS(__m512i, STEP)
#undef STEP
}

/* A product of tiles is 16 x 16 x 32 multiplications and takes sixteen cycles. */
#define TILE_ROUNDS   (COMPUTE_ROUNDS / 16)
#define TILE_PRODUCTS 6

__attribute__((target("amx-tile,amx-bf16"))) static void bf16_amx(void)
{
    /* Palette 1, then from byte 16 on eight tiles' bytes a row, from byte 48 on their rows. */
    uint8_t shapes[64] = {1};
    for (unsigned t = 0; t < 8; t++) {
        shapes[16 + 2 * t] = 64;
        shapes[48 + t] = 16;
    }
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(shapes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (unsigned i = 0; i < TILE_ROUNDS; i++) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    _tile_release();
}

/* The processor has it, and the kernel lets this process: for good, so ask before threads start. */
static bool may_use_tiles(void)
{
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, ARCH_REQ_PERM = 0x1023, TILE_DATA = 18 };
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & AMX_BF16) &&
           (edx & AMX_TILE) && syscall(SYS_arch_prctl, ARCH_REQ_PERM, TILE_DATA) == 0;
}
#endif

roofline_kernel_fn roofline_kernel(const char *unit, double *ret_ops)
{
    const double steps = (double)COMPUTE_ROUNDS * CHAINS;
#ifdef __x86_64__
    if (strcmp(unit, "bf16-amx") == 0 && may_use_tiles()) {
        *ret_ops = (double)TILE_ROUNDS * TILE_PRODUCTS * 16 * 16 * 32 * 2;
        return bf16_amx;
    }
    if (strcmp(unit, "int8-vnni512") == 0 && __builtin_cpu_supports("avx512vnni")) {
        *ret_ops = steps * 64 * 2;
        return int8_vnni512;
    }
    if (strcmp(unit, "int8-avxvnni") == 0 && has_avxvnni()) {
        *ret_ops = steps * 32 * 2;
        return int8_avxvnni;
    }
    if (strcmp(unit, "int8-avx2") == 0 && __builtin_cpu_supports("avx2")) {
        *ret_ops = steps * 32 * 2;
        return int8_avx2;
    }
    if (strcmp(unit, "f32-avx512") == 0 && __builtin_cpu_supports("avx512f")) {
        *ret_ops = steps * 16 * 2;
        return f32_avx512;
    }
    if (strcmp(unit, "f32-avx2") == 0 && __builtin_cpu_supports("fma")) {
        *ret_ops = steps * 8 * 2;
        return f32_avx2;
    }
#endif
    if (strcmp(unit, "f32") == 0) {
        *ret_ops = steps * 4 * 2;
        return f32_plain;
    }
    return NULL;
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* ---- threads that start together --------------------------------------------------------- */

#define TRIES_MAX (BANDWIDTH_TRIES > COMPUTE_TRIES ? BANDWIDTH_TRIES : COMPUTE_TRIES)

/* What the threads of one measurement share. */
struct team {
    pthread_mutex_t gate; /* closed until the barrier knows how many threads there are */
    pthread_barrier_t barrier;
    int tries;    /* 0: the measurement does not take place */
    read_fn read; /* or NULL: compute */
    roofline_kernel_fn compute;
};

struct worker {
    struct team *team;
    const uint8_t *data;
    size_t bytes;
    uint64_t sink; /* keeps the reads from being optimised away */
    double start_us[TRIES_MAX], end_us[TRIES_MAX];
};

static void *work(void *arg)
{
    struct worker *w = arg;
    struct team *team = w->team;
    pthread_mutex_lock(&team->gate);
    pthread_mutex_unlock(&team->gate);
    for (int i = 0; i < team->tries; i++) {
        pthread_barrier_wait(&team->barrier);
        w->start_us[i] = now_us();
        if (team->read != NULL) {
            w->sink ^= team->read(w->data, w->bytes);
        } else {
            team->compute();
        }
        w->end_us[i] = now_us();
    }
    return NULL;
}

/* Seconds of the best try, from the first thread's start to the last one's end. */
static double best_seconds(const struct worker *workers, unsigned n_threads, int tries)
{
    double best = 0;
    for (int i = 0; i < tries; i++) {
        double first = workers[0].start_us[i], last = workers[0].end_us[i];
        for (unsigned t = 1; t < n_threads; t++) {
            first = workers[t].start_us[i] < first ? workers[t].start_us[i] : first;
            last = workers[t].end_us[i] > last ? workers[t].end_us[i] : last;
        }
        double seconds = (last - first) / 1e6;
        best = best == 0 || seconds < best ? seconds : best;
    }
    return best;
}

/* Runs the team's kernel in n_threads threads, this one among them; fewer where the system gives
 * fewer. Returns work_per_thread times the threads, per second of the best try; 0: failed. */
static double measure(struct team *team, struct worker *workers, unsigned n_threads, int tries,
                      double work_per_thread)
{
    pthread_t threads[THREADS_MAX];
    unsigned n = 1;
    pthread_mutex_init(&team->gate, NULL);
    pthread_mutex_lock(&team->gate);
    for (unsigned t = 0; t < n_threads; t++) {
        workers[t].team = team;
    }
    while (n < n_threads && pthread_create(&threads[n], NULL, work, &workers[n]) == 0) {
        n++;
    }
    team->tries = pthread_barrier_init(&team->barrier, NULL, n) == 0 ? tries : 0;
    pthread_mutex_unlock(&team->gate);
    work(&workers[0]);
    for (unsigned t = 1; t < n; t++) {
        pthread_join(threads[t], NULL);
    }
    double seconds = best_seconds(workers, n, team->tries);
    if (team->tries > 0) {
        pthread_barrier_destroy(&team->barrier);
    }
    pthread_mutex_destroy(&team->gate);
    return seconds > 0 ? work_per_thread * n / seconds : 0;
}

static unsigned clamp_threads(unsigned n_threads)
{
    return n_threads < 1 ? 1 : n_threads > THREADS_MAX ? THREADS_MAX : n_threads;
}

double roofline_bandwidth(unsigned n_threads)
{
    n_threads = clamp_threads(n_threads);
    size_t part = BANDWIDTH_BYTES / n_threads & ~(size_t)4095;
    size_t bytes = part * n_threads;
    struct team team = {.read = pick_read()};
    struct worker *workers = calloc(n_threads, sizeof(*workers));
    uint8_t *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double rate = 0;
    if (workers != NULL && data != MAP_FAILED) {
        madvise(data, bytes, MADV_HUGEPAGE);
        memset(data, 0x5a, bytes); /* untouched pages are all one page of zeros, in the cache */
        for (unsigned t = 0; t < n_threads; t++) {
            workers[t].data = data + t * part;
            workers[t].bytes = part;
        }
        rate = measure(&team, workers, n_threads, BANDWIDTH_TRIES, (double)part);
    }
    if (data != MAP_FAILED) {
        munmap(data, bytes);
    }
    free(workers);
    return rate;
}

double roofline_compute(const char *unit, unsigned n_threads)
{
    double ops = 0;
    struct team team = {.compute = roofline_kernel(unit, &ops)};
    n_threads = clamp_threads(n_threads);
    if (team.compute == NULL) {
        return 0;
    }
    struct worker *workers = calloc(n_threads, sizeof(*workers));
    double rate = workers != NULL ? measure(&team, workers, n_threads, COMPUTE_TRIES, ops) : 0;
    free(workers);
    return rate;
}
