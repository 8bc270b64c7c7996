/* tests/bench/k_layouts.c - what the arrangement of K in a block costs: scores of r queries with 64
 * tokens, for the layouts that were considered (docs/experiments.md).
 *
 *     bench_k_layouts [seconds per line]
 *
 *     tiles   f16, 16 tokens of one dimension side by side: what docs/kv-layout.md has
 *     rows    f16, the dimensions of one token side by side: lanes must be summed
 *     pairs   bf16, 16 tokens x 2 dimensions, for VDPBF16PS: half the instructions, but products of
 *             8 bits, which a generated token's attention must not have (design of numerics)
 *
 * AVX-512 only, one thread. "cached" goes over 64 KiB again and again, "memory" over 192 MiB. */
#include "plugins/cpu/unroll.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define TOKENS       64u
#define DIM_MAX      128u
#define QUERIES_MAX  12u
#define CACHED_BYTES (64u << 10)
#define MEMORY_BYTES (192u << 20)
#define LEVEL        __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define INLINE       LEVEL static inline __attribute__((always_inline))

/* ---- kernels: s (r, TOKENS) = q . k over d dimensions ------------------------------------ */

struct queries {
    float by_dim[DIM_MAX * QUERIES_MAX];       /* (d, r) */
    float by_row[QUERIES_MAX * DIM_MAX];       /* (r, d) */
    uint32_t pairs[DIM_MAX / 2 * QUERIES_MAX]; /* (d / 2, r), two bf16 each */
};

INLINE void score_tiles(const uint32_t r, const char *k, uint32_t d, const struct queries *q,
                        float *s)
{
    const uint32_t nt = r <= 6 ? 4 : 2;

    for (uint32_t t = 0; t < 4; t += nt) {
        const uint16_t *tile = (const uint16_t *)(const void *)k + (size_t)t * 16 * d;
        __m512 sum[QUERIES_MAX][4];

        CPU_UNROLL
        for (uint32_t i = 0; i < r; i++) {
            CPU_UNROLL
            for (uint32_t j = 0; j < nt; j++) {
                sum[i][j] = _mm512_setzero_ps();
            }
        }
        for (uint32_t c = 0; c < d; c++) {
            __m512 row[4];
            CPU_UNROLL
            for (uint32_t j = 0; j < nt; j++) {
                row[j] = _mm512_cvtph_ps(_mm256_loadu_si256(
                    (const __m256i *)(const void *)(tile + (size_t)j * 16 * d + c * 16)));
            }
            for (uint32_t line = 0; line < nt * 32; line += 64) {
                _mm_prefetch((const char *)(tile + (size_t)c * 16 * nt) + line + TOKENS * d * 2,
                             _MM_HINT_T0);
            }
            CPU_UNROLL
            for (uint32_t i = 0; i < r; i++) {
                __m512 one = _mm512_set1_ps(q->by_dim[c * r + i]);
                CPU_UNROLL
                for (uint32_t j = 0; j < nt; j++) {
                    sum[i][j] = _mm512_fmadd_ps(one, row[j], sum[i][j]);
                }
            }
        }
        CPU_UNROLL
        for (uint32_t i = 0; i < r; i++) {
            CPU_UNROLL
            for (uint32_t j = 0; j < nt; j++) {
                _mm512_storeu_ps(s + i * TOKENS + (t + j) * 16, sum[i][j]);
            }
        }
    }
}

