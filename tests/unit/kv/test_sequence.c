/* A sequence's blocks: growth, windows, the end. */
#include "daemon/kv/sequence.h"
#include "tests/unit/must.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>

#define WINDOW 100u

static struct kv_cache *cache;
static struct kv_arena *arena;  /* its own */
static struct kv_layout layout; /* class 0 sees everything, class 1 a window */
static struct kv_sequence s;

static struct kv_cache *make_cache(uint64_t bytes_max)
{
    const struct kv_cache_options options = {.arena_bytes_max = bytes_max};
    struct kv_cache *made = NULL;
    cr_assert(eq(int, kv_cache_create(&options, &made), 0));
    return made;
}

/* A sequence that shares nothing. */
static void init(struct kv_sequence *seq, struct kv_cache *from)
{
    kv_sequence_init(seq, &layout, from, NULL, false);
}

static void setup(void)
{
    const struct kv_layer_desc layers[] = {
        {0, 2, 16, 16, GQA_TYPE_F32, GQA_TYPE_F32},
        {WINDOW, 2, 16, 16, GQA_TYPE_F32, GQA_TYPE_F32},
        {WINDOW, 2, 16, 16, GQA_TYPE_F32, GQA_TYPE_F32},
    };
    cr_assert(eq(int, kv_layout_init(&layout, layers, 3), 0));
    cache = make_cache(64u << 20);
    arena = kv_cache_arena(cache);
    init(&s, cache);
}

static void teardown(void)
{
    kv_sequence_finish(&s);
    must(kv_arena_blocks_used(arena) == 0);
    must(kv_arena_bytes_used(arena) == 0);
    kv_cache_destroy(cache);
    kv_layout_finish(&layout);
}

TestSuite(kv_sequence, .init = setup, .fini = teardown);

static void add(uint32_t n)
{
    cr_assert(eq(int, kv_sequence_reserve(&s, n), 0));
    kv_sequence_commit(&s, n, NULL);
}

Test(kv_sequence, grows_by_whole_blocks)
{
    for (uint32_t n = 1; n <= 90; n++) {
        add(1);
        uint32_t n_blocks = (n + 63) / 64;
        cr_assert(eq(u32, s.n_tokens, n));
        cr_assert(eq(u32, s.tables[0].n_pages, n_blocks));
        cr_assert(eq(u32, s.tables[1].n_pages, n_blocks));
        cr_assert(eq(ptr, s.tables[0].pages[n_blocks - 1], s.lists[0].blocks[n_blocks - 1]->data));
        cr_assert(eq(u64, kv_arena_blocks_used(arena), 2 * n_blocks));
    }
}

/* A reservation that is not used is there for the next one. */
Test(kv_sequence, reserve_twice_takes_once)
{
    cr_assert(eq(int, kv_sequence_reserve(&s, 200), 0));
    void *first = s.tables[0].pages[0];
    cr_assert(eq(int, kv_sequence_reserve(&s, 200), 0));
    cr_expect(eq(u64, kv_arena_blocks_used(arena), 8));
    kv_sequence_commit(&s, 200, NULL);
    add(1000);
    cr_expect(eq(ptr, s.tables[0].pages[0], first));
}

/* The next token at p sees p - WINDOW + 1 and later: blocks wholly before that are given back, and
 * no other. */
Test(kv_sequence, windows_give_blocks_back)
{
    for (uint32_t n = 1; n <= 700; n++) {
        add(1);
        uint32_t first_seen = n >= WINDOW ? n - WINDOW + 1 : 0;
        for (uint32_t i = 0; i < s.tables[1].n_pages; i++) {
            bool gone = (i + 1) * 64 <= first_seen;
            cr_assert(eq(int, s.tables[1].pages[i] == NULL, gone), "block %u at %u", i, n);
            cr_assert(ne(ptr, s.tables[0].pages[i], NULL));
        }
    }
    cr_expect(eq(u64, kv_arena_blocks_used(arena), 11 + 2));
}

/* A chunk larger than the window: rows of its start still see blocks from before it. */
Test(kv_sequence, a_chunk_over_a_window)
{
    add(150);
    cr_expect(ne(ptr, s.tables[1].pages[0], NULL)); /* the next token sees from 51 */
    cr_assert(eq(int, kv_sequence_reserve(&s, 500), 0));
    cr_expect(ne(ptr, s.tables[1].pages[0], NULL));
    kv_sequence_commit(&s, 500, NULL);
    for (uint32_t i = 0; i < 8; i++) {
        cr_expect(eq(ptr, s.tables[1].pages[i], NULL));
    }
    cr_expect(ne(ptr, s.tables[1].pages[8], NULL)); /* 551 / 64 */
    cr_expect(eq(u32, s.tables[1].n_pages, 11));
}

