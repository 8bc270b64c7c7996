#include "daemon/sched/fair.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

static struct fair f;

static struct fair_user *come(uid_t uid)
{
    struct fair_user *u = NULL;
    cr_assert(eq(int, fair_come(&f, uid, &u), 0));
    return u;
}

/* Serves whoever is behind, one token at a time. */
static void serve(struct fair_user *a, struct fair_user *b, int n, int *ret_a, int *ret_b)
{
    for (int i = 0; i < n; i++) {
        struct fair_user *u = a->served <= b->served ? a : b;
        fair_charge(&f, u, 1);
        *(u == a ? ret_a : ret_b) += 1;
    }
}

Test(fair, tokens_go_by_weight)
{
    const struct fair_weight weights[] = {{2, 3}};
    int n_a = 0, n_b = 0;
    fair_init(&f);
    cr_assert(eq(int, fair_set_weights(&f, weights, 1), 0));
    struct fair_user *a = come(1), *b = come(2);
    cr_expect(eq(u32, a->weight, 1));
    cr_expect(eq(u32, b->weight, 3));
    serve(a, b, 4000, &n_a, &n_b);
    cr_expect(le(int, abs(n_a - 1000), 2), "%d", n_a);
    fair_finish(&f);
}

Test(fair, who_was_away_gets_no_credit_and_no_penalty)
{
    int n_a = 0, n_b = 0;
    fair_init(&f);
    struct fair_user *a = come(1);
    fair_charge(&f, a, 100000);
    struct fair_user *b = come(2); /* new: it starts where a is */
    serve(a, b, 1000, &n_a, &n_b);
    cr_expect(le(int, abs(n_a - n_b), 2), "%d, %d", n_a, n_b);
    fair_leave(&f, a);
    fair_charge(&f, b, 100000);
    cr_expect(eq(ptr, come(1), a)); /* a is remembered, and not ahead for its absence */
    n_a = n_b = 0;
    serve(a, b, 1000, &n_a, &n_b);
    cr_expect(le(int, abs(n_a - n_b), 2), "%d, %d", n_a, n_b);
    fair_finish(&f);
}

Test(fair, weights_can_be_changed_and_taken_back)
{
    const struct fair_weight weights[] = {{1, 5}};
    fair_init(&f);
    struct fair_user *a = come(1);
    cr_assert(eq(int, fair_set_weights(&f, weights, 1), 0));
    fair_apply_weights(&f);
    cr_expect(eq(u32, a->weight, 5));
    cr_assert(eq(int, fair_set_weights(&f, NULL, 0), 0));
    fair_apply_weights(&f);
    cr_expect(eq(u32, a->weight, 1));
    fair_finish(&f);
}

Test(fair, those_who_left_are_forgotten_oldest_first_and_nobody_else)
{
    fair_init(&f);
    struct fair_user *stays = come(100000);
    for (uid_t uid = 0; uid < 3 * FAIR_USERS_MAX; uid++) {
        struct fair_user *u = come(uid);
        u->tokens_prompt = uid + 1;
        fair_leave(&f, u);
    }
    cr_expect(le(u32, f.n_users, FAIR_USERS_MAX));
    cr_expect(eq(ptr, come(100000), stays));
    cr_expect(eq(u64, come(3 * FAIR_USERS_MAX - 1)->tokens_prompt, 3 * FAIR_USERS_MAX));
    cr_expect(eq(u64, come(0)->tokens_prompt, 0));
    fair_finish(&f);
}

/* More users at once than are remembered: all have their places. */
Test(fair, nobody_who_is_here_is_forgotten)
{
    static struct fair_user *users[2 * FAIR_USERS_MAX];
    fair_init(&f);
    for (uid_t uid = 0; uid < 2 * FAIR_USERS_MAX; uid++) {
        users[uid] = come(uid);
    }
    for (uid_t uid = 0; uid < 2 * FAIR_USERS_MAX; uid++) {
        cr_assert(eq(ptr, come(uid), users[uid]));
    }
    fair_finish(&f);
}
