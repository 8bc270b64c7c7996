/* daemon/task_queue.h - which task the pool gets next.
 *
 * The pool has few threads and takes what it is given in that order, so it is given no more than it
 * can begin at once. What waits, waits here: users take turns, first come first served among the
 * tasks of one. While others wait a user has two threads at most; alone it has all but one, which
 * whoever comes next finds free. Of tasks that ask a disk, which may never answer, half of the
 * threads run at most, whoever they are of. The daemon's own tasks are those of one more user. A
 * task that waits can be taken back: what nobody would hear of need not be done.
 *
 * Plain data; the loop thread's. */
#ifndef DAEMON_TASK_QUEUE_H
#define DAEMON_TASK_QUEUE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>

#define TASK_THREADS   4u          /* libuv's, unless the environment says otherwise */
#define TASK_OF_DAEMON ((uid_t)-1) /* no user's uid */

struct task_user;

/* Work for other threads. Owned by whoever submits it until done() is called, on the loop. */
struct task {
    void (*work)(struct task *t); /* on the task pool; NULL for posted tasks */
    void (*done)(struct task *t); /* on the loop thread */
    uid_t uid;                    /* whose turn it takes */
    bool asks_disk;               /* it may have to wait for one */
    bool is_owed; /* work gives something back and is done even when the daemon ends: else done() is
                   * called without it then, and must cope */
    struct task_user *waits_with; /* the queue's: in whose lines it waits; NULL: in none */
    uint64_t came;                /* the queue's: after how many others */
    TAILQ_ENTRY(task) entry;      /* in one of those lines, or among those that were posted */
};

TAILQ_HEAD(task_list, task);
TAILQ_HEAD(task_user_list, task_user);

struct task_queue {
    struct task_user_list users;  /* with tasks that wait or run; whose turn it is comes first */
    uint32_t n_running, n_asking; /* n_asking: of these, those that ask a disk */
    uint32_t n_waiting_users;
    uint64_t n_came;
};

void task_queue_init(struct task_queue *q);
/* -ENOMEM. */
int task_queue_add(struct task_queue *q, struct task *t);
/* The task that is to begin now, which counts as running; or NULL. */
struct task *task_queue_next(struct task_queue *q);
/* That task has ended, or was not begun after all. */
void task_queue_ended(struct task_queue *q, const struct task *t);
/* Takes out a task that waits. False, and nothing has happened: it runs, has ended, never came, or
 * is owed. */
bool task_queue_recall(struct task_queue *q, struct task *t);
/* Takes out all that wait, but for those that are owed. */
void task_queue_give_up(struct task_queue *q, struct task_list *ret);

#endif
