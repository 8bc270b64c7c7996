#include "daemon/task_queue.h"

#include <errno.h>
#include <stdlib.h>

#define RUNNING_MAX_ALONE  (TASK_THREADS - 1)
#define RUNNING_MAX_SHARED 2u

struct task_user {
    TAILQ_ENTRY(task_user) entry;
    uid_t uid;
    uint32_t n_running;
    struct task *first, **last; /* that wait */
};

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
    if (!u->first && u->n_running == 0) {
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
        u->last = &u->first;
        TAILQ_INSERT_TAIL(&q->users, u, entry);
    }
    q->n_waiting_users += !u->first;
    t->next = NULL;
    *u->last = t;
    u->last = &t->next;
    return 0;
}

struct task *task_queue_next(struct task_queue *q)
{
    uint32_t most = q->n_waiting_users > 1 ? RUNNING_MAX_SHARED : RUNNING_MAX_ALONE;
    struct task_user *u;
    TAILQ_FOREACH(u, &q->users, entry)
    {
        if (u->first && u->n_running < most) {
            break;
        }
    }
    if (!u || q->n_running == TASK_THREADS) {
        return NULL;
    }
    struct task *t = u->first;
    u->first = t->next;
    if (!u->first) {
        u->last = &u->first;
        q->n_waiting_users--;
    }
    u->n_running++;
    q->n_running++;
    TAILQ_REMOVE(&q->users, u, entry);
    TAILQ_INSERT_TAIL(&q->users, u, entry);
    return t;
}

void task_queue_ended(struct task_queue *q, uid_t uid)
{
    struct task_user *u = find(q, uid);
    u->n_running--;
    q->n_running--;
    forget_idle(q, u);
}

/* Moves the user's tasks that are not owed to the end of a list; returns the list's new end. */
static struct task **give_up(struct task_user *u, struct task **end)
{
    struct task *t = u->first;
    u->last = &u->first;
    while (t) {
        struct task ***to = t->is_owed ? &u->last : &end;
        **to = t;
        *to = &t->next;
        t = t->next;
    }
    *u->last = NULL;
    *end = NULL;
    return end;
}

struct task *task_queue_give_up(struct task_queue *q)
{
    struct task *given_up = NULL, **end = &given_up;
    struct task_user *next;
    for (struct task_user *u = TAILQ_FIRST(&q->users); u; u = next) {
        next = TAILQ_NEXT(u, entry);
        q->n_waiting_users -= u->first != NULL;
        end = give_up(u, end);
        q->n_waiting_users += u->first != NULL;
        forget_idle(q, u);
    }
    return given_up;
}
