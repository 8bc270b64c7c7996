/* ipc/ring.h - the two ends of a ring of records in shared memory (ipc/ring_layout.h).
 *
 * A ring has one producer and one consumer, in two processes that do not trust each other. Each end
 * keeps its own index and the geometry in private memory and never reads them back from what is
 * shared. The other end's index is loaded once per look and refused unless it can be true; from
 * then on the private copy counts. Whatever the peer does to the shared bytes, an end reads and
 * writes inside of the ring only, and does a bounded amount of work per call.
 *
 * After -EPROTO the peer is broken or hostile: the ring is of no more use. What was taken before
 * was whole.
 *
 * An end belongs to one thread at a time. Nothing here blocks but ring_bell_wait(). */
#ifndef IPC_RING_H
#define IPC_RING_H

#include "ipc/ring_layout.h"

#include <stdbool.h>

/* The producing end. */
struct ring_out {
    _Atomic uint32_t *tail_shared;       /* ours */
    const _Atomic uint32_t *head_shared; /* the consumer's */
    uint8_t *bytes;                      /* the ring, of size bytes */
    uint32_t size;
    uint32_t tail;      /* end of what was put */
    uint32_t published; /* end of what was shown */
    uint32_t head;      /* what the consumer was last seen to have taken */
};

/* The consuming end. */
struct ring_in {
    const _Atomic uint32_t *tail_shared; /* the producer's */
    _Atomic uint32_t *head_shared;       /* ours */
    const uint8_t *bytes;
    uint32_t size;
    uint32_t head;      /* end of what was taken */
    uint32_t published; /* end of what was given back */
    uint32_t tail;      /* what the producer was last seen to have published */
    uint32_t left;      /* bytes that the message whose pieces come still lacks */
};

/* size: a power of two from RING_BYTES_MIN to RING_BYTES_MAX. The shared indices are not read. */
void ring_out_init(struct ring_out *r, _Atomic uint32_t *tail, const _Atomic uint32_t *head,
                   uint8_t *bytes, uint32_t size);
void ring_in_init(struct ring_in *r, const _Atomic uint32_t *tail, _Atomic uint32_t *head,
                  const uint8_t *bytes, uint32_t size);

/* Puts what fits of a message, from byte *done on, and moves *done. The consumer sees it after
 * ring_out_publish(). Returns 1 when all of the message has been put, 0 when the ring is full,
 * -EPROTO. A message is not empty. */
int ring_out_put(struct ring_out *r, const uint8_t *message, size_t bytes, size_t *done);
/* Shows what was put. True when something was. */
bool ring_out_publish(struct ring_out *r);
/* Whether the consumer has taken something since the ring was found full: it is worth another try.
 * A consumer that talks nonsense counts as true, so that the next put finds out. */
bool ring_out_has_moved(const struct ring_out *r);
/* Whether the consumer has taken all that was put. */
bool ring_out_is_drained(const struct ring_out *r);

/* Whether there is a record to take, or nonsense to find out: one load. */
bool ring_in_has_some(const struct ring_in *r);
/* Takes one record into to, which has RING_RECORD_MAX bytes of room. Returns 1 and sets *ret_bytes
 * and *ret_last (the message ends with this record), 0 when there is none, -EPROTO. The producer
 * may use its place again after ring_in_publish(). message_bytes_max bounds what pieces may add up
 * to. */
int ring_in_take(struct ring_in *r, uint32_t message_bytes_max, uint8_t *to, size_t *ret_bytes,
                 bool *ret_last);
/* Gives the places of what was taken back. True when something was. */
bool ring_in_publish(struct ring_in *r);

/* ---- sleeping and waking ---------------------------------------------------------------------
 * A sleeper first tells what it waits for, then looks again, and sleeps only if there is still
 * nothing; the other end first publishes, then takes the sleeper's wish. Each of the four is
 * sequentially consistent, so at least one of the two sees the other's. */

/* Tells what this side waits for; RING_WAIT_NOTHING takes it back. Look again afterwards. */
void ring_wait_for(_Atomic uint32_t *wait, uint32_t what);
/* After publishing: what the other side waits for of those in mask, or RING_WAIT_NOTHING. It is
 * then taken: the caller wakes the sleeper, once. */
uint32_t ring_take_wait(_Atomic uint32_t *wait, uint32_t mask);

/* The client's futex. Sleeps until the bell has rung since it showed seen, for at most
 * timeout_us microseconds. 0: look again (also when woken for nothing), -ETIMEDOUT, -EINTR. */
int ring_bell_wait(_Atomic uint32_t *bell, uint32_t seen, uint64_t timeout_us);
void ring_bell_ring(_Atomic uint32_t *bell);

/* One pause of a loop that looks at shared memory again and again. */
static inline void ring_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
