/* The engine with the KV cache: what is adopted, from memory and from disk, and that no token
 * differs for it. */
#include "daemon/kv/guard.h"
#include "tests/unit/engine/driver.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <fcntl.h>
#include <ftw.h>
#include <glob.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MANY (64ull << 20)

static struct io *kv_io;
static char kv_folder[128];

static void setup_model(uint32_t n_ctx)
{
    struct tiny t = tiny_default();
    t.n_ctx = n_ctx;
    driver_setup(&t);
    snprintf(kv_folder, sizeof(kv_folder), "%s", folder_path(&parts.folder, "kv"));
    cr_assert(eq(int, mkdir(kv_folder, 0700), 0));
    cr_assert(eq(int, io_create(false, &kv_io), 0));
}

static void setup(void)
{
    setup_model(2048);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    return remove(path);
}

static void teardown(void)
{
    driver_stop();
    io_destroy(kv_io);
    nftw(kv_folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    driver_teardown();
}

TestSuite(cache, .init = setup, .fini = teardown, .timeout = 120);

/* An engine whose cache lives in memory, or also on disk. */
static void start(uint64_t kv_bytes, bool on_disk)
{
    const struct engine_options o = {
        .n_parallel = 16,
        .n_queue = 64,
        .kv = {.arena_bytes_max = kv_bytes,
               .folder = on_disk ? kv_folder : NULL,
               .io = on_disk ? kv_io : NULL,
               .store_bytes_max = 1ull << 30,
               .pool = parts.pool},
    };
    driver_start(&o);
}

static struct result *make_shared(const char *realm, uint32_t seed, uint32_t n, uint32_t n_predict)
{
    struct result *r = make(REQUEST_GENERATE, seed, n, n_predict);
    snprintf(r->request->realm, sizeof(r->request->realm), "%s", realm);
    return r;
}

static struct result *run(struct result *r)
{
    submit(r);
    wait_done(r);
    cr_assert(eq(int, r->request->finish, FINISH_LENGTH), "%s", r->request->error_message);
    return r;
}

/* The same prompt without any cache. */
static struct result *run_cold(uint32_t seed, uint32_t n, uint32_t n_predict)
{
    return run(make(REQUEST_GENERATE, seed, n, n_predict));
}

static uint32_t expected_blocks(uint32_t n)
{
    return (n - 1) / 64;
}

/* Waits until nothing is being saved. */
static void wait_for_idle_cache(struct engine_stats *ret)
{
    do {
        sched_yield();
        engine_stats(engine, ret);
    } while (ret->kv.n_pending > 0);
}

static int damage_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    bool is_data = type == FTW_F && strstr(path, ".c0") != NULL;
    int fd = is_data ? open(path, O_WRONLY | O_CLOEXEC) : -1;
    for (off_t at = 5000; is_data && at < st->st_size; at += 40000) {
        cr_assert(eq(i64, pwrite(fd, "damage", 6, at), 6));
    }
    close(fd);
    return 0;
}

static void damage_data_files(void)
{
    nftw(kv_folder, damage_one, 16, FTW_PHYS);
}

static int truncate_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    bool is_data = type == FTW_F && strstr(path, ".c0") != NULL;
    cr_assert(not(is_data && truncate(path, 4096) < 0));
    return 0;
}

static void truncate_data_files(void)
{
    nftw(kv_folder, truncate_one, 16, FTW_PHYS);
}

/* Prompts of every length around block boundaries: again, all whole blocks but the last token's are
 * adopted, and the beginning of that one is copied where it was full. */
Test(cache, a_prompt_again_is_adopted_and_gives_the_same_tokens)
{
    static const uint32_t lengths[] = {1, 63, 64, 65, 127, 128, 129, 300, 640};
    start(MANY, false);
    for (uint32_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        uint32_t n = lengths[i];
        struct result *cold = run_cold(i, n, 3);
        struct result *first = run(make_shared("a", i, n, 3));
        struct result *again = run(make_shared("a", i, n, 3));
        check_same(cold, first);
        check_same(cold, again);
        cr_expect(eq(u32, first->request->n_cached, 0));
        cr_expect(eq(u32, again->request->hit_blocks, expected_blocks(n)));
        /* Two generated tokens were computed behind the prompt. */
        uint32_t copied = (n - 1) % 64 + 3 >= 64 ? (n - 1) % 64 : 0;
        cr_expect(eq(u32, again->request->n_cached, expected_blocks(n) * 64 + copied));
    }
    check_nothing_used();
}

