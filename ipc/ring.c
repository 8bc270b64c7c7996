#include "ipc/ring.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint32_t padded(uint32_t bytes)
{
    return (bytes + RING_RECORD_ALIGN - 1) & ~(RING_RECORD_ALIGN - 1);
}

static bool is_size(uint32_t size)
{
    return size >= RING_BYTES_MIN && size <= RING_BYTES_MAX && (size & (size - 1)) == 0;
}

/* ---- producing --------------------------------------------------------------------------- */

void ring_out_init(struct ring_out *r, _Atomic uint32_t *tail, const _Atomic uint32_t *head,
                   uint8_t *bytes, uint32_t size)
{
    assert(is_size(size));
    *r = (struct ring_out){.tail_shared = tail, .head_shared = head, .bytes = bytes, .size = size};
}

/* Looks at how far the consumer is, which can only lie between where it was before and what was
 * published. -EPROTO. */
static int refresh_head(struct ring_out *r)
{
    /* Acquire: pairs with the release of ring_in_publish(). The consumer's reads of those places
     * are over, so they may be written again. */
    uint32_t head = atomic_load_explicit(r->head_shared, memory_order_acquire);
    if (head - r->head > r->published - r->head || head % RING_RECORD_ALIGN != 0) {
        return -EPROTO;
    }
    r->head = head;
    return 0;
}

static void copy_in(struct ring_out *r, uint32_t at, const void *data, uint32_t bytes)
{
    uint32_t place = at & (r->size - 1);
    uint32_t first = bytes < r->size - place ? bytes : r->size - place;
    memcpy(r->bytes + place, data, first);
    memcpy(r->bytes, (const uint8_t *)data + first, bytes - first);
}

/* Payload that one record may have now; 0: too little to be worth a record. A message that is not
 * going to fit at once waits for an eighth of the ring, lest it be cut into crumbs. */
static uint32_t payload_room(const struct ring_out *r, size_t wanted)
{
    uint32_t room = r->size - (r->tail - r->head);
    if (room <= sizeof(struct ring_record)) {
        return 0;
    }
    room -= sizeof(struct ring_record);
    uint32_t most = room < RING_RECORD_MAX ? room : RING_RECORD_MAX;
    if (wanted <= most) {
        return (uint32_t)wanted;
    }
    return most >= r->size / 8 ? most : 0;
}

int ring_out_put(struct ring_out *r, const uint8_t *message, size_t bytes, size_t *done)
{
    bool looked = false;
    assert(bytes <= UINT32_MAX);
    while (*done < bytes) {
        size_t wanted = bytes - *done;
        uint32_t n = payload_room(r, wanted);
        if (n == 0 || (n < wanted && n < RING_RECORD_MAX && !looked)) {
            int rc = refresh_head(r);
            if (rc < 0) {
                return rc;
            }
            looked = true;
            n = payload_room(r, wanted);
        }
        if (n == 0) {
            return 0;
        }
        const struct ring_record record = {.bytes = n, .left = (uint32_t)(wanted - n)};
        copy_in(r, r->tail, &record, sizeof(record));
        copy_in(r, r->tail + (uint32_t)sizeof(record), message + *done, n);
        r->tail += (uint32_t)sizeof(record) + padded(n);
        *done += n;
    }
    return 1;
}

bool ring_out_publish(struct ring_out *r)
{
    if (r->published == r->tail) {
        return false;
    }
    r->published = r->tail;
    /* Release: pairs with the acquire of ring_in_take() and ring_in_has_some(). Sequentially
     * consistent for ring_take_wait(), which follows. */
    atomic_store_explicit(r->tail_shared, r->tail, memory_order_seq_cst);
    return true;
}

bool ring_out_has_moved(const struct ring_out *r)
{
    return atomic_load_explicit(r->head_shared, memory_order_seq_cst) != r->head;
}

bool ring_out_is_drained(const struct ring_out *r)
{
    return atomic_load_explicit(r->head_shared, memory_order_seq_cst) == r->tail;
}

/* ---- consuming --------------------------------------------------------------------------- */

void ring_in_init(struct ring_in *r, const _Atomic uint32_t *tail, _Atomic uint32_t *head,
                  const uint8_t *bytes, uint32_t size)
{
    assert(is_size(size));
    *r = (struct ring_in){.tail_shared = tail, .head_shared = head, .bytes = bytes, .size = size};
}

