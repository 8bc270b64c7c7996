/* The sampler against brute force on fixed logits, and its draws against their distribution. */
#include "daemon/model/sampler.h"
#include "daemon/model/sampler_internal.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define N_VOCAB 400

static float logits[N_VOCAB];

/* Values without ties, in no order; the same on every run. */
static void fill_logits(void)
{
    uint64_t state = 42;
    for (size_t i = 0; i < N_VOCAB; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        logits[i] = (float)((double)(state >> 40) / (1 << 24) * 12 - 6);
    }
}

/* Every candidate left, whatever else is set. */
static struct sampler_params everything(void)
{
    struct sampler_params p = sampler_params_default();
    p.temperature = 1;
    p.top_k = 0;
    p.top_p = 1;
    p.min_p = 0;
    return p;
}

static struct sampler *create(const struct sampler_params *p, uint32_t n_vocab)
{
    struct sampler *s = NULL;
    cr_assert_eq(sampler_create(p, n_vocab, &s), 0);
    return s;
}

static int32_t sample(struct sampler *s, const float *values)
{
    struct sampled_token out;
    cr_assert_eq(sampler_sample(s, values, &out), 0);
    return out.token;
}

static int32_t greedy(struct sampler_params p, const float *values, uint32_t n,
                      const int32_t *history, size_t n_history)
{
    p.temperature = 0;
    struct sampler *s = create(&p, n);
    for (size_t i = 0; i < n_history; i++) {
        cr_assert_eq(sampler_accept(s, history[i]), 0);
    }
    int32_t token = sample(s, values);
    sampler_destroy(s);
    return token;
}

/* How many of the tokens better than token there are. */
static size_t rank_of(int32_t token)
{
    size_t rank = 0;
    for (size_t i = 0; i < N_VOCAB; i++) {
        rank += logits[i] > logits[token];
    }
    return rank;
}

/* Draws n times and expects exactly the tokens that keep() names, each with its share: Pearson's
 * chi-square, cells of expectation below 5 joined; the bound is 5 standard deviations. */
static void expect_distribution(const struct sampler_params *p, const double *weights, size_t n)
{
    size_t *count = calloc(N_VOCAB, sizeof(*count));
    struct sampler *s = create(p, N_VOCAB);
    double total = 0;
    for (size_t i = 0; i < N_VOCAB; i++) {
        total += weights[i];
    }
    for (size_t i = 0; i < n; i++) {
        count[sample(s, logits)]++;
    }
    double chi = 0, rest_expected = 0, rest_seen = 0;
    size_t cells = 0;
    for (size_t i = 0; i < N_VOCAB; i++) {
        double expected = weights[i] / total * (double)n;
        cr_assert(expected > 0 || count[i] == 0, "token %zu must never be drawn", i);
        if (expected < 5) {
            rest_expected += expected;
            rest_seen += (double)count[i];
            continue;
        }
        double d = (double)count[i] - expected;
        chi += d * d / expected;
        cells++;
    }
    if (rest_expected >= 5) {
        chi += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
        cells++;
    }
    double freedom = (double)cells - 1;
    cr_expect_leq(chi, freedom + 5 * sqrt(2 * freedom) + 5, "chi-square %f, %zu cells", chi, cells);
    sampler_destroy(s);
    free(count);
}

Test(sampler, defaults_are_the_documented_ones)
{
    struct sampler_params p = sampler_params_default();
    cr_expect(p.temperature == 0.8f && p.top_k == 40 && p.top_p == 0.95f && p.min_p == 0.05f);
    cr_expect(p.repeat_penalty == 1 && p.repeat_last_n == 64 && p.presence_penalty == 0);
}

Test(sampler, greedy_takes_the_first_of_equal_maxima)
{
    float values[40] = {0};
    values[17] = values[23] = values[39] = 2;
    cr_expect_eq(greedy(everything(), values, 40, NULL, 0), 17);
    values[17] = -INFINITY;
    cr_expect_eq(greedy(everything(), values, 40, NULL, 0), 23);
    struct logit_bias bias[] = {{5, 2.0f}, {23, 0.0f}};
    struct sampler_params p = everything();
    p.logit_bias = bias;
    p.n_logit_bias = 2;
    cr_expect_eq(greedy(p, values, 40, NULL, 0), 5, "ties after a bias go to the lowest id too");
}

