/* Embeddings of a decoder: what rows are, how they are pooled, and that neighbours, chunks and the
 * other inputs of a request change no bit of them. */
#include "tests/unit/engine/embeds.h"
#include "tests/unit/engine/parts.h"
#include "tests/unit/must.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define N_SCORES 3u

static struct parts parts;
static struct model *model;
static struct engine *engine;

static void setup(void)
{
    struct tiny t = tiny_default();
    t.n_scores = N_SCORES;
    parts_init(&parts, 2);
    model = parts_load(&parts, &t, "tiny");
    engine = embeds_engine(parts.pool, 4, PARTS_BATCH);
}

static void teardown(void)
{
    struct engine_stats s;
    engine_stats(engine, &s);
    must(s.kv_blocks_used == 0);
    must(s.n_running == 0);
    must(s.n_waiting == 0);
    engine_destroy(engine);
    model_unref(model);
    parts_finish(&parts);
}

TestSuite(embed, .init = setup, .fini = teardown, .timeout = 120);

static struct embeds *run(enum pooling pooling, uint32_t seed, const uint32_t *lengths,
                          uint32_t n_inputs)
{
    struct embeds *e = embeds_make(model, pooling, seed, lengths, n_inputs);
    embeds_submit(engine, e);
    embeds_wait(engine, e);
    cr_assert(eq(int, e->request->finish, FINISH_LENGTH), "%s", e->request->error_message);
    return e;
}

/* Rows without pooling, one input. */
static struct embeds *run_rows(uint32_t seed, uint32_t n)
{
    struct embeds *e = run(POOLING_NONE, seed, &n, 1);
    cr_assert(eq(u32, e->n_rows[0], n));
    cr_assert(not(e->out_of_order));
    return e;
}

static void check_equal(const float *a, const float *b, size_t n)
{
    cr_expect(eq(int, memcmp(a, b, n * sizeof(*a)), 0));
}

/* ---- what rows are ----------------------------------------------------------------------- */

/* Rows of logits come another way: the head's product of the same rows. */
Test(embed, rows_times_the_head_are_the_logits)
{
    uint32_t n = 150;
    struct embeds *rows = run_rows(1, n);
    struct embeds *logits = embeds_make(model, POOLING_NONE, 1, &n, 1);
    struct request *r = logits->request;
    r->kind = REQUEST_LOGITS;
    r->tokens = r->embed.inputs[0].tokens;
    r->n_tokens = n;
    r->embed.n_inputs = 0;
    r->embed.width = TINY_VOCAB; /* how the rows that come are laid out */
    embeds_submit(engine, logits);
    embeds_wait(engine, logits);
    cr_assert(eq(u32, logits->n_rows[0], n));
    const float *head = gguf_find_tensor(model_gguf(model), "output.weight")->data;
    for (uint32_t i = 0; i < n; i++) {
        const float *x = rows->rows[0] + i * rows->n_embd;
        for (uint32_t v = 0; v < TINY_VOCAB; v++) {
            double sum = 0, size = 0;
            for (uint32_t k = 0; k < rows->n_embd; k++) {
                double term = (double)x[k] * (double)head[v * rows->n_embd + k];
                sum += term;
                size += fabs(term);
            }
            /* float32 products summed in any order: a few units of the terms' last places. */
            cr_assert(fabs(sum - (double)logits->rows[0][i * TINY_VOCAB + v]) <= 1e-5 * size,
                      "row %u, token %u", i, v);
        }
    }
    embeds_destroy(rows);
    embeds_destroy(logits);
}

/* ---- pooling ----------------------------------------------------------------------------- */

