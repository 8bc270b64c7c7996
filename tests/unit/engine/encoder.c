#include "tests/unit/engine/encoder.h"

#include "format/types.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EPS 1e-12

static void need(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "encoder: %s\n", what);
        exit(99);
    }
}

static double *zeros(size_t n)
{
    double *x = calloc(n, sizeof(*x));
    need(x != NULL, "memory");
    return x;
}

/* ---- specs and tensors ------------------------------------------------------------------- */

struct encoder_spec encoder_spec_bert(void)
{
    return (struct encoder_spec){.arch = "bert",
                                 .n_layers = 3,
                                 .n_embd = 48,
                                 .n_heads = 4,
                                 .n_ff = 80,
                                 .n_ctx = 320,
                                 .n_types = 2,
                                 .positions = true,
                                 .biases = true,
                                 .pooling = -1,
                                 .seed = 5};
}

struct encoder_spec encoder_spec_nomic(void)
{
    return (struct encoder_spec){.arch = "nomic-bert",
                                 .n_layers = 2,
                                 .n_embd = 64,
                                 .n_heads = 2,
                                 .n_ff = 96,
                                 .n_ctx = 320,
                                 .n_types = 1,
                                 .gated = true,
                                 .fused_qkv = true,
                                 .base = 1000,
                                 .pooling = 1,
                                 .seed = 6};
}

static float random_value(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return (float)(*x >> 40) / 8388608.0f - 1;
}

/* Vectors named ".weight" lie about 1, biases about 0. */
static void add(struct encoder *e, uint64_t *x, const char *name, uint64_t n_in, uint64_t n_out)
{
    size_t i = e->n_tensors, last = strlen(name), n = n_in * (n_out > 0 ? n_out : 1);
    bool bias = strcmp(name + last - 5, ".bias") == 0;
    if (e->spec.without != NULL && strcmp(name, e->spec.without) == 0) {
        return;
    }
    need(i < ENCODER_TENSORS, "too many tensors");
    e->n_tensors++;
    snprintf(e->tensors[i].name, sizeof(e->tensors[i].name), "%s", name);
    e->tensors[i].n_in = n_in;
    e->tensors[i].n_out = n_out;
    e->tensors[i].values = malloc(n * sizeof(float));
    need(e->tensors[i].values != NULL, "memory");
    float scale = n_out == 0 ? 0.4f : 2.0f / sqrtf((float)n_in);
    for (size_t v = 0; v < n; v++) {
        e->tensors[i].values[v] = (n_out == 0 && !bias ? 1 : 0) + scale * random_value(x);
    }
}

/* A product of a layer, with its bias. */
static void add_product(struct encoder *e, uint64_t *x, uint32_t layer, const char *stem,
                        uint64_t n_in, uint64_t n_out)
{
    char name[64];
    snprintf(name, sizeof(name), "blk.%u.%s.weight", layer, stem);
    add(e, x, name, n_in, n_out);
    if (e->spec.biases) {
        snprintf(name, sizeof(name), "blk.%u.%s.bias", layer, stem);
        add(e, x, name, n_out, 0);
    }
}

static void add_norm(struct encoder *e, uint64_t *x, const char *prefix, const char *stem)
{
    char name[64];
    snprintf(name, sizeof(name), "%s%s.weight", prefix, stem);
    add(e, x, name, e->spec.n_embd, 0);
    snprintf(name, sizeof(name), "%s%s.bias", prefix, stem);
    add(e, x, name, e->spec.n_embd, 0);
}

static void add_layer(struct encoder *e, uint64_t *x, uint32_t layer)
{
    const struct encoder_spec *s = &e->spec;
    static const char *const heads[] = {"attn_q", "attn_k", "attn_v"};
    char prefix[16];
    snprintf(prefix, sizeof(prefix), "blk.%u.", layer);
    for (size_t i = 0; i < 3 && !s->fused_qkv; i++) {
        add_product(e, x, layer, heads[i], s->n_embd, s->n_embd);
    }
    if (s->fused_qkv) {
        add_product(e, x, layer, "attn_qkv", s->n_embd, 3ull * s->n_embd);
    }
    add_product(e, x, layer, "attn_output", s->n_embd, s->n_embd);
    add_norm(e, x, prefix, "attn_output_norm");
    if (s->gated) {
        add_product(e, x, layer, "ffn_gate", s->n_embd, s->n_ff);
    }
    add_product(e, x, layer, "ffn_up", s->n_embd, s->n_ff);
    add_product(e, x, layer, "ffn_down", s->n_ff, s->n_embd);
    add_norm(e, x, prefix, "layer_output_norm");
}

