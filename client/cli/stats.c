/* client/cli/stats.c - figures about repeated measurements. */
#include "client/cli/cli.h"

#include <math.h>
#include <stdlib.h>

double cli_mean(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i];
    }
    return n > 0 ? sum / (double)n : 0;
}

double cli_stddev(const double *x, size_t n)
{
    double mean = cli_mean(x, n), sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (x[i] - mean) * (x[i] - mean);
    }
    return n > 1 ? sqrt(sum / (double)(n - 1)) : 0;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double cli_percentile(double *x, size_t n, double percent)
{
    if (n == 0) {
        return 0;
    }
    qsort(x, n, sizeof(*x), compare);
    double rank = ceil(percent / 100 * (double)n);
    size_t index = rank < 1 ? 0 : (size_t)rank - 1;
    return x[index < n ? index : n - 1];
}
