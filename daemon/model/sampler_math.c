/* daemon/model/sampler_math.c - exponentials, sums and random numbers that are the same everywhere.
 *
 * No libm function decides which token is drawn: glibc's expf differs in the last place between
 * versions and instruction sets. */
#include "daemon/model/sampler_internal.h"

#include <errno.h>
#include <math.h>

#define LANES 16  /* independent sums: one vector of any machine divides it */
#define CHUNK 512 /* floats are summed this far before they go to a double */

/* The greatest of n logits in *ret; false when one of them is NaN or +inf. */
static bool find_max(const float *logits, size_t n, float *ret)
{
    float lane[LANES];
    int bad[LANES] = {0};
    for (size_t j = 0; j < LANES; j++) {
        lane[j] = -INFINITY;
    }
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (size_t j = 0; j < LANES; j++) {
            float x = logits[i + j];
            bad[j] |= !(x < INFINITY);
            lane[j] = x > lane[j] ? x : lane[j];
        }
    }
    for (size_t j = 0; i < n; i++, j++) {
        float x = logits[i];
        bad[j] |= !(x < INFINITY);
        lane[j] = x > lane[j] ? x : lane[j];
    }
    float max = -INFINITY;
    int any_bad = 0;
    for (size_t j = 0; j < LANES; j++) {
        any_bad |= bad[j];
        max = lane[j] > max ? lane[j] : max;
    }
    *ret = max;
    return !any_bad;
}

/* The first of n values that is the given one; it is among them. Most runs of lanes need one look.
 */
static size_t find_first(const float *values, size_t n, float value)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        int found = 0;
        for (size_t j = 0; j < LANES; j++) {
            found |= values[i + j] == value;
        }
        if (found) {
            break;
        }
    }
    while (values[i] != value) {
        i++;
    }
    return i;
}

int sampler_find_best(const float *logits, size_t n, size_t *ret)
{
    float max;
    if (!find_max(logits, n, &max) || max == -INFINITY) {
        return -EDOM;
    }
    *ret = find_first(logits, n, max);
    return 0;
}

/* Lanes are added alike whatever a vector holds, so that levels differ in nothing but speed. */
static inline __attribute__((always_inline)) double sum_exp_lanes(const float *logits, size_t n,
                                                                  float max)
{
    double sum = 0;
    for (size_t start = 0; start < n; start += CHUNK) {
        size_t end = n - start < CHUNK ? n : start + CHUNK;
        float lane[LANES] = {0};
        size_t i = start;
        for (; i + LANES <= end; i += LANES) {
            for (size_t j = 0; j < LANES; j++) {
                lane[j] += sampler_exp(logits[i + j] - max);
            }
        }
        for (size_t j = 0; i < end; i++, j++) {
            lane[j] += sampler_exp(logits[i] - max);
        }
        for (size_t j = 0; j < LANES; j++) {
            sum += lane[j];
        }
    }
    return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static double sum_exp_avx2(const float *logits, size_t n, float max)
{
    return sum_exp_lanes(logits, n, max);
}
#endif

static double sum_exp(const float *logits, size_t n, float max)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
        return sum_exp_avx2(logits, n, max);
    }
#endif
    return sum_exp_lanes(logits, n, max);
}

int sampler_log_sum_exp(const float *logits, size_t n, size_t *ret_best, float *ret_log_sum)
{
    int rc = sampler_find_best(logits, n, ret_best);
    if (rc == 0) {
        float max = logits[*ret_best];
        *ret_log_sum = (float)((double)max + log(sum_exp(logits, n, max)));
    }
    return rc;
}

/* ln((1 + z) / (1 - z)) = 2 (z + z^3 / 3 + z^5 / 5 + ...) with z^2 <= 0.0295. */
double sampler_log(double x)
{
    int exponent;
    if (x <= 0) {
        return -INFINITY;
    }
    double m = frexp(x, &exponent); /* exact; 0.5 to 1 */
    if (m < 0.70710678118654752) {
        m *= 2;
        exponent--;
    }
    double z = (m - 1) / (m + 1), square = z * z, sum = 0;
    for (int k = 21; k >= 1; k -= 2) {
        sum = sum * square + 1.0 / k;
    }
    return exponent * 0.693147180559945309417 + 2 * z * sum;
}

/* x = n ln 2 + r with |r| <= ln 2 / 2, and Taylor's series for e^r. */
double sampler_exp_wide(double x)
{
    const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer */
    x = x < 700 ? x : 700;
    x = x > -700 ? x : -700;
    double n = (x * 1.44269504088896340736 + magic) - magic;
    double r = x - n * 6.93147180369123816490e-01; /* ln 2 in two parts; the first has few bits */
    r -= n * 1.90821492927058770002e-10;
    double sum = 1;
    for (int k = 14; k >= 1; k--) {
        sum = 1 + sum * r / k;
    }
    return ldexp(sum, (int)n); /* exact */
}

double sampler_pow(double x, double y)
{
    if (x <= 0) {
        return y > 0 ? 0 : 1;
    }
    return sampler_exp_wide(y * sampler_log(x));
}

/* PCG-XSH-RR 64/32: M. E. O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good
 * Algorithms for Random Number Generation", 2014. */
static uint32_t pcg32_next(struct pcg32 *rng)
{
    uint64_t old = rng->state;
    rng->state = old * 6364136223846793005u + rng->increment;
    uint32_t mixed = (uint32_t)(((old >> 18) ^ old) >> 27);
    uint32_t turn = (uint32_t)(old >> 59);
    return (mixed >> turn) | (mixed << (-turn & 31));
}

void pcg32_init(struct pcg32 *rng, uint64_t seed)
{
    rng->state = 0;
    rng->increment = 0xDA3E39CB94B95BDBu;
    (void)pcg32_next(rng);
    rng->state += seed;
    (void)pcg32_next(rng);
}

double pcg32_unit(struct pcg32 *rng)
{
    uint64_t high = pcg32_next(rng) >> 5; /* 27 bits */
    uint64_t low = pcg32_next(rng) >> 6;  /* 26 bits */
    return (double)(high << 26 | low) * 0x1p-53;
}
