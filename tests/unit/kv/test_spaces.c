/* Spaces over real folders: what makes room, what a purge leaves, what is held meanwhile. */
#include "daemon/kv/cache_admin.h"
#include "daemon/kv/sequence.h"
#include "tests/unit/kv/spaces_rig.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

TestSuite(kv_spaces, .init = setup, .fini = teardown, .timeout = 60);

/* The calling thread's allocations until one fails; negative: none does. The linker wraps malloc
 * for this program. */
static _Thread_local int allocations = -1;
void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);

void *__wrap_malloc(size_t bytes)
{
    return allocations >= 0 && allocations-- == 0 ? NULL : __real_malloc(bytes);
}

struct purged {
    bool done;
    int result;
};

static void on_purged(void *arg, int result, const struct kv_removed *removed)
{
    *(struct purged *)arg = (struct purged){true, result};
}

static void begin_purge(struct purged *p, const char *realm)
{
    const struct kv_purge how = {on_purged, p};
    *p = (struct purged){0};
    cr_assert(eq(int, kv_cache_purge(cache, realm, &how), 0));
}

/* ---- room -------------------------------------------------------------------------------- */

/* Room for the copy is made by evicting, and not by evicting what is to be copied. */
Test(kv_spaces, what_a_sequence_copies_from_is_not_evicted_for_the_copy)
{
    start(2u << 20, 0);
    struct kv_space *space = open_space("r", 1);
    struct kv_sequence hog, s;
    compute(space, 1);
    kv_sequence_init(&hog, &layout, cache, NULL, false);
    cr_assert(eq(int, kv_sequence_reserve(&hog, (SLAB_BLOCKS - 1) * BLOCK), 0));
    int32_t tokens[BLOCK];
    const struct kv_text text = {tokens, BLOCK, BLOCK};
    fill(tokens, BLOCK, 1);
    tokens[40] = 7;
    kv_sequence_init(&s, &layout, cache, space, false);
    cr_expect(eq(int, kv_sequence_adopt(&s, &text, BLOCK - 1, false), 0));
    cr_expect(eq(u32, s.n_tokens, 0)); /* no memory: it is computed instead */
    cr_expect(is_known(space, 1));
    kv_sequence_finish(&hog);
    cr_expect(eq(int, kv_sequence_adopt(&s, &text, BLOCK - 1, false), 0));
    cr_expect(eq(u32, s.n_tokens, 40));
    cr_expect(eq(int, *(unsigned char *)s.lists[0].pages[0], 1));
    kv_sequence_finish(&s);
}

static int lock_store(const char *realm, uint8_t model)
{
    char path[256];
    snprintf(path, sizeof(path), "%s/%s/%02x000000000000000000000000000000.lock", folder, realm,
             model);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    cr_assert(ge(int, fd, 0));
    cr_assert(eq(int, flock(fd, LOCK_EX | LOCK_NB), 0));
    return fd;
}

/* A store that was locked by somebody is full when it opens: what could not be saved meanwhile
 * takes the place of what was there. */
Test(kv_spaces, a_backlog_is_saved_into_a_full_store)
{
    enum { N = 48 };
    uint64_t bound = (N + 2) * (uint64_t)BLOCK_BYTES;
    start(16u << 20, bound);
    struct kv_space *space = open_space("r", 1);
    for (uint32_t i = 0; i < N; i++) {
        compute(space, i);
        settle();
    }
    stop();
    int fd = lock_store("r", 1);
    start(16u << 20, bound);
    space = open_space("r", 1);
    cr_assert(eq(int, space->state, KV_SPACE_FAILED));
    for (uint32_t i = 0; i < N; i++) {
        compute(space, 100 + i);
    }
    close(fd);
    space->retry_ns = 1;
    kv_cache_poll(cache);
    settle();
    cr_assert(eq(int, space->state, KV_SPACE_OPEN));
    struct kv_cache_stats stats;
    kv_cache_stats(cache, &stats);
    cr_expect(lt(u64, 0, stats.n_evicted_store));
    cr_expect(le(u64, stats.store_bytes, bound));
    cr_expect(eq(u64, stats.n_nodes, space->tree.n_nodes));
    uint32_t n_known = 0;
    for (uint32_t i = 0; i < N; i++) {
        n_known += is_known(space, 100 + i);
    }
    cr_expect(lt(u32, N / 4 * 3, n_known)); /* all are of one second: some of the new may go, too */
}

