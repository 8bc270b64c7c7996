/* Every crash: scenarios run on a disk that remembers, and after every operation of its log the
 * folders that a crash might leave are made and opened.
 *
 * A crash keeps what was synced, and of what was not: all, none, all but one, one alone, two in the
 * other order, the last write torn at every 512 bytes. Whatever it leaves must open; what was
 * acknowledged and not forgotten must verify; what verifies must have its own bytes; what was
 * dropped for good must not be named, and what was purged must not be found in any file. And the
 * store must go on: a block is written then, and everything holds after the next opening too.
 *
 * By default sequences of two operations, a few seconds; GQAD_TEST_LONG=1: of three, with crashes
 * while the crash is being recovered from. */
#include "tests/unit/kv/rig.h"

#include "daemon/kv/store_internal.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BYTES_MAX  (256u << 10)
#define AFTERWARDS RIG_MAX /* the block that is written after a crash */
#define MAX_LENGTH 40

static struct rig before, after; /* the one that crashes, and the one that finds */
static unsigned long n_states, n_failed;
static bool long_run;

/* ---- scenarios ----------------------------------------------------------------------------- */

static unsigned next_block;

static unsigned oldest_stored(const struct rig *r)
{
    for (unsigned k = 1; k < AFTERWARDS; k++) {
        if (r->status[k] == RIG_STORED) {
            return k;
        }
    }
    return 0;
}

static void write_blocks(struct rig *r, unsigned n)
{
    rig_write(r, next_block, n);
    next_block += n;
}

static void forget_oldest(struct rig *r)
{
    unsigned k = oldest_stored(r);
    if (k != 0) {
        rig_forget(r, k);
    }
}

static void fail_next(struct rig *r, enum disk_fault kind, int code)
{
    r->disk->fail_mask = 1u << kind;
    r->disk->countdown = 0;
    r->disk->n_failures = 1;
    r->disk->code = code;
    write_blocks(r, 2);
    r->disk->countdown = -1;
    r->now_ms += 10000; /* the pause is over */
}

static void reopen(struct rig *r)
{
    rig_close(r);
    cr_assert(eq(int, rig_open(r), 0), "%s", r->err.text);
}

/* The process is killed at that operation of its next batch, and another one opens what the kernel
 * shows; power is lost later. */
static void kill_at(struct rig *r, enum disk_fault kind, long nth)
{
    if (kind == DISK_FAULT_SYNC_FOLDER) {
        r->store->index.broken = true;
    }
    forget_oldest(r);
    r->disk->fail_mask = 1u << kind;
    r->disk->countdown = nth;
    r->disk->n_failures = LONG_MAX;
    r->disk->code = -EIO;
    r->disk->killed = true;
    write_blocks(r, 2);
    r->store->paused_until_ms = UINT64_MAX; /* a killed process does not tidy up */
    r->store->pause_code = -EIO;
    rig_close(r);
    r->disk->countdown = -1;
    r->disk->killed = false;
    cr_assert(eq(int, rig_open(r), 0), "%s", r->err.text);
}

static void use_and_pin(struct rig *r)
{
    unsigned k = oldest_stored(r);
    if (k != 0) {
        r->blocks[k].hits++;
        r->blocks[k].flags |= KV_BLOCK_PINNED;
        kv_store_use(r->store, &r->blocks[k]);
        kv_store_flag(r->store, &r->blocks[k]);
        rig_flush(r);
    }
}

/* What a letter of a scenario does. */
static void run_letter(struct rig *r, char letter)
{
    switch (letter) {
    case 'w': /* one block */
        write_blocks(r, 1);
        break;
    case 'b': /* a batch of three */
        write_blocks(r, 3);
        break;
    case 'd': /* two forgotten, and that synced */
        forget_oldest(r);
        forget_oldest(r);
        rig_flush(r);
        break;
    case 'm': /* forgotten and written in one batch */
        forget_oldest(r);
        write_blocks(r, 2);
        break;
    case 'u':
        use_and_pin(r);
        break;
    case 'r':
        reopen(r);
        break;
    case 'c': /* a new index */
        r->store->index.broken = true;
        write_blocks(r, 1);
        break;
    case 'p':
        rig_purge(r, oldest_stored(r));
        break;
    case 'P':
        rig_purge(r, 0);
        break;
    case 's': /* a sync of data that fails */
        fail_next(r, DISK_FAULT_SYNC, -EIO);
        break;
    case 'a': /* no space */
        fail_next(r, DISK_FAULT_WRITE, -ENOSPC);
        break;
    case 'f': /* the folder cannot be synced, after the rename of a new index */
        r->store->index.broken = true;
        fail_next(r, DISK_FAULT_SYNC_FOLDER, -EIO);
        break;
    case 'k': /* killed between the rename of a new index and the sync of the folder */
        kill_at(r, DISK_FAULT_SYNC_FOLDER, 0);
        break;
    case 'j': /* killed between records and their sync: the third, after two data files' */
        kill_at(r, DISK_FAULT_SYNC, 2);
        break;
    default:
        cr_assert(false, "no such letter: %c", letter);
    }
}

