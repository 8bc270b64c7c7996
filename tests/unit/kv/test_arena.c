/* The arena's bound, reuse and counts. */
#include "daemon/kv/arena.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MIB      (1ull << 20)
#define SLAB     (2 * MIB)
#define N_BLOCKS 4096

static struct kv_arena *arena;

static void make(uint64_t bytes_max)
{
    cr_assert(eq(int, kv_arena_create(bytes_max, &arena), 0));
}

static void finish(void)
{
    cr_expect(eq(u64, kv_arena_blocks_used(arena), 0));
    cr_expect(eq(u64, kv_arena_bytes_used(arena), 0));
    kv_arena_destroy(arena);
}

/* Takes blocks until there is no more; returns how many. */
static size_t take_all(uint64_t bytes, struct kv_block **blocks)
{
    size_t n = 0;
    int rc = 0;
    while (n < N_BLOCKS && (rc = kv_arena_alloc(arena, bytes, &blocks[n])) == 0) {
        n++;
    }
    cr_expect(eq(int, rc, -ENOMEM));
    return n;
}

static void give_all(struct kv_block **blocks, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        kv_block_unref(arena, blocks[i]);
    }
}

Test(kv_arena, blocks_are_apart_and_writable)
{
    struct kv_block *blocks[N_BLOCKS];
    make(3 * SLAB);
    size_t n = take_all(64 * 1024, blocks);
    cr_expect(eq(sz, n, 3 * SLAB / (64 * 1024)));
    for (size_t i = 0; i < n; i++) {
        cr_expect(eq(u64, (uintptr_t)blocks[i]->data % 64, 0));
        memset(blocks[i]->data, (int)i, 64 * 1024);
    }
    for (size_t i = 0; i < n; i++) {
        const unsigned char *data = blocks[i]->data;
        cr_expect(data[0] == (unsigned char)i && data[64 * 1024 - 1] == (unsigned char)i);
    }
    cr_expect(eq(u64, kv_arena_bytes_used(arena), 3 * SLAB));
    cr_expect(eq(u64, kv_arena_blocks_used(arena), n));
    cr_expect(eq(u64, kv_arena_bytes_max(arena), 3 * SLAB));
    give_all(blocks, n);
    finish();
}

Test(kv_arena, after_exhaustion_a_freed_block_serves_again)
{
    struct kv_block *blocks[N_BLOCKS], *again;
    make(SLAB);
    size_t n = take_all(MIB / 2, blocks);
    cr_expect(eq(sz, n, 4));
    void *data = blocks[2]->data;
    kv_block_unref(arena, blocks[2]);
    cr_assert(eq(int, kv_arena_alloc(arena, MIB / 2, &again), 0));
    cr_expect(eq(ptr, again->data, data));
    blocks[2] = again;
    give_all(blocks, n);
    cr_expect(eq(sz, take_all(MIB / 2, blocks), n));
    give_all(blocks, n);
    finish();
}

Test(kv_arena, references_keep_a_block)
{
    struct kv_block *b;
    make(SLAB);
    cr_assert(eq(int, kv_arena_alloc(arena, 4096, &b), 0));
    cr_expect(eq(ptr, kv_block_ref(b), b));
    kv_block_unref(arena, b);
    cr_expect(eq(u64, kv_arena_blocks_used(arena), 1));
    kv_block_unref(arena, b);
    kv_block_unref(arena, NULL);
    finish();
}

/* Memory of one size goes to another when its slabs are empty, without anybody's asking. */
Test(kv_arena, empty_slabs_serve_other_sizes)
{
    struct kv_block *blocks[N_BLOCKS], *other;
    make(2 * SLAB);
    size_t n = take_all(1024 * 64, blocks);
    cr_expect(eq(int, kv_arena_alloc(arena, 128, &other), -ENOMEM));
    give_all(blocks, n);
    cr_expect(eq(sz, take_all(3 * MIB, blocks), 1));
    kv_block_unref(arena, blocks[0]);
    cr_assert(eq(int, kv_arena_alloc(arena, 128, &other), 0));
    cr_expect(eq(u64, kv_arena_bytes_used(arena), 128));
    kv_block_unref(arena, other);
    finish();
}

/* A slab that is still in use stays, and its free blocks stay usable. */
Test(kv_arena, trim_takes_empty_slabs_only)
{
    struct kv_block *blocks[N_BLOCKS], *other;
    make(2 * SLAB);
    size_t n = take_all(MIB, blocks);
    cr_assert(eq(sz, n, 4));
    memset(blocks[0]->data, 5, MIB);
    give_all(blocks + 1, 3);
    kv_arena_trim(arena);
    cr_expect(eq(int, ((char *)blocks[0]->data)[MIB - 1], 5));
    cr_expect(eq(int, kv_arena_alloc(arena, SLAB, &other), 0)); /* the other slab's bytes */
    cr_expect(eq(int, kv_arena_alloc(arena, MIB, &blocks[1]), 0));
    cr_expect(eq(int, kv_arena_alloc(arena, MIB, &blocks[2]), -ENOMEM));
    kv_block_unref(arena, other);
    give_all(blocks, 2);
    kv_arena_trim(arena);
    finish();
}

