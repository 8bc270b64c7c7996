/* The block store with all its threads: one that writes, forgets, uses and flags, the io thread,
 * one that verifies and reads, and one that asks for facts. */
#include "tests/unit/kv/rig.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define N_KEPT 20u /* blocks that stay, for the reader */

static struct rig rig;
static atomic_bool stop;
static atomic_ulong n_read;

static void need(bool holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "store_tsan: %s\n", what);
        exit(1);
    }
}

static void *read_blocks(void *arg)
{
    const struct kv_store_block *kept = arg;
    while (!atomic_load(&stop)) {
        for (unsigned i = 0; i < N_KEPT; i++) {
            kv_store_will_need(rig.store, &kept[i]);
            need(kv_store_verify(rig.store, &kept[i]) == 0, "a block does not verify");
            need(!kv_store_marked(rig.store, &kept[i]), "a block is marked");
            atomic_fetch_add(&n_read, 1);
        }
    }
    return NULL;
}

static void *ask(void *arg)
{
    struct kv_store_stats f;
    while (!atomic_load(&stop)) {
        kv_store_stats(rig.store, &f);
        need(f.state == KV_STORE_OK && f.bytes_files <= f.bytes_max, "the facts are wrong");
    }
    return NULL;
}

/* Waves of blocks, without waiting for one before the next is queued. */
static void write_waves(void)
{
    for (unsigned wave = 0; wave < 30; wave++) {
        for (unsigned k = N_KEPT + 1; k <= N_KEPT + 16; k++) {
            if (rig.status[k] == RIG_STORED) {
                rig_forget(&rig, k);
            }
        }
        for (unsigned i = 1; i <= N_KEPT; i++) {
            rig.blocks[i].hits++;
            kv_store_use(rig.store, &rig.blocks[i]);
        }
        rig.blocks[1 + wave % N_KEPT].flags ^= KV_BLOCK_PINNED;
        kv_store_flag(rig.store, &rig.blocks[1 + wave % N_KEPT]);
        need(rig_write(&rig, N_KEPT + 1, 16) == 0, "a write failed");
        if (wave % 10 == 9) {
            need(rig_purge(&rig, N_KEPT + 1) == 0, "a purge failed");
        }
    }
}

int main(void)
{
    static struct kv_store_block kept[N_KEPT];
    struct io *io;
    pthread_t reader, asker;
    need(io_create(false, &io) == 0, "the io thread");
    rig_init_folder(&rig, io);
    need(rig_open(&rig) == 0, rig.err.text);
    need(rig_write(&rig, 1, N_KEPT) == 0, "a write failed");
    for (unsigned i = 0; i < N_KEPT; i++) {
        kept[i] = rig.blocks[i + 1];
    }
    need(pthread_create(&reader, NULL, read_blocks, kept) == 0, "a thread");
    need(pthread_create(&asker, NULL, ask, NULL) == 0, "a thread");
    write_waves();
    atomic_store(&stop, true);
    pthread_join(reader, NULL);
    pthread_join(asker, NULL);
    need(atomic_load(&n_read) > 0, "nothing was read");
    rig_close(&rig);
    need(rig_open(&rig) == 0, rig.err.text);
    const char *wrong = rig_check(&rig);
    need(wrong == NULL, wrong);
    rig_finish(&rig);
    io_destroy(io);
    return 0;
}
