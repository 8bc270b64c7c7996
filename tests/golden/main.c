/* tests/golden/main.c - golden models hold their bounds, whatever the level, cache, chunks, batch.
 *
 *   golden [NAME...]
 *
 * For every model: logits within the golden bounds with f32 and f16 caches; greedy continuation
 * equal; the same bits for any chunking, with one and two threads, alone and among others; the
 * same bounds with attention from examples/minimal_plugin. Prints one line per model and run. */
#include "tests/golden/golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned n_passed, n_failed;

static void verdict(bool ok, const struct golden *g, const char *run, const char *what)
{
    if (ok) {
        n_passed++;
    } else {
        n_failed++;
        printf("FAILED  %s, %s: %s\n", g->name, run, what);
    }
}

static bool is_quant(uint32_t kv_type)
{
    return kv_type == GQA_TYPE_Q8_0 || kv_type == GQA_TYPE_Q4_0;
}

static bool is_mixture(const struct golden *g)
{
    return strncmp(g->name, "gpt-oss", 7) == 0 || strcmp(g->name, "mixtral") == 0 ||
           strcmp(g->name, "qwen3moe") == 0;
}

/* Experts are chosen by a comparison, which the noise of 8-bit activations turns now and then, and
 * so does that of a cache of quants: of mixtures the median position is looked at. */
static bool by_median(const struct golden *g, uint32_t kv_type)
{
    return (g->quantised && strncmp(g->name, "gpt-oss", 7) == 0) ||
           (is_mixture(g) && is_quant(kv_type));
}

static double measure(const struct golden *g, size_t seq, const float *logits, bool median)
{
    const struct golden_seq *s = &g->seqs[seq];
    return median ? median_kl(s->truth, logits, s->n_ids, g->n_vocab)
                  : mean_kl(s->truth, logits, s->n_ids, g->n_vocab);
}

/* KL of each sequence with a cache of F16, of the model that is being checked, measured as that of
 * a cache of quants is. */
static double f16_kl[4];

/* Bounds on the KL from the golden data's own README. Those of quants are measured, against
 * F16 in the same run, since KL grows with the square of a value's error wherever the model is
 * equally sensitive: of 18 sequences Q8_0 gave 460 to 800 times F16's, Q4_0 90,000 to 185,000. That
 * is what their steps say: of a run of 32 values about 2.3 times their deviation large, a step of
 * Q8_0 is 1/127 and one of Q4_0 1/8 (16 times that, squared 252), F16's about 1/3000. These models
 * are random and sharp: 8-bit weights cost them 2e-3, the cache of Q8_0 at most 9e-4. In mixtures
 * the noise of 4 bits turns choices at so many positions that the median is moved too: 165,000 to
 * 330,000 times F16's (Q8_0's median: 490 to 740). */
static double bound_of(const struct golden *g, size_t seq, uint32_t kv_type)
{
    if (is_quant(kv_type)) {
        return (kv_type == GQA_TYPE_Q8_0 ? 1e3 : is_mixture(g) ? 5e5 : 2.5e5) * f16_kl[seq];
    }
    bool gemma = strncmp(g->name, "gemma", 5) == 0;
    if (g->quantised) {
        return 1.2 * (by_median(g, kv_type) ? g->engine_median_kl[seq] : g->engine_kl[seq]);
    }
    if (g->bf16) {
        return 2e-4;
    }
    return kv_type == GQA_TYPE_F32 ? (gemma ? 1e-6 : 1e-8) : 3e-6;
}

/* phi3-longrope's sequence "long" is for contexts beyond the original one, "a" for shorter ones. */
static uint32_t ctx_of(const struct golden *g, size_t seq)
{
    bool longrope = strcmp(g->name, "phi3-longrope") == 0;
    return longrope ? (strcmp(g->seqs[seq].name, "long") == 0 ? 4096 : 256) : 0;
}

