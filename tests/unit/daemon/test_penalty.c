/* Who is slowed, for how long, and who is not; by a clock that the tests move. */
#include "daemon/log.h"
#include "daemon/penalty.h"

#include <criterion/criterion.h>

#define SECOND  1000000000u
#define HOSTILE 7u
#define OTHER   8u

static struct penalty_table table;
static struct penalty *hostile, *other;
static uint64_t now;

static void setup(void)
{
    log_init(LOG_LEVEL_ERROR);
    penalty_init(&table);
    table.limits = (struct penalty_limits){.strikes_max = 1000, .share_permille = 5};
    now = 1000 * (uint64_t)SECOND;
    hostile = penalty_ref(&table, HOSTILE);
    other = penalty_ref(&table, OTHER);
}

static void teardown(void)
{
    penalty_finish(&table);
}

TestSuite(penalty, .init = setup, .fini = teardown);

static void strike(enum penalty_kind kind, unsigned times)
{
    for (unsigned i = 0; i < times; i++) {
        penalty_strike(&table, hostile, kind, now);
    }
}

static void pass(uint64_t ns)
{
    for (; ns > SECOND; ns -= SECOND) {
        now += SECOND;
        penalty_tick(&table, now);
    }
    now += ns;
    penalty_tick(&table, now);
}

static void serve(uid_t uid)
{
    penalty_note_served(&table, uid, now);
}

Test(penalty, a_handful_of_violations_slows_and_no_other_uid)
{
    strike(PENALTY_VIOLATION, 10);
    cr_assert(!hostile->slowed);
    strike(PENALTY_VIOLATION, 1);
    cr_assert(hostile->slowed);
    cr_assert(!other->slowed);
    cr_assert_eq(other->strikes, 0);
}

/* n times a second, for a minute. */
static void keep_doing(enum penalty_kind kind, unsigned n)
{
    for (unsigned i = 0; i < 60 * n; i++) {
        strike(kind, 1);
        pass(SECOND / n);
    }
}

Test(penalty, what_honest_programs_do_now_and_then_never_adds_up)
{
    keep_doing(PENALTY_CANCEL, 10);     /* an editor, of completions */
    keep_doing(PENALTY_ABRUPT_END, 50); /* tests that are killed */
    keep_doing(PENALTY_CONNECTION, 200);
    keep_doing(PENALTY_LATE, 20);
    keep_doing(PENALTY_VIOLATION, 1); /* a wrong program that is started again and again */
    strike(PENALTY_ABRUPT_END, 190);  /* 190 connections of a program that crashed */
    cr_assert(!hostile->slowed);
}

Test(penalty, what_is_too_much_slows)
{
    keep_doing(PENALTY_CANCEL, 600);
    cr_assert(hostile->slowed);
}

Test(penalty, who_stops_is_forgiven_after_ten_to_thirty_seconds)
{
    strike(PENALTY_VIOLATION, 11);
    pass(9 * (uint64_t)SECOND);
    cr_assert(hostile->slowed);
    pass(4 * (uint64_t)SECOND);
    cr_assert(!hostile->slowed);

    strike(PENALTY_VIOLATION, 1000000); /* more than can be counted */
    pass(29 * (uint64_t)SECOND);
    cr_assert(hostile->slowed);
    pass(2 * (uint64_t)SECOND);
    cr_assert(!hostile->slowed);
}

Test(penalty, who_goes_on_a_tenth_as_much_is_not_forgiven)
{
    strike(PENALTY_VIOLATION, 20);
    keep_doing(PENALTY_CANCEL, 60);
    cr_assert(hostile->slowed);
}

Test(penalty, who_is_alone_does_not_wait)
{
    strike(PENALTY_VIOLATION, 20);
    cr_assert(!penalty_is_paced(&table, hostile, now));
    serve(HOSTILE);
    cr_assert(!penalty_is_paced(&table, hostile, now));
    serve(OTHER);
    cr_assert(penalty_is_paced(&table, hostile, now));
    serve(HOSTILE);
    cr_assert(penalty_is_paced(&table, hostile, now));
    cr_assert(!penalty_is_paced(&table, other, now));
    now += 11 * (uint64_t)SECOND; /* the other has done nothing since */
    serve(HOSTILE);
    cr_assert(!penalty_is_paced(&table, hostile, now));
}

Test(penalty, a_step_is_paid_for_by_waiting)
{
    strike(PENALTY_VIOLATION, 20);
    penalty_charge(&table, hostile, 100000, now); /* 0.1 ms are 5 permille of 20 ms */
    cr_assert_eq(hostile->next_ns, now + 19900000);
    penalty_charge(&table, hostile, 1, now);
    cr_assert_eq(hostile->next_ns, now + 10000000);
    penalty_charge(&table, hostile, SECOND, now); /* an answer comes within a bounded time */
    cr_assert_eq(hostile->next_ns, now + 250000000);
    table.limits.share_permille = 1000;
    penalty_charge(&table, hostile, SECOND, now);
    cr_assert_eq(hostile->next_ns, now + 10000000);
}

Test(penalty, leaving_and_coming_back_does_not_help)
{
    strike(PENALTY_VIOLATION, 20);
    penalty_unref(&table, hostile);
    cr_assert_eq(penalty_find(&table, HOSTILE), hostile);
    hostile = penalty_ref(&table, HOSTILE);
    cr_assert(hostile->slowed);
    penalty_unref(&table, hostile);
    pass(100 * (uint64_t)SECOND);
    cr_assert_null(penalty_find(&table, HOSTILE));
    cr_assert_eq(table.n_idle, 0);
}

Test(penalty, who_did_nothing_is_not_remembered)
{
    penalty_unref(&table, other);
    cr_assert_null(penalty_find(&table, OTHER));
}

Test(penalty, uids_that_are_remembered_are_bounded)
{
    for (uid_t uid = 100; uid < 100 + 2 * PENALTY_IDLE_MAX; uid++) {
        struct penalty *p = penalty_ref(&table, uid);
        penalty_strike(&table, p, PENALTY_CONNECTION, now);
        penalty_unref(&table, p);
    }
    cr_assert_eq(table.n_idle, PENALTY_IDLE_MAX);
    pass(10 * (uint64_t)SECOND);
    cr_assert_eq(table.n_idle, 0);
    cr_assert_eq(penalty_find(&table, HOSTILE), hostile); /* it is connected */
}

Test(penalty, a_limit_of_zero_forgives_all_and_slows_nobody)
{
    strike(PENALTY_VIOLATION, 20);
    table.limits.strikes_max = 0;
    pass(SECOND);
    cr_assert(!hostile->slowed);
    strike(PENALTY_VIOLATION, 1000);
    cr_assert(!hostile->slowed);
    cr_assert_eq(hostile->strikes, 0);
}
