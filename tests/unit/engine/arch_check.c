#include "tests/unit/engine/arch_check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_TOKENS 40
#define BOUND    1e-8 /* on the mean KL: float32 keeps 1e-12 */
#define NOTICED  1e-4 /* what a mistake must change it by: far above the bound */

struct parts arch_parts;

void arch_setup(void)
{
    parts_init(&arch_parts, 1);
}

void arch_teardown(void)
{
    parts_finish(&arch_parts);
}

struct reference_spec arch_spec(const char *arch)
{
    return (struct reference_spec){
        .arch = arch,
        .n_layers = 2,
        .n_embd = 48,
        .n_heads = 4,
        .n_kv_heads = 2,
        .head_dim = 16,
        .n_rot = 16,
        .n_ff = 80,
        .base = 10000,
        .seed = 7,
    };
}

/* Mean over positions of KL(truth || candidate), in nats. */
static double mean_kl(const double *truth, const double *candidate)
{
    double total = 0;
    for (size_t row = 0; row < N_TOKENS; row++) {
        const double *t = truth + row * TINY_VOCAB, *c = candidate + row * TINY_VOCAB;
        double t_max = t[0], c_max = c[0], t_sum = 0, c_sum = 0;
        for (size_t i = 0; i < TINY_VOCAB; i++) {
            t_max = fmax(t_max, t[i]);
            c_max = fmax(c_max, c[i]);
        }
        for (size_t i = 0; i < TINY_VOCAB; i++) {
            t_sum += exp(t[i] - t_max);
            c_sum += exp(c[i] - c_max);
        }
        for (size_t i = 0; i < TINY_VOCAB; i++) {
            double log_t = t[i] - t_max - log(t_sum);
            total += exp(log_t) * (log_t - (c[i] - c_max - log(c_sum)));
        }
    }
    return total / N_TOKENS;
}

const char *arch_path(const char *name)
{
    return folder_path(&arch_parts.folder, name);
}

int arch_try_load(const char *path, const char *backend, struct model **ret, struct fmt_error *err)
{
    struct model_options o = parts_model_options();
    o.path = path;
    o.name = "it";
    o.backend = backend;
    o.k_type = o.v_type = GQA_TYPE_F32;
    o.max_batch_rows = o.max_out_rows = FEED_ROWS;
    return model_load(&o, arch_parts.catalogue, arch_parts.pool, arch_parts.io, NULL, NULL, NULL,
                      ret, err);
}

struct model *arch_load(const char *path, const char *backend)
{
    struct fmt_error err = {""};
    struct model *m = NULL;
    int rc = arch_try_load(path, backend, &m, &err);
    cr_assert(eq(int, rc, 0), "%s", err.text);
    return m;
}

static void tokens_of(const struct reference_spec *s, int32_t *ret)
{
    uint64_t x = s->seed * 77 + 5;
    for (size_t i = 0; i < N_TOKENS; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        ret[i] = (int32_t)(x >> 33) % (int32_t)TINY_VOCAB;
    }
}

static double model_kl(struct model *m, const int32_t *tokens, uint32_t chunk, const double *truth)
{
    float *logits = calloc(N_TOKENS * TINY_VOCAB, sizeof(*logits));
    double *wide = calloc(N_TOKENS * TINY_VOCAB, sizeof(*wide));
    cr_assert(eq(int, feed_all(m, tokens, N_TOKENS, chunk, logits), 0));
    for (size_t i = 0; i < N_TOKENS * TINY_VOCAB; i++) {
        wide[i] = (double)logits[i];
    }
    double kl = mean_kl(truth, wide);
    free(logits);
    free(wide);
    return kl;
}

void arch_compare(const struct reference *r, const char *path)
{
    static const char *const levels[] = {"c", "avx2", "avxvnni", "avx512", "amx"};
    struct backend_info info[1];
    int32_t tokens[N_TOKENS];
    double *truth = calloc(N_TOKENS * TINY_VOCAB, sizeof(*truth));
    tokens_of(&r->spec, tokens);
    reference_logits(r, &r->spec, tokens, N_TOKENS, truth);
    cr_assert(eq(sz, backend_catalogue_list(arch_parts.catalogue, info, 1), 1));
    for (size_t i = 0; i < sizeof(levels) / sizeof(*levels); i++) {
        char backend[32];
        if (strstr(info[0].isas, levels[i]) == NULL) {
            continue;
        }
        snprintf(backend, sizeof(backend), "cpu:isa=%s", levels[i]);
        struct model *m = arch_load(path, backend);
        for (uint32_t chunk = 3; chunk <= N_TOKENS; chunk += N_TOKENS - 3) {
            double kl = model_kl(m, tokens, chunk, truth);
            printf("%-12s %-8s chunks of %2u: mean KL %.3g\n", r->spec.arch, levels[i], chunk, kl);
            cr_expect(le(dbl, kl, BOUND), "%s on %s: mean KL %g", r->spec.arch, levels[i], kl);
        }
        model_unref(m);
    }
    free(truth);
}

