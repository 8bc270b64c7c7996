/* Lines that may not come too often. */
#include "daemon/log.h"

#include <criterion/criterion.h>

Test(log, a_paced_line_comes_once_in_a_while_and_tells_what_was_left_out)
{
    struct log_pace pace = {0};
    uint64_t n = 7;
    cr_assert(log_pace_is_due(&pace, 1000, &n));
    cr_assert_eq(n, 0);
    n = 7;
    for (uint64_t i = 1; i <= 3; i++) {
        cr_assert_not(log_pace_is_due(&pace, 1000 + LOG_PACE_NS - i, &n));
    }
    cr_assert_eq(n, 7);
    cr_assert(log_pace_is_due(&pace, 1000 + LOG_PACE_NS, &n));
    cr_assert_eq(n, 3);
    cr_assert(log_pace_is_due(&pace, 1000 + 2 * LOG_PACE_NS, &n));
    cr_assert_eq(n, 0);
}

Test(log, some_may_come_together)
{
    struct log_pace pace = {.n_more = 2};
    uint64_t n;
    for (uint64_t round = 0; round < 3; round++) {
        uint64_t now = 1 + round * LOG_PACE_NS;
        for (unsigned i = 0; i < 5; i++) {
            cr_assert_eq(log_pace_is_due(&pace, now + i, &n), i < 3);
            cr_assert_eq(n, i == 0 && round > 0 ? 2 : 0);
            n = 0;
        }
    }
}
