/* format/checked.h - arithmetic on sizes that come from files: every overflow is seen.
 *
 * All helpers return true on success and leave *ret untouched on overflow. */
#ifndef FORMAT_CHECKED_H
#define FORMAT_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool checked_add_u64(uint64_t a, uint64_t b, uint64_t *ret)
{
    uint64_t sum;
    if (__builtin_add_overflow(a, b, &sum)) {
        return false;
    }
    *ret = sum;
    return true;
}

static inline bool checked_mul_u64(uint64_t a, uint64_t b, uint64_t *ret)
{
    uint64_t product;
    if (__builtin_mul_overflow(a, b, &product)) {
        return false;
    }
    *ret = product;
    return true;
}

/* Rounds value up to a multiple of alignment, which must be a power of two. */
static inline bool checked_align_u64(uint64_t value, uint64_t alignment, uint64_t *ret)
{
    uint64_t sum;
    if (!checked_add_u64(value, alignment - 1, &sum)) {
        return false;
    }
    *ret = sum & ~(alignment - 1);
    return true;
}

#endif