/* Another continuation: whole blocks, then the common beginning of one. */
Test(cache, a_prompt_that_goes_on_differently_takes_what_is_common)
{
    start(MANY, false);
    run(make_shared("a", 1, 300, 1));
    for (uint32_t at = 100; at < 300; at += 33) {
        struct result *cold = make(REQUEST_GENERATE, 1, 300, 8);
        struct result *warm = make_shared("a", 1, 300, 8);
        for (uint32_t i = at; i < 300; i++) {
            cold->request->tokens[i] = warm->request->tokens[i] = (int32_t)(3 + (i + at) % 50);
        }
        run(cold);
        run(warm);
        check_same(cold, warm);
        cr_expect(ge(u32, warm->request->n_cached, at / 64 * 64));
        cr_expect(ge(u32, warm->request->n_cached, at < 256 ? at : 256), "at %u", at);
    }
}

/* A conversation: the next prompt holds the answer to the first one. */
Test(cache, what_was_generated_is_adopted_by_the_next_turn)
{
    start(MANY, false);
    struct result *first = run(make_shared("a", 2, 150, 200));
    struct result *next = make_shared("a", 2, 150, 40), *cold = make(REQUEST_GENERATE, 2, 150, 40);
    struct result *both[] = {next, cold};
    for (uint32_t i = 0; i < 2; i++) {
        struct request *r = both[i]->request;
        r->tokens = realloc(r->tokens, 400 * sizeof(*r->tokens));
        memcpy(r->tokens + 150, first->tokens, 200 * sizeof(*r->tokens));
        for (uint32_t k = 350; k < 400; k++) {
            r->tokens[k] = (int32_t)(5 + k % 90);
        }
        r->n_tokens = 400;
    }
    run(next);
    run(cold);
    check_same(cold, next);
    cr_expect(eq(u32, next->request->hit_blocks, 349 / 64));
}

Test(cache, realms_do_not_share)
{
    start(MANY, false);
    run(make_shared("a", 1, 300, 1));
    cr_expect(eq(u32, run(make_shared("b", 1, 300, 1))->request->n_cached, 0));
    cr_expect(lt(u32, 0, run(make_shared("b", 1, 300, 1))->request->n_cached));
    cr_expect(eq(u32, run_cold(1, 300, 1)->request->n_cached, 0));
}

/* Many at the same instant: the first computes the prefix, the others take it. */
Test(cache, a_prefix_is_computed_once_for_requests_that_come_together)
{
    start(MANY, false);
    struct result *cold = run_cold(7, 1000, 5);
    struct engine_stats before, after;
    engine_stats(engine, &before);
    struct result *many[8];
    for (uint32_t i = 0; i < 8; i++) {
        many[i] = make_shared("a", 7, 1000, 5);
    }
    for (uint32_t i = 0; i < 8; i++) {
        submit(many[i]);
    }
    wait_all();
    engine_stats(engine, &after);
    for (uint32_t i = 0; i < 8; i++) {
        check_same(cold, many[i]);
        cr_expect(eq(u32, many[i]->request->n_cached, i == 0 ? 0 : 999 / 64 * 64));
    }
    /* 1,000 once, and 1,000 % 64 of each other. */
    cr_expect(eq(u64, after.n_prompt_tokens - before.n_prompt_tokens, 1000 + 7 * (1000 % 64)));
}

/* An arena for little more than one sequence: nothing fails, the old gives way. */
Test(cache, a_full_cache_makes_room)
{
    start(2u << 20, false);
    for (uint32_t i = 0; i < 24; i++) {
        struct result *cold = run_cold(i, 1500, 2);
        check_same(cold, run(make_shared("a", i, 1500, 2)));
        request_destroy(results[0].request);
        request_destroy(results[1].request);
        n_results = 0;
    }
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(lt(u64, 0, s.kv.n_evicted_arena));
    check_nothing_used();
}

/* ---- the store --------------------------------------------------------------------------- */

/* Ends the engine and starts another one on the same files. */
static void restart(void)
{
    driver_stop();
    start(MANY, true);
}

Test(cache, a_restarted_engine_goes_on_from_the_store)
{
    start(MANY, true);
    struct result *cold = run_cold(3, 700, 6);
    check_same(cold, run(make_shared("a", 3, 700, 6)));
    for (uint32_t i = 0; i < 3; i++) {
        restart();
        struct result *warm = run(make_shared("a", 3, 700, 6));
        check_same(cold, warm);
        cr_expect(eq(u32, warm->request->hit_blocks, 699 / 64));
        cr_expect(eq(u32, warm->request->store_blocks, 699 / 64));
    }
    cr_expect(eq(u32, run(make_shared("b", 3, 700, 6))->request->n_cached, 0));
}

