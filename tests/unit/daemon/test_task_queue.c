/* Whose task begins next, and what is left of the queue at the end. */
#include "daemon/task_queue.h"
#include "tests/unit/must.h"

#include <criterion/criterion.h>
#include <string.h>

static struct task_queue q;
static struct task tasks[64];
static unsigned n_tasks;

static void set_up(void)
{
    task_queue_init(&q);
    n_tasks = 0;
}

static void tear_down(void)
{
    must(TAILQ_EMPTY(&q.users)); /* nobody is remembered */
    must(q.n_running == 0 && q.n_asking == 0);
    must(q.n_waiting_users == 0);
}

TestSuite(task_queue, .init = set_up, .fini = tear_down);

static struct task *add_task(uid_t uid, bool asks_disk)
{
    struct task *t = &tasks[n_tasks++];
    *t = (struct task){.uid = uid, .asks_disk = asks_disk};
    cr_assert_eq(task_queue_add(&q, t), 0);
    return t;
}

static struct task *add(uid_t uid)
{
    return add_task(uid, false);
}

static void add_many(uid_t uid, unsigned n)
{
    while (n-- > 0) {
        add(uid);
    }
}

static void end(uid_t uid)
{
    task_queue_ended(&q, &(struct task){.uid = uid});
}

/* Begins what may begin; "112" are two tasks of user 1 and one of user 2. */
static const char *begun(void)
{
    static char users[16];
    size_t n = 0;
    struct task *t;
    while ((t = task_queue_next(&q)) != NULL) {
        users[n++] = (char)('0' + t->uid);
    }
    users[n] = '\0';
    return users;
}

Test(task_queue, one_thread_is_left_for_whoever_comes_next)
{
    add_many(1, 20);
    cr_assert_str_eq(begun(), "111");
    cr_assert_str_eq(begun(), "");
    add(2);
    cr_assert_str_eq(begun(), "2");
    add(2);
    cr_assert_str_eq(begun(), "");
    for (unsigned i = 0; i < 2; i++) { /* others wait: user 1 is to have two */
        end(1);
        cr_assert_str_eq(begun(), i == 0 ? "2" : "1");
    }
    end(2);
    cr_assert_str_eq(begun(), "1"); /* nobody else waits any more */
    end(2);
    cr_assert_str_eq(begun(), "");
    for (unsigned i = 0; i < 15; i++) {
        end(1);
        cr_assert_str_eq(begun(), "1");
    }
    end(1);
    cr_assert_str_eq(begun(), "");
    end(1);
    end(1);
}

Test(task_queue, users_take_turns_and_tasks_of_one_keep_their_order)
{
    add_many(1, 8);
    struct task *a = add(2), *b = add(2), *c = add(3);
    cr_assert_eq(task_queue_next(&q), &tasks[0]);
    cr_assert_eq(task_queue_next(&q), a);
    cr_assert_eq(task_queue_next(&q), c);
    cr_assert_eq(task_queue_next(&q), &tasks[1]);
    cr_assert_null(task_queue_next(&q));
    end(3);
    cr_assert_eq(task_queue_next(&q), b);
    for (unsigned i = 2; i < 8; i++) {
        end(i == 2 || i == 3 ? 2 : 1);
        cr_assert_eq(task_queue_next(&q), i == 3 ? NULL : &tasks[i > 3 ? i - 1 : i]);
    }
    end(1);
    cr_assert_eq(task_queue_next(&q), &tasks[7]);
    end(1);
    end(1);
    end(1);
}

static struct task *add_asking(uid_t uid)
{
    return add_task(uid, true);
}

/* A disk that never answers takes half of the threads at most, whoever asks it. */
Test(task_queue, those_that_ask_a_disk_leave_threads_to_the_others)
{
    struct task *first = add_asking(1), *second = add_asking(1), *third = add_asking(1);
    struct task *other = add_asking(2);
    cr_assert_str_eq(begun(), "12");
    cr_assert(second->waits_with && third->waits_with && !other->waits_with);
    add(3);
    add(1);
    cr_assert_str_eq(begun(), "13"); /* before what waits for the disk */
    task_queue_ended(&q, first);
    cr_assert_str_eq(begun(), "1");
    cr_assert(!second->waits_with && third->waits_with);
    end(3);
    cr_assert_str_eq(begun(), "");
    task_queue_ended(&q, other);
    cr_assert_str_eq(begun(), "1");
    end(1);
    task_queue_ended(&q, second);
    task_queue_ended(&q, third);
}

Test(task_queue, what_asks_a_disk_keeps_its_place_while_it_may_begin)
{
    struct task *in_order[] = {add(1), add_asking(1), add(1), add_asking(1)};
    for (unsigned i = 0; i < 4; i++) {
        cr_assert_eq(task_queue_next(&q), in_order[i]);
        task_queue_ended(&q, in_order[i]);
    }
}

Test(task_queue, at_the_end_only_what_is_owed_is_left)
{
    add_many(1, 4);
    struct task *of_daemon = add(TASK_OF_DAEMON), *owed = add(1), *last = add(1);
    owed->is_owed = true;
    cr_assert_eq(task_queue_next(&q), &tasks[0]);
    struct task_list given_up;
    task_queue_give_up(&q, &given_up);
    struct task *t = TAILQ_FIRST(&given_up);
    cr_assert_eq(t, of_daemon); /* whose turn it was */
    t = TAILQ_NEXT(t, entry);
    for (unsigned i = 1; i < 4; i++) {
        cr_assert_eq(t, &tasks[i]);
        t = TAILQ_NEXT(t, entry);
    }
    cr_assert_eq(t, last);
    cr_assert_null(TAILQ_NEXT(t, entry));
    cr_assert_eq(task_queue_next(&q), owed);
    cr_assert_null(task_queue_next(&q));
    add(1); /* the queue is as good as before */
    cr_assert_eq(task_queue_next(&q), &tasks[7]);
    end(1);
    end(1);
    end(1);
    task_queue_give_up(&q, &given_up);
    cr_assert(TAILQ_EMPTY(&given_up));
}

Test(task_queue, what_waits_can_be_taken_back_and_nothing_else)
{
    add_many(1, 6);
    struct task *other = add(2), *owed = add(1), never = {.uid = 1};
    owed->is_owed = true;
    cr_assert_str_eq(begun(), "1211");
    cr_assert(!task_queue_recall(&q, &tasks[0])); /* it runs */
    cr_assert(!task_queue_recall(&q, other));
    cr_assert(!task_queue_recall(&q, owed));
    cr_assert(!task_queue_recall(&q, &never));
    cr_assert(task_queue_recall(&q, &tasks[4]));  /* out of the middle */
    cr_assert(!task_queue_recall(&q, &tasks[4])); /* once */
    cr_assert(task_queue_recall(&q, &tasks[3]));
    end(1);
    cr_assert_eq(task_queue_next(&q), &tasks[5]);
    cr_assert_null(task_queue_next(&q));
    end(1);
    cr_assert_eq(task_queue_next(&q), owed);
    for (unsigned i = 0; i < 3; i++) {
        end(1);
    }
    end(2);
}

Test(task_queue, whoever_waits_for_nothing_any_more_leaves_its_threads_to_others)
{
    add_many(1, 4);
    add_many(2, 3);
    cr_assert_str_eq(begun(), "1212");
    cr_assert(task_queue_recall(&q, &tasks[6]));
    end(2);
    cr_assert_str_eq(begun(), "1");
    end(2);
    cr_assert_str_eq(begun(), ""); /* one thread stays free */
    end(1);
    cr_assert_str_eq(begun(), "1");
    end(1);
    end(1);
    end(1);
}
