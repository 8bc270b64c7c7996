#include "daemon/task_queue.h"

#include <errno.h>
#include <stdlib.h>

#define RUNNING_MAX_ALONE  (TASK_THREADS - 1)
#define RUNNING_MAX_SHARED 2u
#define ASKING_MAX         (TASK_THREADS / 2)

struct task_user {
    TAILQ_ENTRY(task_user) entry;
    uid_t uid;
    uint32_t n_running;
    struct task_list waiting[2]; /* those that do not ask a disk, and those that do */
};

static bool waits(const struct task_user *u)
{
    return !TAILQ_EMPTY(&u->waiting[false]) || !TAILQ_EMPTY(&u->waiting[true]);
}

void task_queue_init(struct task_queue *q)
{
    *q = (struct task_queue){0};
    TAILQ_INIT(&q->users);
}

static struct task_user *find(const struct task_queue *q, uid_t uid)
{
    struct task_user *u;
    TAILQ_FOREACH(u, &q->users, entry)
    {
        if (u->uid == uid) {
            return u;
        }
    }
    return NULL;
}

static void forget_idle(struct task_queue *q, struct task_user *u)
{
    if (!waits(u) && u->n_running == 0) {
        TAILQ_REMOVE(&q->users, u, entry);
        free(u);
    }
}

int task_queue_add(struct task_queue *q, struct task *t)
{
    struct task_user *u = find(q, t->uid);
    if (!u) {
        u = calloc(1, sizeof(*u));
        if (!u) {
            return -ENOMEM;
        }
        u->uid = t->uid;
        TAILQ_INIT(&u->waiting[false]);
        TAILQ_INIT(&u->waiting[true]);
        TAILQ_INSERT_TAIL(&q->users, u, entry);
    }
    q->n_waiting_users += !waits(u);
    TAILQ_INSERT_TAIL(&u->waiting[t->asks_disk], t, entry);
    t->waits_with = u;
    t->came = q->n_came++;
    return 0;
}

static void take_out(struct task_queue *q, struct task *t)
{
    struct task_user *u = t->waits_with;
    TAILQ_REMOVE(&u->waiting[t->asks_disk], t, entry);
    t->waits_with = NULL;
    q->n_waiting_users -= !waits(u);
}

/* The user's first task that may begin, or NULL. */
static struct task *first_of(const struct task_queue *q, const struct task_user *u)
{
    struct task *plain = TAILQ_FIRST(&u->waiting[false]), *asking = TAILQ_FIRST(&u->waiting[true]);
    if (!asking || q->n_asking == ASKING_MAX) {
        return plain;
    }
    return plain && plain->came < asking->came ? plain : asking;
}

struct task *task_queue_next(struct task_queue *q)
{
    uint32_t most = q->n_waiting_users > 1 ? RUNNING_MAX_SHARED : RUNNING_MAX_ALONE;
    struct task *t = NULL;
    struct task_user *u;
    if (q->n_running == TASK_THREADS) {
        return NULL;
    }
    TAILQ_FOREACH(u, &q->users, entry)
    {
        t = u->n_running < most ? first_of(q, u) : NULL;
        if (t) {
            break;
        }
    }
    if (!t) {
        return NULL;
    }
    take_out(q, t);
    u->n_running++;
    q->n_running++;
    q->n_asking += t->asks_disk;
    TAILQ_REMOVE(&q->users, u, entry);
    TAILQ_INSERT_TAIL(&q->users, u, entry);
    return t;
}

void task_queue_ended(struct task_queue *q, const struct task *t)
{
    struct task_user *u = find(q, t->uid);
    u->n_running--;
    q->n_running--;
    q->n_asking -= t->asks_disk;
    forget_idle(q, u);
}

bool task_queue_recall(struct task_queue *q, struct task *t)
{
    struct task_user *u = t->waits_with;
    if (!u || t->is_owed) {
        return false;
    }
    take_out(q, t);
    forget_idle(q, u);
    return true;
}

/* Moves those of a user's tasks that are not owed to the end of a list. */
static void give_up(struct task_queue *q, struct task_list *waiting, struct task_list *to)
{
    struct task *next;
    for (struct task *t = TAILQ_FIRST(waiting); t; t = next) {
        next = TAILQ_NEXT(t, entry);
        if (!t->is_owed) {
            take_out(q, t);
            TAILQ_INSERT_TAIL(to, t, entry);
        }
    }
}

void task_queue_give_up(struct task_queue *q, struct task_list *ret)
{
    struct task_user *next;
    TAILQ_INIT(ret);
    for (struct task_user *u = TAILQ_FIRST(&q->users); u; u = next) {
        next = TAILQ_NEXT(u, entry);
        give_up(q, &u->waiting[false], ret);
        give_up(q, &u->waiting[true], ret);
        forget_idle(q, u);
    }
}
