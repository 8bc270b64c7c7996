/* The scheduler's rules one by one: cost, budget, order, deadlines, who gives way. */
#include "daemon/sched/budget.h"
#include "daemon/sched/deadline.h"
#include "daemon/sched/fair.h"
#include "daemon/sched/order.h"
#include "daemon/sched/preempt.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>

#define SECOND 1000000000ull

static uint64_t seed = 88172645463325252u;

static uint32_t next(uint32_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 32) % below;
}

/* A machine: what steps really take, within a twentieth. */
static double truth(const struct cost_work *w, double speed)
{
    double ms = 30 + 0.8 * w->decode_rows + 3.1 * w->prefill_rows + 2e-4 * w->depth_tokens;
    return ms / speed * (0.95 + next(1000) / 10000.0);
}

static void learn(struct cost *c, int steps, double speed)
{
    for (int i = 0; i < steps; i++) {
        struct cost_work w = {.decode_rows = next(9)};
        w.prefill_rows = i % 3 == 0 ? 0 : 1 + next(64);
        w.depth_tokens = (w.decode_rows + w.prefill_rows) * (double)next(4000);
        cost_learn(c, &w, truth(&w, speed));
    }
}

static void check_near(const struct cost *c, const struct cost_work *w, double speed)
{
    double got = cost_ms(c, w), wanted = truth(w, speed);
    cr_expect(fabs(got - wanted) < 0.15 * wanted, "%g, not %g", got, wanted);
}

/* ---- cost -------------------------------------------------------------------------------- */

Test(cost, is_learned_from_steps)
{
    struct cost c = {0};
    cr_expect(not(cost_knows_prefill(&c)));
    learn(&c, 200, 1);
    check_near(&c, &(struct cost_work){.decode_rows = 4, .depth_tokens = 8000}, 1);
    check_near(&c, &(struct cost_work){4, 32, 36 * 2000.0}, 1);
    check_near(&c, &(struct cost_work){0, 64, 64 * 1000.0}, 1);
    cr_expect(fabs(cost_row_ms(&c, 0) - 3.1) < 0.5, "%g", cost_row_ms(&c, 0));
}

Test(cost, follows_a_machine_that_slows_down)
{
    struct cost c = {0};
    learn(&c, 200, 1);
    learn(&c, 150, 0.5);
    check_near(&c, &(struct cost_work){4, 32, 36 * 2000.0}, 0.5);
}

Test(cost, one_stall_says_little)
{
    struct cost c = {0};
    learn(&c, 200, 1);
    const struct cost_work w = {.decode_rows = 4, .depth_tokens = 8000};
    double before = cost_ms(&c, &w);
    cost_learn(&c, &w, 60000);
    cr_expect(lt(dbl, cost_ms(&c, &w), 1.2 * before));
}

Test(cost, never_predicts_less_for_more)
{
    struct cost c = {0};
    for (int i = 0; i < 500; i++) { /* noise alone */
        const struct cost_work w = {next(9), next(65), next(100000)};
        cost_learn(&c, &w, 1 + next(1000));
        for (unsigned k = 0; k < COST_TERMS; k++) {
            cr_assert(c.terms[k] >= 0 && isfinite(c.terms[k]));
        }
    }
}

/* ---- budget ------------------------------------------------------------------------------ */

Test(budget, streams_keep_their_pace_and_prompts_get_on)
{
    struct cost c = {0};
    uint32_t n_mixed = 0, n_probes = 0;
    learn(&c, 200, 1);
    for (int i = 0; i < 1000; i++) {
        double depth = i * 4.0;
        struct cost_work w = {.decode_rows = 4, .depth_tokens = 4 * 500};
        double alone = truth(&w, 1);
        const struct budget b = {.alone_ms = cost_ms(&c, &w), .decoding = true};
        struct budget own = b;
        own.own_ms = b.alone_ms;
        uint32_t rows = budget_rows(&own, &c, depth, 508, &n_mixed);
        w.prefill_rows = rows;
        w.depth_tokens += rows * depth;
        double ms = truth(&w, 1);
        n_probes += rows == 0;
        cr_expect(ms <= 1.5 * 1.12 * alone, "%u rows: %g ms beside %g", rows, ms, alone);
        cost_learn(&c, &w, ms);
    }
    cr_expect(eq(u32, n_probes, 1000 / BUDGET_PROBE));
}

