/* ipc/extents.h - who has which bytes of a region: the allocator of a data area's part.
 *
 * All of it lies in the owner's private memory: the other side sees places, never this. First fit,
 * so that a region of which little is in use stays in the caches.
 *
 * One thread at a time. */
#ifndef IPC_EXTENTS_H
#define IPC_EXTENTS_H

#include <stddef.h>
#include <stdint.h>

#define EXTENTS_MAX   256u
#define EXTENTS_ALIGN 64u /* of places and sizes: a cache line, and any vector */

struct extents {
    uint64_t first, bytes; /* the region */
    uint64_t used;
    uint32_t count;
    struct {
        uint64_t offset, bytes;
    } live[EXTENTS_MAX]; /* ascending */
};

/* first: a multiple of EXTENTS_ALIGN. */
void extents_init(struct extents *e, uint64_t first, uint64_t bytes);
/* 0 and *ret_offset, or -ENOSPC: no room, or too many places, until something is given back. */
int extents_take(struct extents *e, uint64_t bytes, uint64_t *ret_offset);
/* -ENOENT: nothing was taken there. */
int extents_give(struct extents *e, uint64_t offset);

#endif
