/* Memory that is given back to the system a millisecond for every 16 MiB, by the task pool instead
 * of the loop. */
#include "daemon/handlers_internal.h"

#include <stdlib.h>

#define FREE_INLINE_BYTES (2u << 20)

struct freeing {
    struct task task;
    void *memory;
};

static void free_work(struct task *t)
{
    struct freeing *f = (struct freeing *)((char *)t - offsetof(struct freeing, task));
    free(f->memory);
}

static void free_done(struct task *t)
{
    free((char *)t - offsetof(struct freeing, task));
}

void service_free(struct service *s, void *memory, size_t bytes)
{
    struct freeing *f = bytes > FREE_INLINE_BYTES ? malloc(sizeof(*f)) : NULL;
    if (f) {
        f->task = (struct task){.work = free_work, .done = free_done};
        f->memory = memory;
        if (s->host.run(s->host.data, &f->task) == 0) {
            return;
        }
    }
    free(f);
    free(memory);
}
