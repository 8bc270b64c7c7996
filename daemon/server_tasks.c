/* Work that leaves the loop, and news that come to it. */
#include "daemon/server_internal.h"

static void on_work(uv_work_t *request)
{
    struct task_thread *thread = request->data;
    thread->task->work(thread->task);
}

static void begin_tasks(struct server *s);

static void on_worked(uv_work_t *request, int status)
{
    struct task_thread *thread = request->data;
    struct server *s = thread->server;
    struct task *t = thread->task;
    thread->task = NULL;
    task_queue_ended(&s->tasks, t);
    begin_tasks(s); /* first: done may take its time */
    t->done(t);
}

/* No more run than there are threads of the pool, so that each begins at once. */
static void begin_tasks(struct server *s)
{
    struct task *t;
    while ((t = task_queue_next(&s->tasks)) != NULL) {
        struct task_thread *thread = s->task_threads;
        while (thread->task) {
            thread++;
        }
        *thread = (struct task_thread){.server = s, .task = t};
        thread->request.data = thread;
        uv_queue_work(&s->loop, &thread->request, on_work, on_worked); /* it cannot fail */
    }
}

int tasks_run(void *data, struct task *t)
{
    struct server *s = data;
    int rc = task_queue_add(&s->tasks, t);
    if (rc == 0) {
        begin_tasks(s);
    }
    return rc;
}

bool tasks_recall(void *data, struct task *t)
{
    struct server *s = data;
    bool waited = task_queue_recall(&s->tasks, t);
    if (waited) {
        begin_tasks(s); /* a user that waits for nothing leaves its threads to the others */
    }
    return waited;
}

/* Calls done() of each, which may free it. */
static void end_tasks(struct task_list *list)
{
    struct task *next;
    for (struct task *t = TAILQ_FIRST(list); t; t = next) {
        next = TAILQ_NEXT(t, entry);
        t->done(t);
    }
}

void tasks_give_up(struct server *s)
{
    struct task_list given_up;
    task_queue_give_up(&s->tasks, &given_up);
    end_tasks(&given_up);
}

static void on_last(uv_timer_t *timer)
{
    uv_stop(timer->loop);
}

bool tasks_end(struct server *s)
{
    uv_timer_init(&s->loop, &s->last);
    uv_timer_start(&s->last, on_last, SERVER_TASKS_MS, 0);
    uv_unref((uv_handle_t *)&s->last); /* the loop ends before it when the last task does */
    uv_run(&s->loop, UV_RUN_DEFAULT);
    uv_close((uv_handle_t *)&s->last, NULL);
    if (s->tasks.n_running > 0) {
        log_error("%u tasks have not ended within %u s (a disk that does not answer?): the daemon "
                  "ends without them",
                  s->tasks.n_running, SERVER_TASKS_MS / 1000);
        return false;
    }
    uv_run(&s->loop, UV_RUN_DEFAULT);
    return true;
}

void tasks_post(void *data, struct task *t)
{
    struct server *s = data;
    pthread_mutex_lock(&s->posted_lock);
    TAILQ_INSERT_TAIL(&s->posted, t, entry);
    pthread_mutex_unlock(&s->posted_lock);
    uv_async_send(&s->task_news);
}

void tasks_deliver(struct server *s)
{
    struct task_list posted = TAILQ_HEAD_INITIALIZER(posted);
    pthread_mutex_lock(&s->posted_lock);
    TAILQ_CONCAT(&posted, &s->posted, entry);
    pthread_mutex_unlock(&s->posted_lock);
    end_tasks(&posted);
}
