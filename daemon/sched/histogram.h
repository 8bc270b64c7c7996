/* daemon/sched/histogram.h - durations, counted in buckets that grow by an eighth of an octave.
 *
 * A percentile is right within 1/16 of its value, whatever the durations are; memory is constant.
 * Plain data: whoever owns one guards it. */
#ifndef DAEMON_SCHED_HISTOGRAM_H
#define DAEMON_SCHED_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_PER_OCTAVE 8u
/* Bucket 0 is below 1 us; the last one takes all from 2^36 us (19 hours) on. */
#define HISTOGRAM_BUCKETS (36u * HISTOGRAM_PER_OCTAVE + 2u)

struct histogram {
    uint64_t count;
    uint64_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *h, uint64_t ns);
/* Nanoseconds below which that share (0 to 1) of the durations lies; 0 where there is none. */
double histogram_quantile(const struct histogram *h, double share);

#endif