Test(embed, pooled_vectors_are_made_of_the_rows)
{
    static const uint32_t lengths[] = {1, 63, 64, 65, 128, 200, 511};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        uint32_t n = lengths[i], width = model_shape(model)->n_embd;
        struct embeds *rows = run_rows(7, n);
        struct embeds *mean = run(POOLING_MEAN, 7, &n, 1);
        struct embeds *cls = run(POOLING_CLS, 7, &n, 1);
        struct embeds *last = run(POOLING_LAST, 7, &n, 1);
        check_equal(embeds_vector(cls, 0), rows->rows[0], width);
        check_equal(embeds_vector(last, 0), rows->rows[0] + (n - 1) * width, width);
        for (uint32_t k = 0; k < width; k++) {
            double sum = 0;
            for (uint32_t row = 0; row < n; row++) {
                sum += (double)rows->rows[0][row * width + k];
            }
            cr_assert(embeds_vector(mean, 0)[k] == (float)(sum / n), "%u tokens", n);
        }
        cr_expect(eq(u32, mean->request->n_prompt, n));
        embeds_destroy(rows);
        embeds_destroy(mean);
        embeds_destroy(cls);
        embeds_destroy(last);
    }
}

static const float *tensor(const char *name)
{
    return gguf_find_tensor(model_gguf(model), name)->data;
}

/* tanh(cls x + bias), then cls.output, of the last row, in float64. */
Test(embed, rank_is_the_classifier_of_the_last_row)
{
    uint32_t n = 70, width = model_shape(model)->n_embd;
    struct embeds *rows = run_rows(3, n);
    struct embeds *rank = run(POOLING_RANK, 3, &n, 1);
    const float *x = rows->rows[0] + (n - 1) * width;
    double dense[64];
    cr_assert(le(u32, width, 64));
    for (uint32_t o = 0; o < width; o++) {
        double sum = (double)tensor("cls.bias")[o];
        for (uint32_t k = 0; k < width; k++) {
            sum += (double)x[k] * (double)tensor("cls.weight")[o * width + k];
        }
        dense[o] = tanh(sum);
    }
    cr_assert(eq(u32, rank->request->embed.width, N_SCORES));
    for (uint32_t o = 0; o < N_SCORES; o++) {
        double sum = (double)tensor("cls.output.bias")[o];
        for (uint32_t k = 0; k < width; k++) {
            sum += dense[k] * (double)tensor("cls.output.weight")[o * width + k];
        }
        /* Sums of 32 terms of size 1 in float32, twice. */
        cr_expect(fabs(sum - (double)embeds_vector(rank, 0)[o]) < 1e-4, "score %u", o);
    }
    embeds_destroy(rows);
    embeds_destroy(rank);
}

Test(embed, vectors_are_cut_and_then_scaled)
{
    uint32_t n = 90, width = model_shape(model)->n_embd;
    struct embeds *whole = run(POOLING_MEAN, 5, &n, 1);
    float want[64];
    for (uint32_t cut = 1; cut <= width; cut += 7) {
        struct embeds *e = embeds_make(model, POOLING_MEAN, 5, &n, 1);
        e->request->embed.width = cut;
        e->request->embed.norm = 2;
        embeds_submit(engine, e);
        embeds_wait(engine, e);
        memcpy(want, embeds_vector(whole, 0), cut * sizeof(float));
        embedding_normalise(want, cut, 2);
        check_equal(embeds_vector(e, 0), want, cut);
        embeds_destroy(e);
    }
    struct embeds *rows = run_rows(5, n);
    struct embeds *cut = embeds_make(model, POOLING_NONE, 5, &n, 1);
    cut->request->embed.width = 10;
    cut->request->embed.norm = 2;
    embeds_submit(engine, cut);
    embeds_wait(engine, cut);
    for (uint32_t i = 0; i < n; i++) {
        memcpy(want, rows->rows[0] + i * width, 10 * sizeof(float));
        embedding_normalise(want, 10, 2);
        check_equal(cut->rows[0] + i * 10, want, 10);
    }
    embeds_destroy(whole);
    embeds_destroy(rows);
    embeds_destroy(cut);
}

/* ---- company ----------------------------------------------------------------------------- */