/* The retry that is due at some time is due now. */
static void retry_now(struct kv_space *space)
{
    cr_expect(le(int, 0, kv_cache_timeout_ms(cache)));
    cr_assert(ne(u64, space->retry_ns, 0));
    space->retry_ns = 1;
    kv_cache_poll(cache);
    settle();
}

/* All that the store may hold is in use: a further block is saved some time after that has ended,
 * though nothing else happens. */
Test(kv_spaces, a_block_that_found_the_store_in_use_is_saved_later)
{
    enum { N = 8 };
    int32_t tokens[N * BLOCK];
    const struct kv_text text = {tokens, N * BLOCK, N * BLOCK};
    struct kv_sequence holder;
    struct kv_cache_stats stats;
    start(16u << 20, 1u << 30);
    struct kv_space *space = open_space("r", 1);
    cache->options.store_bytes_max = (N - 1) * (uint64_t)BLOCK_BYTES;
    compute_chain(space, 1, N - 1);
    settle();
    kv_sequence_init(&holder, &layout, cache, space, false);
    fill(tokens, N * BLOCK, 1);
    cr_assert(eq(int, kv_sequence_adopt(&holder, &text, (N - 1) * BLOCK, false), 0));
    cr_assert(eq(u32, holder.n_tokens, (N - 1) * BLOCK));
    compute(space, 2);
    settle();
    kv_cache_stats(cache, &stats);
    cr_assert(eq(u64, stats.n_saved_bytes, (N - 1) * (uint64_t)BLOCK_BYTES));
    kv_sequence_finish(&holder);
    retry_now(space);
    kv_cache_stats(cache, &stats);
    cr_expect(eq(u64, stats.n_saved_bytes, N * (uint64_t)BLOCK_BYTES));
    cr_expect(eq(int, kv_cache_timeout_ms(cache), -1));
    cr_expect(is_known(space, 2));
}

/* ---- two classes ------------------------------------------------------------------------- */

#define WINDOWED 6u /* blocks of a chain, of which the window sees the last */

static void use_windows(void)
{
    const struct kv_layer_desc layers[] = {{0, 2, 64, 64, GQA_TYPE_F32, GQA_TYPE_F32},
                                           {2 * BLOCK, 2, 64, 64, GQA_TYPE_F32, GQA_TYPE_F32}};
    kv_layout_finish(&layout);
    cr_assert(eq(int, kv_layout_init(&layout, layers, 2), 0));
}

/* A chain that somebody may go on from. tokens (WINDOWED * BLOCK) */
static void compute_windowed(struct kv_space *space, int32_t *tokens)
{
    const struct kv_text text = {tokens, WINDOWED * BLOCK, WINDOWED * BLOCK};
    struct kv_sequence s;
    fill(tokens, WINDOWED * BLOCK, 1);
    kv_sequence_init(&s, &layout, cache, space, false);
    cr_assert(eq(int, kv_sequence_reserve(&s, text.n_tokens), 0));
    kv_sequence_commit(&s, text.n_tokens, &text);
    kv_sequence_checkpoint(&s);
    kv_sequence_finish(&s);
}

/* What a continuation needs of windowed layers is saved late rather than never. */
Test(kv_spaces, windows_that_could_not_be_saved_are_saved_later)
{
    int32_t tokens[WINDOWED * BLOCK];
    const struct kv_text text = {tokens, WINDOWED * BLOCK, WINDOWED * BLOCK};
    struct kv_sequence s;
    use_windows();
    start(16u << 20, 1ull << 30);
    open_space("r", 1);
    stop();
    int fd = lock_store("r", 1);
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    cr_assert(eq(int, space->state, KV_SPACE_FAILED));
    compute_windowed(space, tokens);
    close(fd);
    retry_now(space);
    cr_assert(eq(int, space->state, KV_SPACE_OPEN));
    stop();
    start(16u << 20, 1ull << 30);
    kv_sequence_init(&s, &layout, cache, open_space("r", 1), false);
    while (kv_sequence_adopt(&s, &text, text.n_tokens, false) == -EAGAIN) {
        settle();
    }
    cr_expect(eq(u32, s.n_tokens, text.n_tokens));
    kv_sequence_finish(&s);
}

/* Each class has files of its own. A leaf that has given its block of one, but not of the other,
 * is no reason to keep those before it. */