/* Once saved, blocks are served from the mapping: the arena's copies go when nobody uses them. */
Test(cache, saved_blocks_leave_the_arena)
{
    start(MANY, true);
    run(make_shared("a", 3, 700, 6));
    struct engine_stats s;
    do {
        wait_for_idle_cache(&s);
    } while (s.kv.arena_bytes_cached > 0);
    cr_expect(lt(u64, 0, s.kv.store_bytes));
    struct result *again = run(make_shared("a", 3, 700, 6));
    cr_expect(eq(u32, again->request->store_blocks, 699 / 64));
}

/* A block that is not what was written is found out, and computed again. */
Test(cache, damaged_blocks_are_computed_again)
{
    start(MANY, true);
    struct result *cold = run_cold(4, 700, 6);
    run(make_shared("a", 4, 700, 6));
    driver_stop();
    damage_data_files();
    start(MANY, true);
    struct result *warm = run(make_shared("a", 4, 700, 6));
    check_same(cold, warm);
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(lt(u64, 0, s.kv.n_corrupt));
    cr_expect(lt(u32, warm->request->hit_blocks, 699 / 64));
    struct result *again = run(make_shared("a", 4, 700, 6));
    check_same(cold, again);
    cr_expect(eq(u32, again->request->hit_blocks, 699 / 64));
}

/* A folder that cannot be used costs persistence, and nothing else. */
Test(cache, without_its_folder_the_cache_is_in_memory)
{
    cr_assert(eq(int, rmdir(kv_folder), 0));
    int fd = open(kv_folder, O_CREAT | O_WRONLY | O_CLOEXEC, 0600); /* no folder, but a file */
    close(fd);
    start(MANY, true);
    struct result *cold = run_cold(4, 300, 6);
    check_same(cold, run(make_shared("a", 4, 300, 6)));
    struct result *again = run(make_shared("a", 4, 300, 6));
    check_same(cold, again);
    cr_expect(eq(u32, again->request->hit_blocks, 299 / 64));
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(ne(int, strcmp(s.kv.store_state, "ok"), 0));
}

/* A file that shrinks while its blocks are mapped: the step that read zeros is thrown away, and the
 * request goes on as if nothing had been. */
Test(cache, a_file_truncated_under_a_running_sequence_changes_no_token)
{
    kv_guard_install();
    start(MANY, true);
    struct result *cold = run_cold(5, 700, 300);
    run(make_shared("a", 5, 700, 1));
    restart();
    struct result *warm = make_shared("a", 5, 700, 300);
    driver_hold(true);
    submit(warm);
    wait_tokens(warm, 20);
    truncate_data_files();
    driver_hold(false);
    wait_done(warm);
    check_same(cold, warm);
    cr_expect(lt(u32, 0, warm->request->store_blocks));
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(lt(u64, 0, s.kv.n_faults));
}

/* The fault of one sequence makes all begin anew: rows of logits that were sent are not sent again.
 */
Test(cache, rows_are_sent_once_whatever_is_computed_again)
{
    kv_guard_install();
    start(MANY, true);
    struct result *alone = make(REQUEST_LOGITS, 6, 2000, 0);
    submit(alone);
    wait_done(alone);
    run(make_shared("a", 5, 700, 1));
    restart();
    struct result *warm = make_shared("a", 5, 700, 300), *rows = make(REQUEST_LOGITS, 6, 2000, 0);
    driver_hold(true);
    submit(warm);
    submit(rows);
    wait_tokens(warm, 5);
    truncate_data_files();
    driver_hold(false);
    wait_done(warm);
    wait_done(rows);
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(lt(u64, 0, s.kv.n_faults));
    cr_expect(not(rows->out_of_order));
    cr_assert(eq(u32, rows->n_rows, alone->n_rows));
    cr_expect(eq(int, memcmp(rows->rows, alone->rows, 2000 * TINY_VOCAB * sizeof(float)), 0));
}