INLINE void score_pairs(const uint32_t r, const char *k, uint32_t d, const struct queries *q,
                        float *s)
{
    const uint32_t nt = r <= 6 ? 4 : 2;

    for (uint32_t t = 0; t < 4; t += nt) {
        const char *tile = k + (size_t)t * 32 * d;
        __m512 sum[QUERIES_MAX][4];

        CPU_UNROLL
        for (uint32_t i = 0; i < r; i++) {
            CPU_UNROLL
            for (uint32_t j = 0; j < nt; j++) {
                sum[i][j] = _mm512_setzero_ps();
            }
        }
        for (uint32_t c = 0; c < d / 2; c++) {
            __m512i row[4];
            CPU_UNROLL
            for (uint32_t j = 0; j < nt; j++) {
                row[j] = _mm512_loadu_si512(tile + (size_t)j * 32 * d + c * 64);
                _mm_prefetch(tile + (size_t)j * 32 * d + c * 64 + TOKENS * d * 2, _MM_HINT_T0);
            }
            CPU_UNROLL
            for (uint32_t i = 0; i < r; i++) {
                __m512i one = _mm512_set1_epi32((int)q->pairs[c * r + i]);
                CPU_UNROLL
                for (uint32_t j = 0; j < nt; j++) {
                    sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)one, (__m512bh)row[j]);
                }
            }
        }
        CPU_UNROLL
        for (uint32_t i = 0; i < r; i++) {
            CPU_UNROLL
            for (uint32_t j = 0; j < nt; j++) {
                _mm512_storeu_ps(s + i * TOKENS + (t + j) * 16, sum[i][j]);
            }
        }
    }
}

/* Lane i of the result is the sum of the lanes of x[i]; x is spoilt. Each step folds two vectors
 * into one: 15 folds of two shuffles and an addition. */
INLINE __m512 sums_of_16(__m512 *x)
{
    CPU_UNROLL
    for (uint32_t i = 0; i < 8; i++) { /* x[i] and x[i + 8]: a half of the register each */
        x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44),
                             _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < 4; i++) { /* then a quarter each, in the order i, i + 4, i + 8, ... */
        x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x88),
                             _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd));
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < 2; i++) {
        x[i] =
            _mm512_add_ps(_mm512_unpacklo_ps(x[i], x[i + 2]), _mm512_unpackhi_ps(x[i], x[i + 2]));
    }
    x[0] = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    /* Quarter c has x[c'], x[c' + 1], x[c' + 2], x[c' + 3] of c' = 0, 8, 4, 12 by the folds above.
     */
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(order, x[0]);
}

INLINE void score_rows(const uint32_t r, const char *k, uint32_t d, const struct queries *q,
                       float *s)
{
    float wide[16 * DIM_MAX] __attribute__((aligned(64)));

    for (uint32_t t = 0; t < TOKENS; t += 16) {
        const uint16_t *rows = (const uint16_t *)(const void *)k + (size_t)t * d;

        for (uint32_t c = 0; c < 16 * d; c += 16) { /* once for all queries */
            _mm512_store_ps(wide + c, _mm512_cvtph_ps(_mm256_loadu_si256(
                                          (const __m256i *)(const void *)(rows + c))));
            _mm_prefetch((const char *)(rows + c) + TOKENS * d * 2, _MM_HINT_T0);
        }
        for (uint32_t i = 0; i < r; i++) {
            __m512 x[16];
            CPU_UNROLL
            for (uint32_t j = 0; j < 16; j++) {
                x[j] = _mm512_setzero_ps();
            }
            for (uint32_t c = 0; c < d; c += 16) {
                __m512 one = _mm512_loadu_ps(q->by_row + (size_t)i * d + c);
                CPU_UNROLL
                for (uint32_t j = 0; j < 16; j++) {
                    x[j] = _mm512_fmadd_ps(one, _mm512_load_ps(wide + (size_t)j * d + c), x[j]);
                }
            }
            _mm512_storeu_ps(s + i * TOKENS + t, sums_of_16(x));
        }
    }
}

