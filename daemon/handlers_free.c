/* Memory that is given back to the system a millisecond for every 16 MiB, by the task pool instead
 * of the loop. What a quota counts goes in the turn of its user, who cannot have more of it than
 * that; the rest in the daemon's, or it would pile up behind tasks that its user makes last. */
#include "daemon/handlers_internal.h"

#include <stdlib.h>

#define FREE_INLINE_BYTES (2u << 20)

struct freeing {
    struct task task;
    struct ipc_message message; /* all zeros: none */
    void *memory;
    struct service *service;
    uid_t uid;
    uint64_t held_bytes;
};

static struct freeing *freeing_of(struct task *t)
{
    return (struct freeing *)((char *)t - offsetof(struct freeing, task));
}

static void give_back(struct service *s, uid_t uid, uint64_t held_bytes)
{
    struct quota_amounts held = {.of = {[QUOTA_INPUT_BYTES] = held_bytes}};
    quota_give_one(s->quotas, uid, &held, QUOTA_INPUT_BYTES);
}

static void free_work(struct task *t)
{
    struct freeing *f = freeing_of(t);
    ipc_message_finish(&f->message);
    free(f->memory);
}

static void free_done(struct task *t)
{
    struct freeing *f = freeing_of(t);
    give_back(f->service, f->uid, f->held_bytes);
    free(f);
}

void service_free(struct service *s, void *memory, size_t bytes)
{
    service_free_message(s, 0, NULL, memory, bytes, 0);
}

/* Only what is gone counts as given back: else memory could pile up in front of a busy pool. */
void service_free_message(struct service *s, uid_t uid, struct ipc_message *m, void *memory,
                          size_t bytes, uint64_t held_bytes)
{
    bool is_large = m || (memory && bytes > FREE_INLINE_BYTES);
    struct freeing *f = is_large ? malloc(sizeof(*f)) : NULL;
    if (f) {
        *f = (struct freeing){.task = {.work = free_work,
                                       .done = free_done,
                                       .uid = held_bytes > 0 ? uid : TASK_OF_DAEMON,
                                       .is_owed = true},
                              .message = m ? *m : (struct ipc_message){0},
                              .memory = memory,
                              .service = s,
                              .uid = uid,
                              .held_bytes = held_bytes};
        if (s->host.run(s->host.data, &f->task) == 0) {
            return;
        }
    }
    free(f);
    if (m) {
        ipc_message_finish(m);
    }
    free(memory);
    give_back(s, uid, held_bytes);
}