Test(kv_spaces, a_class_gives_way_to_the_last_block)
{
    int32_t tokens[WINDOWED * BLOCK];
    struct kv_cache_stats stats;
    use_windows();
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    compute_windowed(space, tokens);
    settle();
    stop(); /* and nothing of it is in the arena */
    start(16u << 20, 1ull << 30);
    space = open_space("r", 1);
    cr_assert(eq(u32, space->tree.n_nodes, WINDOWED));
    while (space->tree.n_nodes > 0) {
        cr_assert(lt(u64, 0, kv_space_evict_store(space, 0, BLOCK_BYTES)), "%u nodes are left",
                  space->tree.n_nodes);
    }
    kv_cache_stats(cache, &stats);
    cr_expect(eq(u64, stats.store_bytes, 0));
}

static uint32_t count_fds(void)
{
    uint32_t n = 0;
    DIR *dir = opendir("/proc/self/fd");
    while (readdir(dir) != NULL) {
        n++;
    }
    closedir(dir);
    return n;
}

static uint64_t bytes_found;

static int add_bytes(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    bytes_found += type == FTW_F ? (uint64_t)st->st_blocks * 512 : 0;
    return 0;
}

static uint64_t bytes_on_disk(void)
{
    bytes_found = 0;
    nftw(folder, add_bytes, 16, FTW_PHYS);
    return bytes_found;
}

Test(kv_spaces, stores_that_make_room_leave_nothing_open)
{
    start(16u << 20, 1ull << 30);
    for (uint8_t i = 1; i <= 8; i++) {
        compute(open_space("r", i), i);
        settle();
    }
    stop();
    uint32_t before = count_fds();
    start(16u << 20, 128u << 10);
    settle();
    cr_expect(lt(u64, bytes_on_disk(), 256u << 10));
    stop();
    cr_expect(eq(u32, count_fds(), before));
}

static uint32_t n_stores;

static int add_store(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    n_stores += strstr(path, ".index") != NULL;
    return 0;
}

static uint32_t count_stores(void)
{
    n_stores = 0;
    nftw(folder, add_store, 16, FTW_PHYS);
    return n_stores;
}

/* More spaces than may be open at once, in a folder that is full: what those that were closed have
 * left counts in the bound all the same, and goes. */
Test(kv_spaces, stores_that_were_closed_count)
{
    enum { N = KV_SPACES_MAX + 40 };
    uint64_t bound = 8u << 20;
    start(16u << 20, bound);
    for (uint32_t i = 0; i < N; i++) {
        char realm[16];
        snprintf(realm, sizeof(realm), "r%u", i);
        struct kv_space *space = open_space(realm, 1);
        for (uint32_t k = 0; k < 4; k++) {
            compute(space, k);
            settle();
        }
    }
    settle();
    cr_expect(le(u32, count_stores(), KV_SPACES_MAX));
}

/* ---- a slow disk ------------------------------------------------------------------------- */

/* So many spaces are open, and each has a block that is saved. */
static void fill_spaces(uint8_t n)
{
    for (uint8_t i = 1; i <= n; i++) {
        compute(open_space("r", i), i);
        settle();
    }
}

/* Whoever wants one space more than may be open does not wait until the disk has closed another;
 * which is opened again behind that, with what it had. */
Test(kv_spaces, a_store_is_closed_without_waiting)
{
    struct gate gate;
    start(16u << 20, 1ull << 30);
    fill_spaces(KV_SPACES_MAX);
    shut(&gate);
    begin_space("r", KV_SPACES_MAX + 1);
    cr_expect(eq(u32, cache->n_spaces, KV_SPACES_MAX));
    cr_expect(eq(u32, cache->n_closing, 1));
    struct kv_space *first = begin_space("r", 1);
    cr_expect(eq(u32, cache->n_closing, 2));
    cr_expect(not(kv_space_is_ready(first)));
    open_gate(&gate);
    settle();
    cr_expect(eq(u32, cache->n_closing, 0));
    cr_expect(eq(int, first->state, KV_SPACE_OPEN));
    cr_expect(is_known(first, 1));
    sem_destroy(&gate.opened);
}

/* While the disk does not answer, few are on their way out, and the others stay. */
Test(kv_spaces, few_stores_are_closed_at_once)
{
    struct gate gate;
    start(16u << 20, 1ull << 30);
    fill_spaces(KV_SPACES_MAX);
    shut(&gate);
    for (uint8_t i = 1; i <= KV_CLOSING_MAX + 2; i++) {
        begin_space("r", KV_SPACES_MAX + i);
    }
    cr_expect(eq(u32, cache->n_closing, KV_CLOSING_MAX));
    cr_expect(eq(u32, cache->n_spaces, KV_SPACES_MAX + 2));
    open_gate(&gate);
    settle();
    open_space("r", KV_SPACES_MAX + KV_CLOSING_MAX + 3);
    cr_expect(eq(u32, cache->n_spaces, KV_SPACES_MAX));
    cr_expect(is_known(open_space("r", 1), 1));
    sem_destroy(&gate.opened);
}

