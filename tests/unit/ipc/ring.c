/* Rings of records: whole messages through wraps and full rings, and every way in which the other
 * end can lie. */
#include "ipc/ring.h"
#include "tests/unit/must.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SIZE        RING_BYTES_MIN
#define MESSAGE_MAX (1u << 20)

/* Both ends on plain memory, with guards around the ring. */
static struct {
    _Atomic uint32_t tail, head;
    uint8_t before[64], bytes[SIZE], after[64];
    struct ring_out out;
    struct ring_in in;
    uint8_t record[RING_RECORD_MAX];
} r;

static void setup_at(uint32_t index)
{
    memset(&r, 0, sizeof(r));
    memset(r.before, 0xa5, sizeof(r.before));
    memset(r.after, 0xa5, sizeof(r.after));
    ring_out_init(&r.out, &r.tail, &r.head, r.bytes, SIZE);
    ring_in_init(&r.in, &r.tail, &r.head, r.bytes, SIZE);
    /* As if so much had passed through already. */
    r.out.tail = r.out.published = r.out.head = index;
    r.in.tail = r.in.published = r.in.head = index;
    atomic_store(&r.tail, index);
    atomic_store(&r.head, index);
}

static void setup(void)
{
    setup_at(0);
}

static void teardown(void)
{
    for (size_t i = 0; i < sizeof(r.before); i++) {
        must(r.before[i] == 0xa5 && r.after[i] == 0xa5); /* else: written outside of the ring */
    }
}

TestSuite(ring, .init = setup, .fini = teardown);

static void fill(uint8_t *message, size_t bytes, uint32_t seed)
{
    for (size_t i = 0; i < bytes; i++) {
        message[i] = (uint8_t)(seed * 31u + i * 7u + (i >> 8));
    }
}

/* Takes all pieces that are there of a message into to; true when it is whole. */
static bool take_message(uint8_t *to, size_t *at)
{
    size_t bytes;
    bool last = false;
    int rc = 0;
    while (!last && (rc = ring_in_take(&r.in, MESSAGE_MAX, r.record, &bytes, &last)) == 1) {
        memcpy(to + *at, r.record, bytes);
        *at += bytes;
    }
    cr_assert_geq(rc, 0);
    ring_in_publish(&r.in);
    return last;
}

static void pass(size_t bytes, uint32_t seed)
{
    uint8_t *message = malloc(bytes), *got = malloc(bytes);
    size_t done = 0, at = 0;
    bool whole = false;
    fill(message, bytes, seed);
    while (!whole) {
        int rc = ring_out_put(&r.out, message, bytes, &done);
        cr_assert_geq(rc, 0);
        ring_out_publish(&r.out);
        whole = take_message(got, &at);
    }
    cr_assert_eq(done, bytes);
    cr_assert_eq(at, bytes);
    cr_assert_eq(memcmp(message, got, bytes), 0);
    free(message);
    free(got);
}

Test(ring, messages_of_every_length_pass_whole_at_every_place)
{
    for (size_t bytes = 1; bytes < 300; bytes++) {
        pass(bytes, (uint32_t)bytes);
    }
    for (uint32_t place = 0; place < SIZE; place += RING_RECORD_ALIGN) {
        setup_at(place);
        pass(1 + place % 777, place);
    }
}

Test(ring, indices_wrap_at_two_to_the_32)
{
    setup_at(UINT32_MAX - 2048 + 1);
    for (uint32_t i = 0; i < 100; i++) {
        pass(1 + i * 13, i);
    }
    cr_assert_lt(atomic_load(&r.tail), 1u << 20);
}

Test(ring, a_message_longer_than_the_ring_goes_in_pieces)
{
    pass(SIZE - 8, 1);
    pass(SIZE, 2);
    pass(SIZE * 5 + 3, 3);
    pass(MESSAGE_MAX, 4);
}

Test(ring, nothing_is_seen_before_it_is_published)
{
    const uint8_t message[] = {1, 2, 3};
    size_t bytes, done = 0;
    bool last;
    cr_assert_eq(ring_out_put(&r.out, message, sizeof(message), &done), 1);
    cr_assert_not(ring_in_has_some(&r.in));
    cr_assert_eq(ring_in_take(&r.in, MESSAGE_MAX, r.record, &bytes, &last), 0);
    cr_assert(ring_out_publish(&r.out));
    cr_assert_not(ring_out_publish(&r.out));
    cr_assert(ring_in_has_some(&r.in));
    cr_assert_eq(ring_in_take(&r.in, MESSAGE_MAX, r.record, &bytes, &last), 1);
    cr_assert_eq(bytes, 3);
    cr_assert(last);
    cr_assert(ring_in_publish(&r.in));
    cr_assert_not(ring_in_publish(&r.in));
}

