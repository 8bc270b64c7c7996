#include "daemon/sched/histogram.h"

#include <math.h>

#define UNIT_NS 1000u

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < UNIT_NS) {
        return 0;
    }
    double octaves = log2((double)ns / UNIT_NS);
    uint32_t index = 1 + (uint32_t)(octaves * HISTOGRAM_PER_OCTAVE);
    return index < HISTOGRAM_BUCKETS ? index : HISTOGRAM_BUCKETS - 1;
}

/* The middle of a bucket, by ratio. */
static double middle_of(uint32_t index)
{
    return index == 0 ? UNIT_NS / 2.0
                      : UNIT_NS * exp2((index - 1 + 0.5) / (double)HISTOGRAM_PER_OCTAVE);
}

void histogram_add(struct histogram *h, uint64_t ns)
{
    h->count++;
    h->buckets[bucket_of(ns)]++;
}

double histogram_quantile(const struct histogram *h, double share)
{
    double wanted = share * (double)h->count;
    uint64_t below = 0;
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        below += h->buckets[i];
        if (below > 0 && (double)below >= wanted) {
            return middle_of(i);
        }
    }
    return 0;
}