static _Atomic uint32_t n_told;

static void count_told(void *arg)
{
    n_told++;
}

/* A cache that ends does not wait for ever: what the io thread is at work on stays as it is, and
 * goes when the disk has answered after all. */
static void end_while_shut(struct gate *gate)
{
    cache->options.wake = count_told;
    cache->end_s = 0;
    cr_expect(not(kv_cache_destroy(cache)));
    uint32_t before = n_told;
    struct gate behind;
    shut(&behind); /* all that the cache had queued */
    open_gate(gate);
    reach_gate(&behind);
    open_gate(&behind);
    cr_expect(eq(u32, n_told, before)); /* the engine is gone */
    cache->end_s = 30;
    cr_expect(kv_cache_destroy(cache));
    cache = NULL;
}

Test(kv_spaces, the_end_does_not_wait_for_a_block_for_ever)
{
    struct gate gate;
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    compute(space, 1);
    settle();
    shut(&gate);
    reach_gate(&gate);
    compute(space, 2);
    begin_space("other", 1);
    end_while_shut(&gate);
    start(16u << 20, 1ull << 30);
    space = open_space("r", 1);
    cr_expect(is_known(space, 1));
    cr_expect(is_known(space, 2));
}

Test(kv_spaces, the_end_does_not_wait_for_a_store_to_close_for_ever)
{
    struct gate gate;
    start(16u << 20, 1ull << 30);
    fill_spaces(KV_CLOSING_MAX + 2);
    shut(&gate);
    reach_gate(&gate);
    end_while_shut(&gate);
    start(16u << 20, 1ull << 30);
    cr_expect(is_known(open_space("r", 1), 1));
    cr_expect(is_known(open_space("r", KV_CLOSING_MAX + 2), KV_CLOSING_MAX + 2));
}

/* Who cannot destroy the cache, since others read from it, has it save what it can. */
Test(kv_spaces, a_cache_settles_before_the_process_ends)
{
    struct gate gate;
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    shut(&gate);
    reach_gate(&gate);
    compute(space, 1);
    cache->end_s = 0;
    cr_expect(not(kv_cache_settle(cache)));
    open_gate(&gate);
    cache->end_s = 30;
    cr_expect(kv_cache_settle(cache));
    cr_expect(not(kv_cache_is_busy(cache)));
    stop();
    start(16u << 20, 1ull << 30);
    cr_expect(is_known(open_space("r", 1), 1));
    sem_destroy(&gate.opened);
}

/* What the end of a store needs was there when it was opened. */
Test(kv_spaces, a_store_is_closed_without_memory)
{
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    compute(space, 1);
    settle();
    allocations = 0;
    bool begun = kv_space_begin_close(space);
    allocations = -1;
    cr_expect(begun);
    cr_expect(eq(u32, cache->n_closing, 1));
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    cr_expect(is_known(open_space("r", 1), 1));
}

/* A purge wipes what is just being closed, and goes by nothing but what is open then. */
Test(kv_spaces, a_purge_takes_a_store_that_is_being_closed)
{
    struct gate gate;
    struct purged purge;
    start(16u << 20, 1ull << 30);
    fill_spaces(KV_SPACES_MAX);
    shut(&gate);
    begin_space("other", 1);
    cr_assert(eq(u32, cache->n_closing, 1));
    begin_purge(&purge, "r");
    open_gate(&gate);
    settle();
    cr_expect(purge.done);
    cr_expect(eq(int, purge.result, 0));
    cr_expect(not(is_known(open_space("r", 1), 1)));
    sem_destroy(&gate.opened);
}

/* ---- what gives way ------------------------------------------------------------------------ */

/* The bound is of the disk: what one store has evicted for the sake of others takes no space. */
Test(kv_spaces, stores_that_gave_way_take_no_space)
{
    enum { N = 100, STORES = 6 };
    uint64_t bound = N * (uint64_t)BLOCK_BYTES;
    start(16u << 20, bound);
    for (uint8_t i = 1; i <= STORES; i++) {
        struct kv_space *space = open_space("r", i);
        for (uint32_t k = 0; k < N; k++) {
            compute(space, k);
            settle();
        }
        cr_expect(le(u64, bytes_on_disk(), bound + bound / 2), "%u stores", i);
    }
    struct kv_space *first = open_space("r", 1);
    for (uint32_t k = 0; k < N; k++) { /* holes are filled again */
        compute(first, 1000 + k);
        settle();
    }
    cr_expect(le(u64, bytes_on_disk(), bound + bound / 2));
    stop();
    start(16u << 20, bound);
    first = open_space("r", 1);
    uint32_t n_known = 0;
    for (uint32_t k = 0; k < N; k++) {
        n_known += is_known(first, 1000 + k);
    }
    cr_expect(lt(u32, N / 2, n_known));
    struct kv_cache_stats stats;
    kv_cache_stats(cache, &stats);
    cr_expect(eq(u64, stats.n_corrupt, 0));
}

