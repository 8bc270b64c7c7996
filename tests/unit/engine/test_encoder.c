/* Encoders against a forward pass in float64, at every level of the cpu backend; and what their
 * texts owe to company, which is nothing. */
#include "tests/unit/engine/embeds.h"
#include "tests/unit/engine/encoder.h"
#include "tests/unit/engine/parts.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCH 320u /* rows of a step: what a text may have */

/* Hidden states lie about 1 after the last norm. Products of up to a hundred float32 terms, three
 * layers: a few hundred units of 2^-24. */
#define STATE_TOLERANCE 2e-5

static struct parts parts;

static void setup(void)
{
    parts_init(&parts, 2);
}

static void teardown(void)
{
    parts_finish(&parts);
}

TestSuite(encoder, .init = setup, .fini = teardown, .timeout = 180);

static int try_load(const struct encoder_spec *spec, const char *backend, uint32_t n_ctx,
                    struct model **ret, struct fmt_error *err)
{
    struct encoder e;
    char path[128];
    snprintf(path, sizeof(path), "%s", folder_path(&parts.folder, "encoder.gguf"));
    encoder_init(&e, spec);
    encoder_write(&e, path);
    encoder_finish(&e);
    struct model_options options = parts_model_options();
    options.path = path;
    options.name = "encoder";
    options.backend = backend;
    options.n_ctx = n_ctx;
    options.max_batch_rows = BATCH;
    return model_load(&options, parts.catalogue, parts.pool, parts.io, NULL, NULL, NULL, ret, err);
}

static struct model *load(const struct encoder_spec *spec, const char *backend)
{
    struct model *m = NULL;
    struct fmt_error err = {""};
    cr_assert(eq(int, try_load(spec, backend, 0, &m, &err), 0), "%s", err.text);
    return m;
}

static struct embeds *run(struct engine *engine, struct model *m, enum pooling pooling,
                          uint32_t seed, const uint32_t *lengths, uint32_t n_inputs)
{
    struct embeds *e = embeds_make(m, pooling, seed, lengths, n_inputs);
    embeds_submit(engine, e);
    embeds_wait(engine, e);
    cr_assert(eq(int, e->request->finish, FINISH_LENGTH), "%s", e->request->error_message);
    return e;
}

/* ---- against the reference --------------------------------------------------------------- */

static void near(const float *found, const double *truth, size_t n, const char *what)
{
    for (size_t i = 0; i < n; i++) {
        cr_assert(fabs((double)found[i] - truth[i]) <= STATE_TOLERANCE * (1 + fabs(truth[i])),
                  "%s, value %zu: %.9g, truth %.9g", what, i, (double)found[i], truth[i]);
    }
}

/* All kinds of pooling of one text. */
static void compare_text(struct engine *engine, struct model *m, const struct encoder *e,
                         uint32_t n)
{
    const uint32_t width = e->spec.n_embd;
    double *states = calloc((size_t)n * width, sizeof(*states));
    double mean[64], scores[8];
    int32_t tokens[BATCH];
    cr_assert(states != NULL && width <= 64 && e->spec.n_scores <= 8);
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = embeds_token(11, i);
    }
    encoder_states(e, tokens, n, states);
    for (uint32_t k = 0; k < width; k++) {
        mean[k] = 0;
        for (uint32_t i = 0; i < n; i++) {
            mean[k] += states[i * width + k] / n;
        }
    }
    struct embeds *rows = run(engine, m, POOLING_NONE, 11, &n, 1);
    cr_assert(eq(u32, rows->n_rows[0], n));
    near(rows->rows[0], states, (size_t)n * width, "rows");
    embeds_destroy(rows);
    const struct {
        enum pooling pooling;
        const double *truth;
    } kinds[] = {{POOLING_MEAN, mean},
                 {POOLING_CLS, states},
                 {POOLING_LAST, states + (size_t)(n - 1) * width}};
    for (size_t i = 0; i < 3; i++) {
        struct embeds *v = run(engine, m, kinds[i].pooling, 11, &n, 1);
        near(embeds_vector(v, 0), kinds[i].truth, width, pooling_name(kinds[i].pooling));
        embeds_destroy(v);
    }
    if (e->spec.n_scores > 0) {
        struct embeds *v = run(engine, m, POOLING_RANK, 11, &n, 1);
        encoder_scores(e, states, scores);
        near(embeds_vector(v, 0), scores, e->spec.n_scores, "scores");
        embeds_destroy(v);
    }
    free(states);
}