Test(sampler, logprobs_are_those_of_the_raw_logits)
{
    fill_logits();
    double sum = 0;
    for (size_t i = 0; i < N_VOCAB; i++) {
        sum += exp((double)logits[i]);
    }
    struct sampler_params p = sampler_params_default();
    p.n_probs = SAMPLER_MAX_PROBS;
    p.temperature = 0.3f;
    struct sampler *s = create(&p, N_VOCAB);
    struct sampled_token out;
    cr_assert_eq(sampler_sample(s, logits, &out), 0);
    cr_expect_eq(out.n_probs, SAMPLER_MAX_PROBS);
    for (uint32_t i = 0; i < out.n_probs; i++) {
        cr_expect_eq(rank_of(out.probs[i].token), i);
        double expected = (double)logits[out.probs[i].token] - log(sum);
        cr_expect_float_eq(out.probs[i].logprob, expected, 1e-5);
    }
    cr_expect_float_eq(out.logprob, (double)logits[out.token] - log(sum), 1e-5);
    sampler_destroy(s);
}

Test(sampler, fewer_tokens_than_wanted_probabilities)
{
    float values[3] = {1, 1, 2};
    struct sampler_params p = everything();
    p.n_probs = 5;
    struct sampler *s = create(&p, 3);
    struct sampled_token out;
    cr_assert_eq(sampler_sample(s, values, &out), 0);
    cr_expect_eq(out.n_probs, 3);
    cr_expect(out.probs[0].token == 2 && out.probs[1].token == 0 && out.probs[2].token == 1);
    sampler_destroy(s);
}

Test(sampler, draws_follow_the_softmax)
{
    fill_logits();
    struct sampler_params p = everything();
    double weights[N_VOCAB];
    for (size_t i = 0; i < N_VOCAB; i++) {
        weights[i] = exp((double)logits[i]);
    }
    p.seed = 1;
    expect_distribution(&p, weights, 50000);
    p.temperature = 0.5f;
    for (size_t i = 0; i < N_VOCAB; i++) {
        weights[i] = exp((double)logits[i] / 0.5);
    }
    expect_distribution(&p, weights, 50000);
}

Test(sampler, top_k_leaves_exactly_k)
{
    fill_logits();
    double weights[N_VOCAB];
    static const int32_t ks[] = {1, 2, 7, 40, 333, N_VOCAB, N_VOCAB + 5};
    for (size_t k = 0; k < sizeof(ks) / sizeof(ks[0]); k++) {
        struct sampler_params p = everything();
        p.top_k = ks[k];
        for (size_t i = 0; i < N_VOCAB; i++) {
            weights[i] = rank_of((int32_t)i) < (size_t)ks[k] ? exp((double)logits[i]) : 0;
        }
        expect_distribution(&p, weights, 5000);
    }
}

/* The fewest best tokens whose share reaches p, at least keep. */
static void top_p_weights(double top_p, size_t keep, double *weights)
{
    double total = 0, by_rank[N_VOCAB];
    for (size_t i = 0; i < N_VOCAB; i++) {
        by_rank[rank_of((int32_t)i)] = exp((double)logits[i]);
        total += exp((double)logits[i]);
    }
    size_t n = 0;
    double sum = 0;
    while (n < N_VOCAB && (n < keep || sum < top_p * total)) {
        sum += by_rank[n++];
    }
    for (size_t i = 0; i < N_VOCAB; i++) {
        weights[i] = rank_of((int32_t)i) < n ? exp((double)logits[i]) : 0;
    }
}

Test(sampler, top_p_leaves_the_nucleus)
{
    fill_logits();
    double weights[N_VOCAB];
    static const float ps[] = {0.0f, 0.1f, 0.5f, 0.9f, 0.999f};
    for (size_t k = 0; k < sizeof(ps) / sizeof(ps[0]); k++) {
        struct sampler_params p = everything();
        p.top_p = ps[k];
        top_p_weights((double)ps[k], 1, weights);
        expect_distribution(&p, weights, 5000);
    }
    struct sampler_params p = everything();
    p.top_p = 0.01f;
    p.min_keep = 5;
    top_p_weights(0.01, 5, weights);
    expect_distribution(&p, weights, 5000);
}