Test(budget, nobody_decodes_then_prompts_have_all)
{
    struct cost c = {0};
    uint32_t n_mixed = 3;
    const struct budget b = {0};
    cr_expect(eq(u32, budget_rows(&b, &c, 0, 512, &n_mixed), 512));
    cr_expect(eq(u32, n_mixed, 0));
}

Test(budget, a_target_gives_more_and_never_less)
{
    struct cost c = {0};
    learn(&c, 200, 1);
    struct budget b = {.alone_ms = 34, .own_ms = 34, .decoding = true};
    uint32_t n_mixed = 0, least = budget_rows(&b, &c, 0, 512, &n_mixed);
    b.target_ms = 20;
    n_mixed = 0;
    cr_expect(eq(u32, budget_rows(&b, &c, 0, 512, &n_mixed), least));
    b.target_ms = 340;
    n_mixed = 0;
    cr_expect(le(u32, abs((int)budget_rows(&b, &c, 0, 512, &n_mixed) - 98), 15));
}

Test(budget, the_slowest_machine_gets_on)
{
    struct cost c = {0};
    learn(&c, 200, 0.001);
    uint32_t n_mixed = 0;
    const struct budget b = {.alone_ms = 1, .own_ms = 1, .decoding = true};
    cr_expect(eq(u32, budget_rows(&b, &c, 1e6, 512, &n_mixed), BUDGET_LEAST));
    cr_expect(eq(u32, budget_rows(&b, &c, 1e6, 1, &n_mixed), 1));
}

/* ---- order ------------------------------------------------------------------------------- */

Test(order, priority_then_share_then_age)
{
    const struct order_key a = {0, 100, 5, 100}, urgent = {1, 200, 9, 200},
                           behind = {0, 300, 4, 300};
    const struct order_key later = {0, 400, 5, 400};
    cr_expect(order_before(&urgent, &a, 1, 500));
    cr_expect(order_before(&behind, &a, 0, 500));
    cr_expect(order_before(&a, &later, 0, 500));
    cr_expect(not(order_before(&a, &a, 0, 500)));
}

Test(order, waiting_raises_to_the_highest_that_was_asked_for_and_not_beyond)
{
    cr_expect(eq(i32, order_level(0, 0, 0, 1000 * SECOND), 0));
    cr_expect(eq(i32, order_level(-3, 0, 2, 0), -3));
    cr_expect(eq(i32, order_level(-3, 0, 2, 3 * ORDER_AGEING_NS), 0));
    cr_expect(eq(i32, order_level(-3, 0, 2, UINT64_MAX / 2), 2));
    cr_expect(eq(i32, order_level(5, 0, 2, 1000 * SECOND), 5));
    /* Two that asked for nothing: the long wait of one gives it no right above the other's share.
     */
    const struct order_key old = {0, 0, 10, 0}, fresh = {0, 999 * SECOND, 1, 999 * SECOND};
    cr_expect(order_before(&fresh, &old, 0, 1000 * SECOND));
}

Test(order, a_full_queue_tells_when_places_come_free)
{
    struct order_pace p = {0};
    cr_expect(eq(u32, order_retry_ms(&p, 5 * SECOND), ORDER_RETRY_MS_UNKNOWN));
    for (uint64_t i = 1; i <= 50; i++) {
        order_pace_note(&p, i * SECOND / 2);
    }
    uint64_t last = 25 * SECOND;
    cr_expect(le(u32, abs((int)order_retry_ms(&p, last) - 500), 1));
    cr_expect(le(u32, abs((int)order_retry_ms(&p, last + SECOND / 5) - 300), 1));
    cr_expect(le(u32, abs((int)order_retry_ms(&p, last + 4 * SECOND) - 4000), 1)); /* slower now */
    cr_expect(eq(u32, order_retry_ms(&p, last + 1000 * SECOND), ORDER_RETRY_MS_MOST));
    cr_expect(ge(u32, order_retry_ms(&p, last + SECOND / 2 - 1), ORDER_RETRY_MS_LEAST));
}

/* ---- deadlines --------------------------------------------------------------------------- */

