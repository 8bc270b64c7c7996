/* The table of quotas: taking, refusing, giving back, forgetting. */
#include "daemon/quota.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

static struct quota_table table;
static struct ipc_error e;

static void setup(void)
{
    quota_init(&table);
    e = (struct ipc_error){0};
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        table.limits.of[k] = 10;
    }
}

static void teardown(void)
{
    quota_finish(&table);
}

TestSuite(quota, .init = setup, .fini = teardown);

static struct quota_amounts amount(enum quota_kind kind, uint64_t n)
{
    struct quota_amounts a = {{0}};
    a.of[kind] = n;
    return a;
}

static int take(uid_t uid, enum quota_kind kind, uint64_t n)
{
    struct quota_amounts a = amount(kind, n);
    return quota_take(&table, uid, &a, &e);
}

static uint32_t n_relieved;

static void on_relieved(void *arg)
{
    n_relieved++;
}

Test(quota, who_reads_too_little_is_marked_until_it_reads)
{
    table.relieved = on_relieved;
    cr_assert_eq(take(1, QUOTA_CALLS, 1), 0);
    const struct quota_user *u = quota_user(&table, 1);
    quota_change(&table, 1, QUOTA_OUTPUT_BYTES, 0, 9);
    cr_assert(!u->is_unread);
    quota_change(&table, 1, QUOTA_OUTPUT_BYTES, 9, 10);
    cr_assert(u->is_unread);
    cr_assert_eq(n_relieved, 0);
    quota_change(&table, 1, QUOTA_OUTPUT_BYTES, 10, 5);
    cr_assert(!u->is_unread);
    cr_assert_eq(n_relieved, 1);
    /* A connection that ends gives all of its output back. */
    quota_change(&table, 1, QUOTA_OUTPUT_BYTES, 5, 20);
    struct quota_amounts held = amount(QUOTA_OUTPUT_BYTES, 20);
    quota_give(&table, 1, &held);
    cr_assert(!u->is_unread);
    cr_assert_eq(n_relieved, 2);
}

Test(quota, each_quota_is_kept_to_its_limit_exactly)
{
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        cr_assert_eq(take(1, k, 9), 0);
        cr_assert_eq(take(1, k, 2), -EBUSY);
        cr_assert_eq(take(1, k, 1), 0);
        cr_assert_eq(take(1, k, 1), -EBUSY);
        cr_assert_eq(quota_user(&table, 1)->used.of[k], 10);
    }
    cr_assert_eq(quota_user(&table, 1)->n_refused, 2 * QUOTA_COUNT);
}

Test(quota, a_refusal_names_user_quota_use_and_limit_and_when_to_try_again)
{
    cr_assert_eq(take(4711, QUOTA_QUEUED_TOKENS, 7), 0);
    cr_assert_eq(take(4711, QUOTA_QUEUED_TOKENS, 5), -EBUSY);
    cr_assert_eq(e.code, PROTO_E_BUSY);
    cr_assert_gt(e.retry_after_ms, 0);
    for (const char *const *word = (const char *const[]){"4711", "has 7 ", "wants 5 ", "is 10 ",
                                                         "max_queued_tokens_per_user", NULL};
         *word; word++) {
        cr_assert_not_null(strstr(e.message, *word), "'%s' lacks '%s'", e.message, *word);
    }
}

Test(quota, what_is_refused_takes_nothing)
{
    struct quota_amounts both = amount(QUOTA_CALLS, 3);
    both.of[QUOTA_SEQUENCES] = 11;
    cr_assert_eq(quota_take(&table, 1, &both, &e), -EBUSY);
    cr_assert_null(quota_user(&table, 1));
    cr_assert_eq(take(1, QUOTA_CALLS, 10), 0);
}

Test(quota, one_users_use_is_not_anothers)
{
    cr_assert_eq(take(1, QUOTA_CALLS, 10), 0);
    cr_assert_eq(take(2, QUOTA_CALLS, 10), 0);
    cr_assert_eq(take(1, QUOTA_CALLS, 1), -EBUSY);
}

Test(quota, who_has_given_everything_back_is_forgotten)
{
    struct quota_amounts held = amount(QUOTA_CALLS, 3);
    held.of[QUOTA_FDS] = 2;
    cr_assert_eq(quota_take(&table, 1, &held, &e), 0);
    quota_give_one(&table, 1, &held, QUOTA_CALLS);
    cr_assert_eq(held.of[QUOTA_CALLS], 0);
    quota_give_one(&table, 1, &held, QUOTA_CALLS); /* nothing is left of it */
    cr_assert_eq(quota_user(&table, 1)->used.of[QUOTA_FDS], 2);
    quota_give(&table, 1, &held);
    cr_assert_null(quota_user(&table, 1));
    quota_give(&table, 1, &held);
}

Test(quota, a_lowered_limit_takes_nothing_away)
{
    struct quota_amounts held = amount(QUOTA_CALLS, 8);
    cr_assert_eq(quota_take(&table, 1, &held, &e), 0);
    table.limits.of[QUOTA_CALLS] = 5;
    cr_assert_eq(take(1, QUOTA_CALLS, 1), -EBUSY);
    cr_assert_eq(quota_user(&table, 1)->used.of[QUOTA_CALLS], 8);
    quota_give(&table, 1, &held);
    cr_assert_eq(take(1, QUOTA_CALLS, 5), 0);
}

Test(quota, amounts_near_the_end_of_the_numbers_do_not_wrap)
{
    cr_assert_eq(take(1, QUOTA_QUEUED_TOKENS, 10), 0);
    cr_assert_eq(take(1, QUOTA_QUEUED_TOKENS, UINT64_MAX - 5), -EBUSY);
    table.limits.of[QUOTA_QUEUED_TOKENS] = UINT64_MAX;
    cr_assert_eq(take(1, QUOTA_QUEUED_TOKENS, UINT64_MAX - 10), 0);
    cr_assert_eq(take(1, QUOTA_QUEUED_TOKENS, 1), -EBUSY);
}

Test(quota, output_that_grew_past_the_limit_shuts_the_door)
{
    cr_assert_eq(quota_check(&table, 1, QUOTA_OUTPUT_BYTES, &e), 0);
    cr_assert_eq(take(1, QUOTA_CONNECTIONS, 1), 0);
    quota_change(&table, 1, QUOTA_OUTPUT_BYTES, 0, 9);
    cr_assert_eq(quota_check(&table, 1, QUOTA_OUTPUT_BYTES, &e), 0);
    quota_change(&table, 1, QUOTA_OUTPUT_BYTES, 9, 900);
    cr_assert_eq(quota_check(&table, 1, QUOTA_OUTPUT_BYTES, &e), -EBUSY);
    cr_assert_eq(e.code, PROTO_E_BUSY);
    quota_change(&table, 1, QUOTA_OUTPUT_BYTES, 900, 0);
    cr_assert_eq(quota_check(&table, 1, QUOTA_OUTPUT_BYTES, &e), 0);
}
