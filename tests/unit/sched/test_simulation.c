/* The rules together, on a clock and a machine that are made up: users come and go with prompts and
 * generations, and a small engine serves them by the scheduler's own functions. All is drawn from a
 * seed; a failure names it, and GQAD_TEST_SEED repeats it. */
#include "daemon/sched/budget.h"
#include "daemon/sched/fair.h"
#include "daemon/sched/order.h"
#include "daemon/sched/preempt.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdlib.h>
#include <string.h>

#define SECOND   1000000000ull
#define JOBS_MAX 4000u
#define PLACES   8u
#define N_BATCH  512u
#define N_USERS  4u
#define NEVER    UINT64_MAX

struct job {
    uid_t uid;
    int32_t priority;
    uint32_t n_prompt, n_predict;
    uint64_t comes_ns;
    /* State. */
    struct fair_user *user;
    uint32_t n_computed, n_generated;
    bool has_place;
    int32_t level; /* at which it was given its place */
    uint64_t started_ns, ended_ns, last_token_ns;
};

struct world {
    uint64_t seed, now_ns;
    struct fair fair;
    struct cost cost;
    uint32_t n_mixed;
    struct job jobs[JOBS_MAX];
    uint32_t n_jobs, n_running;
    uint64_t n_preempted;
    uint64_t tokens_of[N_USERS + 1]; /* while all users were there */
    double worst_stretch;            /* of a token's time beside a prompt */
};

static struct world w;

static uint32_t next(uint32_t below)
{
    w.seed ^= w.seed << 13;
    w.seed ^= w.seed >> 7;
    w.seed ^= w.seed << 17;
    return (uint32_t)(w.seed >> 32) % below;
}

static double step_ms(const struct cost_work *work)
{
    double ms = 30 + 0.8 * work->decode_rows + 3.1 * work->prefill_rows + 2e-4 * work->depth_tokens;
    return ms * (0.97 + next(600) / 10000.0);
}

static void begin(void)
{
    const char *given = getenv("GQAD_TEST_SEED");
    memset(&w, 0, sizeof(w));
    w.seed = given != NULL ? strtoull(given, NULL, 0) : 0x2545f4914f6cdd1du;
    fair_init(&w.fair);
}

static void end(void)
{
    fair_finish(&w.fair);
}

static struct job *add(uid_t uid, int32_t priority, uint32_t n_prompt, uint32_t n_predict,
                       uint64_t comes_ns)
{
    cr_assert(w.n_jobs < JOBS_MAX);
    struct job *j = &w.jobs[w.n_jobs++];
    *j = (struct job){uid, priority, n_prompt, n_predict, comes_ns};
    return j;
}

static bool is_open(const struct job *j)
{
    return j->user != NULL && j->ended_ns == 0;
}

static struct order_key key_of(const struct job *j)
{
    return (struct order_key){j->priority, j->comes_ns, j->user->served, j->comes_ns};
}

static struct job *pick(int32_t *ret_level)
{
    int32_t highest = INT32_MIN;
    struct job *best = NULL;
    for (uint32_t i = 0; i < w.n_jobs; i++) {
        struct job *j = &w.jobs[i];
        bool waits = is_open(j) && !j->has_place;
        highest = waits && j->priority > highest ? j->priority : highest;
    }
    for (uint32_t i = 0; i < w.n_jobs; i++) {
        struct job *j = &w.jobs[i];
        if (is_open(j) && !j->has_place) {
            const struct order_key a = key_of(j), b = best != NULL ? key_of(best) : a;
            best = best == NULL || order_before(&a, &b, highest, w.now_ns) ? j : best;
        }
    }
    if (best != NULL) {
        *ret_level = order_level(best->priority, best->comes_ns, highest, w.now_ns);
    }
    return best;
}

static struct preempt_rank rank_of(const struct job *j)
{
    return (struct preempt_rank){false, j->level, j->comes_ns, (uint64_t)(j - w.jobs)};
}

/* The engine's rule (engine_make_room): a lower priority, or a user with more than its share. */
static struct job *victim_for(const struct job *asks, int32_t level)
{
    struct job *lowest = NULL, *debtor = NULL;
    for (uint32_t i = 0; i < w.n_jobs; i++) {
        struct job *j = &w.jobs[i];
        if (!is_open(j) || !j->has_place) {
            continue;
        }
        const struct preempt_rank rank = rank_of(j);
        const struct preempt_share a = {asks->user->n_running, asks->user->weight};
        const struct preempt_share h = {j->user->n_running, j->user->weight};
        const struct preempt_rank r1 = lowest != NULL ? rank_of(lowest) : rank;
        lowest = lowest == NULL || preempt_is_lower(&rank, &r1) ? j : lowest;
        if (j->user != asks->user && preempt_is_owed(&a, &h) && j->level <= level) {
            const struct preempt_rank r2 = debtor != NULL ? rank_of(debtor) : rank;
            debtor = debtor == NULL || preempt_is_lower(&rank, &r2) ? j : debtor;
        }
    }
    return lowest != NULL && lowest->level < level ? lowest : debtor;
}

