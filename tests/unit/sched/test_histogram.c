#include "daemon/sched/histogram.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

static bool is_near(double got, double wanted)
{
    return got > wanted * (1 - 1.0 / 15) && got < wanted * (1 + 1.0 / 15);
}

Test(histogram, nothing_has_no_quantile)
{
    struct histogram h = {0};
    cr_expect(eq(dbl, histogram_quantile(&h, 0.5), 0));
}

Test(histogram, quantiles_are_right_within_a_sixteenth)
{
    static struct histogram h;
    for (uint64_t i = 1; i <= 100000; i++) {
        histogram_add(&h, i * 1000 * 10); /* 10 us to 1 s, evenly */
    }
    cr_expect(eq(u64, h.count, 100000));
    cr_expect(is_near(histogram_quantile(&h, 0.5), 0.5e9), "%g", histogram_quantile(&h, 0.5));
    cr_expect(is_near(histogram_quantile(&h, 0.99), 0.99e9), "%g", histogram_quantile(&h, 0.99));
    cr_expect(is_near(histogram_quantile(&h, 0.01), 0.01e9), "%g", histogram_quantile(&h, 0.01));
}

Test(histogram, one_outlier_is_the_highest_and_moves_nothing_else)
{
    static struct histogram h;
    for (int i = 0; i < 999; i++) {
        histogram_add(&h, 20000000);
    }
    histogram_add(&h, 5000000000u);
    cr_expect(is_near(histogram_quantile(&h, 0.99), 0.02e9));
    cr_expect(is_near(histogram_quantile(&h, 1), 5e9));
}

Test(histogram, extremes_are_counted)
{
    static struct histogram h;
    histogram_add(&h, 0);
    histogram_add(&h, UINT64_MAX);
    cr_expect(eq(u64, h.count, 2));
    cr_expect(lt(dbl, histogram_quantile(&h, 0.5), 1000));
    cr_expect(lt(dbl, 1e12, histogram_quantile(&h, 1)));
}