void encoder_init(struct encoder *e, const struct encoder_spec *spec)
{
    uint64_t x = spec->seed * 0x9e3779b97f4a7c15u + 1;
    memset(e, 0, sizeof(*e));
    e->spec = *spec;
    add(e, &x, "token_embd.weight", spec->n_embd, TINY_VOCAB);
    if (spec->n_types > 0) {
        add(e, &x, "token_types.weight", spec->n_embd, spec->n_types);
    }
    if (spec->positions) {
        add(e, &x, "position_embd.weight", spec->n_embd, spec->n_ctx);
    }
    add_norm(e, &x, "", "token_embd_norm");
    for (uint32_t layer = 0; layer < spec->n_layers; layer++) {
        add_layer(e, &x, layer);
    }
    if (spec->dense_classifier) {
        add(e, &x, "cls.weight", spec->n_embd, spec->n_embd);
        add(e, &x, "cls.bias", spec->n_embd, 0);
    }
    if (spec->n_scores > 0) {
        add(e, &x, "cls.output.weight", spec->n_embd, spec->n_scores);
        add(e, &x, "cls.output.bias", spec->n_scores, 0);
    }
}

void encoder_finish(struct encoder *e)
{
    for (size_t i = 0; i < e->n_tensors; i++) {
        free(e->tensors[i].values);
    }
}

/* ---- the file ---------------------------------------------------------------------------- */

static void add_keys(const struct encoder *e, struct gguf_writer *w)
{
    const struct encoder_spec *s = &e->spec;
    const struct {
        const char *key;
        uint32_t value;
    } keys[] = {{"context_length", s->n_ctx},
                {"embedding_length", s->n_embd},
                {"block_count", s->n_layers},
                {"feed_forward_length", s->n_ff},
                {"attention.head_count", s->n_heads}};
    char name[96];
    gguf_writer_add_string(w, "general.architecture", s->arch);
    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        snprintf(name, sizeof(name), "%s.%s", s->arch, keys[i].key);
        gguf_writer_add_u32(w, name, keys[i].value);
    }
    snprintf(name, sizeof(name), "%s.attention.layer_norm_epsilon", s->arch);
    gguf_writer_add_f32(w, name, (float)EPS);
    snprintf(name, sizeof(name), "%s.attention.causal", s->arch);
    gguf_writer_add_bool(w, name, false);
    if (s->pooling >= 0) {
        snprintf(name, sizeof(name), "%s.pooling_type", s->arch);
        gguf_writer_add_u32(w, name, (uint32_t)s->pooling);
    }
    if (!s->positions) {
        snprintf(name, sizeof(name), "%s.rope.freq_base", s->arch);
        gguf_writer_add_f32(w, name, (float)s->base);
    }
    tiny_add_vocabulary(w);
    if (s->add_keys != NULL) {
        s->add_keys(w);
    }
}

void encoder_write(const struct encoder *e, const char *path)
{
    struct gguf_writer *w;
    need(gguf_writer_create(path, &w) == 0, path);
    add_keys(e, w);
    for (size_t i = 0; i < e->n_tensors; i++) {
        uint64_t n_in = e->tensors[i].n_in, n_out = e->tensors[i].n_out;
        const uint64_t ne[2] = {n_in, n_out > 0 ? n_out : 1};
        need(gguf_writer_add_tensor(w, e->tensors[i].name, FMT_TYPE_F32, n_out > 0 ? 2 : 1, ne) ==
                 0,
             e->tensors[i].name);
    }
    need(gguf_writer_begin_data(w) == 0, "data");
    for (size_t i = 0; i < e->n_tensors; i++) {
        size_t n = e->tensors[i].n_in * (e->tensors[i].n_out > 0 ? e->tensors[i].n_out : 1);
        need(gguf_writer_write(w, e->tensors[i].values, n * sizeof(float)) == 0, "values");
    }
    need(gguf_writer_finish(w) == 0, path);
    gguf_writer_destroy(w);
}