static void admit(void)
{
    struct job *j;
    int32_t level = 0;
    while ((j = pick(&level)) != NULL) {
        if (w.n_running == PLACES) {
            struct job *victim = victim_for(j, level);
            if (victim == NULL) {
                return;
            }
            victim->has_place = false;
            victim->user->n_running--;
            w.n_running--;
            w.n_preempted++;
        }
        j->has_place = true;
        j->level = j->started_ns > 0 && j->level > level ? j->level : level;
        j->user->n_running++;
        j->started_ns = j->started_ns > 0 ? j->started_ns : w.now_ns;
        w.n_running++;
    }
}

static void come(void)
{
    for (uint32_t i = 0; i < w.n_jobs; i++) {
        struct job *j = &w.jobs[i];
        if (j->user == NULL && j->comes_ns <= w.now_ns) {
            cr_assert(eq(int, fair_come(&w.fair, j->uid, &j->user), 0));
        }
    }
}

static bool decodes(const struct job *j)
{
    return j->has_place && j->n_computed >= j->n_prompt;
}

static void finish_if_done(struct job *j)
{
    if (j->n_generated >= j->n_predict) {
        j->ended_ns = w.now_ns;
        j->has_place = false;
        j->user->n_running--;
        w.n_running--;
        fair_leave(&w.fair, j->user);
    }
}

/* One step. False: nothing runs. */
static bool step(void)
{
    static struct fair_claim claims[PLACES];
    struct job *decoding[PLACES], *prompts[PLACES];
    uint32_t n_decoding = 0, n_prompts = 0;
    int32_t highest = INT32_MIN;
    struct cost_work work = {0};
    for (uint32_t i = 0; i < w.n_jobs; i++) {
        struct job *j = &w.jobs[i];
        if (is_open(j) && decodes(j)) {
            decoding[n_decoding++] = j;
            work.depth_tokens += j->n_computed;
        } else if (is_open(j) && j->has_place) {
            prompts[n_prompts++] = j;
            highest = j->priority > highest ? j->priority : highest;
        }
    }
    work.decode_rows = n_decoding;
    if (n_decoding + n_prompts == 0) {
        return false;
    }
    struct budget budget = {.decoding = n_decoding > 0};
    double alone = n_decoding > 0 ? step_ms(&work) : 0;
    budget.alone_ms = n_decoding > 0 && cost_knows_decode(&w.cost) ? cost_ms(&w.cost, &work) : 0;
    budget.own_ms = budget.alone_ms;
    for (uint32_t i = 0; i < n_prompts; i++) {
        struct job *j = prompts[i];
        claims[i] = (struct fair_claim){
            .user = j->user,
            .level = order_level(j->priority, j->comes_ns, highest, w.now_ns),
            .wanted = j->n_prompt - j->n_computed,
        };
    }
    uint32_t max = N_BATCH - n_decoding;
    double depth = n_prompts > 0 ? prompts[0]->n_computed : 0;
    uint32_t rows = n_prompts > 0 ? budget_rows(&budget, &w.cost, depth, max, &w.n_mixed) : 0;
    fair_share(claims, n_prompts, rows);
    for (uint32_t i = 0; i < n_prompts; i++) {
        work.prefill_rows += claims[i].given;
        work.depth_tokens += (double)claims[i].given * prompts[i]->n_computed;
    }
    double ms = step_ms(&work);
    cost_learn(&w.cost, &work, ms);
    bool settled = w.cost.n_prefill > 50 && w.cost.n_decode > 50;
    if (settled && n_decoding > 0 && ms / alone > w.worst_stretch) {
        w.worst_stretch = ms / alone;
    }
    w.now_ns += (uint64_t)(ms * 1e6);
    for (uint32_t i = 0; i < n_prompts; i++) {
        struct job *j = prompts[i];
        j->n_computed += claims[i].given;
        fair_charge(&w.fair, j->user, claims[i].given);
        w.tokens_of[j->uid] += claims[i].given;
        if (j->n_computed >= j->n_prompt) {
            j->n_generated++;
            finish_if_done(j);
        }
    }
    for (uint32_t i = 0; i < n_decoding; i++) {
        struct job *j = decoding[i];
        j->n_computed++;
        j->n_generated++;
        fair_charge(&w.fair, j->user, 1);
        w.tokens_of[j->uid]++;
        finish_if_done(j);
    }
    return true;
}