/* ---- purges ------------------------------------------------------------------------------ */

/* A model of the realm that comes back while a purge is under way: what it left on the disk goes
 * as well. */
Test(kv_spaces, a_purge_takes_a_store_that_is_wanted_meanwhile)
{
    struct purged purge;
    start(16u << 20, 1ull << 30);
    compute(open_space("r", 1), 1);
    compute(open_space("r", 2), 2);
    compute(open_space("other", 2), 2);
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    cr_assert(is_known(open_space("r", 1), 1));
    begin_purge(&purge, "r");
    struct kv_space *late = begin_space("r", 2), *other = begin_space("other", 2);
    settle();
    cr_expect(purge.done);
    cr_expect(eq(int, purge.result, 0));
    cr_expect(kv_space_is_ready(late));
    cr_expect(eq(int, late->state, KV_SPACE_OPEN));
    cr_expect(not(is_known(late, 2)));
    cr_expect(is_known(other, 2));
    compute(late, 3);
    settle();
    stop();
    start(16u << 20, 1ull << 30);
    late = open_space("r", 2);
    cr_expect(is_known(late, 3));
    cr_expect(not(is_known(late, 2)));
}

/* What another process has open is not wiped under it, and the purge says that it is not gone. */
Test(kv_spaces, a_purge_tells_of_a_store_that_is_locked)
{
    struct purged purge;
    start(16u << 20, 1ull << 30);
    compute(open_space("r", 1), 1);
    settle();
    stop();
    int fd = lock_store("r", 1);
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    cr_assert(eq(int, space->state, KV_SPACE_FAILED));
    begin_purge(&purge, "r");
    settle();
    cr_expect(purge.done);
    cr_expect(eq(int, purge.result, -EWOULDBLOCK));
    cr_expect(lt(u64, BLOCK_BYTES, bytes_on_disk()));
    close(fd);
    begin_purge(&purge, "r");
    settle();
    cr_expect(purge.done);
    cr_expect(eq(int, purge.result, 0));
    cr_expect(eq(u64, bytes_on_disk(), 0));
}

/* Places that stayed would name slots that are holes: without memory nothing is wiped at all. */
Test(kv_spaces, a_purge_without_memory_fails_before_it_wipes)
{
    struct purged purge = {0};
    const struct kv_purge how = {on_purged, &purge};
    start(16u << 20, 1ull << 30);
    struct kv_space *spaces[] = {open_space("r", 1), open_space("r", 2)};
    compute(spaces[0], 1);
    compute(spaces[1], 2);
    settle();
    for (int nth = 0; nth < 2; nth++) {
        allocations = nth;
        cr_expect(eq(int, kv_cache_purge(cache, "r", &how), -ENOMEM));
        cr_expect(eq(int, allocations, -1));
        allocations = -1;
        cr_expect(not(kv_cache_is_busy(cache)));
        cr_expect(not(kv_cache_is_purging(cache, "r")));
        cr_expect(not(purge.done));
    }
    cr_expect(lt(u64, BLOCK_BYTES, bytes_on_disk()));
    begin_purge(&purge, "r");
    settle();
    cr_expect(purge.done);
    cr_expect(eq(int, purge.result, 0));
    cr_expect(not(is_known(spaces[0], 1)));
    cr_expect(not(is_known(spaces[1], 2)));
}

Test(kv_spaces, a_drop_without_memory_says_so)
{
    struct kv_removed removed;
    start(16u << 20, 1ull << 30);
    struct kv_space *space = open_space("r", 1);
    compute(space, 1);
    settle();
    allocations = 0;
    cr_expect(eq(int, kv_cache_drop(cache, "r", NULL, &removed), -ENOMEM));
    cr_expect(eq(u64, removed.n_blocks, 0));
    cr_expect(is_known(space, 1));
    cr_expect(eq(int, kv_cache_drop(cache, "r", NULL, &removed), 0));
    cr_expect(eq(u64, removed.n_blocks, 1));
    cr_expect(not(is_known(space, 1)));
}
