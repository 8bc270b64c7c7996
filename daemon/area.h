/* daemon/area.h - the data area of a connection's rings, as those see it who put tensors there.
 *
 * Its first part is the client's, to write what its requests name; the second is the daemon's,
 * which gives out places in it: to the engine, for rows that then lie where the client reads them
 * and are copied by nobody on the way, and to the loop. The client gives a place back when it has
 * read it.
 *
 * The memory stays until the last reference goes, those of requests among them: what the engine
 * writes has a place however the connection fares. References and retiring are the loop's; places
 * are given out to any thread. */
#ifndef DAEMON_AREA_H
#define DAEMON_AREA_H

#include "ipc/extents.h"

#include <pthread.h>
#include <stdbool.h>

/* Less costs more to name by handle, and to give back, than to send. */
#define AREA_BYTES_MIN 4096u

struct area {
    uint8_t *data;     /* shared with the client, who may write anywhere at any time */
    uint64_t in_bytes; /* of the client's part, which comes first */
    uint32_t n_refs;
    void (*unused)(struct area *a); /* on the loop, when the last reference has gone */

    pthread_mutex_t lock; /* of what follows; held for moments */
    struct extents lent;
    bool retired; /* nothing is given out any more */
};

/* Begins with one reference. */
void area_init(struct area *a, uint8_t *data, uint64_t in_bytes, uint64_t out_bytes,
               void (*unused)(struct area *a));
void area_finish(struct area *a); /* by unused(), or whoever it tells */

struct area *area_ref(struct area *a); /* NULL is legal in both */
void area_unref(struct area *a);

/* Its rings are being closed: what was given out is not named to the client any more. */
void area_retire(struct area *a);
bool area_is_retired(struct area *a);

/* Room for so many bytes: *ret is where, *ret_offset what a handle calls it. -ENOSPC: none now, or
 * too little to be worth it, or retired, or a is NULL. */
int area_take(struct area *a, uint64_t bytes, uint64_t *ret_offset, void **ret);
/* An offset that was not given out is ignored: it comes from the client. */
void area_give(struct area *a, uint64_t offset);

#endif