Test(sampler, min_p_drops_what_is_far_below_the_best)
{
    fill_logits();
    double weights[N_VOCAB];
    static const float ps[] = {0.01f, 0.2f, 1.0f};
    for (size_t k = 0; k < sizeof(ps) / sizeof(ps[0]); k++) {
        for (uint32_t keep = 0; keep < 20; keep += 19) {
            struct sampler_params p = everything();
            p.min_p = ps[k];
            p.min_keep = keep;
            float best = -INFINITY;
            for (size_t i = 0; i < N_VOCAB; i++) {
                best = logits[i] > best ? logits[i] : best;
            }
            size_t above = 0;
            for (size_t i = 0; i < N_VOCAB; i++) {
                above += exp((double)logits[i] - (double)best) >= (double)ps[k];
            }
            size_t n = above > keep ? above : keep;
            for (size_t i = 0; i < N_VOCAB; i++) {
                weights[i] = rank_of((int32_t)i) < n ? exp((double)logits[i]) : 0;
            }
            expect_distribution(&p, weights, 5000);
        }
    }
}

Test(sampler, the_whole_chain_in_its_order)
{
    fill_logits();
    struct sampler_params p = sampler_params_default();
    /* top_k 40; top_p of what is left; min_p of the best; then the temperature. */
    double weights[N_VOCAB], by_rank[40], total = 0, sum = 0;
    for (size_t i = 0; i < N_VOCAB; i++) {
        if (rank_of((int32_t)i) < 40) {
            by_rank[rank_of((int32_t)i)] = exp((double)logits[i]);
            total += exp((double)logits[i]);
        }
    }
    size_t n = 0;
    while (sum < (double)p.top_p * total) {
        sum += by_rank[n++];
    }
    while (by_rank[n - 1] < by_rank[0] * (double)p.min_p) {
        n--;
    }
    for (size_t i = 0; i < N_VOCAB; i++) {
        weights[i] = rank_of((int32_t)i) < n ? exp((double)logits[i] / 0.8) : 0;
    }
    p.seed = 7;
    expect_distribution(&p, weights, 50000);
}

Test(sampler, penalties_follow_the_formula)
{
    /* Token 0 occurs twice, 1 once, 2 has left the window of three. */
    const int32_t history[] = {2, 0, 1, 0};
    struct sampler_params p = everything();
    p.repeat_last_n = 3;
    p.repeat_penalty = 2;
    p.frequency_penalty = 0.25f;
    p.presence_penalty = 0.5f;
    /* 0: 4 / 2 - 2 * 0.25 - 0.5 = 1;  1: -1 * 2 - 0.25 - 0.5 = -2.75;  2 and 3 stay. */
    float values[4] = {4, -1, -2.5f, 0.9f};
    cr_expect_eq(greedy(p, values, 4, history, 4), 0);
    values[3] = 1.1f;
    cr_expect_eq(greedy(p, values, 4, history, 4), 3);
    float low[4] = {-100, -1, -2.8f, -100};
    cr_expect_eq(greedy(p, low, 4, history, 4), 1);
    low[2] = -2.7f;
    cr_expect_eq(greedy(p, low, 4, history, 4), 2);
    p.repeat_last_n = -1; /* now 2 is penalised too: -2.7 * 2 - 0.75 */
    cr_expect_eq(greedy(p, low, 4, history, 4), 1);
    p.repeat_last_n = 0;
    cr_expect_eq(greedy(p, values, 4, history, 4), 0);
}

Test(sampler, penalty_window_slides_over_a_long_history)
{
    struct sampler_params p = everything();
    p.presence_penalty = 10;
    p.temperature = 0;
    p.repeat_last_n = 300;
    struct sampler *s = create(&p, 9);
    float values[9] = {7, 6, 5, 4, 3, 2, 1, 0, 5.5f}; /* token 8 never occurs */
    for (int i = 0; i < 1000; i++) {
        cr_assert_eq(sampler_accept(s, i < 700 ? 0 : i % 7 + 1), 0);
    }
    cr_expect_eq(sample(s, values), 0, "token 0 has just left the window");
    cr_assert_eq(sampler_accept(s, 0), 0);
    cr_expect_eq(sample(s, values), 8);
    for (int i = 0; i < 299; i++) {
        cr_assert_eq(sampler_accept(s, 1), 0);
    }
    cr_expect_eq(sample(s, values), 8);
    cr_assert_eq(sampler_accept(s, 1), 0);
    cr_expect_eq(sample(s, values), 0);
    sampler_destroy(s);
}

