/* Chains of samplers against their plain forms: which candidates are left, with which logits; and
 * what is random, against its distribution. */
#include "daemon/model/sampler.h"
#include "daemon/model/sampler_internal.h"
#include "tests/unit/model/sampler_plain.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_MAX     400
#define N_HISTORY 120

static uint64_t state = 1;

static uint32_t any(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

static float between(float low, float high)
{
    return low + (high - low) * (float)any(1u << 20) / (float)(1u << 20);
}

/* Every second set has many equal logits, every third some that are forbidden. */
static void fill(float *logits, size_t n, unsigned round)
{
    for (size_t i = 0; i < n; i++) {
        logits[i] = between(-6, 6);
        logits[i] = round % 2 == 1 ? roundf(logits[i] * 2) / 2 : logits[i];
        logits[i] = round % 3 == 2 && any(4) == 0 && i > 0 ? -INFINITY : logits[i];
    }
}

static struct sampler_params off(void)
{
    struct sampler_params p = sampler_params_default();
    p.temperature = 1;
    p.top_k = 0;
    p.top_p = 1;
    p.min_p = 0;
    return p;
}

static void set_chain(struct sampler_params *p, const uint8_t *chain, uint32_t n)
{
    memcpy(p->chain, chain, n);
    p->n_chain = n;
}

static struct sampler *create(const struct sampler_params *p, size_t n_vocab)
{
    struct sampler *s = NULL;
    cr_assert_eq(sampler_create(p, (uint32_t)n_vocab, &s), 0);
    return s;
}

static int32_t sample(struct sampler *s, const float *logits)
{
    struct sampled_token out;
    cr_assert_eq(sampler_sample(s, logits, &out), 0);
    return out.token;
}

static int by_token(const void *a, const void *b)
{
    return ((const struct candidate *)a)->token - ((const struct candidate *)b)->token;
}

static int plain_by_token(const void *a, const void *b)
{
    return ((const struct plain_token *)a)->token - ((const struct plain_token *)b)->token;
}

/* After a draw the sampler still has the candidates that it drew from. Logits count by their
 * differences only. */
static void expect_same(struct sampler *s, struct plain *p, const char *what)
{
    struct candidates *c = &s->cand;
    cr_assert_eq(c->n, p->n, "%s: %zu candidates, not %zu", what, c->n, p->n);
    double max = (double)candidates_max(c), plain_max = p->item[0].logit;
    qsort(c->item, c->n, sizeof(*c->item), by_token);
    qsort(p->item, p->n, sizeof(*p->item), plain_by_token);
    for (size_t i = 0; i < c->n; i++) {
        cr_assert_eq(c->item[i].token, p->item[i].token, "%s: token %d, not %d", what,
                     c->item[i].token, p->item[i].token);
        double want = p->item[i].logit - plain_max, got = (double)c->item[i].logit - max;
        cr_assert((isinf(want) && isinf(got)) || fabs(got - want) <= 1e-4 * (1 + fabs(want)),
                  "%s: token %d: %g, not %g", what, c->item[i].token, got, want);
    }
}

/* Parameters under which every sampler does something, at random. */
static struct sampler_params random_params(void)
{
    static const uint32_t keeps[] = {0, 0, 1, 3, 17, 1000};
    struct sampler_params p = sampler_params_default();
    p.temperature = between(0.2f, 3);
    p.dynatemp_range = any(2) ? between(0, 2) : 0;
    p.dynatemp_exponent = between(0.2f, 3);
    p.top_k = (int32_t)any(60);
    p.top_p = between(0, 1);
    p.min_p = between(0, 0.3f);
    p.typical_p = between(0, 1);
    p.top_n_sigma = between(0, 3);
    p.xtc_probability = any(3) ? 1 : 0;
    p.xtc_threshold = between(0, 0.6f);
    p.repeat_penalty = between(0.7f, 1.5f);
    p.presence_penalty = between(-1, 1);
    p.frequency_penalty = between(-0.3f, 0.3f);
    p.repeat_last_n = (int32_t)any(N_HISTORY + 10) - 1;
    p.dry_multiplier = any(3) ? between(0, 2) : 0;
    p.dry_base = between(0.8f, 2);
    p.dry_allowed_length = (int32_t)any(5);
    p.dry_penalty_last_n = (int32_t)any(N_HISTORY + 10) - 1;
    p.min_keep = keeps[any(6)];
    p.seed = any(1000);
    p.n_chain = any(SAMPLER_CHAIN_MAX + 1);
    for (uint32_t i = 0; i < p.n_chain; i++) {
        p.chain[i] = (uint8_t)any(SAMPLER_KINDS);
    }
    return p;
}

static void describe(const struct sampler_params *p, char *text, size_t bytes)
{
    size_t at = 0;
    for (uint32_t i = 0; i < p->n_chain; i++) {
        at += (size_t)snprintf(text + at, bytes - at, "%s ", sampler_name(p->chain[i]));
    }
    snprintf(text + at, bytes - at, "min_keep %u", p->min_keep);
}

/* One random chain; false when rounding may decide. */
static bool compare_chain(unsigned round)
{
    static const size_t sizes[] = {1, 2, 3, 7, 40, 129, N_MAX};
    size_t n = sizes[any(7)];
    float logits[N_MAX];
    int32_t history[N_HISTORY];
    char what[256];
    struct sampler_params params = random_params();
    size_t n_history = any(N_HISTORY + 1);
    uint32_t alphabet = any(4) + 1;
    fill(logits, n, round);
    describe(&params, what, sizeof(what));
    struct sampler *s = create(&params, n);
    struct plain p;
    plain_init(&p, &params, logits, n);
    for (size_t i = 0; i < n_history; i++) {
        history[i] = (int32_t)(any(alphabet) % n);
        cr_assert_eq(sampler_accept(s, history[i]), 0);
    }
    p.history = history;
    p.n_history = n_history;
    for (uint32_t i = 0; i < params.n_chain; i++) {
        plain_apply(&p, params.chain[i]);
    }
    int32_t token = sample(s, logits);
    if (!p.close) {
        bool among = false;
        for (size_t i = 0; i < p.n; i++) {
            among |= p.item[i].token == token;
        }
        cr_assert(among, "%s: token %d was dropped", what, token);
        expect_same(s, &p, what);
    }
    plain_finish(&p);
    sampler_destroy(s);
    return !p.close;
}

Test(sampler_chain, any_chain_leaves_what_the_plain_samplers_leave)
{
    unsigned compared = 0;
    for (unsigned round = 0; round < 4000; round++) {
        compared += compare_chain(round);
    }
    cr_expect_gt(compared, 2800, "only %u of 4000 were clear", compared);
}

Test(sampler_chain, each_sampler_alone_leaves_what_its_plain_form_leaves)
{
    float logits[N_MAX];
    char what[256];
    for (uint8_t kind = SAMPLER_TOP_N_SIGMA; kind < SAMPLER_KINDS; kind++) {
        unsigned compared = 0;
        for (unsigned round = 0; round < 300; round++) {
            struct sampler_params params = random_params();
            set_chain(&params, &kind, 1);
            fill(logits, N_MAX, round);
            struct plain p;
            plain_init(&p, &params, logits, N_MAX);
            plain_apply(&p, kind);
            struct sampler *s = create(&params, N_MAX);
            sample(s, logits);
            describe(&params, what, sizeof(what));
            if (!p.close) {
                expect_same(s, &p, what);
                compared++;
            }
            plain_finish(&p);
            sampler_destroy(s);
        }
        cr_expect_gt(compared, 250, "%s: %u of 300", sampler_name(kind), compared);
    }
}

Test(sampler_chain, the_best_of_many_are_those_of_a_full_sort)
{
    static const size_t ks[] = {1, 2, 17, 40, 399, N_MAX};
    struct candidate some[N_MAX], all[N_MAX];
    float logits[N_MAX];
    for (unsigned round = 0; round < 600; round++) {
        size_t k = ks[any(6)], n = k + any((uint32_t)(N_MAX - k) + 1);
        struct candidates taken = {some, 0, 0}, sorted = {all, n, 0};
        fill(logits, n, round);
        for (size_t i = 0; i < n; i++) {
            all[i] = (struct candidate){logits[i], (int32_t)i};
        }
        candidates_take_best(&taken, logits, n, k);
        candidates_sort(&sorted, k);
        cr_assert(taken.n == k && taken.n_sorted == k);
        for (size_t i = 0; i < k; i++) {
            cr_assert_eq(some[i].token, all[i].token, "%zu of %zu: place %zu", k, n, i);
            cr_assert(some[i].logit == all[i].logit);
        }
    }
}

/* Of logits with their bias added, what the chain gives for them without one: the draws too. */
Test(sampler_chain, a_bias_is_as_good_as_other_logits)
{
    float logits[N_MAX], moved[N_MAX];
    struct logit_bias bias[5];
    for (unsigned round = 0; round < 600; round++) {
        struct sampler_params p = round % 2 ? random_params() : sampler_params_default();
        p.temperature = round % 3 ? p.temperature : 0;
        p.mirostat = (int32_t)(round % 7 == 6) * 2;
        fill(logits, N_MAX, round);
        memcpy(moved, logits, sizeof(moved));
        struct sampler *without = create(&p, N_MAX);
        for (size_t i = 0; i < 5; i++) {
            size_t best = 0; /* what would be chosen is what is forbidden, or another made to be */
            for (size_t k = 1; k < N_MAX; k++) {
                best = moved[k] > moved[best] ? k : best;
            }
            bias[i] = (struct logit_bias){i % 2 ? (int32_t)any(N_MAX) : (int32_t)best,
                                          i % 2 ? between(-9, 9) : -INFINITY};
            moved[bias[i].token] += bias[i].bias;
        }
        p.logit_bias = bias;
        p.n_logit_bias = 5;
        struct sampler *with = create(&p, N_MAX);
        for (int i = 0; i < 4; i++) {
            int32_t want = sample(without, moved);
            cr_assert_eq(sample(with, logits), want, "round %u", round);
            cr_assert_eq(sampler_accept(with, want), 0);
            cr_assert_eq(sampler_accept(without, want), 0);
        }
        sampler_destroy(with);
        sampler_destroy(without);
    }
}

Test(sampler_chain, the_order_matters)
{
    /* top_p 0.6 of all: tokens 0 and 1 of (0.4, 0.3, 0.2, 0.1); of the best two: the same two, but
     * of the best one it is that one. A temperature before min_p makes the rest likelier. */
    const float logits[] = {logf(0.4f), logf(0.3f), logf(0.2f), logf(0.1f)};
    const uint8_t orders[2][2] = {{SAMPLER_TEMPERATURE, SAMPLER_MIN_P},
                                  {SAMPLER_MIN_P, SAMPLER_TEMPERATURE}};
    size_t left[2];
    for (int i = 0; i < 2; i++) {
        struct sampler_params p = off();
        p.temperature = 3;
        p.min_p = 0.6f; /* as they are: 0.4 and 0.3; at temperature 3: 0.63 times the best, all */
        set_chain(&p, orders[i], 2);
        struct sampler *s = create(&p, 4);
        sample(s, logits);
        left[i] = s->cand.n;
        sampler_destroy(s);
    }
    cr_expect_eq(left[0], 4);
    cr_expect_eq(left[1], 2);
}

Test(sampler_chain, what_is_not_listed_is_not_applied)
{
    float logits[N_MAX];
    fill(logits, N_MAX, 0);
    struct sampler_params p = sampler_params_default();
    p.repeat_penalty = 5;
    p.dry_multiplier = 5;
    p.temperature = 0;
    p.n_chain = 0;
    struct sampler *s = create(&p, N_MAX);
    for (int32_t i = 0; i < N_MAX; i++) {
        cr_assert_eq(sampler_accept(s, i % 5), 0);
    }
    bool differ = false;
    int32_t first = sample(s, logits);
    for (int i = 0; i < 50; i++) {
        differ |= sample(s, logits) != first;
    }
    cr_expect(differ, "temperature 0 is not in the chain");
    cr_expect_eq(s->cand.n, N_MAX);
    for (size_t i = 0; i < N_MAX; i++) {
        cr_expect(s->cand.item[i].logit == logits[i]);
    }
    sampler_destroy(s);
}

Test(sampler_chain, greedy_stands_where_the_temperature_stands)
{
    /* xtc takes the best two away before the temperature chooses; after it there is one left. */
    const float logits[] = {5, 4.9f, 4.8f, -3};
    const uint8_t before[] = {SAMPLER_XTC, SAMPLER_TEMPERATURE};
    const uint8_t after[] = {SAMPLER_TEMPERATURE, SAMPLER_XTC};
    struct sampler_params p = off();
    p.temperature = 0;
    p.xtc_probability = 1;
    set_chain(&p, before, 2);
    struct sampler *s = create(&p, 4);
    cr_expect_eq(sample(s, logits), 2);
    sampler_destroy(s);
    set_chain(&p, after, 2);
    s = create(&p, 4);
    cr_expect_eq(sample(s, logits), 0);
    sampler_destroy(s);
    /* top_k before a penalty that would let another token win. */
    const uint8_t cut[] = {SAMPLER_TOP_K, SAMPLER_PENALTIES, SAMPLER_TEMPERATURE};
    p.top_k = 1;
    p.presence_penalty = 50;
    set_chain(&p, cut, 3);
    s = create(&p, 4);
    cr_assert_eq(sampler_accept(s, 0), 0);
    cr_expect_eq(sample(s, logits), 0);
    sampler_destroy(s);
}

Test(sampler_chain, names)
{
    static const char *const order[] = {"penalties", "dry",       "top_n_sigma",
                                        "top_k",     "typical_p", "top_p",
                                        "min_p",     "xtc",       "temperature"};
    struct sampler_params p = sampler_params_default();
    enum sampler_kind kind;
    cr_assert_eq(p.n_chain, SAMPLER_KINDS);
    for (uint32_t i = 0; i < SAMPLER_KINDS; i++) {
        cr_expect_str_eq(sampler_name(p.chain[i]), order[i]);
        cr_expect_eq(sampler_by_name(order[i], strlen(order[i]), &kind), 0);
        cr_expect_eq(kind, p.chain[i]);
        cr_expect_eq(sampler_by_name(order[i], strlen(order[i]) - 1, &kind), -ENOENT);
    }
    cr_expect(sampler_by_name("typ_p", 5, &kind) == 0 && kind == SAMPLER_TYPICAL_P);
    cr_expect(sampler_by_name("temp", 4, &kind) == 0 && kind == SAMPLER_TEMPERATURE);
    cr_expect_eq(sampler_by_name("", 0, &kind), -ENOENT);
    cr_expect_eq(sampler_by_name("top_kk", 6, &kind), -ENOENT);
}

Test(sampler_chain, defaults_are_the_documented_ones)
{
    struct sampler_params p = sampler_params_default();
    cr_expect(p.dynatemp_range == 0 && p.dynatemp_exponent == 1 && p.typical_p == 1);
    cr_expect(p.top_n_sigma == -1 && p.xtc_probability == 0 && p.xtc_threshold == 0.1f);
    cr_expect(p.dry_multiplier == 0 && p.dry_base == 1.75f && p.dry_allowed_length == 2);
    cr_expect(p.dry_penalty_last_n == -1 && p.mirostat == 0);
    cr_expect(p.mirostat_tau == 5 && p.mirostat_eta == 0.1f && p.min_keep == 0);
    cr_expect_not(sampler_params_want_dry(&p));
    p.dry_multiplier = 0.8f;
    cr_expect(sampler_params_want_dry(&p));
    p.mirostat = 1;
    cr_expect_not(sampler_params_want_dry(&p));
    p.mirostat = 0;
    p.chain[SAMPLER_DRY] = SAMPLER_TOP_K;
    cr_expect_not(sampler_params_want_dry(&p));
}

/* ---- randomness -------------------------------------------------------------------------- */

Test(sampler_chain, xtc_strikes_with_its_probability)
{
    /* Of four equal tokens at threshold 0.2 three go, or none: token 3 is drawn with the
     * probability x + (1 - x) / 4. n = 40,000 and a bound of 5 standard deviations: one false alarm
     * in 1.7 million seeds, and the seed is fixed. */
    const float logits[] = {1, 1, 1, 1};
    static const float chances[] = {0.05f, 0.3f, 0.9f, 1};
    for (size_t i = 0; i < 4; i++) {
        struct sampler_params p = off();
        p.xtc_probability = chances[i];
        p.xtc_threshold = 0.2f;
        p.seed = 77 + i;
        struct sampler *s = create(&p, 4);
        double n = 40000, seen = 0, x = (double)chances[i] + (1 - (double)chances[i]) / 4;
        for (int k = 0; k < 40000; k++) {
            seen += sample(s, logits) == 3;
        }
        cr_expect_leq(fabs(seen - n * x), 5 * sqrt(n * x * (1 - x)), "%g: %g of %g", chances[i],
                      seen, n);
        sampler_destroy(s);
    }
}

/* Pearson's chi-square of n draws against a plain chain; the bound is 5 standard deviations above
 * the mean. For a normal variable that is one false alarm in 3.5 million; the seeds are fixed. */
static void expect_draws(const struct sampler_params *params, const float *logits, size_t n_vocab,
                         double n)
{
    struct plain p;
    size_t *count = calloc(n_vocab, sizeof(*count));
    plain_init(&p, params, logits, n_vocab);
    for (uint32_t i = 0; i < params->n_chain; i++) {
        plain_apply(&p, params->chain[i]);
    }
    plain_softmax(&p);
    struct sampler *s = create(params, n_vocab);
    for (int i = 0; i < (int)n; i++) {
        count[sample(s, logits)]++;
    }
    double chi = 0, rest = n, rest_seen = n, cells = 0;
    for (size_t i = 0; i < p.n && p.item[i].p * n >= 5; i++) {
        double seen = (double)count[p.item[i].token], expected = p.item[i].p * n;
        chi += (seen - expected) * (seen - expected) / expected;
        rest -= expected;
        rest_seen -= seen;
        cells++;
    }
    if (rest >= 5) {
        chi += (rest_seen - rest) * (rest_seen - rest) / rest;
        cells++;
    }
    double freedom = cells - 1;
    cr_expect_leq(chi, freedom + 5 * sqrt(2 * freedom) + 5, "chi-square %f, %g cells", chi, cells);
    sampler_destroy(s);
    plain_finish(&p);
    free(count);
}

Test(sampler_chain, draws_follow_the_whole_chain)
{
    float logits[N_MAX];
    for (unsigned round = 0; round < 6; round++) {
        fill(logits, N_MAX, round);
        struct sampler_params p = sampler_params_default();
        p.dynatemp_range = round % 2 ? 0.5f : 0;
        p.top_n_sigma = 3.0f;
        p.top_k = 0;
        p.typical_p = 0.95f;
        p.xtc_probability = round % 3 ? 0 : 1;
        p.xtc_threshold = 0.01f;
        p.seed = round;
        expect_draws(&p, logits, N_MAX, 30000);
    }
}

/* ---- mirostat ---------------------------------------------------------------------------- */

/* Follows the sampler step by step: its mu, how many candidates it left, and that it drew among
 * them. */
static void follow_mirostat(int32_t version, float temperature, float tau)
{
    float logits[N_MAX];
    struct sampler_params params = off();
    params.mirostat = version;
    params.temperature = temperature;
    params.mirostat_tau = tau;
    params.top_k = 1; /* there is no chain */
    params.repeat_penalty = 10;
    struct sampler *s = create(&params, N_MAX);
    double mu = 2 * (double)tau, total = 0;
    unsigned compared = 0;
    for (unsigned step = 0; step < 2000; step++) {
        fill(logits, N_MAX, step % 2);
        struct plain p;
        plain_init(&p, &params, logits, N_MAX);
        plain_apply(&p, SAMPLER_TEMPERATURE);
        size_t n = plain_mirostat_count(&p, N_MAX, mu);
        int32_t token = sample(s, logits);
        cr_assert_eq(sampler_accept(s, token), 0);
        if (p.close) {
            n = s->cand.n;
        }
        compared += !p.close;
        cr_assert_eq(s->cand.n, n, "step %u: %zu candidates, not %zu", step, s->cand.n, n);
        p.n = n;
        plain_softmax(&p);
        double surprise = -1;
        for (size_t i = 0; i < n; i++) {
            surprise = p.item[i].token == token ? -log2(p.item[i].p) : surprise;
        }
        cr_assert_geq(surprise, 0, "step %u: token %d was dropped", step, token);
        mu -= (double)params.mirostat_eta * (surprise - (double)tau);
        cr_assert_float_eq((double)s->mirostat_mu, mu, 1e-3, "step %u", step);
        mu = (double)s->mirostat_mu;
        total += surprise;
        plain_finish(&p);
    }
    cr_expect_gt(compared, 1800);
    cr_expect_float_eq(total / 2000, (double)tau, 0.05, "mirostat %d: %g bits", version,
                       total / 2000);
    sampler_destroy(s);
}

Test(sampler_chain, mirostat_does_as_the_paper_says_and_holds_the_surprise)
{
    for (int32_t version = 1; version <= 2; version++) {
        follow_mirostat(version, 1, 3);
        follow_mirostat(version, 0.7f, 2);
        follow_mirostat(version, 1.5f, 4);
    }
}

Test(sampler_chain, mirostat_of_one_candidate)
{
    const float logits[] = {-INFINITY, 3, -INFINITY};
    for (int32_t version = 1; version <= 2; version++) {
        struct sampler_params p = off();
        p.mirostat = version;
        struct sampler *s = create(&p, 3);
        for (int i = 0; i < 100; i++) {
            cr_expect_eq(sample(s, logits), 1);
        }
        cr_expect(isfinite(s->mirostat_mu));
        sampler_destroy(s);
        p.temperature = 0;
        s = create(&p, 3);
        const float others[] = {1, 2, 3};
        cr_expect_eq(sample(s, others), 2, "temperature 0 is greedy with mirostat too");
        sampler_destroy(s);
    }
}

/* ---- edges ------------------------------------------------------------------------------- */

static struct sampler_params all_on(void)
{
    struct sampler_params p = sampler_params_default();
    p.dynatemp_range = 0.5f;
    p.top_n_sigma = 2;
    p.typical_p = 0.9f;
    p.xtc_probability = 0.5f;
    p.repeat_penalty = 1.2f;
    p.dry_multiplier = 0.8f;
    return p;
}

Test(sampler_chain, a_vocabulary_of_one)
{
    const float logits[] = {-3};
    for (int32_t mirostat = 0; mirostat <= 2; mirostat++) {
        struct sampler_params p = all_on();
        p.mirostat = mirostat;
        p.min_keep = 7;
        struct sampler *s = create(&p, 1);
        for (int i = 0; i < 50; i++) {
            cr_expect_eq(sample(s, logits), 0);
            cr_assert_eq(sampler_accept(s, 0), 0);
        }
        sampler_destroy(s);
    }
}

Test(sampler_chain, a_huge_vocabulary)
{
    size_t n = 300000;
    float *logits = malloc(n * sizeof(*logits));
    for (size_t i = 0; i < n; i++) {
        logits[i] = between(-10, 10);
    }
    struct sampler_params params = all_on();
    params.xtc_probability = 1;
    params.xtc_threshold = 1e-5f;
    for (params.top_k = 0; params.top_k < 1000; params.top_k += 500) {
        struct sampler *s = create(&params, n);
        struct plain p;
        plain_init(&p, &params, logits, n);
        for (uint32_t i = 0; i < params.n_chain; i++) {
            plain_apply(&p, params.chain[i]);
        }
        sample(s, logits);
        if (!p.close) {
            expect_same(s, &p, "300,000 tokens");
        }
        plain_finish(&p);
        sampler_destroy(s);
    }
    free(logits);
}

Test(sampler_chain, bad_logits_are_refused_by_every_chain)
{
    float logits[N_MAX];
    for (int32_t mirostat = 0; mirostat <= 2; mirostat++) {
        struct sampler_params p = all_on();
        struct sampled_token out = {.token = -7};
        p.mirostat = mirostat;
        struct sampler *s = create(&p, N_MAX);
        fill(logits, N_MAX, 0);
        logits[200] = NAN;
        cr_expect_eq(sampler_sample(s, logits, &out), -EDOM);
        logits[200] = INFINITY;
        cr_expect_eq(sampler_sample(s, logits, &out), -EDOM);
        logits[200] = 0;
        cr_expect_eq(out.token, -7);
        cr_expect_eq(sampler_sample(s, logits, &out), 0);
        sampler_destroy(s);
    }
}

Test(sampler_chain, penalties_that_overflow_are_an_error_wherever_they_stand)
{
    const float logits[] = {-3e38f, -3e38f};
    const uint8_t chain[] = {SAMPLER_TOP_P, SAMPLER_PENALTIES, SAMPLER_TYPICAL_P};
    struct sampler_params p = off();
    p.repeat_penalty = 100;
    p.typical_p = 0.5f;
    p.top_p = 0.99f;
    for (uint32_t n = 2; n <= 3; n++) {
        set_chain(&p, chain, n);
        struct sampler *s = create(&p, 2);
        struct sampled_token out;
        cr_assert_eq(sampler_accept(s, 0), 0);
        cr_assert_eq(sampler_accept(s, 1), 0);
        cr_expect_eq(sampler_sample(s, logits, &out), -EDOM);
        sampler_destroy(s);
    }
}

Test(sampler_chain, dry_never_forbids_a_token)
{
    const float logits[] = {1, 2};
    struct sampler_params p = off();
    p.dry_multiplier = 100;
    p.dry_base = 100;
    struct sampler *s = create(&p, 2);
    for (int i = 0; i < 5000; i++) {
        cr_assert_eq(sampler_accept(s, i % 2), 0);
    }
    cr_expect_eq(sample(s, logits), 1, "0 would go on with a repetition of 4998 tokens");
    p.dry_penalty_last_n = 100;
    sampler_destroy(s);
    const float one[] = {1};
    s = create(&p, 1);
    for (int i = 0; i < 5000; i++) {
        cr_assert_eq(sampler_accept(s, 0), 0);
    }
    cr_expect_eq(sample(s, one), 0);
    sampler_destroy(s);
}

Test(sampler_chain, bad_parameters_are_refused)
{
    struct sampler_params p[40];
    struct sampler *s = NULL;
    size_t n = 0;
    for (size_t i = 0; i < 40; i++) {
        p[i] = sampler_params_default();
    }
    static const float bad[] = {NAN, INFINITY, -0.5f};
    for (size_t i = 0; i < 3; i++) {
        p[n++].dynatemp_range = bad[i];
        p[n++].dynatemp_exponent = bad[i];
        p[n++].typical_p = bad[i];
        p[n++].xtc_probability = bad[i];
        p[n++].xtc_threshold = bad[i];
        p[n++].dry_multiplier = bad[i];
        p[n++].dry_base = bad[i];
        p[n++].mirostat_tau = bad[i];
        p[n++].mirostat_eta = bad[i];
    }
    p[n++].top_n_sigma = NAN;
    p[n++].dry_allowed_length = -1;
    p[n++].dry_penalty_last_n = -2;
    p[n++].mirostat = 3;
    p[n++].mirostat = -1;
    p[n++].n_chain = SAMPLER_CHAIN_MAX + 1;
    p[n++].chain[0] = SAMPLER_KINDS;
    for (size_t i = 0; i < n; i++) {
        cr_expect_eq(sampler_create(&p[i], 10, &s), -EINVAL, "parameters %zu", i);
    }
}

Test(sampler_chain, logarithms_and_powers_are_those_of_libm)
{
    for (int i = 0; i < 20000; i++) {
        double x = exp((double)between(-80, 80)), y = (double)between(-3, 3);
        cr_assert_float_eq(sampler_log(x), log(x), 1e-14 * (1 + fabs(log(x))));
        double e = (double)between(-690, 690);
        cr_assert_float_eq(sampler_exp_wide(e) / exp(e), 1, 1e-13, "e^%g", e);
        cr_assert_float_eq(sampler_pow(x, y) / pow(x, y), 1, 1e-12, "%g^%g", x, y);
    }
    cr_expect(sampler_log(1) == 0 && isinf(sampler_log(0)));
    cr_expect(sampler_pow(0, 2) == 0 && sampler_pow(0, 0) == 1 && sampler_pow(5, 0) == 1);
    cr_expect(sampler_exp_wide(-1e9) > 0 && isfinite(sampler_exp_wide(INFINITY)));
}