static const char letters[] = "wbdmurcpPsafkj";

/* ---- one state ------------------------------------------------------------------------------ */

static void report(const char *scenario, size_t at, const char *variant, const char *wrong)
{
    if (n_failed++ < 20) {
        fprintf(stderr, "scenario %s, %zu operations, %s: %s\n", scenario, at, variant, wrong);
    }
}

/* NULL, or what is wrong with the folder that is on disk. */
static const char *check_state(struct disk *disk, const enum rig_status *status)
{
    rig_init(&after, disk);
    after.bytes_max = BYTES_MAX;
    memcpy(after.status, status, sizeof(after.status));
    const char *wrong = NULL;
    for (int round = 0; round < 2 && wrong == NULL; round++) {
        if (rig_open(&after) != 0) {
            wrong = after.err.text;
            break;
        }
        wrong = rig_check(&after);
        if (wrong == NULL && round == 0 && rig_write(&after, AFTERWARDS, 1) != 0) {
            wrong = "nothing can be written afterwards";
        }
        wrong = wrong == NULL ? rig_check(&after) : wrong;
        rig_close(&after);
    }
    rig_finish(&after);
    n_states++;
    return wrong;
}

struct choice { /* which pending operations survive */
    enum { ALL, NONE, ALL_BUT, ONLY } kind;
    size_t index;
};

static bool survives(const void *arg, size_t index, size_t n)
{
    const struct choice *c = arg;
    switch (c->kind) {
    case ALL:
        return true;
    case NONE:
        return false;
    case ALL_BUT:
        return index != c->index;
    default:
        return index == c->index;
    }
}

struct cut { /* a point of a log */
    const char *scenario;
    const struct disk_replay *replay;
    const enum rig_status *status;
    struct disk *disk; /* for the states */
};

static void check_replay(const char *scenario, const struct disk *log, struct disk *start,
                         const enum rig_status *status, size_t first, int depth);

/* The same crash again, and while it is recovered from, another one. */
static void check_nested(const struct cut *c)
{
    struct disk *start = disk_create();
    static struct rig recovering;
    disk_copy(c->disk, start);
    disk_record(c->disk);
    rig_init(&recovering, c->disk);
    recovering.bytes_max = BYTES_MAX;
    memcpy(recovering.status, c->status, sizeof(recovering.status));
    if (rig_open(&recovering) == 0) {
        rig_write(&recovering, AFTERWARDS - 2, 2);
        rig_finish(&recovering);
        check_replay(c->scenario, c->disk, start, c->status, 0, 1);
    }
    c->disk->recording = false;
}

static void check_crash(const struct cut *c, const struct disk_crash *crash, const char *variant,
                        int depth)
{
    disk_crash(c->replay, crash, c->disk);
    if (long_run && depth == 0 && n_states % 29 == 0) {
        struct disk *copy = disk_create();
        struct cut nested = *c;
        disk_copy(c->disk, copy);
        nested.disk = copy;
        check_nested(&nested);
        disk_destroy(copy);
    }
    const char *wrong = check_state(c->disk, c->status);
    if (wrong != NULL) {
        report(c->scenario, c->replay->at, variant, wrong);
    }
}

static void check_choice(const struct cut *c, struct choice choice, size_t swap,
                         const char *variant, int depth)
{
    char text[64];
    struct disk_crash crash = {
        .survives = survives, .arg = &choice, .swap = swap, .torn = SIZE_MAX};
    snprintf(text, sizeof(text), "%s %zu of %zu", variant, choice.index, c->replay->n_pending);
    check_crash(c, &crash, text, depth);
}

/* A pending write keeps only the sectors before, or from, every boundary. */
static void check_tears(const struct cut *c, size_t pending, int depth)
{
    const struct disk_op *op = &c->replay->log->ops[c->replay->pending[pending]];
    if (op->kind != DISK_WRITE || op->data == NULL) {
        return;
    }
    for (int others = 0; others <= (long_run ? 1 : 0); others++) {
        for (size_t at = 512; at < op->bytes; at += 512) {
            char text[64];
            struct choice choice = {others == 0 ? ALL : ONLY, pending};
            struct disk_crash crash = {
                .survives = survives, .arg = &choice, .swap = SIZE_MAX, .torn = pending};
            snprintf(text, sizeof(text), "operation %zu torn at %zu", pending, at);
            crash.torn_to = at;
            check_crash(c, &crash, text, depth);
            crash.torn_from = at;
            crash.torn_to = op->bytes;
            check_crash(c, &crash, text, depth);
        }
    }
}