static void check_logits(struct rig *r, const struct golden *g, const struct run_options *o,
                         const char *run)
{
    for (size_t i = 0; i < g->n_seqs; i++) {
        const struct golden_seq *s = &g->seqs[i];
        struct run_options with_ctx = *o;
        struct model *m;
        with_ctx.n_ctx = ctx_of(g, i);
        if (rig_load(r, g, &with_ctx, &m) < 0) {
            verdict(false, g, run, "does not load");
            continue;
        }
        float *logits = calloc(s->n_ids * g->n_vocab, sizeof(float));
        int rc = run_chunked(r, m, s->ids, s->n_ids, 48, logits);
        bool median = by_median(g, o->kv_type);
        double kl = rc == 0 ? measure(g, i, logits, median) : INFINITY;
        double bound = bound_of(g, i, o->kv_type);
        if (o->kv_type == GQA_TYPE_F16 && o->attention == NULL) {
            f16_kl[i] = measure(g, i, logits, by_median(g, GQA_TYPE_Q8_0));
        }
        char what[128];
        snprintf(what, sizeof(what), "sequence %s: %s KL %.3g, bound %.3g", s->name,
                 median ? "median" : "mean", kl, bound);
        printf("        %-16s %-34s %s\n", g->name, run, what);
        verdict(kl <= bound, g, run, what);
        free(logits);
        model_unref(m);
    }
}

static int32_t argmax(const float *logits, uint32_t n)
{
    int32_t best = 0;
    for (uint32_t i = 1; i < n; i++) {
        best = logits[i] > logits[best] ? (int32_t)i : best;
    }
    return best;
}

/* Quantised models are compared by logits only: 8-bit activations may turn a small margin, and so
 * may a cache of quants, which only has to get to the end. */
static void check_greedy(struct rig *r, const struct golden *g, struct model *m, const char *run,
                         uint32_t kv_type)
{
    const struct golden_seq *s = &g->seqs[0];
    if (g->quantised) {
        return;
    }
    size_t n = s->n_ids + g->n_greedy;
    int32_t *tokens = calloc(n + 1, sizeof(*tokens));
    float *logits = calloc(s->n_ids * g->n_vocab, sizeof(float));
    memcpy(tokens, s->ids, s->n_ids * sizeof(*tokens));
    struct feed feed = {.model = m, .tokens = tokens};
    struct feed *feeds[] = {&feed};
    float *out[] = {logits};
    kv_sequence_init(&feed.kv, model_kv_layout(m), r->cache, NULL, false);
    size_t equal = 0;
    int rc = feed_step(feeds, 1, (uint32_t)s->n_ids, out);
    const float *last = logits + (s->n_ids - 1) * g->n_vocab;
    for (size_t i = 0; rc == 0 && i < g->n_greedy; i++) {
        tokens[s->n_ids + i] = argmax(last, g->n_vocab);
        equal += tokens[s->n_ids + i] == g->greedy[i];
        rc = feed_step(feeds, 1, 1, out);
        last = logits;
    }
    char what[96];
    snprintf(what, sizeof(what), "%zu of %zu greedy tokens equal", equal, g->n_greedy);
    verdict(rc == 0 && g->n_greedy > 0 && (is_quant(kv_type) || equal == g->n_greedy), g, run,
            what);
    kv_sequence_finish(&feed.kv);
    free(tokens);
    free(logits);
}

/* Every chunk size is tried with one model of each kind of attention and products, and with all of
 * them by GQAD_TEST_LONG=1; with the others those around powers of two. */
static bool is_tried(const struct golden *g, uint32_t chunk)
{
    static const char *const all_sizes[] = {"llama-gqa", "gemma3", "qwen3moe", "llama-q-Q4_0"};
    for (size_t i = 0; i < sizeof(all_sizes) / sizeof(all_sizes[0]); i++) {
        if (strcmp(g->name, all_sizes[i]) == 0) {
            return true;
        }
    }
    const uint32_t below = chunk - 1, above = chunk + 1;
    return getenv("GQAD_TEST_LONG") != NULL || (chunk & below) == 0 || (above & chunk) == 0 ||
           (below & (below - 1)) == 0;
}

/* Chunks give the very same bits as one chunk. */
static void check_chunks(struct rig *r, const struct golden *g, struct model *m, const char *run)
{
    const struct golden_seq *s = &g->seqs[0];
    size_t n = s->n_ids * g->n_vocab;
    float *whole = calloc(n, sizeof(float)), *parts = calloc(n, sizeof(float));
    int rc = run_chunked(r, m, s->ids, s->n_ids, (uint32_t)s->n_ids, whole);
    for (uint32_t chunk = 1; rc == 0 && chunk < s->n_ids; chunk++) {
        char what[64];
        if (!is_tried(g, chunk)) {
            continue;
        }
        rc = run_chunked(r, m, s->ids, s->n_ids, chunk, parts);
        snprintf(what, sizeof(what), "chunks of %u give other bits", chunk);
        verdict(rc == 0 && memcmp(whole, parts, n * sizeof(float)) == 0, g, run, what);
    }
    verdict(rc == 0, g, run, "a step fails");
    free(whole);
    free(parts);
}