Test(ring, a_full_ring_takes_no_more_until_the_consumer_has_published)
{
    uint8_t message[100];
    size_t bytes;
    bool last;
    unsigned n = 0;
    fill(message, sizeof(message), 5);
    for (size_t done = 0; ring_out_put(&r.out, message, sizeof(message), &done) == 1; done = 0) {
        n++;
    }
    cr_assert_eq(n, SIZE / 112);
    ring_out_publish(&r.out);
    cr_assert_not(ring_out_has_moved(&r.out));
    cr_assert_not(ring_out_is_drained(&r.out));
    cr_assert_eq(ring_in_take(&r.in, MESSAGE_MAX, r.record, &bytes, &last), 1);
    size_t done = 0;
    cr_assert_eq(ring_out_put(&r.out, message, sizeof(message), &done), 0, "not given back yet");
    ring_in_publish(&r.in);
    cr_assert(ring_out_has_moved(&r.out));
    cr_assert_eq(ring_out_put(&r.out, message, sizeof(message), &done), 1);
}

/* ---- a consumer that lies ---------------------------------------------------------------- */

Test(ring, a_head_that_cannot_be_is_refused)
{
    uint8_t message[SIZE - 8];
    fill(message, sizeof(message), 1);
    for (uint32_t delta = 1; delta != 0; delta = delta << 1) {
        setup();
        size_t done = 0;
        cr_assert_eq(ring_out_put(&r.out, message, sizeof(message), &done), 1);
        ring_out_publish(&r.out);
        /* Beyond what was published, or behind what was taken before, or no record's end. */
        atomic_store(&r.head, r.out.published + delta);
        done = 0;
        cr_expect_eq(ring_out_put(&r.out, message, sizeof(message), &done), -EPROTO, "+%u", delta);
        atomic_store(&r.head, 0u - delta);
        cr_expect_eq(ring_out_put(&r.out, message, sizeof(message), &done), -EPROTO, "-%u", delta);
    }
    setup();
    size_t done = 0;
    cr_assert_eq(ring_out_put(&r.out, message, sizeof(message), &done), 1);
    ring_out_publish(&r.out);
    atomic_store(&r.head, 4);
    done = 0;
    cr_expect_eq(ring_out_put(&r.out, message, sizeof(message), &done), -EPROTO, "not aligned");
}

Test(ring, what_is_not_published_cannot_have_been_taken)
{
    uint8_t message[SIZE];
    size_t done = 0;
    fill(message, sizeof(message), 1);
    cr_assert_eq(ring_out_put(&r.out, message, sizeof(message) - 8, &done), 1);
    atomic_store(&r.head, r.out.tail);
    done = 0;
    cr_expect_eq(ring_out_put(&r.out, message, sizeof(message), &done), -EPROTO);
}

/* ---- a producer that lies ---------------------------------------------------------------- */

static int take(void)
{
    size_t bytes;
    bool last;
    return ring_in_take(&r.in, MESSAGE_MAX, r.record, &bytes, &last);
}

Test(ring, a_tail_that_cannot_be_is_refused)
{
    static const uint32_t tails[] = {SIZE + 8, SIZE + 1,  2 * SIZE,  1,          4,
                                     12,       7,         0u - 8,    UINT32_MAX, 1u << 31,
                                     SIZE - 4, 0u - SIZE, SIZE << 8, 0x80000008u};
    for (size_t i = 0; i < sizeof(tails) / sizeof(tails[0]); i++) {
        setup();
        atomic_store(&r.tail, tails[i]);
        cr_expect(ring_in_has_some(&r.in), "nonsense is to be found out: %u", tails[i]);
        cr_expect_eq(take(), -EPROTO, "tail %u", tails[i]);
    }
}

static int take_record(uint32_t bytes, uint32_t left, uint32_t published)
{
    const struct ring_record record = {bytes, left};
    setup();
    memcpy(r.bytes, &record, sizeof(record));
    atomic_store(&r.tail, published);
    return take();
}