Test(sampler, bias_and_ignored_ends)
{
    float values[5] = {1, 2, 3, 4, 5};
    struct logit_bias bias[] = {{4, -INFINITY}, {0, 1.5f}, {0, 1.0f}};
    const int32_t eog[] = {3};
    struct sampler_params p = everything();
    p.logit_bias = bias;
    p.n_logit_bias = 3;
    p.eog = eog;
    p.n_eog = 1;
    cr_expect_eq(greedy(p, values, 5, NULL, 0), 3);
    p.ignore_eos = true;
    cr_expect_eq(greedy(p, values, 5, NULL, 0), 0, "biases of the same token add up: 3.5");
    p.temperature = 1;
    struct sampler *s = create(&p, 5);
    for (int i = 0; i < 2000; i++) {
        int32_t token = sample(s, values);
        cr_assert(token != 3 && token != 4);
    }
    sampler_destroy(s);
}

Test(sampler, same_seed_same_tokens)
{
    fill_logits();
    struct sampler_params p = sampler_params_default();
    p.temperature = 2;
    int32_t first[50], differing = 0;
    for (uint64_t seed = 0; seed < 3; seed++) {
        p.seed = seed == 2 ? 99 : 5;
        struct sampler *s = create(&p, N_VOCAB);
        for (int i = 0; i < 50; i++) {
            int32_t token = sample(s, logits);
            first[i] = seed == 0 ? token : first[i];
            cr_expect(seed != 1 || token == first[i]);
            differing += seed == 2 && token != first[i];
        }
        sampler_destroy(s);
    }
    cr_expect_gt(differing, 20);
}

Test(sampler, draws_are_the_same_on_every_machine)
{
    /* Recorded once: a change of generator, exponential or order of sums shows here. */
    fill_logits();
    struct sampler_params p = sampler_params_default();
    p.seed = 1234;
    struct sampler *s = create(&p, N_VOCAB);
    static const int32_t expected[] = {372, 376, 234, 186, 118, 376, 372, 271,
                                       389, 234, 334, 243, 164, 243, 197, 110};
    for (size_t i = 0; i < sizeof(expected) / sizeof(expected[0]); i++) {
        int32_t token = sample(s, logits);
        cr_expect_eq(token, expected[i], "draw %zu: %d", i, token);
    }
    sampler_destroy(s);
}

Test(sampler, bad_logits_are_refused)
{
    fill_logits();
    struct sampled_token out = {.token = -7};
    static const size_t places[] = {0, 15, 16, 300, N_VOCAB - 1};
    for (int greedy_too = 0; greedy_too < 2; greedy_too++) {
        struct sampler_params p = sampler_params_default();
        p.temperature = greedy_too ? 0 : 1;
        struct sampler *s = create(&p, N_VOCAB);
        for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
            float kept = logits[places[i]];
            logits[places[i]] = NAN;
            cr_expect_eq(sampler_sample(s, logits, &out), -EDOM);
            logits[places[i]] = INFINITY;
            cr_expect_eq(sampler_sample(s, logits, &out), -EDOM);
            logits[places[i]] = -INFINITY;
            cr_expect_eq(sampler_sample(s, logits, &out), 0);
            logits[places[i]] = kept;
        }
        float nothing[N_VOCAB];
        for (size_t i = 0; i < N_VOCAB; i++) {
            nothing[i] = -INFINITY;
        }
        out.token = -7;
        cr_expect_eq(sampler_sample(s, nothing, &out), -EDOM);
        cr_expect_eq(out.token, -7, "the output is untouched on failure");
        sampler_destroy(s);
    }
}

