/* Any bytes as a ring that a hostile producer has filled, under indices that jump: what is taken
 * lies inside of the ring and of the message's bound, and the work is bounded. The same bytes as
 * consumer's indices, against the producing end.
 *
 * Input: pairs of 4 bytes, an index and how often to look under it; then the ring's bytes. */
#include "ipc/ring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#define SIZE    RING_BYTES_MIN
#define JUMPS   8u
#define MESSAGE (1u << 17)

static _Atomic uint32_t tail, head;
static uint8_t record[RING_RECORD_MAX];

/* What pieces add up to must be what they announced. */
static void take_all(struct ring_in *in)
{
    size_t n, total = 0;
    bool last;
    unsigned rounds = 0;
    int rc;
    while ((rc = ring_in_take(in, MESSAGE, record, &n, &last)) == 1) {
        total += n;
        if (n == 0 || n > RING_RECORD_MAX || total > MESSAGE || ++rounds > SIZE / 16) {
            abort();
        }
        if (last != (in->left == 0) || in->head - in->published > SIZE) {
            abort();
        }
        total = last ? 0 : total;
    }
    if (rc != 0 && rc != -EPROTO) {
        abort();
    }
    ring_in_publish(in);
}

static void put_some(struct ring_out *out, const uint8_t *data, size_t bytes)
{
    size_t done = 0;
    if (bytes == 0) {
        return;
    }
    int rc = ring_out_put(out, data, bytes, &done);
    if (done > bytes || (rc == 1) != (done == bytes) || out->tail - out->head > SIZE) {
        abort();
    }
    ring_out_publish(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    uint32_t jumps[JUMPS];
    if (bytes < sizeof(jumps)) {
        return 0;
    }
    memcpy(jumps, data, sizeof(jumps));
    data += sizeof(jumps);
    bytes -= sizeof(jumps);
    uint8_t *ring = calloc(1, SIZE); /* of its own, for ASan to guard both ends */
    if (ring == NULL) {
        return 0;
    }
    struct ring_in in;
    struct ring_out out;
    memcpy(ring, data, bytes < SIZE ? bytes : SIZE);
    ring_in_init(&in, &tail, &head, ring, SIZE);
    in.head = in.tail = in.published = jumps[0] & ~7u;
    for (unsigned i = 1; i < JUMPS; i++) {
        /* Most of them plausible, or nothing would ever be taken. */
        tail = jumps[i] % 4 == 0 ? jumps[i] : in.head + jumps[i] % (SIZE + 8) / 8 * 8;
        take_all(&in);
    }
    ring_out_init(&out, &tail, &head, ring, SIZE);
    out.head = out.tail = out.published = jumps[0] & ~7u;
    for (unsigned i = 1; i < JUMPS; i++) {
        head = jumps[i] % 4 == 0 ? jumps[i] : out.head + jumps[i] % (SIZE + 8) / 8 * 8;
        put_some(&out, data, bytes % (jumps[i] % SIZE + 1));
    }
    free(ring);
    return 0;
}