/* ---- measuring --------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

enum layout { TILES, ROWS, PAIRS, LAYOUT_COUNT };

static const char *const layout_names[] = {"tiles", "rows", "pairs"};

#define WITH_COUNT(r, f, ...) \
    switch (r) {              \
    case 1:                   \
        f(1, __VA_ARGS__);    \
        break;                \
    case 4:                   \
        f(4, __VA_ARGS__);    \
        break;                \
    case 8:                   \
        f(8, __VA_ARGS__);    \
        break;                \
    default:                  \
        f(12, __VA_ARGS__);   \
        break;                \
    }

LEVEL static void score(enum layout layout, uint32_t r, const char *k, uint32_t d,
                        const struct queries *q, float *s)
{
    if (layout == TILES) {
        WITH_COUNT(r, score_tiles, k, d, q, s);
    } else if (layout == ROWS) {
        WITH_COUNT(r, score_rows, k, d, q, s);
    } else {
        WITH_COUNT(r, score_pairs, k, d, q, s);
    }
}

/* Bytes of K per second, the best pass over bytes of it. */
static double rate_of(enum layout layout, uint32_t r, uint32_t d, const char *k, size_t bytes,
                      const struct queries *q, double seconds)
{
    const size_t block = (size_t)TOKENS * d * 2;
    float s[QUERIES_MAX * TOKENS];
    double best = 0, until = now() + seconds;

    do {
        double start = now();
        for (size_t at = 0; at + block <= bytes; at += block) {
            score(layout, r, k + at, d, q, s);
        }
        double rate = (double)(bytes / block * block) / (now() - start);
        best = rate > best ? rate : best;
    } while (now() < until);
    return best;
}

/* Every layout gives the sums that it should: values are powers of two, another for each token of a
 * tile and twice that in odd dimensions, which both types and the sums hold exactly. */
static void check(uint32_t d, char *k, const struct queries *q)
{
    for (enum layout layout = TILES; layout < LAYOUT_COUNT; layout++) {
        float s[QUERIES_MAX * TOKENS];
        uint16_t *values = (uint16_t *)(void *)k;

        for (uint32_t t = 0; t < TOKENS; t++) {
            for (uint32_t c = 0; c < d; c++) {
                size_t tile = t / 16 * 16 * (size_t)d, lane = t % 16;
                size_t at = layout == TILES  ? tile + c * 16 + lane
                            : layout == ROWS ? (size_t)t * d + c
                                             : tile + c / 2 * 32 + lane * 2 + c % 2;
                uint32_t exponent = t % 16 + c % 2; /* of two, plus 8 */
                values[at] =
                    (uint16_t)(layout == PAIRS ? (119 + exponent) << 7 : (7 + exponent) << 10);
            }
        }
        score(layout, 4, k, d, q, s);
        for (uint32_t i = 0; i < 4 * TOKENS; i++) {
            float expected = (float)(1u << i % 16) * (1.5f / 256) * (float)d;
            if (s[i] != expected) {
                fprintf(stderr, "%s: score %u is %g, not %g\n", layout_names[layout], i,
                        (double)s[i], (double)expected);
                exit(1);
            }
        }
    }
}

static void bench(uint32_t d, char *k, double seconds)
{
    static struct queries q;

    for (uint32_t i = 0; i < DIM_MAX * QUERIES_MAX; i++) {
        q.by_dim[i] = q.by_row[i] = 1.0f;
    }
    for (uint32_t i = 0; i < DIM_MAX / 2 * QUERIES_MAX; i++) {
        q.pairs[i] = 0x3f803f80;
    }
    check(d, k, &q);
    for (uint32_t r = 1; r <= QUERIES_MAX; r += r == 1 ? 3 : 4) {
        for (enum layout layout = TILES; layout < LAYOUT_COUNT; layout++) {
            memset(k, 0, MEMORY_BYTES);
            double cached = rate_of(layout, r, d, k, CACHED_BYTES, &q, seconds);
            double memory = rate_of(layout, r, d, k, MEMORY_BYTES, &q, seconds);
            printf("| d=%u r=%u %s | %.1f GB/s | %.0f GFLOP/s | %.1f GB/s |\n", d, r,
                   layout_names[layout], cached * 1e-9, cached * r * 1e-9, memory * 1e-9);
            fflush(stdout);
        }
    }
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 0.2;
    char *k = aligned_alloc(64, MEMORY_BYTES + (64u << 10));

    if (k == NULL || !__builtin_cpu_supports("avx512bf16")) {
        fprintf(stderr, "%s\n", k == NULL ? "no memory" : "no AVX512-BF16 here");
        free(k);
        return 1;
    }
    printf("| scores with K | cached | | memory |\n|---|---|---|---|\n");
    bench(64, k, seconds);
    bench(128, k, seconds);
    free(k);
    return 0;
}
#else
int main(void)
{
    fprintf(stderr, "only for x86-64\n");
    return 1;
}
#endif