void arch_notices(const struct reference *r, const struct reference_spec *changed, const char *what)
{
    int32_t tokens[N_TOKENS];
    double *truth = calloc(2 * N_TOKENS * TINY_VOCAB, sizeof(*truth));
    double *other = truth + N_TOKENS * TINY_VOCAB;
    tokens_of(&r->spec, tokens);
    reference_logits(r, &r->spec, tokens, N_TOKENS, truth);
    reference_logits(r, changed, tokens, N_TOKENS, other);
    cr_expect(ge(dbl, mean_kl(truth, other), NOTICED), "%s: %s changes next to nothing",
              r->spec.arch, what);
    free(truth);
}

/* Turns one thing that the spec has the other way, and expects another result. */
static void notices_all(const struct reference *r)
{
    const struct reference_spec *s = &r->spec;
#define NOTICES(condition, field, value)    \
    if (condition) {                        \
        struct reference_spec changed = *s; \
        changed.field = (value);            \
        arch_notices(r, &changed, #field);  \
    }
    NOTICES(true, rotate_halves, !s->rotate_halves);
    NOTICES(true, base, 500);
    NOTICES(s->n_rot < s->head_dim, n_rot, s->head_dim);
    NOTICES(s->window > 0, window, s->window + 1);
    NOTICES(s->window > 0, window, 0);
    NOTICES(s->nope_step > 0, nope_step, 0);
    NOTICES(s->local_base > 0, local_base, 0);
    NOTICES(s->yarn_factor > 0, yarn_factor, 0);
    NOTICES(s->yarn_log_mul > 0, yarn_log_mul, 0);
    NOTICES(true, layer_norm, !s->layer_norm);
    NOTICES(s->norm_bias, norm_bias, false);
    NOTICES(s->qkv_bias, qkv_bias, false);
    NOTICES(s->out_bias, out_bias, false);
    NOTICES(s->ff_bias, ff_bias, false);
    NOTICES(s->head_bias, head_bias, false);
    NOTICES(s->post_norms, post_norms, false);
    NOTICES(s->qk_norm != REFERENCE_QK_PLAIN, qk_norm, REFERENCE_QK_PLAIN);
    NOTICES(s->sinks, sinks, false);
    NOTICES(s->untied, untied, false);
    NOTICES(s->act != REFERENCE_SILU, act, REFERENCE_SILU);
    NOTICES(s->embed_scale > 0, embed_scale, 0);
    NOTICES(s->residual_scale > 0, residual_scale, 0);
    NOTICES(s->attn_scale > 0, attn_scale, 0);
    NOTICES(s->logit_divisor > 0, logit_divisor, 0);
    NOTICES(s->n_experts > 0, n_used, s->n_used - 1);
    NOTICES(s->n_experts > 0, raw_experts, !s->raw_experts);
    NOTICES(s->n_ff_shared > 0, n_ff_shared, 0);
    NOTICES(s->shared_gate, shared_gate, false);
#undef NOTICES
}

void arch_check(const struct reference_spec *spec)
{
    struct reference r;
    char path[128];
    reference_init(&r, spec);
    snprintf(path, sizeof(path), "%s", arch_path("it.gguf"));
    reference_write(&r, path);
    arch_compare(&r, path);
    notices_all(&r);
    reference_finish(&r);
}

void arch_set_windows(struct reference_spec *s, uint32_t window, uint32_t pattern)
{
    s->window = window;
    for (uint32_t i = 0; i < s->n_layers; i++) {
        s->windowed[i] = pattern == 1 || i % pattern != pattern - 1;
    }
}

void arch_add_granite_keys(struct gguf_writer *w)
{
    gguf_writer_add_f32(w, "granitemoe.embedding_scale", 6);
    gguf_writer_add_f32(w, "granitemoe.residual_scale", 0.5f);
    gguf_writer_add_f32(w, "granitemoe.attention.scale", 0.125f);
    gguf_writer_add_f32(w, "granitemoe.logit_scale", 4);
}

struct reference_spec arch_granite_spec(void)
{
    struct reference_spec s = arch_spec("granitemoe");
    s.embed_scale = 6;
    s.residual_scale = 0.5;
    s.attn_scale = 0.125;
    s.logit_divisor = 4;
    s.add_keys = arch_add_granite_keys;
    return s;
}