/* ---- the pass ---------------------------------------------------------------------------- */

static const float *find(const struct encoder *e, const char *name)
{
    for (size_t i = 0; i < e->n_tensors; i++) {
        if (strcmp(e->tensors[i].name, name) == 0) {
            return e->tensors[i].values;
        }
    }
    return NULL;
}

static const float *of_layer(const struct encoder *e, uint32_t layer, const char *stem,
                             const char *kind)
{
    char name[64];
    snprintf(name, sizeof(name), "blk.%u.%s.%s", layer, stem, kind);
    return find(e, name);
}

/* y (n, n_out) = x (n, n_in) times the weight's rows, and the bias where there is one. */
static void product(const float *weight, const float *bias, const double *x, uint32_t n,
                    uint32_t n_in, uint32_t n_out, double *y)
{
    need(weight != NULL, "a weight is missing");
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t o = 0; o < n_out; o++) {
            double sum = bias != NULL ? (double)bias[o] : 0;
            for (uint32_t k = 0; k < n_in; k++) {
                sum += x[i * n_in + k] * (double)weight[o * n_in + k];
            }
            y[i * n_out + o] = sum;
        }
    }
}

static void layer_norm(const float *weight, const float *bias, double *x, uint32_t n,
                       uint32_t width)
{
    need(weight != NULL && bias != NULL, "a norm is missing");
    for (uint32_t i = 0; i < n; i++, x += width) {
        double mean = 0, variance = 0;
        for (uint32_t k = 0; k < width; k++) {
            mean += x[k] / width;
        }
        for (uint32_t k = 0; k < width; k++) {
            variance += (x[k] - mean) * (x[k] - mean) / width;
        }
        for (uint32_t k = 0; k < width; k++) {
            x[k] = (x[k] - mean) / sqrt(variance + EPS) * (double)weight[k] + (double)bias[k];
        }
    }
}

/* Pairs (i, i + half) of every head turn by position * base^(-2 i / head_dim). */
static void rotate(double *x, uint32_t n, uint32_t n_heads, uint32_t dim, double base)
{
    for (uint32_t p = 0; p < n; p++) {
        for (uint32_t h = 0; h < n_heads; h++, x += dim) {
            for (uint32_t i = 0; i < dim / 2; i++) {
                double angle = p * pow(base, -2.0 * i / dim);
                double a = x[i], b = x[i + dim / 2];
                x[i] = a * cos(angle) - b * sin(angle);
                x[i + dim / 2] = a * sin(angle) + b * cos(angle);
            }
        }
    }
}

/* Every row sees every row. */
static void attend(const double *q, const double *k, const double *v, uint32_t n, uint32_t n_heads,
                   uint32_t dim, double *out)
{
    double *weights = zeros(n);
    uint32_t width = n_heads * dim;
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t h = 0; h < n_heads; h++) {
            double max = -INFINITY, sum = 0;
            for (uint32_t j = 0; j < n; j++) {
                double dot = 0;
                for (uint32_t d = 0; d < dim; d++) {
                    dot += q[i * width + h * dim + d] * k[j * width + h * dim + d];
                }
                weights[j] = dot / sqrt(dim);
                max = fmax(max, weights[j]);
            }
            for (uint32_t j = 0; j < n; j++) {
                weights[j] = exp(weights[j] - max);
                sum += weights[j];
            }
            for (uint32_t d = 0; d < dim; d++) {
                double mixed = 0;
                for (uint32_t j = 0; j < n; j++) {
                    mixed += weights[j] / sum * v[j * width + h * dim + d];
                }
                out[i * width + h * dim + d] = mixed;
            }
        }
    }
    free(weights);
}