Test(ring, a_descriptor_that_cannot_be_is_refused)
{
    cr_expect_eq(take_record(8, 0, 16), 1);
    cr_expect_eq(take_record(0, 0, 16), -EPROTO, "an empty record");
    cr_expect_eq(take_record(0, 8, 16), -EPROTO);
    cr_expect_eq(take_record(9, 0, 16), -EPROTO, "longer than what is there");
    cr_expect_eq(take_record(8, 0, 8), -EPROTO, "nothing but the descriptor");
    cr_expect_eq(take_record(SIZE - 8, 0, SIZE), 1);
    cr_expect_eq(take_record(SIZE - 7, 0, SIZE), -EPROTO);
    cr_expect_eq(take_record(SIZE, 0, SIZE), -EPROTO);
    cr_expect_eq(take_record(RING_RECORD_MAX + 1, 0, SIZE), -EPROTO);
    cr_expect_eq(take_record(UINT32_MAX, 0, SIZE), -EPROTO);
    cr_expect_eq(take_record(UINT32_MAX - 7, 0, SIZE), -EPROTO, "padding must not wrap it");
    cr_expect_eq(take_record(8, MESSAGE_MAX - 8, 16), 1);
    cr_expect_eq(take_record(8, MESSAGE_MAX - 7, 16), -EPROTO, "a message over the limit");
    cr_expect_eq(take_record(8, UINT32_MAX, 16), -EPROTO);
}

Test(ring, pieces_must_be_those_of_one_message)
{
    const struct ring_record first = {8, 16};
    const struct ring_record second[] = {{8, 8}, {16, 0}, {8, 0}, {8, 16}, {16, 8}, {8, 4}};
    for (size_t i = 0; i < sizeof(second) / sizeof(second[0]); i++) {
        setup();
        memcpy(r.bytes, &first, sizeof(first));
        memcpy(r.bytes + 16, &second[i], sizeof(second[i]));
        atomic_store(&r.tail, 64);
        cr_assert_eq(take(), 1);
        cr_expect_eq(take(), i < 2 ? 1 : -EPROTO, "case %zu", i);
    }
}

/* The peer changes a record after it was taken, and between two looks. */
Test(ring, what_was_taken_does_not_change)
{
    uint8_t message[64];
    size_t bytes, done = 0;
    bool last;
    fill(message, sizeof(message), 9);
    ring_out_put(&r.out, message, sizeof(message), &done);
    ring_out_publish(&r.out);
    cr_assert_eq(ring_in_take(&r.in, MESSAGE_MAX, r.record, &bytes, &last), 1);
    memset(r.bytes, 0xff, SIZE);
    cr_assert_eq(memcmp(r.record, message, sizeof(message)), 0);
    atomic_store(&r.tail, 8); /* behind what was taken */
    cr_expect_eq(take(), -EPROTO);
}

/* Any bytes under any indices: no crash, no endless loop, nothing written outside. */
Test(ring, any_bytes_at_all)
{
    uint64_t x = 88172645463325252u;
    for (unsigned round = 0; round < 20000; round++) {
        setup();
        for (size_t i = 0; i < SIZE / 8; i++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            uint64_t word = round % 4 == 0 ? x : x & 0x1f0000001full;
            memcpy(r.bytes + i * 8, &word, sizeof(word));
        }
        atomic_store(&r.tail, round % 3 == 0 ? (uint32_t)x : (uint32_t)x % (SIZE + 16) & ~7u);
        unsigned n = 0;
        int rc;
        while ((rc = take()) == 1) {
            n++;
        }
        cr_assert(rc == 0 || rc == -EPROTO);
        cr_assert_leq(n, SIZE / 16);
        teardown();
    }
}

/* ---- waking ------------------------------------------------------------------------------ */

Test(ring, a_wish_is_taken_once_and_only_by_who_can_grant_it)
{
    _Atomic uint32_t wait = 0;
    cr_expect_eq(ring_take_wait(&wait, UINT32_MAX), RING_WAIT_NOTHING);
    ring_wait_for(&wait, RING_WAIT_FUTEX);
    cr_expect_eq(ring_take_wait(&wait, RING_WAIT_ROOM), RING_WAIT_NOTHING);
    cr_expect_eq(ring_take_wait(&wait, RING_WAIT_FUTEX | RING_WAIT_MESSAGE), RING_WAIT_FUTEX);
    cr_expect_eq(ring_take_wait(&wait, UINT32_MAX), RING_WAIT_NOTHING);
    ring_wait_for(&wait, RING_WAIT_MESSAGE | RING_WAIT_ROOM);
    ring_wait_for(&wait, RING_WAIT_NOTHING);
    cr_expect_eq(ring_take_wait(&wait, UINT32_MAX), RING_WAIT_NOTHING);
}

Test(ring, a_bell_that_has_rung_already_does_not_wait)
{
    _Atomic uint32_t bell = 7;
    ring_bell_ring(&bell);
    cr_expect_eq(atomic_load(&bell), 8);
    cr_expect_eq(ring_bell_wait(&bell, 7, 60000000), 0);
    cr_expect_eq(ring_bell_wait(&bell, 8, 1000), -ETIMEDOUT);
}
