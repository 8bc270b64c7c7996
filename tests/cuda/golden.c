/* tests/cuda/golden.c - golden models on the cuda backend, by default those of mixtures of experts
 * and two that have none.
 *
 *   cuda-golden [NAME...]
 *
 * Logits within bounds of the golden truth, and the same bits for chunks of 7 rows and with other
 * sequences in every step. Exit status: 0 right, 1 wrong, 77 no golden data or no device (and it
 * says so). */
#include "tests/golden/golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEQS 3u /* of a batch */

static unsigned n_passed, n_failed;

static void verdict(bool ok, const struct golden *g, const char *what)
{
    n_passed += ok;
    n_failed += !ok;
    printf("%-7s %-16s %s\n", ok ? "ok" : "FAILED", g->name, what);
}

/* With a cache of F16. F32 weights are F16 on cuda, each wrong by up to 2^-12 of itself. Quantised
 * weights: what another engine reaches, of mixtures the median, since 8-bit activations turn the
 * choice of an expert now and then (golden/main.c). */
static double bound_of(const struct golden *g, size_t seq, bool median)
{
    if (g->quantised) {
        return 1.2 * (median ? g->engine_median_kl[seq] : g->engine_kl[seq]);
    }
    return g->bf16 ? 2e-4 : 1e-5;
}

static void check_sequence(struct rig *r, const struct golden *g, struct model *m, size_t seq)
{
    const struct golden_seq *s = &g->seqs[seq];
    size_t n = s->n_ids * g->n_vocab;
    bool median = g->quantised && strncmp(g->name, "gpt-oss", 7) == 0;
    float *whole = calloc(n, sizeof(*whole)), *parts = calloc(n, sizeof(*parts));
    double bound = bound_of(g, seq, median), kl = INFINITY;
    char what[128];

    int rc = run_chunked(r, m, s->ids, s->n_ids, 48, whole);
    if (rc == 0) {
        kl = median ? median_kl(s->truth, whole, s->n_ids, g->n_vocab)
                    : mean_kl(s->truth, whole, s->n_ids, g->n_vocab);
    }
    snprintf(what, sizeof(what), "sequence %s: %s KL %.3g, bound %.3g", s->name,
             median ? "median" : "mean", kl, bound);
    verdict(rc == 0 && kl <= bound, g, what);
    rc = run_chunked(r, m, s->ids, s->n_ids, 7, parts);
    snprintf(what, sizeof(what), "sequence %s: chunks of 7 give the same bits", s->name);
    verdict(rc == 0 && memcmp(whole, parts, n * sizeof(*whole)) == 0, g, what);
    free(whole);
    free(parts);
}

/* Sequences that are shifted against each other, token by token in one step each. */
static void check_batch(struct rig *r, const struct golden *g, struct model *m)
{
    const struct golden_seq *s = &g->seqs[0];
    uint32_t length = (uint32_t)s->n_ids / 2;
    size_t n = (size_t)length * g->n_vocab;
    struct feed storage[SEQS], *feeds[SEQS];
    float *together[SEQS], *alone = calloc(n, sizeof(*alone));
    int rc = 0;

    for (uint32_t i = 0; i < SEQS; i++) {
        storage[i] = (struct feed){.model = m, .tokens = s->ids + i};
        kv_sequence_init(&storage[i].kv, model_kv_layout(m), r->cache, NULL, false);
        feeds[i] = &storage[i];
        together[i] = calloc(n, sizeof(*alone));
    }
    for (uint32_t done = 0; rc == 0 && done < length; done++) {
        float *out[SEQS];
        for (uint32_t i = 0; i < SEQS; i++) {
            out[i] = together[i] + (size_t)done * g->n_vocab;
        }
        rc = feed_step(feeds, SEQS, 1, out);
    }
    for (uint32_t i = 0; i < SEQS; i++) {
        char what[64];
        rc = rc < 0 ? rc : run_chunked(r, m, feeds[i]->tokens, length, length, alone);
        snprintf(what, sizeof(what), "sequence %u of %u has the same bits in a batch", i, SEQS);
        verdict(rc == 0 && memcmp(alone, together[i], n * sizeof(*alone)) == 0, g, what);
        kv_sequence_finish(&storage[i].kv);
        free(together[i]);
    }
    free(alone);
}

static void check_model(struct rig *r, const struct golden *g)
{
    const struct run_options o = {.backend = "cuda", .kv_type = GQA_TYPE_F16};
    struct model *m;

    if (rig_load(r, g, &o, &m) < 0) {
        verdict(false, g, "does not load");
        return;
    }
    for (size_t i = 0; i < g->n_seqs; i++) {
        check_sequence(r, g, m, i);
    }
    check_batch(r, g, m);
    model_unref(m);
}

/* 0, or 77 where it cannot run. */
static int find_device(const struct rig *r)
{
    struct backend_info info[8];
    size_t n = backend_catalogue_list(r->catalogue, info, 8);

    for (size_t i = 0; i < n && i < 8; i++) {
        if (strcmp(info[i].name, "cuda") == 0 && info[i].usable) {
            printf("cuda on %s\n", info[i].device);
            return 0;
        }
        if (strcmp(info[i].name, "cuda") == 0) {
            printf("SKIPPED: cuda cannot run here: %s\n", info[i].reason);
        }
    }
    return 77;
}

int main(int argc, char **argv)
{
    static const char *const default_models[] = {"mixtral", "qwen3moe",      "gpt-oss",
                                                 "granite", "gpt-oss-mxfp4", "llama-q-Q4_K_M"};
    const char *root = getenv("GQAD_TEST_GOLDEN");
    size_t n = argc > 1 ? (size_t)argc - 1 : sizeof(default_models) / sizeof(*default_models);
    char probe[4096];
    struct rig r;

    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(probe, sizeof(probe), "%s/models/llama-gqa/model.gguf", root != NULL ? root : "");
    FILE *f = fopen(probe, "rb");
    if (f == NULL) {
        printf("SKIPPED: no golden data (GQAD_TEST_GOLDEN is %s)\n", root != NULL ? root : "unset");
        return 77;
    }
    fclose(f);
    if (rig_init(&r, 1, getenv("GQAD_TEST_CUDA_FOLDER"), getenv("GQAD_TEST_CPU_FOLDER"),
                 getenv("GQAD_TEST_CHECK")) < 0) {
        fprintf(stderr, "the rig cannot be set up\n");
        return 1;
    }
    int status = find_device(&r);
    for (size_t i = 0; status == 0 && i < n; i++) {
        struct golden g;
        if (golden_open(root, argc > 1 ? argv[i + 1] : default_models[i], &g) < 0) {
            n_failed++;
            continue;
        }
        check_model(&r, &g);
        golden_close(&g);
    }
    rig_finish(&r);
    if (status != 0) {
        return status;
    }
    printf("%u checks passed, %u failed\n", n_passed, n_failed);
    return n_failed == 0 && n_passed > 0 ? 0 : 1;
}
