/* The shared memory of a peer's rings, from the descriptors to the system's getting it back. */
#include "daemon/peer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Task pool. The client may keep the memfds for ever; their memory it may not. */
static void give_back(struct task *t)
{
    struct peer_area *m = (struct peer_area *)((char *)t - offsetof(struct peer_area, release));
    ring_map_discard(&m->map);
    ring_map_finish(&m->map);
}

static void on_given_back(struct task *t)
{
    struct peer_area *m = (struct peer_area *)((char *)t - offsetof(struct peer_area, release));
    quota_give(m->host->quotas, m->uid, &m->held);
    free(m);
}

/* The loop does not end before the work has. */
static void on_unused(struct area *a)
{
    struct peer_area *m = (struct peer_area *)((char *)a - offsetof(struct peer_area, area));
    area_finish(a);
    m->release =
        (struct task){.work = give_back, .done = on_given_back, .uid = m->uid, .is_owed = true};
    if (service_run(m->host->service, &m->release) < 0) {
        give_back(&m->release);
        on_given_back(&m->release);
    }
}

int peer_area_create(struct peer *p, const struct ring_sizes *sizes, struct peer_area **ret,
                     int ret_fds[2], struct ipc_error *e)
{
    struct quota_amounts held = {.of = {[QUOTA_RING_BYTES] = ring_sizes_total(sizes)}};
    int rc = quota_take(p->host->quotas, p->uid, &held, e);
    if (rc < 0) {
        return rc;
    }
    struct peer_area *m = calloc(1, sizeof(*m));
    rc = m ? ring_map_create(sizes, &m->map, ret_fds) : -ENOMEM;
    if (rc < 0) {
        ipc_error_set(e, rc == -ENOMEM ? PROTO_E_NO_MEMORY : PROTO_E_IO,
                      "rings of %llu bytes cannot be made: %s",
                      (unsigned long long)ring_sizes_total(sizes), strerror(-rc));
        quota_give(p->host->quotas, p->uid, &held);
        free(m);
        return rc;
    }
    m->host = p->host;
    m->uid = p->uid;
    m->held = held;
    area_init(&m->area, m->map.data, sizes->in_bytes, sizes->out_bytes, on_unused);
    *ret = m;
    return 0;
}