Test(kv_sequence, finish_releases_everything_and_starts_anew)
{
    add(1234);
    kv_sequence_finish(&s);
    cr_expect(eq(u64, kv_arena_blocks_used(arena), 0));
    init(&s, cache);
    cr_expect(eq(u32, s.n_tokens, 0));
    add(3);
    cr_expect(eq(u32, s.tables[0].n_pages, 1));
}

/* A page that a device copied is told from another's at the same address. */
Test(kv_sequence, the_same_memory_for_other_tokens_has_another_version)
{
    add(100);
    const void *page = s.tables[0].pages[1];
    uint64_t version = s.tables[0].versions[1];
    cr_expect(ne(u64, version, 0));
    cr_expect(ne(u64, version, s.tables[0].versions[0]));
    cr_expect(ne(u64, version, s.tables[1].versions[1]));
    add(100);
    cr_expect(eq(u64, s.tables[0].versions[1], version)); /* it only grew */
    kv_sequence_reset(&s);
    add(200);
    bool found = false;
    for (uint32_t i = 0; i < s.tables[0].n_pages; i++) {
        found = found || s.tables[0].pages[i] == page;
        cr_expect(lt(u64, version, s.tables[0].versions[i]));
    }
    cr_expect(found, "the arena hands out what was given back");
}

Test(kv_sequence, without_memory_nothing_is_lost_and_the_call_may_be_repeated)
{
    struct kv_cache *small = make_cache(2u << 21); /* one slab for each class */
    struct kv_sequence a, b;
    uint64_t block = layout.classes[0].block_bytes;
    uint64_t per_slab = (2u << 20) / block;
    init(&a, small);
    init(&b, small);
    cr_assert(eq(int, kv_sequence_reserve(&a, 64 * 4), 0));
    kv_sequence_commit(&a, 64 * 4, NULL);
    uint64_t used = kv_arena_blocks_used(kv_cache_arena(small));
    cr_expect(eq(int, kv_sequence_reserve(&b, (uint32_t)(64 * per_slab)), -ENOMEM));
    cr_expect(eq(u32, b.n_tokens, 0));
    for (uint32_t i = 0; i < 4; i++) {
        cr_expect(eq(ptr, a.tables[0].pages[i], a.lists[0].blocks[i]->data));
    }
    cr_expect(eq(int, kv_sequence_reserve(&b, (uint32_t)(64 * per_slab)), -ENOMEM));
    kv_sequence_finish(&b);
    cr_expect(eq(u64, kv_arena_blocks_used(kv_cache_arena(small)), used));
    kv_sequence_finish(&a);
    init(&b, small);
    cr_expect(eq(int, kv_sequence_reserve(&b, 64 * 16), 0));
    kv_sequence_finish(&b);
    kv_cache_destroy(small);
}

static uint64_t bytes_for(uint64_t n_tokens, uint32_t step_rows)
{
    const struct kv_policy full = {.kind = KV_POLICY_FULL};
    const struct kv_extent extent = {&full, n_tokens, n_tokens, step_rows, false};
    return kv_sequence_bytes_for(&layout, &extent);
}

Test(kv_sequence, bytes_for_bounds_what_a_sequence_takes)
{
    const uint32_t lengths[] = {0, 1, 64, 65, 1000, 20000};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        for (uint32_t step = 1; step <= 1000; step = 10 * step) {
            struct kv_cache *exact = make_cache(bytes_for(lengths[i], step));
            struct kv_sequence alone;
            init(&alone, exact);
            while (alone.n_tokens < lengths[i]) {
                uint32_t left = lengths[i] - alone.n_tokens;
                uint32_t n = left < step ? left : step;
                cr_assert(eq(int, kv_sequence_reserve(&alone, n), 0));
                kv_sequence_commit(&alone, n, NULL);
            }
            kv_sequence_finish(&alone);
            kv_cache_destroy(exact);
        }
    }
    cr_expect(eq(u64, bytes_for(UINT64_MAX, 512), UINT64_MAX));
}