/* n sequences in one step, each shifted against the others, give the bits that each gives alone. */
static void check_batch(struct rig *r, const struct golden *g, struct model *m, uint32_t n,
                        const char *run)
{
    const struct golden_seq *s = &g->seqs[0];
    uint32_t length = (uint32_t)s->n_ids / 2;
    struct feed *feeds[48], storage[48];
    float *together[48];
    float *alone = calloc((size_t)length * g->n_vocab, sizeof(float));
    int rc = 0;
    for (uint32_t i = 0; i < n; i++) {
        storage[i] = (struct feed){.model = m, .tokens = s->ids + i % (s->n_ids - length)};
        kv_sequence_init(&storage[i].kv, model_kv_layout(m), r->cache, NULL, false);
        feeds[i] = &storage[i];
        together[i] = calloc((size_t)length * g->n_vocab, sizeof(float));
    }
    for (uint32_t done = 0; rc == 0 && done < length; done++) {
        float *out[48];
        for (uint32_t i = 0; i < n; i++) {
            out[i] = together[i] + (size_t)done * g->n_vocab;
        }
        rc = feed_step(feeds, n, 1, out);
    }
    for (uint32_t i = 0; rc == 0 && i < n; i++) {
        char what[64];
        rc = run_chunked(r, m, feeds[i]->tokens, length, length, alone);
        snprintf(what, sizeof(what), "sequence %u of %u gives other bits in a batch", i, n);
        verdict(rc == 0 &&
                    memcmp(alone, together[i], (size_t)length * g->n_vocab * sizeof(float)) == 0,
                g, run, what);
    }
    verdict(rc == 0, g, run, "a step fails");
    for (uint32_t i = 0; i < n; i++) {
        kv_sequence_finish(&storage[i].kv);
        free(together[i]);
    }
    free(alone);
}

/* GQAD_TEST_ONLY: one level, which must be there, and its logits alone: what an emulated level has
 * time for. */
static const char *only_level(void)
{
    return getenv("GQAD_TEST_ONLY");
}

static void check_model(struct rig *one, struct rig *two, const struct golden *g, const char *isa)
{
    char backend[32], run[64];
    snprintf(backend, sizeof(backend), "cpu:isa=%s", isa);
    for (int f16 = 0; f16 < 2; f16++) {
        struct run_options o = {
            .backend = backend,
            .kv_type = f16 ? GQA_TYPE_F16 : GQA_TYPE_F32,
            .n_ctx = ctx_of(g, 0),
        };
        snprintf(run, sizeof(run), "%s, kv %s", isa, f16 ? "f16" : "f32");
        check_logits(two, g, &o, run);
        if (only_level() != NULL) {
            continue;
        }
        if (getenv("GQAD_TEST_MINIMAL") != NULL) {
            o.attention = "minimal";
            snprintf(run, sizeof(run), "%s, kv %s, minimal attention", isa, f16 ? "f16" : "f32");
            check_logits(two, g, &o, run);
            o.attention = NULL;
        }
        struct model *m, *m1;
        if (rig_load(two, g, &o, &m) < 0) {
            continue;
        }
        snprintf(run, sizeof(run), "%s, kv %s", isa, f16 ? "f16" : "f32");
        if (!f16 || g->bf16) {
            check_greedy(two, g, m, run, o.kv_type);
        }
        check_chunks(two, g, m, run);
        check_batch(two, g, m, 3, run);
        check_batch(two, g, m, 48, run);
        if (rig_load(one, g, &o, &m1) == 0) {
            const struct golden_seq *s = &g->seqs[0];
            size_t n = s->n_ids * g->n_vocab;
            float *a = calloc(n, sizeof(float)), *b = calloc(n, sizeof(float));
            int rc = run_chunked(one, m1, s->ids, s->n_ids, 7, a);
            rc = rc < 0 ? rc : run_chunked(two, m, s->ids, s->n_ids, 48, b);
            verdict(rc == 0 && memcmp(a, b, n * sizeof(float)) == 0, g, run,
                    "one thread gives other bits than two");
            free(a);
            free(b);
            model_unref(m1);
        }
        model_unref(m);
    }
}

