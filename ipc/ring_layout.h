/* ipc/ring_layout.h - how a connection's shared memory lies: what both processes must agree on.
 *
 * The daemon makes two memfds. The first holds a page of control and the two rings:
 *
 *   offset             what                                    written by
 *   0                  magic, version, ring_bytes              the daemon, once
 *   128                sub_tail, end of what was submitted     the client
 *   256                sub_head, end of what was taken         the daemon
 *   384                comp_tail, end of what was completed    the daemon
 *   512                comp_head, end of what was taken        the client
 *   640                daemon_wait, what the daemon waits for  set by it, taken by the client
 *   768                client_wait, what the client waits for  set by it, taken by the daemon
 *   896                client_bell, a futex, counts wake-ups   the daemon
 *   4096               submission ring, ring_bytes             the client
 *   4096 + ring_bytes  completion ring, ring_bytes             the daemon
 *
 * All of it in the byte order of the machine. Indices count bytes and run freely: they wrap at
 * 2^32, and an index modulo ring_bytes (a power of two) is a place in the ring. A ring is empty
 * when tail == head and full when tail - head == ring_bytes.
 *
 * What lies between head and tail is a sequence of records. Their payloads, one behind the other,
 * are the stream of messages that would travel on the socket:
 *
 *   +-------+-------+------------------+---------+
 *   | bytes | left  | bytes of payload | padding |   padded to a multiple of 8
 *   +-------+-------+------------------+---------+
 *     u32     u32
 *
 * left tells how many bytes of what was put at once (messages that gathered) are still to come in
 * records after this one; it is 0 in the last of them. A descriptor never wraps, since everything
 * is a multiple of 8; a payload may go on at the ring's beginning.
 *
 * The second memfd is the data area: in_bytes that the client gives out (what requests name by
 * handle), then out_bytes that the daemon gives out (tensors that answers name by handle). Offsets
 * in handles count from the area's beginning.
 *
 * Neither side believes the other: indices are loaded once and compared with private copies,
 * descriptors are copied before they are looked at. ipc/ring.h does both. */
#ifndef IPC_RING_LAYOUT_H
#define IPC_RING_LAYOUT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define RING_MAGIC   0x52415147u /* "GQAR" */
#define RING_VERSION 1u

#define RING_LINE_BYTES    128u /* two cache lines: the neighbour is prefetched with its pair */
#define RING_CONTROL_BYTES 4096u
#define RING_BYTES_MIN     4096u
#define RING_BYTES_MAX     (1u << 20)
#define RING_RECORD_ALIGN  8u
#define RING_RECORD_MAX    (64u << 10) /* bytes of one record's payload */

/* What a sleeper waits for. RING_WAIT_FUTEX and RING_WAIT_MESSAGE tell how it wants to be woken
 * when something is in its ring; RING_WAIT_ROOM: also when there is room in the other one. The
 * daemon is always woken by its doorbell and uses FUTEX for the first. */
#define RING_WAIT_NOTHING 0u
#define RING_WAIT_FUTEX   1u
#define RING_WAIT_MESSAGE 2u
#define RING_WAIT_ROOM    4u

struct ring_record {
    uint32_t bytes; /* of payload in this record; 1 to RING_RECORD_MAX */
    uint32_t left;  /* of the message, in later records */
};

struct ring_control {
    uint32_t magic, version, ring_bytes;
    _Alignas(RING_LINE_BYTES) _Atomic uint32_t sub_tail;
    _Alignas(RING_LINE_BYTES) _Atomic uint32_t sub_head;
    _Alignas(RING_LINE_BYTES) _Atomic uint32_t comp_tail;
    _Alignas(RING_LINE_BYTES) _Atomic uint32_t comp_head;
    _Alignas(RING_LINE_BYTES) _Atomic uint32_t daemon_wait;
    _Alignas(RING_LINE_BYTES) _Atomic uint32_t client_wait;
    _Alignas(RING_LINE_BYTES) _Atomic uint32_t client_bell;
};

_Static_assert(sizeof(struct ring_record) == 8 && RING_RECORD_ALIGN == 8, "descriptors never wrap");
_Static_assert(sizeof(_Atomic uint32_t) == 4 && ATOMIC_INT_LOCK_FREE == 2,
               "indices are plain words, without a lock beside them");
_Static_assert(offsetof(struct ring_control, sub_tail) == 128 &&
                   offsetof(struct ring_control, sub_head) == 256 &&
                   offsetof(struct ring_control, comp_tail) == 384 &&
                   offsetof(struct ring_control, comp_head) == 512 &&
                   offsetof(struct ring_control, daemon_wait) == 640 &&
                   offsetof(struct ring_control, client_wait) == 768 &&
                   offsetof(struct ring_control, client_bell) == 896,
               "docs/protocol.md tells these offsets to other languages");
_Static_assert(sizeof(struct ring_control) <= RING_CONTROL_BYTES, "control fits its page");

#endif