/* More prompts than the store may hold: the old ones go, and nothing fails. */
Test(cache, a_full_store_makes_room)
{
    const struct engine_options o = {
        .n_parallel = 4,
        .n_queue = 16,
        .kv = {.arena_bytes_max = MANY,
               .folder = kv_folder,
               .io = kv_io,
               .store_bytes_max = 2u << 20,
               .pool = parts.pool},
    };
    driver_start(&o);
    struct engine_stats s;
    for (uint32_t i = 0; i < 12; i++) {
        run(make_shared("a", i, 1500, 2));
        wait_for_idle_cache(&s);
        cr_expect(le(u64, s.kv.store_bytes, 2u << 20));
    }
    cr_expect(lt(u64, 0, s.kv.n_evicted_store));
    struct result *last = run(make_shared("a", 11, 1500, 2));
    cr_expect(lt(u32, 0, last->request->hit_blocks));
}

static int count_files(const char *what)
{
    char command[256];
    snprintf(command, sizeof(command), "%s/%s", kv_folder, what);
    glob_t found;
    int n = glob(command, 0, NULL, &found) == 0 ? (int)found.gl_pathc : 0;
    globfree(&found);
    return n;
}

/* Stores of realms that nobody uses any more count in the bound, and go first. */
Test(cache, closed_stores_make_room_before_anything_else)
{
    start(MANY, true);
    struct engine_stats s;
    for (uint32_t i = 0; i < 3; i++) {
        char realm[16];
        snprintf(realm, sizeof(realm), "r%u", i);
        run(make_shared(realm, i, 1500, 1));
    }
    wait_for_idle_cache(&s);
    uint64_t bytes = s.kv.store_bytes;
    driver_stop();
    cr_assert(eq(int, count_files("r*/*.index"), 3));
    const struct engine_options o = {
        .n_parallel = 4,
        .n_queue = 16,
        .kv = {.arena_bytes_max = MANY,
               .folder = kv_folder,
               .io = kv_io,
               .store_bytes_max = bytes + (1u << 20),
               .pool = parts.pool},
    };
    driver_start(&o);
    for (uint32_t i = 10; i < 14; i++) {
        run(make_shared("new", i, 1500, 1));
    }
    wait_for_idle_cache(&s);
    cr_expect(lt(int, count_files("r*/*.index"), 3));
    cr_expect(eq(u32, run(make_shared("new", 13, 1500, 1))->request->hit_blocks, 1499 / 64));
}

/* ---- pins and quotas --------------------------------------------------------------------- */

static struct result *pin(const char *realm, uint32_t seed, uint32_t n, int how)
{
    struct result *r = make_shared(realm, seed, n, 0);
    r->request->pin = how;
    return run(r);
}

/* A quarter of what may be kept can be pinned by one realm, half by all; and when running requests
 * need the memory, they get it. */
Test(cache, pins_leave_room)
{
    start(8u << 20, false);
    uint32_t pinned[3] = {0};
    for (uint32_t i = 0; i < 90; i++) {
        char realm[2] = {(char)('a' + i / 30), '\0'};
        pinned[i / 30] += pin(realm, i, 1024, 1)->request->n_pinned;
        request_destroy(results[0].request);
        n_results = 0;
    }
    cr_expect(le(u32, pinned[0], 16 * 1024));
    cr_expect(lt(u32, 8 * 1024, pinned[0]));
    cr_expect(lt(u32, 4 * 1024, pinned[1]));
    cr_expect(le(u32, pinned[0] + pinned[1] + pinned[2], 32 * 1024));
    for (uint32_t i = 60; i < 66; i++) {
        run(make_shared("a", i, 2000, 2));
    }
    check_nothing_used();
}

Test(cache, a_realm_has_a_bound_of_its_own)
{
    const struct engine_options o = {
        .n_parallel = 4,
        .n_queue = 16,
        .kv = {.arena_bytes_max = MANY,
               .folder = kv_folder,
               .io = kv_io,
               .store_bytes_max = 1ull << 30,
               .store_bytes_per_realm = 1u << 20,
               .pool = parts.pool},
    };
    driver_start(&o);
    struct engine_stats s;
    run(make_shared("b", 99, 1500, 1));
    wait_for_idle_cache(&s);
    uint64_t of_b = s.kv.store_bytes;
    for (uint32_t i = 0; i < 8; i++) {
        run(make_shared("a", i, 1500, 1));
        wait_for_idle_cache(&s);
        cr_expect(le(u64, s.kv.store_bytes, of_b + (1u << 20)));
    }
    cr_expect(lt(u64, 0, s.kv.n_evicted_store));
    cr_expect(eq(u32, run(make_shared("b", 99, 1500, 1))->request->hit_blocks, 1499 / 64));
}
