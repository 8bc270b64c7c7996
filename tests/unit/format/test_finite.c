/* fmt_type_finite says what converting every value would say: random bytes of every type. */
#include "format/types.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <string.h>

#define MAX_BLOCKS 200u
#define N_TRIALS   400u

static uint64_t state = 88172645463325252u;

static uint8_t random_byte(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint8_t)(state >> 24);
}

/* The first value that is no number, or n. A shared exponent of 255 is none by its own format. */
static uint64_t slow_search(const struct fmt_type_info *info, const uint8_t *src, uint64_t n)
{
    float values[FMT_MAX_BLOCK_VALUES];
    for (uint64_t i = 0; i < n; i += info->n_block, src += info->block_bytes) {
        info->dequantise(src, values, info->n_block);
        for (uint32_t v = 0; v < info->n_block; v++) {
            if (!isfinite(values[v]) || (info->type == FMT_TYPE_MXFP4 && src[0] == 255)) {
                return i + v;
            }
        }
    }
    return n;
}

Test(finite, agrees_with_converting_every_value)
{
    static uint8_t data[MAX_BLOCKS * FMT_MAX_BLOCK_BYTES];
    const struct fmt_type_info *info;
    for (size_t t = 0; (info = fmt_type_at(t)) != NULL; t++) {
        unsigned n_clean = 0, n_bad = 0;
        cr_assert(le(u32, info->block_bytes, FMT_MAX_BLOCK_BYTES));
        cr_assert(le(u32, info->n_block, FMT_MAX_BLOCK_VALUES));
        for (unsigned trial = 0; trial < N_TRIALS; trial++) {
            /* Mostly few blocks, so that many a trial has no bad one. */
            uint64_t n_blocks = trial % 4 == 0 ? random_byte() % MAX_BLOCKS : random_byte() % 24u;
            uint64_t n = n_blocks * info->n_block, index = UINT64_MAX;
            for (size_t i = 0; i < n_blocks * info->block_bytes; i++) {
                data[i] = random_byte();
            }
            uint64_t wanted = slow_search(info, data, n);
            bool finite = fmt_type_finite(info, data, n, &index);
            cr_assert(eq(int, finite, wanted == n), "%s, trial %u", info->name, trial);
            cr_assert(finite || index == wanted, "%s, trial %u", info->name, trial);
            n_clean += finite;
            n_bad += !finite;
        }
        cr_expect(n_clean > 0 && n_bad > 0, "%s: %u clean, %u bad", info->name, n_clean, n_bad);
    }
}

Test(finite, one_bad_value_among_many)
{
    static float values[1000];
    uint64_t index;
    const struct fmt_type_info *f32 = fmt_type_info(FMT_TYPE_F32);
    for (size_t i = 0; i < 1000; i += 37) {
        const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
        for (size_t b = 0; b < 4; b++) {
            memset(values, 0, sizeof(values));
            values[i] = bad[b];
            cr_expect(eq(int, fmt_type_finite(f32, values, 1000, &index), false));
            cr_expect(eq(u64, index, i));
            cr_expect(fmt_type_finite(f32, values, i, &index));
        }
    }
    for (size_t i = 0; i < 1000; i++) {
        values[i] = i % 2 ? 3.402823e38f : -3.402823e38f; /* large is legal */
    }
    cr_expect(fmt_type_finite(f32, values, 1000, &index));
}
