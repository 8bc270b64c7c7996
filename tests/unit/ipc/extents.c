/* Places in a region: none overlap, all come back. */
#include "ipc/extents.h"

#include <criterion/criterion.h>
#include <errno.h>

static struct extents e;

Test(extents, first_fit_with_aligned_places)
{
    uint64_t a, b, c, d;
    extents_init(&e, 4096, 1024);
    cr_assert_eq(extents_take(&e, 1, &a), 0);
    cr_assert_eq(extents_take(&e, 128, &b), 0);
    cr_assert_eq(extents_take(&e, 65, &c), 0);
    cr_assert(a == 4096 && b == 4096 + 64 && c == 4096 + 192);
    cr_assert_eq(e.used, 64 + 128 + 128);
    cr_assert_eq(extents_give(&e, b), 0);
    cr_assert_eq(extents_take(&e, 129, &d), 0);
    cr_expect_eq(d, 4096 + 320, "too large for the hole");
    cr_assert_eq(extents_take(&e, 128, &d), 0);
    cr_expect_eq(d, b);
}

Test(extents, only_what_was_taken_can_be_given)
{
    uint64_t a;
    extents_init(&e, 0, 1024);
    cr_expect_eq(extents_give(&e, 0), -ENOENT);
    cr_assert_eq(extents_take(&e, 256, &a), 0);
    cr_expect_eq(extents_give(&e, 64), -ENOENT, "inside of it");
    cr_expect_eq(extents_give(&e, UINT64_MAX), -ENOENT);
    cr_expect_eq(extents_give(&e, a), 0);
    cr_expect_eq(extents_give(&e, a), -ENOENT, "twice");
    cr_expect_eq(e.used, 0);
}

Test(extents, bounds)
{
    uint64_t a = 77;
    extents_init(&e, 0, 1024);
    cr_expect_eq(extents_take(&e, 1025, &a), -ENOSPC);
    cr_expect_eq(extents_take(&e, UINT64_MAX, &a), -ENOSPC);
    cr_expect_eq(a, 77, "untouched");
    cr_expect_eq(extents_take(&e, 1024, &a), 0);
    cr_expect_eq(extents_take(&e, 0, &a), -ENOSPC);
    extents_init(&e, 0, 1u << 20);
    for (uint32_t i = 0; i < EXTENTS_MAX; i++) {
        cr_assert_eq(extents_take(&e, 0, &a), 0);
        cr_assert_eq(a, i * EXTENTS_ALIGN);
    }
    cr_expect_eq(extents_take(&e, 1, &a), -ENOSPC);
}

Test(extents, at_random_nothing_overlaps_and_all_comes_back)
{
    static struct {
        uint64_t offset, bytes;
    } mine[EXTENTS_MAX];
    uint32_t n = 0;
    uint64_t x = 88172645463325252u;
    extents_init(&e, 128, 1u << 20);
    for (unsigned round = 0; round < 20000; round++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        if (n > 0 && x % 5 < 2) {
            uint32_t i = (uint32_t)(x >> 20) % n;
            cr_assert_eq(extents_give(&e, mine[i].offset), 0);
            mine[i] = mine[--n];
            continue;
        }
        uint64_t offset, bytes = (x >> 8) % 20000;
        if (extents_take(&e, bytes, &offset) == 0) {
            cr_assert(offset >= 128 && offset + bytes <= 128 + (1u << 20) && offset % 64 == 0);
            for (uint32_t i = 0; i < n; i++) {
                cr_assert(offset + bytes <= mine[i].offset ||
                          mine[i].offset + mine[i].bytes <= offset);
            }
            mine[n].offset = offset;
            mine[n++].bytes = bytes;
        }
    }
    while (n > 0) {
        cr_assert_eq(extents_give(&e, mine[--n].offset), 0);
    }
    cr_assert(e.count == 0 && e.used == 0);
}
