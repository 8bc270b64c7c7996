/* What a restart finds: the index goes into the tree, blocks are checked before they are believed.
 */
#include "daemon/backend/pool.h"
#include "daemon/kv/sequence.h"
#include "tests/unit/kv/spaces_rig.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

TestSuite(kv_restore, .init = setup, .fini = teardown, .timeout = 60);

/* ---- what was restored is checked ---------------------------------------------------------- */

#define RESTORED 8u

/* A space with a chain of blocks from its store, none of which was looked at, and a prompt that
 * wants them all. */
static void restore_chain(struct kv_sequence *s, int32_t *tokens)
{
    start(16u << 20, 1ull << 30);
    compute_chain(open_space("r", 1), 1, RESTORED);
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    cache->check_bytes_max = 2 * BLOCK_BYTES;
    kv_sequence_init(s, &layout, cache, open_space("r", 1), false);
    fill(tokens, RESTORED * BLOCK, 1);
}

static uint32_t count_verified(const struct kv_space *space)
{
    uint32_t n = 0, bucket = 0;
    for (struct kv_node *node = NULL; (node = kv_tree_next(&space->tree, &bucket, node)) != NULL;) {
        n += node->places[0].verified;
    }
    return n;
}

static void expect_restored(struct kv_sequence *s)
{
    cr_expect(eq(u32, s->n_tokens, RESTORED * BLOCK));
    for (uint32_t i = 0; i < RESTORED; i++) {
        cr_expect(eq(int, *(const unsigned char *)s->lists[0].pages[i], (int)(1 + i)));
    }
    struct kv_cache_stats stats;
    kv_cache_stats(cache, &stats);
    cr_expect(eq(u64, stats.n_corrupt, 0));
}

/* What others have the io thread do comes in between the pieces of a long check. */
Test(kv_restore, a_long_check_lets_others_in_between)
{
    int32_t tokens[RESTORED * BLOCK];
    const struct kv_text text = {tokens, RESTORED * BLOCK, RESTORED * BLOCK};
    struct kv_sequence s;
    struct gate before, between;
    restore_chain(&s, tokens);
    shut(&before);
    cr_assert(eq(int, kv_sequence_adopt(&s, &text, text.n_tokens, false), -EAGAIN));
    shut(&between);
    open_gate(&before);
    reach_gate(&between);
    kv_cache_poll(cache);
    cr_expect(kv_cache_is_busy(cache)); /* a piece is done, and the rest is to come */
    cr_expect(eq(int, kv_sequence_adopt(&s, &text, text.n_tokens, false), -EAGAIN));
    open_gate(&between);
    settle();
    cr_expect(eq(int, kv_sequence_adopt(&s, &text, text.n_tokens, false), 0));
    expect_restored(&s);
    kv_sequence_finish(&s);
    sem_destroy(&before.opened);
    sem_destroy(&between.opened);
}

static uint32_t n_woken;

static void count_wake(void *arg)
{
    n_woken++;
}

static void read_files(const struct kv_space *space)
{
    uint32_t bucket = 0;
    for (struct kv_node *node = NULL; (node = kv_tree_next(&space->tree, &bucket, node)) != NULL;) {
        const struct kv_store_block block = {.slot = node->places[0].slot,
                                             .checksum = node->places[0].checksum};
        cr_assert(eq(int, kv_store_verify(space->store, &block), 0));
    }
}

/* With nothing else to do the engine takes part, and comes back to what else there may be. */
Test(kv_restore, a_direct_check_is_bounded)
{
    int32_t tokens[RESTORED * BLOCK];
    const struct kv_text text = {tokens, RESTORED * BLOCK, RESTORED * BLOCK};
    struct kv_sequence s;
    restore_chain(&s, tokens);
    cr_assert(eq(int, pool_create(2, 0, &cache->options.pool), 0));
    cache->options.wake = count_wake;
    read_files(s.space); /* the system may have dropped them */
    cr_expect(eq(int, kv_sequence_adopt(&s, &text, text.n_tokens, true), -EAGAIN));
    cr_expect(eq(u32, count_verified(s.space), RESTORED / 2));
    cr_expect(eq(u32, n_woken, 1));
    uint64_t news = kv_cache_news(cache);
    kv_cache_poll(cache);
    cr_expect(lt(u64, news, kv_cache_news(cache)));
    cr_expect(not(kv_cache_is_busy(cache)));
    cr_expect(eq(int, kv_sequence_adopt(&s, &text, text.n_tokens, true), 0));
    expect_restored(&s);
    kv_sequence_finish(&s);
    pool_destroy(cache->options.pool);
}