/* t (n, n_embd) = what attention adds. */
static void attention(const struct encoder *e, uint32_t layer, const double *x, uint32_t n,
                      double *t)
{
    const struct encoder_spec *s = &e->spec;
    static const char *const stems[] = {"attn_q", "attn_k", "attn_v"};
    uint32_t width = s->n_embd, dim = width / s->n_heads;
    double *heads[3], *mixed = zeros((size_t)n * width);
    for (size_t i = 0; i < 3; i++) {
        const char *stem = s->fused_qkv ? "attn_qkv" : stems[i];
        size_t skip = s->fused_qkv ? i : 0;
        const float *weight = of_layer(e, layer, stem, "weight");
        const float *bias = of_layer(e, layer, stem, "bias");
        need(weight != NULL, stem);
        heads[i] = zeros((size_t)n * width);
        product(weight + skip * width * width, bias != NULL ? bias + skip * width : NULL, x, n,
                width, width, heads[i]);
        if (i < 2 && !s->positions) {
            rotate(heads[i], n, s->n_heads, dim, s->base);
        }
    }
    attend(heads[0], heads[1], heads[2], n, s->n_heads, dim, mixed);
    product(of_layer(e, layer, "attn_output", "weight"), of_layer(e, layer, "attn_output", "bias"),
            mixed, n, width, width, t);
    for (size_t i = 0; i < 3; i++) {
        free(heads[i]);
    }
    free(mixed);
}

static void feed_forward(const struct encoder *e, uint32_t layer, const double *x, uint32_t n,
                         double *t)
{
    const struct encoder_spec *s = &e->spec;
    size_t count = (size_t)n * s->n_ff;
    double *up = zeros(count), *gate = zeros(count);
    product(of_layer(e, layer, "ffn_up", "weight"), of_layer(e, layer, "ffn_up", "bias"), x, n,
            s->n_embd, s->n_ff, up);
    if (s->gated) {
        product(of_layer(e, layer, "ffn_gate", "weight"), of_layer(e, layer, "ffn_gate", "bias"), x,
                n, s->n_embd, s->n_ff, gate);
    }
    for (size_t i = 0; i < count; i++) {
        up[i] = s->gated ? gate[i] / (1 + exp(-gate[i])) * up[i]
                         : up[i] * 0.5 * (1 + erf(up[i] / sqrt(2)));
    }
    product(of_layer(e, layer, "ffn_down", "weight"), of_layer(e, layer, "ffn_down", "bias"), up, n,
            s->n_ff, s->n_embd, t);
    free(up);
    free(gate);
}

void encoder_states(const struct encoder *e, const int32_t *tokens, uint32_t n, double *ret)
{
    const struct encoder_spec *s = &e->spec;
    const float *types = find(e, "token_types.weight"), *places = find(e, "position_embd.weight");
    uint32_t width = s->n_embd;
    size_t count = (size_t)n * width;
    double *t = zeros(count);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < width; k++) {
            ret[i * width + k] =
                (double)find(e, "token_embd.weight")[(size_t)tokens[i] * width + k] +
                (types != NULL ? (double)types[k] : 0) +
                (places != NULL ? (double)places[i * width + k] : 0);
        }
    }
    layer_norm(find(e, "token_embd_norm.weight"), find(e, "token_embd_norm.bias"), ret, n, width);
    for (uint32_t layer = 0; layer < s->n_layers; layer++) {
        static const char *const norms[] = {"attn_output_norm", "layer_output_norm"};
        for (int branch = 0; branch < 2; branch++) {
            if (branch == 0) {
                attention(e, layer, ret, n, t);
            } else {
                feed_forward(e, layer, ret, n, t);
            }
            for (size_t i = 0; i < count; i++) {
                ret[i] += t[i];
            }
            layer_norm(of_layer(e, layer, norms[branch], "weight"),
                       of_layer(e, layer, norms[branch], "bias"), ret, n, width);
        }
    }
    free(t);
}

void encoder_scores(const struct encoder *e, const double *state, double *ret)
{
    const struct encoder_spec *s = &e->spec;
    double *hidden = zeros(s->n_embd);
    memcpy(hidden, state, s->n_embd * sizeof(*hidden));
    if (s->dense_classifier) {
        product(find(e, "cls.weight"), find(e, "cls.bias"), state, 1, s->n_embd, s->n_embd, hidden);
        for (uint32_t k = 0; k < s->n_embd; k++) {
            hidden[k] = tanh(hidden[k]);
        }
    }
    product(find(e, "cls.output.weight"), find(e, "cls.output.bias"), hidden, 1, s->n_embd,
            s->n_scores, ret);
    free(hidden);
}
