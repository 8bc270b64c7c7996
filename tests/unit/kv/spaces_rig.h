/* tests/unit/kv/spaces_rig.h - a cache over a real folder, its spaces, and an io thread that can be
 * held.
 *
 * One class of full layers with blocks of 64 KiB. In globals: each test of criterion runs in a
 * process of its own. */
#ifndef TESTS_UNIT_KV_SPACES_RIG_H
#define TESTS_UNIT_KV_SPACES_RIG_H

#include "daemon/io/io.h"
#include "daemon/kv/cache_internal.h"

#include <semaphore.h>

#define BLOCK       GQA_KV_BLOCK_TOKENS
#define BLOCK_BYTES (64u << 10)
#define SLAB_BLOCKS 32u /* in 2 MiB, which the arena maps at once */
#define CHAIN_MAX   16u

extern char folder[64];
extern struct io *io;
extern struct kv_cache *cache;
extern struct kv_layout layout;

void setup(void);
void teardown(void);
/* store_bytes 0: memory alone. */
void start(uint64_t arena_bytes, uint64_t store_bytes);
void stop(void);
/* Takes in news until the io thread has nothing to do for the cache. */
void settle(void);
struct kv_space *begin_space(const char *realm, uint8_t model);
struct kv_space *open_space(const char *realm, uint8_t model); /* and settles */

/* Tokens that begin with others for every seed. */
void fill(int32_t *tokens, uint32_t n, uint32_t seed);
/* So many whole blocks of that seed, one after another, go to the tree, and nobody holds them. */
void compute_chain(struct kv_space *space, uint32_t seed, uint32_t n);
void compute(struct kv_space *space, uint32_t seed); /* one block */
bool is_known(const struct kv_space *space, uint32_t seed);

/* A job that the io thread has until somebody opens the gate. */
struct gate {
    struct io_call_job job;
    sem_t reached, opened;
};

void shut(struct gate *g);
void open_gate(struct gate *g);
/* Waits until the io thread has done what came before. */
void reach_gate(struct gate *g);

#endif