static uint64_t next_arrival(void)
{
    uint64_t first = NEVER;
    for (uint32_t i = 0; i < w.n_jobs; i++) {
        const struct job *j = &w.jobs[i];
        first = j->user == NULL && j->comes_ns < first ? j->comes_ns : first;
    }
    return first;
}

/* Until that time, or (NEVER) until all is done. */
static void run(uint64_t until_ns)
{
    while (w.now_ns < until_ns) {
        come();
        admit();
        if (!step()) {
            uint64_t arrival = next_arrival();
            if (arrival == NEVER) {
                return;
            }
            w.now_ns = arrival;
        }
    }
}

static void all_ended(void)
{
    for (uint32_t i = 0; i < w.n_jobs; i++) {
        cr_assert(w.jobs[i].ended_ns > 0, "job %u", i);
        cr_assert(eq(u32, w.jobs[i].n_generated, w.jobs[i].n_predict));
    }
}

TestSuite(simulation, .init = begin, .fini = end);

/* Four users who always want more, one with a hundred times the requests: tokens go by weight. */
Test(simulation, tokens_are_shared_by_weight)
{
    const struct fair_weight weights[] = {{2, 2}};
    cr_assert(eq(int, fair_set_weights(&w.fair, weights, 1), 0));
    for (uint32_t i = 0; i < 2000; i++) {
        add(1, 0, 50 + next(1500), 20 + next(200), 0);
    }
    for (uid_t uid = 2; uid <= 4; uid++) {
        for (uint32_t i = 0; i < 300; i++) {
            add(uid, 0, 50 + next(1500), 20 + next(200), 0);
        }
    }
    run(400 * SECOND);
    double one = (double)(w.tokens_of[1] + w.tokens_of[3] + w.tokens_of[4]) / 3;
    for (uid_t uid = 1; uid <= 4; uid++) {
        double share = (double)w.tokens_of[uid] / one / (uid == 2 ? 2 : 1);
        cr_expect(share > 0.85 && share < 1.15, "uid %u: %g of its share", uid, share);
    }
}

/* A user with one short request now and then does not wait for the crowd of another's. */
Test(simulation, a_light_user_does_not_wait_for_a_heavy_one)
{
    struct job *light[20];
    for (uint32_t i = 0; i < 600; i++) {
        add(1, 0, 500 + next(1000), 400, 0);
    }
    for (uint32_t i = 0; i < 20; i++) {
        light[i] = add(2, 0, 100, 20, (10 + 15 * (uint64_t)i) * SECOND);
    }
    run(400 * SECOND);
    for (uint32_t i = 0; i < 20; i++) {
        cr_assert(light[i]->ended_ns > 0, "job %u", i);
        double waited_ms = (double)(light[i]->started_ns - light[i]->comes_ns) / 1e6;
        /* The step in progress may be one of prompts alone. */
        cr_expect(waited_ms < 2000, "job %u waited for %g ms", i, waited_ms);
    }
}

/* A stream of urgent requests that fills the machine: who asked for nothing gets on by ageing. */
Test(simulation, nobody_starves_behind_urgent_ones)
{
    struct job *patient[10];
    for (uint32_t i = 0; i < 10; i++) {
        patient[i] = add(2, -4, 300, 30, i * SECOND);
    }
    for (uint32_t i = 0; i < 1500; i++) {
        add(1, 4, 200 + next(500), 50, i * SECOND / 2);
    }
    run(500 * SECOND);
    for (uint32_t i = 0; i < 10; i++) {
        cr_expect(patient[i]->ended_ns > 0, "patient %u had %u tokens", i, patient[i]->n_generated);
    }
}

Test(simulation, urgent_ones_go_first)
{
    for (uint32_t i = 0; i < 200; i++) {
        add(1, 0, 500, 200, 0);
    }
    struct job *urgent = add(1, 8, 100, 10, 20 * SECOND);
    run(NEVER);
    all_ended();
    cr_expect(lt(u64, urgent->started_ns - urgent->comes_ns, 2 * SECOND)); /* one step */
}

/* Random users, sizes, priorities and times: everything ends, and tokens keep their pace beside
 * prompts. */
Test(simulation, everything_ends_and_streams_keep_their_pace)
{
    for (uint32_t i = 0; i < 600; i++) {
        add(1 + next(N_USERS), (int32_t)next(5) - 2, 1 + next(4000), 1 + next(100),
            next(600) * SECOND);
    }
    run(NEVER);
    all_ended();
    /* The noise of both steps, 3 % each, is not the scheduler's. */
    cr_expect(w.worst_stretch < 1.5 * 1.1, "%g", w.worst_stretch);
    cr_expect(lt(u64, 0, w.n_preempted));
}