/* Caches of Q8_0 and Q4_0, on models of floats only: bounds, and the same bits in any company. */
static void check_quant_cache(struct rig *two, const struct golden *g, const char *isa,
                              uint32_t kv_type)
{
    char backend[32], run[64];
    snprintf(backend, sizeof(backend), "cpu:isa=%s", isa);
    snprintf(run, sizeof(run), "%s, kv %s", isa, kv_type == GQA_TYPE_Q8_0 ? "q8_0" : "q4_0");
    struct run_options o = {.backend = backend, .kv_type = kv_type, .n_ctx = ctx_of(g, 0)};
    struct model *m;
    if (g->quantised) {
        return;
    }
    check_logits(two, g, &o, run);
    if (only_level() != NULL) {
        return;
    }
    if (rig_load(two, g, &o, &m) < 0) {
        return;
    }
    check_greedy(two, g, m, run, kv_type);
    check_batch(two, g, m, 3, run);
    model_unref(m);
}

/* What the table of architectures and the cpu backend support. */
static const char *const default_models[] = {
    "llama-mha",      "llama-gqa",      "llama-mqa",      "llama-rope3",    "llama-linear",
    "llama-yarn",     "qwen2",          "qwen3",          "gemma2",         "gemma3",
    "phi3",           "phi3-longrope",  "granite",        "mixtral",        "qwen3moe",
    "gpt-oss",        "llama-q-F16",    "llama-q-BF16",   "llama-q-Q8_0",   "llama-q-Q4_0",
    "llama-q-Q4_K_S", "llama-q-Q4_K_M", "llama-q-Q5_K_M", "llama-q-Q6_K",   "llama-q-Q4_1",
    "llama-q-Q5_0",   "llama-q-Q5_1",   "llama-q-Q2_K",   "llama-q-Q3_K_S", "llama-q-IQ4_NL",
    "llama-q-IQ4_XS", "gpt-oss-mxfp4",
};

int main(int argc, char **argv)
{
    const char *root = getenv("GQAD_TEST_GOLDEN");
    const char *plugins = getenv("GQAD_TEST_PLUGINS");
    const char *minimal = getenv("GQAD_TEST_MINIMAL");
    const char *check = getenv("GQAD_TEST_CHECK");
    char probe[4096];
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(probe, sizeof(probe), "%s/models/llama-gqa/model.gguf", root != NULL ? root : "");
    FILE *f = fopen(probe, "rb");
    if (f == NULL) {
        printf("SKIPPED: no golden data (GQAD_TEST_GOLDEN is %s)\n", root != NULL ? root : "unset");
        return 77;
    }
    fclose(f);
    struct rig one, two;
    if (rig_init(&one, 1, plugins, minimal, check) < 0 ||
        rig_init(&two, 2, plugins, minimal, check) < 0) {
        fprintf(stderr, "the rig cannot be set up\n");
        return 1;
    }
    static const char *const levels[] = {"c", "avx2", "avxvnni", "avx512", "amx"};
    struct backend_info info[8];
    size_t n_info = backend_catalogue_list(two.catalogue, info, 8);
    size_t n_models =
        argc > 1 ? (size_t)argc - 1 : sizeof(default_models) / sizeof(*default_models);
    for (size_t l = 0; l < sizeof(levels) / sizeof(*levels); l++) {
        bool usable = false;
        if (only_level() != NULL && strcmp(only_level(), levels[l]) != 0) {
            continue;
        }
        for (size_t i = 0; i < n_info && i < 8; i++) {
            usable = usable ||
                     (strcmp(info[i].name, "cpu") == 0 && strstr(info[i].isas, levels[l]) != NULL);
        }
        if (!usable) {
            printf("SKIPPED: level %s cannot run on this machine\n", levels[l]);
            continue;
        }
        for (size_t i = 0; i < n_models; i++) {
            struct golden g;
            if (golden_open(root, argc > 1 ? argv[i + 1] : default_models[i], &g) < 0) {
                n_failed++;
                continue;
            }
            check_model(&one, &two, &g, levels[l]);
            check_quant_cache(&two, &g, levels[l], GQA_TYPE_Q8_0);
            check_quant_cache(&two, &g, levels[l], GQA_TYPE_Q4_0);
            golden_close(&g);
        }
    }
    rig_finish(&one);
    rig_finish(&two);
    printf("%u checks passed, %u failed\n", n_passed, n_failed);
    return n_failed == 0 && n_passed > 0 ? 0 : 1;
}
