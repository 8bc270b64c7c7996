/* ipc/ring_map.h - a connection's shared memory: made by the daemon, opened by the client.
 *
 * The daemon makes both memfds, gives them their size and seals it (SHRINK, GROW, SEAL), so that no
 * access inside of the mapping can ever fault. They are not sealed against future writes: that
 * would forbid the daemon itself to give the memory back (ring_map_discard) while a client keeps an
 * fd. */
#ifndef IPC_RING_MAP_H
#define IPC_RING_MAP_H

#include "ipc/ring.h"

struct ring_sizes {
    uint32_t ring_bytes; /* of each ring: a power of two from RING_BYTES_MIN to RING_BYTES_MAX */
    uint64_t in_bytes;   /* of the client's part of the data area: whole pages, at least one */
    uint64_t out_bytes;  /* of the daemon's part, likewise */
};

#define RING_AREA_PART_MAX (1ull << 30) /* bytes of either part */

struct ring_map {
    struct ring_sizes sizes;
    struct ring_control *control; /* then the rings */
    uint8_t *data;                /* the client's part, then the daemon's */
};

/* Whether these sizes can be had. */
bool ring_sizes_are_sound(const struct ring_sizes *sizes);
/* Bytes of both memfds together. */
uint64_t ring_sizes_total(const struct ring_sizes *sizes);

/* The daemon's side. ret_fds: the rings', the data area's; the caller's to close, which may be done
 * once they are sent. -EINVAL for unsound sizes, -errno. */
int ring_map_create(const struct ring_sizes *sizes, struct ring_map *ret, int ret_fds[2]);
/* The client's side, with the sizes that ring.open told. The fds stay the caller's. -EPROTO where
 * they are not what it told: size, seals, magic or version. -errno. */
int ring_map_open(const int fds[2], const struct ring_sizes *sizes, struct ring_map *ret);
/* Gives all pages back to the system, whoever else keeps the memfds. They read as zeros then. */
void ring_map_discard(struct ring_map *m);
void ring_map_finish(struct ring_map *m); /* unmaps; a zeroed map is legal */

/* The ends, for each side. */
void ring_map_daemon_ends(const struct ring_map *m, struct ring_in *ret_in,
                          struct ring_out *ret_out);
void ring_map_client_ends(const struct ring_map *m, struct ring_in *ret_in,
                          struct ring_out *ret_out);

#endif
