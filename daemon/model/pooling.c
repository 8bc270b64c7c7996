#include "daemon/model/pooling.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#define INT16_SCALE 32760.0

static const char *const names[POOLING_COUNT] = {"none", "mean", "cls", "last", "rank"};

const char *pooling_name(enum pooling pooling)
{
    return (unsigned)pooling < POOLING_COUNT ? names[pooling] : "unknown";
}

int pooling_by_name(const char *name, size_t bytes, enum pooling *ret)
{
    for (unsigned i = 0; i < POOLING_COUNT; i++) {
        if (strlen(names[i]) == bytes && memcmp(names[i], name, bytes) == 0) {
            *ret = (enum pooling)i;
            return 0;
        }
    }
    return -EINVAL;
}

static double largest(const float *x, size_t n)
{
    double max = 0;
    for (size_t i = 0; i < n; i++) {
        double a = fabs((double)x[i]);
        max = a > max ? a : max;
    }
    return max;
}

/* Terms are taken relative to the largest, so that no power leaves the range of a double. */
static double p_norm(const float *x, size_t n, int32_t p)
{
    double max = largest(x, n), sum = 0;
    if (max == 0) {
        return 0;
    }
    for (size_t i = 0; i < n; i++) {
        sum += pow(fabs((double)x[i]) / max, p);
    }
    return max * pow(sum, 1.0 / p);
}

static double euclidean(const float *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    return sqrt(sum);
}

void embedding_normalise(float *x, size_t n, int32_t norm)
{
    if (norm == EMBEDDING_NORM_NONE) {
        return;
    }
    double length = norm == 0   ? largest(x, n) / INT16_SCALE
                    : norm == 2 ? euclidean(x, n)
                                : p_norm(x, n, norm);
    if (length == 0) {
        return;
    }
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)((double)x[i] / length);
    }
}