/* As sampler_math.c has it: sixteen sums of up to 512 values, one after the other; by scalars. */
static float plain_log_sum(const float *values, size_t n, float max)
{
    double sum = 0;
    for (size_t start = 0; start < n; start += 512) {
        volatile float lane[16] = {0}; /* no vectors here */
        for (size_t i = start; i < n && i < start + 512; i++) {
            lane[(i - start) % 16] += sampler_exp(values[i] - max);
        }
        for (size_t j = 0; j < 16; j++) {
            sum += (double)lane[j];
        }
    }
    return (float)((double)max + log(sum));
}

Test(sampler, the_sum_of_exponentials_is_the_same_with_any_vectors)
{
    static const size_t sizes[] = {1, 15, 16, 17, 511, 512, 513, 3000, 32003};
    float *values = malloc(32003 * sizeof(*values));
    fill_logits();
    for (size_t k = 0; k < sizeof(sizes) / sizeof(sizes[0]); k++) {
        size_t n = sizes[k], best, want = 0;
        float sum;
        for (size_t i = 0; i < n; i++) {
            values[i] = logits[i * 7 % N_VOCAB] * 20;
            values[i] = i % 11 == 5 ? -INFINITY : values[i];
            want = values[i] > values[want] ? i : want;
        }
        cr_assert_eq(sampler_log_sum_exp(values, n, &best, &sum), 0);
        cr_expect_eq(best, want, "%zu: %zu, not %zu", n, best, want);
        float plain = plain_log_sum(values, n, values[want]);
        cr_expect_eq(memcmp(&sum, &plain, sizeof(sum)), 0, "%zu: %a, not %a", n, (double)sum,
                     (double)plain);
    }
    free(values);
}

Test(sampler, nothing_left_after_the_biases_is_an_error)
{
    float values[2] = {1, -INFINITY};
    struct logit_bias bias = {0, -INFINITY};
    struct sampler_params p = sampler_params_default();
    p.logit_bias = &bias;
    p.n_logit_bias = 1;
    struct sampler *s = create(&p, 2);
    struct sampled_token out;
    cr_expect_eq(sampler_sample(s, values, &out), -EDOM);
    sampler_destroy(s);
}

Test(sampler, extreme_values_stay_in_range)
{
    float values[4] = {3e38f, -3e38f, 2.9e38f, -INFINITY};
    struct sampler_params p = everything();
    static const float temperatures[] = {1e-38f, 1e-6f, 1, 1e30f};
    for (size_t i = 0; i < 4; i++) {
        p.temperature = temperatures[i];
        struct sampler *s = create(&p, 4);
        for (int k = 0; k < 100; k++) {
            int32_t token = sample(s, values);
            cr_assert(token >= 0 && token < 3);
            cr_assert(i == 3 || token == 0);
        }
        sampler_destroy(s);
    }
}

Test(sampler, bad_parameters_are_refused)
{
    struct sampler *s = NULL;
    const int32_t outside = 10;
    struct logit_bias bias[] = {{10, 0}, {-1, 0}, {1, NAN}, {1, INFINITY}};
    struct sampler_params p[16];
    size_t n = 0;
    for (size_t i = 0; i < 16; i++) {
        p[i] = sampler_params_default();
    }
    p[n++].temperature = NAN;
    p[n++].top_p = -0.1f;
    p[n++].top_p = NAN;
    p[n++].min_p = 1.5f;
    p[n++].repeat_penalty = 0;
    p[n++].repeat_penalty = INFINITY;
    p[n++].presence_penalty = NAN;
    p[n++].frequency_penalty = INFINITY;
    p[n++].repeat_last_n = -2;
    p[n++].n_probs = SAMPLER_MAX_PROBS + 1;
    for (size_t i = 0; i < 4; i++) {
        p[n].logit_bias = &bias[i];
        p[n++].n_logit_bias = 1;
    }
    p[n].eog = &outside;
    p[n++].n_eog = 1;
    for (size_t i = 0; i < n; i++) {
        cr_expect_eq(sampler_create(&p[i], 10, &s), -EINVAL, "parameters %zu", i);
    }
    p[n] = sampler_params_default();
    cr_expect_eq(sampler_create(&p[n], 0, &s), -EINVAL);
    cr_expect_null(s);
    s = create(&p[n], 10);
    cr_expect_eq(sampler_accept(s, 10), -ERANGE);
    cr_expect_eq(sampler_accept(s, -1), -ERANGE);
    sampler_destroy(s);
    sampler_destroy(NULL);
}