/* Texts of many lengths in one request, more than run at once, beside a generation; each against
 * itself alone. Chunks differ then, as the others take their rows of every step. */
Test(embed, neighbours_chunks_and_other_inputs_change_no_bit)
{
    enum { N = 21 };
    static const enum pooling kinds[] = {POOLING_MEAN, POOLING_CLS, POOLING_LAST, POOLING_RANK};
    uint32_t lengths[N];
    uint32_t total = 0;
    for (uint32_t i = 0; i < N; i++) {
        lengths[i] = 1 + i * i % 150;
        total += lengths[i];
    }
    for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
        struct embeds *busy = embeds_make_generation(model, 100, 200);
        embeds_submit(engine, busy);
        struct embeds *many = run(kinds[k], 40, lengths, N);
        embeds_wait(engine, busy);
        cr_expect(eq(u32, busy->n_generated, 200));
        cr_expect(eq(u32, many->request->n_prompt, total));
        for (uint32_t i = 0; i < N; i++) {
            struct embeds *one = run(kinds[k], 40 + i, &lengths[i], 1);
            check_equal(embeds_vector(many, i), embeds_vector(one, 0), one->request->embed.width);
            embeds_destroy(one);
        }
        embeds_destroy(busy);
        embeds_destroy(many);
    }
}

Test(embed, rows_of_many_inputs_are_those_of_each)
{
    static const uint32_t lengths[] = {200, 3, 65, 1, 100};
    struct embeds *many = run(POOLING_NONE, 60, lengths, 5);
    cr_expect(not(many->out_of_order));
    for (uint32_t i = 0; i < 5; i++) {
        struct embeds *one = run_rows(60 + i, lengths[i]);
        cr_assert(eq(u32, many->n_rows[i], lengths[i]));
        check_equal(many->rows[i], one->rows[0], (size_t)lengths[i] * one->n_embd);
        embeds_destroy(one);
    }
    embeds_destroy(many);
}

/* One request of many inputs is not in the way of another that comes later. */
Test(embed, a_request_of_many_inputs_lets_others_in)
{
    uint32_t lengths[EMBEDS_INPUTS_MAX];
    for (uint32_t i = 0; i < EMBEDS_INPUTS_MAX; i++) {
        lengths[i] = 250;
    }
    struct embeds *many = embeds_make(model, POOLING_NONE, 1, lengths, EMBEDS_INPUTS_MAX);
    struct embeds *other = embeds_make(model, POOLING_LAST, 1, lengths, 1);
    embeds_submit(engine, many);
    embeds_submit(engine, other);
    embeds_wait(engine, other);
    cr_expect(not(many->done));
    embeds_wait(engine, many);
    embeds_destroy(many);
    embeds_destroy(other);
}

/* ---- ends -------------------------------------------------------------------------------- */

Test(embed, a_cancelled_request_ends_once_with_all_its_inputs)
{
    uint32_t lengths[EMBEDS_INPUTS_MAX];
    for (uint32_t i = 0; i < EMBEDS_INPUTS_MAX; i++) {
        lengths[i] = 100;
    }
    struct embeds *e = embeds_make(model, POOLING_NONE, 1, lengths, EMBEDS_INPUTS_MAX);
    embeds_submit(engine, e);
    embeds_wait_inputs(engine, e, 6);
    engine_cancel(engine, e->request);
    embeds_wait(engine, e);
    cr_expect(eq(int, e->request->finish, FINISH_CANCELLED));
    cr_expect(eq(u32, e->n_rows[EMBEDS_INPUTS_MAX - 1], 0));
    cr_expect(eq(u32, engine_model_users(engine, model), 0));
    embeds_destroy(e);
}