Test(deadline, only_what_is_hopeless_is_told_so)
{
    struct cost c = {0};
    const struct deadline_work work = {.prompt_tokens = 1000, .tokens_least = 51, .n_batch = 512};
    cr_expect(eq(dbl, deadline_needed_ms(&c, &work), 0)); /* nothing is known */
    learn(&c, 300, 1);
    double needed = deadline_needed_ms(&c, &work);
    double wanted = 1000 * (3.1 + 2e-4 * 500) + 2 * 30 + 50 * (30.8 + 2e-4 * 1000);
    cr_expect(fabs(needed - wanted) < 0.15 * wanted, "%g, not %g", needed, wanted);
    cr_expect(deadline_is_hopeless(needed, needed / 2));
    cr_expect(not(deadline_is_hopeless(needed, needed)));
    cr_expect(not(deadline_is_hopeless(0, 1)));
    const struct deadline_work cached = {
        .prompt_tokens = 10, .cached_tokens = 990, .tokens_least = 51, .n_batch = 512};
    cr_expect(lt(dbl, deadline_needed_ms(&c, &cached), needed / 1.5));
}

/* ---- giving way -------------------------------------------------------------------------- */

Test(preempt, ranks_are_a_total_order)
{
    struct preempt_rank ranks[40];
    for (uint64_t i = 0; i < 40; i++) {
        ranks[i] = (struct preempt_rank){next(4) == 0, (int32_t)next(3) - 1, next(3), i};
    }
    for (int a = 0; a < 40; a++) {
        for (int b = 0; b < 40; b++) {
            bool lower = preempt_is_lower(&ranks[a], &ranks[b]);
            cr_assert(eq(int, lower + preempt_is_lower(&ranks[b], &ranks[a]), a != b));
            for (int k = 0; lower && k < 40; k++) {
                bool above = preempt_is_lower(&ranks[b], &ranks[k]);
                cr_assert(not(above && !preempt_is_lower(&ranks[a], &ranks[k])));
            }
        }
    }
}

Test(preempt, a_place_moves_once_and_not_back)
{
    for (uint32_t a = 0; a < 12; a++) {
        for (uint32_t b = 0; b < 12; b++) {
            for (uint32_t w = 1; w < 8; w++) {
                struct preempt_share asks = {a, w}, holds = {b, 3};
                if (preempt_is_owed(&asks, &holds)) {
                    asks.n_running++;
                    holds.n_running--;
                    cr_assert(not(preempt_is_owed(&holds, &asks)), "%u %u %u", a, b, w);
                }
            }
        }
    }
    cr_expect(preempt_is_owed(&(struct preempt_share){0, 1}, &(struct preempt_share){2, 1}));
    cr_expect(not(preempt_is_owed(&(struct preempt_share){0, 1}, &(struct preempt_share){1, 1})));
}

/* ---- a step's rows ----------------------------------------------------------------------- */

Test(share, rows_go_by_level_weight_and_arrival)
{
    struct fair_user a = {.uid = 1, .weight = 1}, b = {.uid = 2, .weight = 3};
    struct fair_claim claims[] = {
        {.user = &a, .wanted = 4000}, {.user = &a, .wanted = 4000}, {.user = &b, .wanted = 4000}};
    fair_share(claims, 3, 1024);
    cr_expect(eq(u32, claims[0].given, 256));
    cr_expect(eq(u32, claims[1].given, 0));
    cr_expect(eq(u32, claims[2].given, 768));
    claims[1].level = 1;
    claims[1].wanted = 1000;
    fair_share(claims, 3, 1024);
    cr_expect(eq(u32, claims[1].given, 1000));
    cr_expect(eq(u32, claims[0].given + claims[2].given, 24));
}

Test(share, what_cannot_be_cut_comes_whole_or_not)
{
    struct fair_user a = {.uid = 1, .weight = 1};
    struct fair_claim claims[] = {{.user = &a, .wanted = 300, .whole = true},
                                  {.user = &a, .wanted = 300, .whole = true},
                                  {.user = &a, .wanted = 200, .whole = true}};
    fair_share(claims, 3, 512);
    cr_expect(eq(u32, claims[0].given, 300));
    cr_expect(eq(u32, claims[1].given, 0));
    cr_expect(eq(u32, claims[2].given, 200));
}
