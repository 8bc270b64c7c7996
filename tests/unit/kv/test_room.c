/* Who gives way in memory: whole chains, nodes of windowed layers, pins of one realm and of many.
 */
#include "daemon/kv/cache_internal.h"
#include "daemon/kv/sequence.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdlib.h>
#include <string.h>

#define BLOCK       GQA_KV_BLOCK_TOKENS
#define BLOCK_BYTES (64u << 10) /* 64 tokens x 2 heads x (64 + 64) dimensions of 4 bytes */
#define ARENA_BYTES (64u << 20)

static struct kv_cache *cache;
static struct kv_layout layout;

static void on_wake(void *arg)
{
}

static void start(const uint32_t *windows, uint32_t n_layers)
{
    struct kv_layer_desc layers[4];
    const struct kv_cache_options options = {.arena_bytes_max = ARENA_BYTES, .wake = on_wake};
    for (uint32_t i = 0; i < n_layers; i++) {
        layers[i] = (struct kv_layer_desc){windows[i], 2, 64, 64, GQA_TYPE_F32, GQA_TYPE_F32};
    }
    cr_assert(eq(int, kv_layout_init(&layout, layers, n_layers), 0));
    cr_assert(eq(int, kv_cache_create(&options, &cache), 0));
}

static void teardown(void)
{
    kv_cache_destroy(cache);
    kv_layout_finish(&layout);
}

TestSuite(kv_room, .fini = teardown, .timeout = 60);

static struct kv_space *space_of(const char *realm)
{
    const struct kv_identity identity = {.id = {1}};
    struct kv_space *s = kv_cache_space(cache, realm, &identity, &layout);
    cr_assert(ne(ptr, s, NULL));
    return s;
}

/* A prompt of so many blocks, which nobody holds afterwards. Returns how many tokens were pinned.
 */
static uint32_t compute(struct kv_space *space, uint32_t seed, uint32_t n_blocks, bool pinned)
{
    uint32_t n = n_blocks * BLOCK;
    int32_t *tokens = malloc(n * sizeof(*tokens));
    const struct kv_text text = {tokens, n, n};
    struct kv_sequence s;
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)(seed * 100000 + i);
    }
    kv_sequence_init(&s, &layout, cache, space, false);
    for (uint32_t i = 0; i < n_blocks; i++) {
        cr_assert(eq(int, kv_sequence_reserve(&s, BLOCK), 0));
        kv_sequence_commit(&s, BLOCK, &text);
    }
    uint32_t n_pinned = pinned ? kv_sequence_pin(&s, n, true) : 0;
    kv_sequence_finish(&s);
    free(tokens);
    return n_pinned;
}

static uint64_t n_nodes(void)
{
    struct kv_cache_stats stats;
    kv_cache_stats(cache, &stats);
    return stats.n_nodes;
}

/* ---- chains ------------------------------------------------------------------------------ */

Test(kv_room, a_chain_goes_from_its_end_and_no_further_than_needed)
{
    start((uint32_t[]){0}, 1);
    struct kv_space *s = space_of("r");
    compute(s, 1, 40, false);
    cr_expect(eq(u64, n_nodes(), 40));
    cr_expect(eq(u64, kv_cache_evict_arena(cache, 10 * BLOCK_BYTES), 10 * BLOCK_BYTES));
    cr_expect(eq(u64, n_nodes(), 30));
    int32_t tokens[40 * BLOCK];
    for (uint32_t i = 0; i < 40 * BLOCK; i++) {
        tokens[i] = (int32_t)(100000 + i);
    }
    const struct kv_text text = {tokens, 40 * BLOCK, 40 * BLOCK};
    cr_expect(eq(u32, kv_space_known_tokens(s, &text, false), 30 * BLOCK));
    cr_expect(eq(u64, kv_cache_evict_arena(cache, ARENA_BYTES), 30 * BLOCK_BYTES));
    cr_expect(eq(u64, n_nodes(), 0));
}

static uint64_t n_visited; /* nodes by scans: the linker wraps the step from one to the next */

struct kv_node *__real_kv_tree_next(const struct kv_tree *t, uint32_t *bucket, struct kv_node *n);
struct kv_node *__wrap_kv_tree_next(const struct kv_tree *t, uint32_t *bucket, struct kv_node *n);
struct kv_node *__wrap_kv_tree_next(const struct kv_tree *t, uint32_t *bucket, struct kv_node *n)
{
    n_visited++;
    return __real_kv_tree_next(t, bucket, n);
}

/* However long a chain is, and however much of it goes: one look at each node tells what goes. */
Test(kv_room, an_eviction_looks_at_each_node_once)
{
    start((uint32_t[]){0}, 1);
    struct kv_space *s = space_of("r");
    for (uint32_t n = 50; n <= 800; n *= 4) {
        compute(s, n, n, false);
        n_visited = 0;
        cr_expect(eq(u64, kv_cache_evict_arena(cache, n * BLOCK_BYTES), n * BLOCK_BYTES));
        cr_expect(le(u64, n_visited, n + 1), "%u nodes", n);
        cr_expect(eq(u64, n_nodes(), 0));
    }
}