/* An input that can never fit ends the request, while others of its inputs run. */
Test(embed, an_input_that_fails_ends_the_request)
{
    uint32_t lengths[EMBEDS_INPUTS_MAX];
    for (uint32_t i = 0; i < EMBEDS_INPUTS_MAX; i++) {
        lengths[i] = 30;
    }
    struct embeds *e = embeds_make(model, POOLING_NONE, 1, lengths, EMBEDS_INPUTS_MAX);
    /* A token that no table has, which the handlers would have refused: the backend says so. */
    e->request->embed.inputs[10].tokens[3] = TINY_VOCAB + 5;
    embeds_submit(engine, e);
    embeds_wait(engine, e);
    cr_expect(eq(int, e->request->finish, FINISH_ERROR));
    cr_expect(eq(int, e->request->error, PROTO_E_BACKEND));
    cr_expect(eq(u32, engine_model_users(engine, model), 0));
    embeds_destroy(e);
}

Test(embed, an_engine_that_ends_answers_what_waits)
{
    uint32_t lengths[EMBEDS_INPUTS_MAX];
    for (uint32_t i = 0; i < EMBEDS_INPUTS_MAX; i++) {
        lengths[i] = 200;
    }
    struct embeds *e = embeds_make(model, POOLING_NONE, 1, lengths, EMBEDS_INPUTS_MAX);
    struct embeds *f = embeds_make(model, POOLING_NONE, 1, lengths, EMBEDS_INPUTS_MAX);
    embeds_submit(engine, e);
    embeds_submit(engine, f);
    embeds_wait_inputs(engine, e, 1);
    engine_destroy(engine);
    cr_expect(ne(int, e->request->finish, FINISH_NONE));
    cr_expect(ne(int, f->request->finish, FINISH_NONE));
    cr_expect(eq(u32, e->request->n_sequences + f->request->n_sequences, 0));
    engine = embeds_engine(parts.pool, 4, PARTS_BATCH);
    embeds_destroy(e);
    embeds_destroy(f);
}

/* ---- lengths ----------------------------------------------------------------------------- */

Test(pooling, names_go_both_ways)
{
    for (unsigned i = 0; i < POOLING_COUNT; i++) {
        enum pooling found = POOLING_COUNT;
        const char *name = pooling_name((enum pooling)i);
        cr_expect(eq(int, pooling_by_name(name, strlen(name), &found), 0));
        cr_expect(eq(int, found, i));
        cr_expect(lt(int, pooling_by_name(name, strlen(name) - 1, &found), 0));
    }
    cr_expect(eq(int, strcmp(pooling_name((enum pooling)99), "unknown"), 0));
}

Test(pooling, vectors_get_the_length_that_is_asked_for)
{
    const float x[3] = {3, -4, 0};
    const struct {
        int32_t norm;
        double want[3];
    } cases[] = {
        {-1, {3, -4, 0}},
        {0, {3 / 4.0 * 32760, -32760, 0}},
        {1, {3 / 7.0, -4 / 7.0, 0}},
        {2, {0.6, -0.8, 0}},
        {3, {3 / cbrt(91), -4 / cbrt(91), 0}},
        {64, {0.75, -1, 0}}, /* (3/4)^64 adds 1e-8 to the sum: no 64th root of that shows */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        float y[3];
        memcpy(y, x, sizeof(y));
        embedding_normalise(y, 3, cases[i].norm);
        for (int k = 0; k < 3; k++) {
            cr_expect(fabs((double)y[k] - cases[i].want[k]) <= 1e-7 * fabs(cases[i].want[k]),
                      "norm %d, value %d: %g", cases[i].norm, k, (double)y[k]);
        }
    }
    float zeros[4] = {0, 0, 0, 0}, huge[2] = {3e38f, 3e38f};
    for (int32_t norm = -1; norm < 5; norm++) {
        embedding_normalise(zeros, 4, norm);
        cr_expect(zeros[0] == 0 && zeros[3] == 0);
    }
    embedding_normalise(huge, 2, 64);
    cr_expect(huge[0] > 0.98f && huge[0] < 1);
}
