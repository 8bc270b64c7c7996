#include "tests/unit/kv/spaces_rig.h"

#include "daemon/kv/sequence.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <ftw.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

char folder[64];
struct io *io;
struct kv_cache *cache;
struct kv_layout layout;

void setup(void)
{
    /* One class: 64 tokens x 2 heads x (64 + 64) dimensions of 4 bytes are 64 KiB. */
    const struct kv_layer_desc layer = {0, 2, 64, 64, GQA_TYPE_F32, GQA_TYPE_F32};
    cr_assert(eq(int, kv_layout_init(&layout, &layer, 1), 0));
    cr_assert(eq(u64, layout.classes[0].block_bytes, BLOCK_BYTES));
    strcpy(folder, "/tmp/gqad-test-XXXXXX");
    cr_assert(ne(ptr, mkdtemp(folder), NULL));
    cr_assert(eq(int, io_create(false, &io), 0));
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    return remove(path);
}

void stop(void)
{
    kv_cache_destroy(cache);
    cache = NULL;
}

void teardown(void)
{
    stop();
    io_destroy(io);
    kv_layout_finish(&layout);
    nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void on_wake(void *arg)
{
}

void start(uint64_t arena_bytes, uint64_t store_bytes)
{
    const struct kv_cache_options options = {
        .arena_bytes_max = arena_bytes,
        .folder = store_bytes > 0 ? folder : NULL,
        .io = io,
        .store_bytes_max = store_bytes,
        .wake = on_wake,
    };
    cr_assert(eq(int, kv_cache_create(&options, &cache), 0));
}

void settle(void)
{
    while (kv_cache_is_busy(cache)) {
        kv_cache_poll(cache);
        sched_yield();
    }
}

struct kv_space *begin_space(const char *realm, uint8_t model)
{
    struct kv_identity identity = {.id = {model}};
    struct kv_space *s = kv_cache_space(cache, realm, &identity, &layout);
    cr_assert(ne(ptr, s, NULL));
    return s;
}

struct kv_space *open_space(const char *realm, uint8_t model)
{
    struct kv_space *s = begin_space(realm, model);
    settle();
    return s;
}

/* Tokens that begin with others for every seed. */
void fill(int32_t *tokens, uint32_t n, uint32_t seed)
{
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)(seed * 1000 + i);
    }
}

/* So many whole blocks of that seed, one after another, go to the tree, and nobody holds them. */
void compute_chain(struct kv_space *space, uint32_t seed, uint32_t n)
{
    int32_t tokens[CHAIN_MAX * BLOCK];
    const struct kv_text text = {tokens, n * BLOCK, n * BLOCK};
    struct kv_sequence s;
    cr_assert(le(u32, n, CHAIN_MAX));
    fill(tokens, n * BLOCK, seed);
    kv_sequence_init(&s, &layout, cache, space, false);
    cr_assert(eq(int, kv_sequence_reserve(&s, n * BLOCK), 0));
    for (uint32_t i = 0; i < n; i++) {
        memset(s.lists[0].pages[i], (int)((seed + i) % 251), BLOCK_BYTES);
    }
    kv_sequence_commit(&s, n * BLOCK, &text);
    kv_sequence_finish(&s);
}

void compute(struct kv_space *space, uint32_t seed)
{
    compute_chain(space, seed, 1);
}

bool is_known(const struct kv_space *space, uint32_t seed)
{
    int32_t tokens[BLOCK];
    const struct kv_text text = {tokens, BLOCK, BLOCK};
    fill(tokens, BLOCK, seed);
    return kv_space_known_tokens(space, &text, false) == BLOCK;
}

/* ---- a slow disk ------------------------------------------------------------------------- */

static int wait_at_gate(void *arg)
{
    struct gate *g = arg;
    sem_post(&g->reached);
    while (sem_wait(&g->opened) < 0) {
    }
    return 0;
}

void shut(struct gate *g)
{
    sem_init(&g->opened, 0, 0);
    sem_init(&g->reached, 0, 0);
    g->job = (struct io_call_job){.fn = wait_at_gate, .arg = g};
    cr_assert(eq(int, io_submit_call(io, &g->job), 0));
}

void open_gate(struct gate *g)
{
    sem_post(&g->opened);
}

void reach_gate(struct gate *g)
{
    while (sem_wait(&g->reached) < 0) {
    }
}