/* Prompts that come one after another into a full arena pay for scans that each make room for many:
 * a bounded number of looks for every block, not as many as there are blocks. */
Test(kv_room, a_full_arena_is_scanned_seldom)
{
    enum { HELD = ARENA_BYTES / BLOCK_BYTES, CHAIN = 16, SCANS_FOR_ALL = 64 };
    start((uint32_t[]){0}, 1);
    struct kv_space *s = space_of("r");
    for (uint32_t i = 0; i < 3 * HELD / CHAIN; i++) {
        if (i == HELD / CHAIN) {
            n_visited = 0; /* it is full */
        }
        compute(s, 1 + i, CHAIN, false);
    }
    cr_expect(lt(u64, 0, n_visited));
    cr_expect(le(u64, n_visited, 2ull * SCANS_FOR_ALL * (HELD + 1)));
}

/* Of two prompts with a common beginning the one that was used more often outlives the other, and
 * the beginning outlives both. */
Test(kv_room, what_was_used_more_goes_later)
{
    start((uint32_t[]){0}, 1);
    struct kv_space *s = space_of("r");
    compute(s, 1, 3, false);
    compute(s, 2, 3, false);
    uint32_t bucket = 0;
    for (struct kv_node *n = NULL; (n = kv_tree_next(&s->tree, &bucket, n)) != NULL;) {
        n->hits = n->tokens[0] / 100000 == 1 ? 5 : 0;
        n->used_s = kv_now_s();
    }
    cr_expect(eq(u64, kv_cache_evict_arena(cache, 4 * BLOCK_BYTES), 4 * BLOCK_BYTES));
    bucket = 0;
    uint32_t left = 0;
    for (struct kv_node *n = NULL; (n = kv_tree_next(&s->tree, &bucket, n)) != NULL; left++) {
        cr_expect(eq(i32, n->tokens[0] / 100000, 1));
        cr_expect(lt(u32, n->position, 2));
    }
    cr_expect(eq(u32, left, 2));
}

/* Interior blocks of windowed layers go first and leave nodes that hold nothing: these go when
 * the last of their chain does. */
Test(kv_room, windowed_layers_alone_leave_no_nodes)
{
    start((uint32_t[]){128, 256}, 2);
    struct kv_space *s = space_of("r");
    for (uint32_t seed = 1; seed <= 3; seed++) {
        compute(s, seed, 12, false);
    }
    cr_expect(lt(u64, 0, n_nodes()));
    while (kv_cache_evict_arena(cache, BLOCK_BYTES) > 0) {
    }
    cr_expect(eq(u64, n_nodes(), 0));
}

Test(kv_room, full_and_windowed_layers_leave_no_nodes)
{
    start((uint32_t[]){0, 128}, 2);
    compute(space_of("r"), 1, 12, false);
    while (kv_cache_evict_arena(cache, BLOCK_BYTES) > 0) {
    }
    cr_expect(eq(u64, n_nodes(), 0));
}

/* ---- pins -------------------------------------------------------------------------------- */

Test(kv_room, one_realm_leaves_room_for_the_pins_of_others)
{
    start((uint32_t[]){0}, 1);
    uint32_t all = ARENA_BYTES / 2 / BLOCK_BYTES; /* blocks that may be pinned by all together */
    struct kv_space *a = space_of("a"), *b = space_of("b");
    uint32_t of_a = 0, of_b = 0;
    for (uint32_t seed = 1; seed <= all / 8; seed++) {
        of_a += compute(a, seed, 8, true) / BLOCK;
    }
    cr_expect(eq(u32, of_a, all / 2));
    for (uint32_t seed = 1; seed <= all / 8; seed++) {
        of_b += compute(b, seed, 8, true) / BLOCK;
    }
    cr_expect(eq(u32, of_b, all / 4));
    cr_expect(eq(u32, compute(a, 1, 8, true), 8 * BLOCK)); /* what is pinned takes no more room */
}

/* What is let go of by any way can be pinned by others again. */
Test(kv_room, pins_that_are_gone_count_no_more)
{
    start((uint32_t[]){0}, 1);
    struct kv_space *s = space_of("a");
    uint64_t room = kv_space_room_for_pins(s);
    cr_assert(eq(u32, compute(s, 1, 8, true), 8 * BLOCK));
    cr_expect(eq(u64, kv_space_room_for_pins(s), room - 8 * BLOCK_BYTES));
    cr_assert(eq(u32, compute(s, 1, 8, true), 8 * BLOCK)); /* twice is once */
    cr_expect(eq(u64, kv_space_room_for_pins(s), room - 8 * BLOCK_BYTES));
    uint32_t bucket = 0;
    kv_space_pin(s, kv_tree_next(&s->tree, &bucket, NULL), false);
    cr_expect(eq(u64, kv_space_room_for_pins(s), room - 7 * BLOCK_BYTES));
    kv_cache_evict_arena(cache, ARENA_BYTES); /* for running requests: pinned ones go too */
    cr_expect(eq(u64, n_nodes(), 0));
    cr_expect(eq(u64, kv_space_room_for_pins(s), room));
}