/* The levels of the cpu backend that run here: "c" first. */
static size_t levels(char names[8][32])
{
    struct backend_info info[4];
    size_t n = 0;
    cr_assert(eq(sz, backend_catalogue_list(parts.catalogue, info, 4), 1));
    char isas[192];
    snprintf(isas, sizeof(isas), "%s", info[0].isas);
    char *rest = NULL;
    for (char *isa = strtok_r(isas, ",", &rest); isa != NULL && n < 8;
         isa = strtok_r(NULL, ",", &rest)) {
        snprintf(names[n++], 32, "cpu:isa=%.20s", isa);
    }
    cr_assert(lt(sz, 0, n));
    return n;
}

static void compare(const struct encoder_spec *spec)
{
    static const uint32_t lengths[] = {1, 2, 15, 64, 65, 130, BATCH};
    char names[8][32];
    size_t n_levels = levels(names);
    struct encoder e;
    encoder_init(&e, spec);
    for (size_t level = 0; level < n_levels; level++) {
        struct model *m = load(spec, names[level]);
        struct engine *engine = embeds_engine(parts.pool, 4, BATCH);
        cr_expect(model_is_encoder(m));
        cr_expect(eq(u32, model_kv_layout(m)->n_classes, 0));
        for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
            compare_text(engine, m, &e, lengths[i]);
        }
        engine_destroy(engine);
        model_unref(m);
    }
    encoder_finish(&e);
}

Test(encoder, bert_is_the_reference)
{
    struct encoder_spec s = encoder_spec_bert();
    compare(&s);
}

Test(encoder, nomic_bert_is_the_reference)
{
    struct encoder_spec s = encoder_spec_nomic();
    compare(&s);
}

Test(encoder, rerankers_are_the_reference)
{
    struct encoder_spec s = encoder_spec_bert();
    s.n_scores = 1;
    s.dense_classifier = true;
    s.pooling = POOLING_RANK;
    compare(&s);
    s.n_scores = 3;
    s.dense_classifier = false;
    compare(&s);
}

/* Tables of token types are not in every file, nor are separate q, k and v in every one. */
Test(encoder, other_files_of_the_same_kind)
{
    struct encoder_spec s = encoder_spec_bert();
    s.n_types = 0;
    s.fused_qkv = true;
    compare(&s);
    s = encoder_spec_nomic();
    s.biases = true;
    s.fused_qkv = false;
    compare(&s);
}

/* ---- company ----------------------------------------------------------------------------- */

/* Texts that share steps with others, in every order that their lengths make, against each alone.
 */
Test(encoder, company_changes_no_bit)
{
    enum { N = 40 };
    static const enum pooling kinds[] = {POOLING_MEAN, POOLING_CLS, POOLING_LAST, POOLING_NONE};
    const struct encoder_spec specs[] = {encoder_spec_bert(), encoder_spec_nomic()};
    uint32_t lengths[N];
    for (uint32_t i = 0; i < N; i++) {
        lengths[i] = i % 9 == 8 ? BATCH : 1 + i * i * 7 % 90;
    }
    for (size_t s = 0; s < 2; s++) {
        struct model *m = load(&specs[s], NULL);
        struct engine *engine = embeds_engine(parts.pool, 8, BATCH);
        for (size_t k = 0; k < 4; k++) {
            struct embeds *many = run(engine, m, kinds[k], 70, lengths, N);
            for (uint32_t i = 0; i < N; i++) {
                struct embeds *one = run(engine, m, kinds[k], 70 + i, &lengths[i], 1);
                bool rows = kinds[k] == POOLING_NONE;
                const float *a = rows ? many->rows[i] : embeds_vector(many, i);
                const float *b = rows ? one->rows[0] : embeds_vector(one, 0);
                size_t n = (rows ? lengths[i] : 1) * (size_t)one->n_embd;
                cr_assert(rows ? many->n_rows[i] == lengths[i] : true);
                cr_expect(eq(int, memcmp(a, b, n * sizeof(float)), 0), "%s, text %u of %u",
                          pooling_name(kinds[k]), i, lengths[i]);
                embeds_destroy(one);
            }
            embeds_destroy(many);
        }
        engine_destroy(engine);
        model_unref(m);
    }
}

