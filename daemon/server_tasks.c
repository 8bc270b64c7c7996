/* Work that leaves the loop, and news that come to it. */
#include "daemon/server_internal.h"

#include <errno.h>
#include <stdlib.h>

struct pooled {
    uv_work_t request;
    struct task *task;
};

static void on_work(uv_work_t *request)
{
    struct pooled *p = request->data;
    p->task->work(p->task);
}

static void on_worked(uv_work_t *request, int status)
{
    struct pooled *p = request->data;
    struct task *t = p->task;
    free(p);
    t->done(t);
}

int tasks_run(void *data, struct task *t)
{
    struct server *s = data;
    struct pooled *p = malloc(sizeof(*p));
    if (!p) {
        return -ENOMEM;
    }
    p->task = t;
    p->request.data = p;
    int rc = uv_queue_work(&s->loop, &p->request, on_work, on_worked);
    if (rc < 0) {
        free(p);
    }
    return rc;
}

void tasks_post(void *data, struct task *t)
{
    struct server *s = data;
    t->next = NULL;
    pthread_mutex_lock(&s->posted_lock);
    *s->posted_last = t;
    s->posted_last = &t->next;
    pthread_mutex_unlock(&s->posted_lock);
    uv_async_send(&s->task_news);
}

void tasks_deliver(struct server *s)
{
    pthread_mutex_lock(&s->posted_lock);
    struct task *t = s->posted_first;
    s->posted_first = NULL;
    s->posted_last = &s->posted_first;
    pthread_mutex_unlock(&s->posted_lock);
    while (t) {
        struct task *next = t->next; /* done may free t */
        t->done(t);
        t = next;
    }
}