/* More sizes than lists, one after another: a list without slabs is taken over. */
Test(kv_arena, many_sizes_after_each_other)
{
    struct kv_block *b;
    make(SLAB);
    for (uint64_t i = 1; i <= 500; i++) {
        cr_assert(eq(int, kv_arena_alloc(arena, 64 * i, &b), 0));
        kv_block_unref(arena, b);
    }
    finish();
}

/* Lists whose slabs have no block in use give way to another size. */
Test(kv_arena, sizes_out_of_use_make_room_for_others)
{
    struct kv_block *b;
    make(100 * SLAB);
    for (uint64_t k = 1; k <= 90; k++) {
        cr_assert(eq(int, kv_arena_alloc(arena, 64 * k, &b), 0));
        kv_block_unref(arena, b);
    }
    finish();
}

Test(kv_arena, many_sizes_at_once_are_bounded)
{
    struct kv_block *blocks[256];
    size_t n = 0;
    make(1024 * MIB);
    while (n < 256 && kv_arena_alloc(arena, 64 * (n + 1), &blocks[n]) == 0) {
        n++;
    }
    cr_expect(eq(sz, n, 64));
    give_all(blocks, n);
    finish();
}

Test(kv_arena, odd_requests_and_bounds)
{
    struct kv_block *b = NULL;
    make(SLAB - 1);
    cr_expect(eq(int, kv_arena_alloc(arena, 0, &b), -EINVAL));
    cr_expect(eq(int, kv_arena_alloc(arena, 100, &b), -EINVAL));
    cr_expect(eq(int, kv_arena_alloc(arena, 64, &b), -ENOMEM));
    cr_expect(eq(int, kv_arena_alloc(arena, UINT64_MAX & ~63ull, &b), -ENOMEM));
    cr_expect(b == NULL);
    finish();
    kv_arena_destroy(NULL);
}

/* What admission counts with is what the arena takes. */
Test(kv_arena, bytes_for_is_what_blocks_take)
{
    static const uint64_t sizes[] = {64, 4096 + 64, 700 * 1024, MIB, MIB + 64, 5 * MIB + 64};
    struct kv_block *blocks[8];
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        uint64_t bytes = kv_arena_bytes_for(sizes[i], 7);
        make(bytes);
        for (size_t k = 0; k < 7; k++) {
            cr_assert(eq(int, kv_arena_alloc(arena, sizes[i], &blocks[k]), 0));
        }
        give_all(blocks, 7);
        finish();
        make(bytes - 1);
        size_t n = 0;
        while (n < 7 && kv_arena_alloc(arena, sizes[i], &blocks[n]) == 0) {
            n++;
        }
        cr_expect(lt(sz, n, 7));
        give_all(blocks, n);
        finish();
    }
    cr_expect(eq(u64, kv_arena_bytes_for(4096, 0), 0));
    cr_expect(eq(u64, kv_arena_bytes_for(1ull << 50, 1ull << 40), UINT64_MAX));
}

/* Random takes and gives of three sizes under a bound: the counts always agree. */
Test(kv_arena, random_use)
{
    static const uint64_t sizes[] = {4096, 384 * 1024, 3 * MIB};
    struct kv_block *blocks[300] = {NULL};
    uint64_t bytes[300], used = 0, x = 88172645463325252ull;
    make(40 * MIB);
    for (int i = 0; i < 200000; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        size_t slot = x % 300;
        if (blocks[slot] != NULL) {
            kv_block_unref(arena, blocks[slot]);
            blocks[slot] = NULL;
            used -= bytes[slot];
        } else if (kv_arena_alloc(arena, sizes[x / 300 % 3], &blocks[slot]) == 0) {
            bytes[slot] = sizes[x / 300 % 3];
            *(volatile char *)blocks[slot]->data = 1;
            used += bytes[slot];
        }
        cr_assert(eq(u64, kv_arena_bytes_used(arena), used));
        cr_assert(le(u64, used, 40 * MIB));
    }
    give_all(blocks, 300);
    finish();
}

/* What is set aside counts like blocks; slabs without use make room for it. */
Test(kv_arena, memory_beside_it_counts)
{
    struct kv_block *b, *second;
    make(2 * SLAB);
    cr_assert(eq(int, kv_arena_alloc(arena, SLAB, &b), 0));
    cr_expect(eq(int, kv_arena_set_aside(arena, SLAB + 1), -ENOMEM));
    cr_expect(eq(int, kv_arena_set_aside(arena, SLAB), 0));
    cr_expect(eq(u64, kv_arena_bytes_used(arena), 2 * SLAB));
    cr_expect(eq(int, kv_arena_alloc(arena, SLAB, &second), -ENOMEM));
    kv_block_unref(arena, b);
    cr_expect(eq(int, kv_arena_set_aside(arena, SLAB), 0));
    kv_arena_give_aside(arena, 2 * SLAB);
    cr_expect(eq(int, kv_arena_set_aside(arena, UINT64_MAX), -ENOMEM));
    finish();
}
