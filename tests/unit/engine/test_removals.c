/* What people ask of the cache, and those whose business it is not: a drop or purge of one realm,
 * a stream of calls, and requests that come while the engine looks at its clock. */
#include "daemon/sched/engine_internal.h"
#include "tests/unit/engine/driver.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <ftw.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MANY (64ull << 20)

static struct io *kv_io;
static char kv_folder[128];

static void setup(void)
{
    struct tiny t = tiny_default();
    t.n_ctx = 2048;
    driver_setup(&t);
    snprintf(kv_folder, sizeof(kv_folder), "%s", folder_path(&parts.folder, "kv"));
    cr_assert(eq(int, mkdir(kv_folder, 0700), 0));
    cr_assert(eq(int, io_create(false, &kv_io), 0));
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

TestSuite(removals, .init = setup, .fini = teardown, .timeout = 60);

static void start(bool on_disk)
{
    const struct engine_options o = {
        .n_parallel = 16,
        .n_queue = 64,
        .kv = {.arena_bytes_max = MANY,
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

static void moment(long ns)
{
    const struct timespec t = {.tv_nsec = ns};
    nanosleep(&t, NULL);
}

/* ---- calls ------------------------------------------------------------------------------- */

struct asked {
    struct engine_kv_call call;
    sem_t done;
};

static void on_done(void *arg)
{
    sem_post(&((struct asked *)arg)->done);
}

static void ask(struct asked *a, enum engine_kv_op op, const char *realm)
{
    a->call = (struct engine_kv_call){.op = op, .done = on_done, .arg = a};
    snprintf(a->call.realm, sizeof(a->call.realm), "%s", realm);
    sem_init(&a->done, 0, 0);
    cr_assert(eq(int, engine_kv(engine, &a->call), 0));
}

static void wait_asked(struct asked *a)
{
    while (sem_wait(&a->done) < 0) {
    }
    cr_expect(eq(int, a->call.result, 0));
    free(a->call.spaces);
}

/* Who purges its own prompts does not have others compute theirs again. */
Test(removals, a_purge_of_one_realm_leaves_the_others_alone)
{
    start(false);
    struct result *other = make_shared("b", 2, 1500, 40);
    struct result *alone = make(REQUEST_GENERATE, 3, 1500, 40); /* shares nothing */
    struct result *own = make_shared("a", 1, 400, 1);
    struct asked purge;
    submit(own);
    wait_done(own);
    submit(other);
    submit(alone);
    uint32_t n_purges = 0;
    for (; !other->done || !alone->done; n_purges++) {
        ask(&purge, ENGINE_KV_PURGE, "a");
        wait_asked(&purge);
        take_events(true);
    }
    cr_expect(lt(u32, 10, n_purges));
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(eq(u64, s.n_prompt_tokens, 400 + 1500 + 1500));
    check_nothing_used();
}

/* ---- imports ----------------------------------------------------------------------------- */

static const int32_t imported_tokens[GQA_KV_BLOCK_TOKENS] = {1, 2, 3};

/* The first block of an import, whose bytes are still to be written. */
static void begin_import(struct asked *a, const char *realm, uint32_t uid)
{
    const struct kv_layout *layout = model_kv_layout(model);
    uint64_t bytes = layout->classes[0].block_bytes;
    *a = (struct asked){
        .call = {.op = ENGINE_KV_IMPORT,
                 .model = model_kv_identity(model),
                 .uid = uid,
                 .layout = layout,
                 .piece = {.tokens = imported_tokens, .bytes = bytes, .data_bytes = bytes},
                 .positions_max = 4,
                 .done = on_done,
                 .arg = a}};
    snprintf(a->call.realm, sizeof(a->call.realm), "%s", realm);
    sem_init(&a->done, 0, 0);
    cr_assert(eq(int, engine_kv(engine, &a->call), 0));
    wait_asked(a);
    cr_assert(ne(ptr, a->call.writing, NULL));
}

static void end_writing(struct asked *a)
{
    memset(a->call.to, 0, a->call.piece.bytes);
    atomic_store_explicit(a->call.writing, false, memory_order_release);
    engine_kick(engine);
}

static int keep(struct asked *a)
{
    a->call.op = ENGINE_KV_IMPORT_KEEP;
    cr_assert(eq(int, engine_kv(engine, &a->call), 0));
    while (sem_wait(&a->done) < 0) {
    }
    return a->call.result;
}

/* What was under way into a realm that is purged does not enter it afterwards: once a piece that is
 * just being written is there, it goes, too. */
Test(removals, a_purge_ends_the_imports_of_its_realm)
{
    struct asked own, other, purge, list;
    start(false);
    begin_import(&own, "a", 1);
    begin_import(&other, "b", 2);
    ask(&purge, ENGINE_KV_PURGE, "a");
    ask(&list, ENGINE_KV_LIST, "b");
    wait_asked(&list);
    cr_expect(lt(int, sem_trywait(&purge.done), 0));
    end_writing(&own);
    wait_asked(&purge);
    cr_expect(eq(int, keep(&own), -ESTALE));
    end_writing(&other);
    cr_expect(eq(int, keep(&other), 0));
    cr_expect(eq(u32, other.call.n_new_tokens, GQA_KV_BLOCK_TOKENS));
}

/* It is not idle while a piece is being written, however long that takes: nothing is due then. */
Test(removals, an_import_that_is_written_to_wakes_nobody)
{
    struct asked import;
    start(false);
    cr_expect(eq(int, engine_transfer_timeout_ms(engine), -1));
    begin_import(&import, "a", 1);
    cr_expect(eq(int, engine_transfer_timeout_ms(engine), -1));
    end_writing(&import);
    cr_expect(lt(int, 0, engine_transfer_timeout_ms(engine)));
}

/* ---- a slow disk ------------------------------------------------------------------------- */

static sem_t io_begun, io_may_go_on;

static int hold_io(void *arg)
{
    sem_post(&io_begun);
    while (sem_wait(&io_may_go_on) < 0) {
    }
    return 0;
}

static void on_io_done(void *arg, int result)
{
}

/* A drop waits for what is being saved of its realm, however long the disk takes: requests of the
 * realm wait with it, those of others do not. */
Test(removals, a_drop_that_waits_for_the_disk_holds_up_its_own_realm_only)
{
    struct io_call_job job = {.fn = hold_io, .done = on_io_done};
    sem_init(&io_begun, 0, 0);
    sem_init(&io_may_go_on, 0, 0);
    start(true);
    struct result *warm = make_shared("a", 1, 400, 1);
    submit(warm); /* its store is open from now on */
    wait_done(warm);
    cr_assert(eq(int, io_submit_call(kv_io, &job), 0));
    while (sem_wait(&io_begun) < 0) {
    }
    struct result *saved = make_shared("a", 2, 400, 1);
    submit(saved); /* its blocks wait for the disk */
    wait_done(saved);
    struct asked drop;
    ask(&drop, ENGINE_KV_DROP, "a");
    struct result *own = make_shared("a", 3, 200, 4);
    struct result *other = make(REQUEST_GENERATE, 4, 1000, 30);
    submit(own);
    submit(other);
    wait_done(other);
    cr_expect(eq(int, other->request->finish, FINISH_LENGTH));
    cr_expect(not(own->done));
    cr_expect(eq(u32, own->n_tokens, 0));
    cr_expect(lt(int, sem_trywait(&drop.done), 0));
    sem_post(&io_may_go_on);
    wait_asked(&drop);
    wait_done(own);
    cr_expect(eq(int, own->request->finish, FINISH_LENGTH));
    cr_expect(lt(u64, 0, drop.call.removed.n_blocks));
}

/* Who drops while its own store is being opened holds up its own calls, in their order,
 * but nobody else's: they are answered while the disk has not. */
Test(removals, a_drop_that_waits_for_the_disk_holds_up_no_calls_of_others)
{
    struct io_call_job job = {.fn = hold_io, .done = on_io_done};
    struct asked drop, own, own_drop, list;
    sem_init(&io_begun, 0, 0);
    sem_init(&io_may_go_on, 0, 0);
    start(true);
    struct result *warm = make_shared("b", 1, 400, 1);
    submit(warm);
    wait_done(warm);
    cr_assert(eq(int, io_submit_call(kv_io, &job), 0));
    while (sem_wait(&io_begun) < 0) {
    }
    struct result *opens = make_shared("a", 2, 400, 1);
    struct result *other = make(REQUEST_GENERATE, 3, 64, 1); /* a step: the store is being opened */
    submit(opens);
    submit(other);
    wait_done(other);
    ask(&drop, ENGINE_KV_DROP, "a");
    ask(&own, ENGINE_KV_LIST, "a");
    ask(&own_drop, ENGINE_KV_DROP, "a");
    ask(&list, ENGINE_KV_LIST, "b");
    wait_asked(&list);
    cr_expect(eq(sz, list.call.n_spaces, 1));
    cr_expect(lt(int, sem_trywait(&drop.done), 0));
    cr_expect(lt(int, sem_trywait(&own.done), 0));
    cr_expect(lt(int, sem_trywait(&own_drop.done), 0));
    sem_post(&io_may_go_on);
    wait_asked(&drop);
    wait_asked(&own);
    wait_asked(&own_drop);
    wait_done(opens);
    cr_expect(eq(sz, own.call.n_spaces, 1));
}

/* ---- a stream of calls ------------------------------------------------------------------- */

#define N_CALLS 64u

static uint64_t steps_at[N_CALLS];
static atomic_uint n_told;

/* The engine thread. A call that takes a millisecond. */
static void on_slow_done(void *arg)
{
    struct engine_stats s;
    struct engine_kv_call *call = arg;
    engine_stats(engine, &s);
    steps_at[n_told++] = s.n_steps;
    moment(1000000);
    free(call->spaces);
}

Test(removals, many_calls_leave_steps_between_them)
{
    static struct engine_kv_call calls[N_CALLS];
    start(false);
    struct result *r = make(REQUEST_GENERATE, 1, 64, 500);
    driver_hold(true);
    submit(r);
    wait_tokens(r, 1);
    for (uint32_t i = 0; i < N_CALLS; i++) {
        calls[i] = (struct engine_kv_call){
            .op = ENGINE_KV_LIST, .realm = "a", .done = on_slow_done, .arg = &calls[i]};
        cr_assert(eq(int, engine_kv(engine, &calls[i]), 0));
    }
    driver_hold(false);
    while (atomic_load(&n_told) < N_CALLS) {
        moment(1000000);
    }
    wait_done(r);
    cr_expect(ge(u64, steps_at[N_CALLS - 1], steps_at[0] + N_CALLS / 4));
}

/* ---- the clock --------------------------------------------------------------------------- */

int __real_clock_gettime(clockid_t clock, struct timespec *ret);
int __wrap_clock_gettime(clockid_t clock, struct timespec *ret);

static atomic_bool looks_slowly;
static pthread_t main_thread;

/* What others read of the clock is old when they go on. */
int __wrap_clock_gettime(clockid_t clock, struct timespec *ret)
{
    int rc = __real_clock_gettime(clock, ret);
    if (atomic_load(&looks_slowly) && !pthread_equal(pthread_self(), main_thread)) {
        moment(200000);
    }
    return rc;
}

/* A request may come between the engine's look at the clock and its look at the queue. */
Test(removals, a_deadline_counts_from_when_the_request_came)
{
    start(false);
    main_thread = pthread_self();
    atomic_store(&looks_slowly, true);
    struct result *busy = make(REQUEST_GENERATE, 9, 64, 100);
    submit(busy);
    for (uint32_t i = 0; i < 60; i++) {
        struct result *r = make(REQUEST_GENERATE, i, 10, 1);
        r->request->deadline_ms = 3600000;
        submit(r);
        moment((long)(i * 37 % 50) * 10000);
        take_events(true);
    }
    wait_all();
    atomic_store(&looks_slowly, false);
    for (uint32_t i = 0; i < n_results; i++) {
        cr_expect(eq(int, results[i].request->finish, FINISH_LENGTH), "%u: %s", i,
                  results[i].request->error_message);
    }
}

/* ---- the end ----------------------------------------------------------------------------- */

static void ask_transfer(struct asked *a, enum engine_kv_op op)
{
    a->call.op = op;
    a->call.done = on_done;
    a->call.arg = a;
    a->call.model = model_kv_identity(model);
    a->call.layout = model_kv_layout(model);
    snprintf(a->call.realm, sizeof(a->call.realm), "a");
    sem_init(&a->done, 0, 0);
    cr_assert(eq(int, engine_kv(engine, &a->call), 0));
    wait_asked(a);
}

/* A task of the pool may copy longer than anybody waits for the daemon's calls to end. */
Test(removals, what_is_being_copied_stays_until_the_engine_is_destroyed)
{
    static uint8_t before[1 << 20], after[1 << 20];
    start(false);
    struct result *r = make_shared("a", 1, 200, 1);
    submit(r);
    wait_done(r);

    struct asked out = {.call = {.tokens = r->request->tokens, .n_tokens = r->request->n_tokens}};
    ask_transfer(&out, ENGINE_KV_EXPORT);
    struct kv_export *x = out.call.export;
    size_t bytes = x->blocks[0].bytes < sizeof(before) ? x->blocks[0].bytes : sizeof(before);
    cr_assert(eq(int, kv_export_read(x, 0, 0, bytes, before), 0));
    struct asked in = {
        .call = {.positions_max = 2048 / GQA_KV_BLOCK_TOKENS,
                 .piece = {.tokens = x->tokens, .bytes = x->blocks[0].bytes, .data_bytes = bytes}}};
    ask_transfer(&in, ENGINE_KV_IMPORT);
    cr_assert(in.call.to != NULL);

    engine_stop(engine);
    cr_expect(eq(int, kv_export_read(x, 0, 0, bytes, after), 0));
    cr_expect(memcmp(before, after, bytes) == 0);
    memcpy(in.call.to, before, bytes);
    atomic_store_explicit(in.call.writing, false, memory_order_release);
    engine_kick(engine);
    out.call.op = ENGINE_KV_EXPORT_END;
    cr_expect(eq(int, engine_kv(engine, &out.call), -ESHUTDOWN));
    engine_stop(engine);
}
