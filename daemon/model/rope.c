#include "daemon/model/rope.h"

#include "format/types.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

/* The pair index at which a frequency turns beta times within the original context. */
static double yarn_corr_dim(const struct model_shape *s, double beta)
{
    return s->n_rot * log(s->rope_n_ctx_orig / (beta * 2 * M_PI)) / (2 * log(s->rope_base));
}

/* YaRN: high frequencies stay, low ones are interpolated, a ramp joins them. */
static void apply_yarn(const struct model_shape *s, double *freqs, uint32_t n, float *magnitude)
{
    double low = floor(yarn_corr_dim(s, s->yarn_beta_fast));
    double high = ceil(yarn_corr_dim(s, s->yarn_beta_slow));
    low = low < 0 ? 0 : low;
    high = high > s->n_rot - 1 ? s->n_rot - 1 : high;
    double width = high - low < 0.001 ? 0.001 : high - low;
    for (uint32_t i = 0; i < n; i++) {
        double ramp = (i - low) / width;
        ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
        freqs[i] = freqs[i] / s->rope_factor * ramp + freqs[i] * (1 - ramp);
    }
    double grows = 0.1 * log(s->rope_factor);
    *magnitude *= (float)((1 + grows) / (1 + s->yarn_log_mul * grows));
}

/* Divides by the file's factors, if it has the tensor. */
static int apply_factors(const struct gguf *g, const char *name, double *freqs, uint32_t n,
                         struct fmt_error *err)
{
    const struct gguf_tensor *t = gguf_find_tensor(g, name);
    if (t == NULL) {
        return 0;
    }
    if (t->type != FMT_TYPE_F32 || t->ne[0] != n || t->n_dims != 1) {
        return fmt_fail(err, -EINVAL, "%s: tensor %s must hold %u values of F32", gguf_name(g),
                        name, n);
    }
    const float *factors = t->data;
    for (uint32_t i = 0; i < n; i++) {
        if (!(factors[i] > 0 && isfinite(factors[i]))) {
            return fmt_fail(err, -EINVAL, "%s: tensor %s: factor %u is %g, must be positive",
                            gguf_name(g), name, i, (double)factors[i]);
        }
        freqs[i] /= factors[i];
    }
    return 0;
}

int rope_table_create(const struct gguf *g, const struct model_shape *s, bool local, uint32_t n_ctx,
                      struct gqa_rope_table *ret, struct fmt_error *err)
{
    uint32_t n = s->n_rot / 2;
    double *freqs = calloc(n, sizeof(*freqs));
    if (freqs == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory for %u rotary frequencies", n);
    }
    float magnitude = 1;
    double base = local ? s->rope_base_local : s->rope_base;
    for (uint32_t i = 0; i < n; i++) {
        freqs[i] = pow(base, -2.0 * i / s->n_rot);
    }
    int rc = 0;
    if (!local) {
        const char *factors =
            n_ctx > s->rope_n_ctx_orig ? "rope_factors_long.weight" : "rope_factors_short.weight";
        rc = apply_factors(g, "rope_freqs.weight", freqs, n, err);
        rc = rc < 0 ? rc : apply_factors(g, factors, freqs, n, err);
        if (s->rope_attn_factor > 0) {
            magnitude = s->rope_attn_factor;
        }
        if (s->rope_scaling == ROPE_SCALING_YARN) {
            apply_yarn(s, freqs, n, &magnitude);
        } else if (s->rope_scaling == ROPE_SCALING_LINEAR) {
            for (uint32_t i = 0; i < n; i++) {
                freqs[i] /= s->rope_factor;
            }
        }
    }
    if (rc < 0) {
        free(freqs);
        return rc;
    }
    *ret = (struct gqa_rope_table){.n_freqs = n, .freqs = freqs, .magnitude = magnitude};
    return 0;
}
