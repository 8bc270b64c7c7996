/* The prefix tree, and what sequences take from it: keys, parents, classes of numerics. */
#include "daemon/kv/cache_internal.h"
#include "daemon/kv/sequence.h"
#include "tests/unit/must.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <string.h>

#define BLOCK GQA_KV_BLOCK_TOKENS
#define N     (8 * BLOCK)

static int32_t tokens[N];

static void fill_tokens(void)
{
    for (uint32_t i = 0; i < N; i++) {
        tokens[i] = (int32_t)(i * 31 % 97);
    }
}

/* ---- the tree ---------------------------------------------------------------------------- */

static struct kv_tree tree;

static void setup_tree(void)
{
    fill_tokens();
    cr_assert(eq(int, kv_tree_init(&tree, (struct kv_key){1, 2}, 1, true), 0));
}

static void teardown_tree(void)
{
    must(tree.n_nodes == 0);
    kv_tree_finish(&tree);
}

TestSuite(kv_tree, .init = setup_tree, .fini = teardown_tree);

static struct kv_node *insert(struct kv_key key, struct kv_key parent, uint32_t position)
{
    struct kv_node *n = NULL;
    cr_assert(eq(int, kv_tree_insert(&tree, key, parent, position, 0, tokens, &n), 0));
    return n;
}

Test(kv_tree, keys_depend_on_everything_before)
{
    struct kv_key root = tree.root->key;
    struct kv_key a = kv_tree_next_key(&tree, root, tokens, 0);
    struct kv_key again = kv_tree_next_key(&tree, root, tokens, 0);
    struct kv_key after = kv_tree_next_key(&tree, a, tokens, 0);
    struct kv_key generated = kv_tree_next_key(&tree, root, tokens, KV_BLOCK_GENERATED);
    struct kv_key pinned = kv_tree_next_key(&tree, root, tokens, KV_BLOCK_PINNED);
    cr_expect(kv_key_equal(a, again));
    cr_expect(kv_key_equal(a, pinned)); /* says nothing of the bytes */
    cr_expect(not(kv_key_equal(a, after)));
    cr_expect(not(kv_key_equal(a, generated)));
    tree.classes_differ = false;
    cr_expect(kv_key_equal(kv_tree_next_key(&tree, root, tokens, KV_BLOCK_GENERATED),
                           kv_tree_next_key(&tree, root, tokens, 0)));
}

/* A key is a way to find; the tokens decide. */
Test(kv_tree, tokens_are_compared_on_every_hit)
{
    struct kv_key key = kv_tree_next_key(&tree, tree.root->key, tokens, 0);
    struct kv_node *n = insert(key, (struct kv_key){0}, 0);
    cr_expect(eq(ptr, kv_tree_find(&tree, key, tokens), n));
    cr_expect(eq(ptr, kv_tree_find(&tree, key, tokens + 1), NULL));
    struct kv_node *other = NULL;
    cr_expect(
        eq(int, kv_tree_insert(&tree, key, (struct kv_key){0}, 0, 0, tokens + 1, &other), -EEXIST));
    cr_expect(eq(ptr, other, n));
    kv_tree_remove(&tree, n);
    cr_expect(eq(ptr, kv_tree_find(&tree, key, tokens), NULL));
}

Test(kv_tree, thousands_of_nodes_are_found_and_visited_once)
{
    static struct kv_node *nodes[3000];
    for (uint32_t i = 0; i < 3000; i++) {
        nodes[i] = insert((struct kv_key){i % 7, i + 1}, (struct kv_key){0}, 0);
    }
    uint32_t bucket = 0, visited = 0;
    for (struct kv_node *n = NULL; (n = kv_tree_next(&tree, &bucket, n)) != NULL;) {
        visited++;
    }
    cr_expect(eq(u32, visited, 3000));
    for (uint32_t i = 0; i < 3000; i++) {
        cr_assert(eq(ptr, kv_tree_find(&tree, (struct kv_key){i % 7, i + 1}, tokens), nodes[i]));
        kv_tree_remove(&tree, nodes[i]);
    }
}

/* What was there is found still, and nothing has to move again up to that number. */
Test(kv_tree, buckets_are_made_ahead)
{
    enum { MANY = 3000 };
    struct kv_node *first = insert((struct kv_key){1, 1}, (struct kv_key){0}, 0);
    kv_tree_reserve(&tree, MANY);
    uint32_t n_buckets = tree.n_buckets;
    cr_expect(le(u32, MANY, n_buckets));
    for (uint64_t i = 2; i <= MANY; i++) {
        insert((struct kv_key){i, i}, (struct kv_key){0}, 0);
    }
    cr_expect(eq(u32, tree.n_buckets, n_buckets));
    kv_tree_reserve(&tree, 1);
    cr_expect(eq(u32, tree.n_buckets, n_buckets));
    cr_expect(eq(ptr, kv_tree_find(&tree, (struct kv_key){1, 1}, tokens), first));
    for (uint64_t i = 1; i <= MANY; i++) {
        struct kv_node *n = kv_tree_find(&tree, (struct kv_key){i, i}, tokens);
        cr_assert(ne(ptr, n, NULL));
        kv_tree_remove(&tree, n);
    }
}

/* What a file says of parents may be anything: orphans find theirs when it comes, nobody becomes
 * its own ancestor. */