/* Drops what the system keeps of the store's files. */
static int drop_file(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    int fd = type == FTW_F ? open(path, O_RDONLY) : -1;
    if (fd >= 0) {
        fsync(fd);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
    return 0;
}

/* What is not in memory the engine does not wait for. */
Test(kv_restore, a_disk_is_read_by_the_io_thread)
{
    int32_t tokens[RESTORED * BLOCK];
    const struct kv_text text = {tokens, RESTORED * BLOCK, RESTORED * BLOCK};
    struct kv_sequence s;
    struct gate gate;
    restore_chain(&s, tokens);
    kv_sequence_finish(&s);
    stop();
    nftw(folder, drop_file, 8, FTW_PHYS);
    start(16u << 20, 1ull << 30);
    kv_sequence_init(&s, &layout, cache, open_space("r", 1), false);
    const struct kv_node *first = s.space->tree.root->first_child;
    const struct kv_store_block block = {.slot = first->places[0].slot};
    if (kv_store_in_memory(s.space->store, &block)) {
        fprintf(stderr, "SKIPPED: files of %s stay in memory: reading them was NOT tested\n",
                folder);
    } else {
        cr_assert(eq(int, pool_create(2, 0, &cache->options.pool), 0));
        shut(&gate);
        cr_expect(eq(int, kv_sequence_adopt(&s, &text, text.n_tokens, true), -EAGAIN));
        cr_expect(eq(u32, count_verified(s.space), 0));
        cr_expect(not(kv_store_in_memory(s.space->store, &block)));
        open_gate(&gate);
        settle();
        cr_expect(eq(u32, count_verified(s.space), RESTORED));
        cr_expect(eq(int, kv_sequence_adopt(&s, &text, text.n_tokens, true), 0));
        expect_restored(&s);
        pool_destroy(cache->options.pool);
        cache->options.pool = NULL;
        sem_destroy(&gate.opened);
    }
    kv_sequence_finish(&s);
}

/* ---- what the index names ------------------------------------------------------------------ */

/* A long index goes into the tree in parts, and who asks for the space waits for the last. */
Test(kv_restore, an_index_is_added_in_parts)
{
    enum { PART = 3 };
    int32_t tokens[RESTORED * BLOCK];
    const struct kv_text text = {tokens, RESTORED * BLOCK, RESTORED * BLOCK};
    start(16u << 20, 1ull << 30);
    compute_chain(open_space("r", 1), 1, RESTORED);
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    cache->n_restored_max = PART;
    struct kv_space *space = begin_space("r", 1);
    while (kv_cache_is_busy(cache)) {
        uint32_t before = space->tree.n_nodes;
        kv_cache_poll(cache);
        cr_expect(le(u32, space->tree.n_nodes, before + PART));
        cr_expect(eq(int, kv_space_is_ready(space), space->tree.n_nodes == RESTORED));
        sched_yield();
    }
    fill(tokens, RESTORED * BLOCK, 1);
    cr_expect(eq(u32, kv_space_known_tokens(space, &text, false), RESTORED * BLOCK));
}

/* The first block of a chain was lost and computed again, so the index names it last. */
Test(kv_restore, a_parent_that_comes_late_gets_its_children)
{
    enum { N = 3 };
    int32_t tokens[N * BLOCK];
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    compute_chain(space, 1, N);
    settle();
    fill(tokens, N * BLOCK, 1);
    struct kv_node *first = space->tree.root->first_child;
    kv_space_forget(space, first, 0);
    compute(space, 1);
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    cache->n_restored_max = 2;
    space = open_space("r", 1);
    cr_assert(eq(u32, space->tree.n_nodes, N));
    uint32_t n = 0;
    for (const struct kv_node *node = space->tree.root; node->first_child != NULL; n++) {
        node = node->first_child;
        cr_expect(eq(u32, node->position, n));
    }
    cr_expect(eq(u32, n, N));
}

/* What the first part of an index names does not make room for others before the last is added,
 * since its leaves may be none; and a cache may end in between. */
Test(kv_restore, an_index_that_is_added_in_parts_may_be_cut_short)
{
    start(16u << 20, 1ull << 30);
    compute_chain(open_space("r", 1), 1, RESTORED);
    compute(open_space("r", 2), 2);
    settle();
    stop();
    for (int evicts = 0; evicts < 2; evicts++) {
        start(16u << 20, 1ull << 30);
        cache->n_restored_max = 3;
        struct kv_space *space = begin_space("r", 1);
        while (space->tree.n_nodes == 0) {
            kv_cache_poll(cache);
            sched_yield();
        }
        cr_assert(not(kv_space_is_ready(space)));
        if (evicts) {
            cr_expect(eq(u64, kv_cache_evict_store(cache, "r", 2 * BLOCK_BYTES), 0));
            settle();
            cr_expect(kv_space_is_ready(space));
            cr_expect(eq(u32, space->tree.n_nodes, RESTORED));
            cr_expect(lt(u64, 0, kv_cache_evict_store(cache, "r", 2 * BLOCK_BYTES)));
        }
        stop();
    }
}

/* What was pinned before counts against the realm's share, and can be let go. */
Test(kv_restore, pins_are_restored)
{
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    uint64_t room = kv_space_room_for_pins(space);
    compute_chain(space, 1, RESTORED);
    settle();
    for (struct kv_node *n = space->tree.root->first_child; n != NULL; n = n->first_child) {
        kv_space_pin(space, n, true);
        kv_space_note_flags(space, n);
    }
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    space = open_space("r", 1);
    cr_expect(eq(u64, space->n_pinned, RESTORED));
    cr_expect(eq(u64, kv_space_room_for_pins(space), room - RESTORED * BLOCK_BYTES));
    struct kv_node *leaf = space->tree.root;
    while (leaf->first_child != NULL) {
        leaf = leaf->first_child;
    }
    cr_expect(ne(u32, leaf->flags & KV_BLOCK_PINNED, 0));
    kv_space_pin(space, leaf, false);
    cr_expect(eq(u64, space->n_pinned, RESTORED - 1));
}

/* ---- a disk that takes long ---------------------------------------------------------------- */

/* Nobody waits for a store for ever: what is computed meanwhile is known, and saved when the disk
 * has answered; what the store held is known then, too. */
Test(kv_restore, a_store_that_does_not_open_is_not_waited_for)
{
    struct gate gate;
    start(16u << 20, 1ull << 30);
    compute(open_space("r", 1), 1);
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    shut(&gate);
    struct kv_space *space = begin_space("r", 1);
    kv_cache_poll(cache);
    cr_expect(not(kv_space_is_ready(space)));
    int ms = kv_cache_timeout_ms(cache);
    cr_expect(ge(int, ms, 0)); /* then it is to be looked at again */
    cr_expect(le(int, ms, (int)(KV_OPEN_PATIENCE_NS / 1000000u) + 1));
    cache->patience_ns = 0;
    uint64_t news = kv_cache_news(cache);
    kv_cache_poll(cache);
    cr_expect(kv_space_is_ready(space));
    cr_expect(lt(u64, news, kv_cache_news(cache)));
    cr_expect(eq(int, kv_cache_timeout_ms(cache), -1));
    cr_expect(not(is_known(space, 1)));
    compute(space, 1); /* again */
    compute(space, 2);
    open_gate(&gate);
    settle();
    cr_expect(eq(int, space->state, KV_SPACE_OPEN));
    stop();
    start(16u << 20, 1ull << 30);
    space = open_space("r", 1);
    cr_expect(is_known(space, 1));
    cr_expect(is_known(space, 2));
    sem_destroy(&gate.opened);
}