static void check_cut(const struct cut *c, int depth)
{
    size_t n = c->replay->n_pending;
    bool is_mark = c->replay->at > 0 && c->replay->log->ops[c->replay->at - 1].kind == DISK_MARK;
    check_choice(c, (struct choice){ALL, 0}, SIZE_MAX, "all", depth);
    if (n == 0) {
        return;
    }
    check_choice(c, (struct choice){NONE, 0}, SIZE_MAX, "none", depth);
    for (size_t i = 0; i < n && depth == 0 && !is_mark; i++) {
        check_choice(c, (struct choice){ALL_BUT, i}, SIZE_MAX, "all but", depth);
        if (n > 2) {
            check_choice(c, (struct choice){ONLY, i}, SIZE_MAX, "only", depth);
        }
        if (i + 1 < n) {
            check_choice(c, (struct choice){ALL, i}, i, "swapped", depth);
        }
        if (long_run || i + 1 == n) {
            check_tears(c, i, depth);
        }
    }
}

/* From the operation first on. Takes over start. */
static void check_replay(const char *scenario, const struct disk *log, struct disk *start,
                         const enum rig_status *status, size_t first, int depth)
{
    struct disk_replay replay;
    enum rig_status promised[RIG_MAX + 1];
    memcpy(promised, status, sizeof(promised));
    struct cut cut = {
        .scenario = scenario, .replay = &replay, .status = promised, .disk = disk_create()};
    disk_replay_init(&replay, log, start);
    do {
        if (replay.at > 0 && log->ops[replay.at - 1].kind == DISK_MARK) {
            rig_apply_mark(promised, log->ops[replay.at - 1].mark);
        }
        if (replay.at >= first) {
            check_cut(&cut, depth);
        }
    } while (disk_replay_step(&replay));
    disk_replay_finish(&replay);
    disk_destroy(cut.disk);
}

/* What the first n_known letters do was checked before, with another scenario. */
static void check_scenario(const char *scenario, size_t n_known)
{
    static const enum rig_status nothing[RIG_MAX + 1];
    struct disk *disk = disk_create();
    rig_init(&before, disk);
    before.bytes_max = BYTES_MAX;
    disk_record(disk);
    next_block = 1;
    cr_assert(eq(int, rig_open(&before), 0), "%s", before.err.text);
    before.store->rewrite_slack = 4;
    size_t first = 0;
    for (const char *letter = scenario; *letter != '\0'; letter++) {
        first = (size_t)(letter - scenario) == n_known ? disk->n_ops : first;
        run_letter(&before, *letter);
        const char *wrong = rig_check(&before);
        cr_expect(wrong == NULL, "%s: %s", scenario, wrong);
    }
    rig_finish(&before);
    check_replay(scenario, disk, disk_create(), nothing, first, 0);
    disk_destroy(disk);
}

/* ---- tests ---------------------------------------------------------------------------------- */

static void begin(void)
{
    const char *text = getenv("GQAD_TEST_LONG");
    long_run = text != NULL && strcmp(text, "1") == 0;
}

static void finish(void)
{
    fprintf(stderr, "NOTE: %lu states were opened\n", n_states);
    cr_expect(eq(ulong, n_failed, 0));
}

TestSuite(kv_store_replay, .timeout = 3600);

/* All sequences of two (three) operations after a first batch. */
Test(kv_store_replay, short_sequences)
{
    char scenario[MAX_LENGTH] = "b";
    begin();
    size_t length = long_run ? 4 : 3, n_letters = sizeof(letters) - 1, n_scenarios = 1;
    for (size_t i = 1; i < length; i++) {
        n_scenarios *= n_letters;
    }
    for (size_t number = 0; number < n_scenarios; number++) {
        size_t rest = number, n_known = 0;
        for (size_t i = length - 1; i > 0; i--) {
            scenario[i] = letters[rest % n_letters];
            /* The sequence before this one had all letters up to here. */
            n_known = rest % n_letters > 0 && n_known == 0 ? i : n_known;
            rest /= n_letters;
        }
        scenario[length] = '\0';
        check_scenario(scenario, n_known);
    }
    finish();
    cr_expect(lt(ulong, 5000, n_states));
}

Test(kv_store_replay, long_sequences)
{
    static const char *const scenarios[] = {
        "bbdbdwmrdbubdbcdw", /* slots used again, over and over */
        "wmmmmmmmmmrmmmmmm", /* dead records: new indexes by themselves */
        "bbpwrpwPbrPw",      /* purges */
        "bsbfbambrsdfw",     /* failures in between */
        "bkwmjbdkjwrmpk",    /* killed, and killed again */
    };
    begin();
    for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++) {
        check_scenario(scenarios[i], 0);
    }
    finish();
}