Test(kv_tree, parents_that_come_late_or_lie)
{
    struct kv_key a = {10, 1}, b = {10, 2}, c = {10, 3};
    struct kv_node *child = insert(b, a, 1);
    cr_expect(eq(ptr, child->parent, NULL));
    struct kv_node *first = insert(a, (struct kv_key){0}, 0);
    cr_expect(eq(ptr, first->parent, tree.root));
    struct kv_node *liar = insert(c, b, 1); /* as deep as its parent */
    cr_expect(eq(ptr, liar->parent, NULL));
    const struct kv_key parents[] = {a, b};
    struct kv_node *const orphans[] = {child, liar};
    kv_tree_link_orphans(&tree, parents, orphans, 2);
    cr_expect(eq(ptr, child->parent, first));
    cr_expect(eq(ptr, first->first_child, child));
    cr_expect(eq(ptr, liar->parent, NULL));
    kv_tree_remove(&tree, first); /* its child stays, an orphan again */
    cr_expect(eq(ptr, child->parent, NULL));
    kv_tree_remove(&tree, child);
    kv_tree_remove(&tree, liar);
}

/* ---- classes of numerics ----------------------------------------------------------------- */

static struct kv_layout layout;
static struct kv_cache *cache;

static void setup_cache(void)
{
    const struct kv_layer_desc layer = {0, 1, 16, 16, GQA_TYPE_F16, GQA_TYPE_F16};
    const struct kv_cache_options options = {.arena_bytes_max = 64u << 20};
    fill_tokens();
    cr_assert(eq(int, kv_layout_init(&layout, &layer, 1), 0));
    cr_assert(eq(int, kv_cache_create(&options, &cache), 0));
}

static void teardown_cache(void)
{
    kv_cache_destroy(cache);
    kv_layout_finish(&layout);
}

TestSuite(kv_classes, .init = setup_cache, .fini = teardown_cache);

/* A sequence of n tokens, of which the first n_prompt are a prompt: adopts what it may, computes
 * the rest. Returns how many tokens were adopted. */
static uint32_t run(bool differ, uint32_t n_prompt, uint32_t n, bool exact, enum kv_miss *ret_miss)
{
    const struct kv_identity identity = {.id = {1}, .classes_differ = differ};
    struct kv_sequence s;
    const struct kv_text text = {tokens, n, n_prompt};
    kv_sequence_init(&s, &layout, cache, kv_cache_space(cache, "r", &identity, &layout), exact);
    cr_assert(eq(int, kv_sequence_adopt(&s, &text, n_prompt - 1, true), 0));
    uint32_t adopted = s.n_tokens;
    *ret_miss = s.miss;
    while (s.n_tokens < n) {
        cr_assert(eq(int, kv_sequence_reserve(&s, 1), 0));
        kv_sequence_commit(&s, 1, &text);
    }
    kv_sequence_finish(&s);
    return adopted;
}

Test(kv_classes, generated_blocks_serve_conversations_but_not_the_exact)
{
    enum kv_miss miss;
    cr_expect(eq(u32, run(true, BLOCK, 3 * BLOCK, false, &miss), 0)); /* a prompt and its answer */
    uint32_t next = 3 * BLOCK + 10;
    cr_expect(eq(u32, run(true, next, next, true, &miss), BLOCK));
    cr_expect(eq(int, miss, KV_MISS_INEXACT));
    /* That one was computed as a prompt: from now on there is what the exact may have. */
    cr_expect(eq(u32, run(true, next, next, true, &miss), 3 * BLOCK));
}

Test(kv_classes, a_conversation_goes_on_from_what_was_generated)
{
    enum kv_miss miss;
    run(true, BLOCK, 3 * BLOCK, false, &miss);
    uint32_t next = 3 * BLOCK + 10;
    cr_expect(eq(u32, run(true, next, next, false, &miss), 3 * BLOCK));
}

/* Rows of a prompt's tail are of class D: the beginning of a block of class P does not stand for
 * them, unless the classes are computed alike. */
Test(kv_classes, a_beginning_is_copied_only_where_it_has_the_same_bits)
{
    enum kv_miss miss;
    run(true, 2 * BLOCK, 2 * BLOCK, false, &miss);
    cr_expect(eq(u32, run(true, BLOCK + 36, BLOCK + 36, false, &miss), BLOCK));
    teardown_cache();
    setup_cache();
    run(false, 2 * BLOCK, 2 * BLOCK, false, &miss);
    cr_expect(eq(u32, run(false, BLOCK + 36, BLOCK + 36, false, &miss), BLOCK + 35));
}

Test(kv_classes, where_classes_are_alike_everything_is_exact)
{
    enum kv_miss miss;
    run(false, BLOCK, 3 * BLOCK, false, &miss);
    uint32_t next = 3 * BLOCK + 10;
    cr_expect(eq(u32, run(false, next, next, true, &miss), 3 * BLOCK));
}

/* numerics=strict: no row is of class P, so that generated blocks are what it would compute. */
Test(kv_classes, a_strict_sequence_takes_what_was_generated_exactly)
{
    const struct kv_identity identity = {.id = {1}, .classes_differ = true};
    enum kv_miss miss;
    run(true, BLOCK, 3 * BLOCK, false, &miss); /* block 0 is a prompt's: of no use here */
    for (uint32_t round = 0; round < 2; round++) {
        struct kv_sequence s;
        const struct kv_text text = {tokens, 3 * BLOCK + 1, 0};
        kv_sequence_init(&s, &layout, cache, kv_cache_space(cache, "r", &identity, &layout), true);
        cr_assert(eq(int, kv_sequence_adopt(&s, &text, 3 * BLOCK, true), 0));
        cr_expect(eq(u32, s.n_tokens, round == 0 ? 0 : 3 * BLOCK));
        while (s.n_tokens < 3 * BLOCK + 1) {
            cr_assert(eq(int, kv_sequence_reserve(&s, 1), 0));
            kv_sequence_commit(&s, 1, &text);
        }
        kv_sequence_finish(&s);
    }
}