/* An encoder and a decoder take turns on one engine. */
Test(encoder, shares_the_engine_with_a_decoder)
{
    struct encoder_spec spec = encoder_spec_bert();
    struct tiny t = tiny_default();
    struct model *m = load(&spec, NULL);
    struct model *decoder = parts_load(&parts, &t, "tiny");
    struct engine *engine = embeds_engine(parts.pool, 4, PARTS_BATCH);
    uint32_t lengths[20];
    for (uint32_t i = 0; i < 20; i++) {
        lengths[i] = 1 + i;
    }
    struct embeds *alone = run(engine, m, POOLING_MEAN, 1, lengths, 20);
    struct embeds *busy = embeds_make_generation(decoder, 100, 100);
    embeds_submit(engine, busy);
    struct embeds *beside = run(engine, m, POOLING_MEAN, 1, lengths, 20);
    embeds_wait(engine, busy);
    cr_expect(eq(u32, busy->n_generated, 100));
    cr_expect(eq(int,
                 memcmp(alone->request->embed.vectors, beside->request->embed.vectors,
                        20 * spec.n_embd * sizeof(float)),
                 0));
    embeds_destroy(alone);
    embeds_destroy(busy);
    embeds_destroy(beside);
    engine_destroy(engine);
    model_unref(m);
    model_unref(decoder);
}

/* ---- refusals ---------------------------------------------------------------------------- */

static void refused(const struct encoder_spec *spec, uint32_t n_ctx, int code, const char *part,
                    const char *another)
{
    struct model *m = NULL;
    struct fmt_error err = {""};
    cr_expect(eq(int, try_load(spec, NULL, n_ctx, &m, &err), code), "%s", err.text);
    cr_expect(m == NULL);
    cr_expect(strstr(err.text, part) != NULL && strstr(err.text, another) != NULL,
              "'%s' lacks '%s' or '%s'", err.text, part, another);
}

static void add_bad_pooling(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "bert.pooling_type", 9);
}

Test(encoder, files_that_are_wrong_are_named)
{
    static const char *const names[] = {"position_embd.weight", "token_embd_norm.bias",
                                        "blk.1.attn_q.bias",    "blk.2.attn_output_norm.weight",
                                        "blk.0.ffn_down.bias",  "blk.1.layer_output_norm.bias"};
    struct encoder_spec s = encoder_spec_bert();
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        s.without = names[i];
        refused(&s, 0, -EINVAL, names[i], "is missing");
    }
    s = encoder_spec_bert();
    s.add_keys = add_bad_pooling;
    refused(&s, 0, -EINVAL, "bert.pooling_type is 9", "0..4");
    s = encoder_spec_bert();
    refused(&s, s.n_ctx + 1, -EINVAL, "context of 321", "320 positions");
    /* Tensors of another kind of encoder are not passed over. */
    s = encoder_spec_nomic();
    s.arch = "bert";
    refused(&s, 0, -EINVAL, "position_embd.weight", "is missing");
}

Test(encoder, pooling_is_the_files_or_the_mean)
{
    struct encoder_spec s = encoder_spec_bert();
    const int keys[] = {-1, POOLING_NONE, POOLING_CLS, POOLING_LAST};
    for (size_t i = 0; i < 4; i++) {
        s.pooling = keys[i];
        struct model *m = load(&s, NULL);
        cr_expect(eq(int, model_shape(m)->pooling, keys[i] < 0 ? POOLING_MEAN : keys[i]));
        model_unref(m);
    }
}

/* The minimal backend has no attention to both sides. */
Test(encoder, an_attention_backend_without_it_is_refused)
{
    struct encoder_spec s = encoder_spec_bert();
    size_t bytes;
    unsigned char *plugin = file_read(getenv("GQAD_TEST_MINIMAL"), &bytes);
    folder_write(&parts.folder, "minimal.so", plugin, bytes, 0755);
    free(plugin);
    struct encoder e;
    char path[128];
    snprintf(path, sizeof(path), "%s", folder_path(&parts.folder, "encoder.gguf"));
    encoder_init(&e, &s);
    encoder_write(&e, path);
    encoder_finish(&e);
    struct model_options options = parts_model_options();
    struct model *m = NULL;
    struct fmt_error err = {""};
    options.path = path;
    options.name = "encoder";
    options.attention_backend = "minimal";
    backend_catalogue_destroy(parts.catalogue);
    const char *dirs[] = {parts.folder.path};
    struct backend_catalogue_options o = {.dirs = dirs,
                                          .n_dirs = 1,
                                          .check_program = getenv("GQAD_TEST_CHECK"),
                                          .check_timeout_ms = 120000};
    cr_assert(eq(int, backend_catalogue_create(&o, &parts.catalogue), 0));
    cr_expect(
        eq(int,
           model_load(&options, parts.catalogue, parts.pool, parts.io, NULL, NULL, NULL, &m, &err),
           -ENOTSUP));
    cr_expect(strstr(err.text, "minimal") != NULL && strstr(err.text, "both sides") != NULL, "%s",
              err.text);
}