bool ring_in_has_some(const struct ring_in *r)
{
    return r->tail != r->head ||
           atomic_load_explicit(r->tail_shared, memory_order_seq_cst) != r->head;
}

/* What the producer says can only lie between what it said before and a full ring. */
static int refresh_tail(struct ring_in *r)
{
    /* Acquire: pairs with the release of ring_out_publish(). What lies before it was written. */
    uint32_t tail = atomic_load_explicit(r->tail_shared, memory_order_acquire);
    if (tail - r->head > r->size || tail % RING_RECORD_ALIGN != 0) {
        return -EPROTO;
    }
    r->tail = tail;
    return 0;
}

static void copy_out(const struct ring_in *r, uint32_t at, void *to, uint32_t bytes)
{
    uint32_t place = at & (r->size - 1);
    uint32_t first = bytes < r->size - place ? bytes : r->size - place;
    memcpy(to, r->bytes + place, first);
    memcpy((uint8_t *)to + first, r->bytes, bytes - first);
}

/* The copy of a descriptor; it is never read again from what is shared. */
static bool is_sound(const struct ring_in *r, const struct ring_record *record,
                     uint32_t message_bytes_max)
{
    uint32_t there = r->tail - r->head;
    if (record->bytes == 0 || record->bytes > RING_RECORD_MAX ||
        record->left > message_bytes_max - record->bytes ||
        sizeof(*record) + padded(record->bytes) > there) {
        return false;
    }
    return r->left == 0 || (uint64_t)record->bytes + record->left == r->left;
}

int ring_in_take(struct ring_in *r, uint32_t message_bytes_max, uint8_t *to, size_t *ret_bytes,
                 bool *ret_last)
{
    assert(message_bytes_max >= RING_RECORD_MAX);
    struct ring_record record;
    if (r->tail == r->head) {
        int rc = refresh_tail(r);
        if (rc < 0 || r->tail == r->head) {
            return rc;
        }
    }
    copy_out(r, r->head, &record, sizeof(record));
    /* The copy counts from here on, also for the compiler. */
    atomic_signal_fence(memory_order_seq_cst);
    if (r->tail - r->head < sizeof(record) || !is_sound(r, &record, message_bytes_max)) {
        return -EPROTO;
    }
    copy_out(r, r->head + (uint32_t)sizeof(record), to, record.bytes);
    r->head += (uint32_t)sizeof(record) + padded(record.bytes);
    r->left = record.left;
    *ret_bytes = record.bytes;
    *ret_last = record.left == 0;
    return 1;
}

bool ring_in_publish(struct ring_in *r)
{
    if (r->published == r->head) {
        return false;
    }
    r->published = r->head;
    /* Release: pairs with the acquire of ring_out_put(). Sequentially consistent for
     * ring_take_wait(), which follows. */
    atomic_store_explicit(r->head_shared, r->head, memory_order_seq_cst);
    return true;
}

/* ---- sleeping and waking ----------------------------------------------------------------- */

void ring_wait_for(_Atomic uint32_t *wait, uint32_t what)
{
    atomic_store_explicit(wait, what, memory_order_seq_cst);
}

uint32_t ring_take_wait(_Atomic uint32_t *wait, uint32_t mask)
{
    if ((atomic_load_explicit(wait, memory_order_seq_cst) & mask) == 0) {
        return RING_WAIT_NOTHING;
    }
    return atomic_exchange_explicit(wait, RING_WAIT_NOTHING, memory_order_seq_cst);
}

int ring_bell_wait(_Atomic uint32_t *bell, uint32_t seen, uint64_t timeout_us)
{
    struct timespec t = {.tv_sec = (time_t)(timeout_us / 1000000u),
                         .tv_nsec = (long)(timeout_us % 1000000u) * 1000};
    /* Not FUTEX_PRIVATE: the bell is rung by another process. */
    long rc = syscall(SYS_futex, bell, FUTEX_WAIT, seen, &t, NULL, 0);
    return rc == 0 || errno == EAGAIN ? 0 : -errno;
}

void ring_bell_ring(_Atomic uint32_t *bell)
{
    atomic_fetch_add_explicit(bell, 1, memory_order_seq_cst);
    /* Nothing can be done about a failure, and the sleeper looks again by itself. */
    syscall(SYS_futex, bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
