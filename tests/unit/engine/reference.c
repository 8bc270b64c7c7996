#include "tests/unit/engine/reference.h"

#include "format/types.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EPS       1e-5
#define OAI_ALPHA 1.702
#define OAI_LIMIT 7.0

static void need(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "reference: %s\n", what);
        exit(99);
    }
}

/* ---- tensors ----------------------------------------------------------------------------- */

static float random_value(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return (float)(*x >> 40) / 8388608.0f - 1;
}

/* ne[1] 0: a vector. Vectors named ".weight" lie about 1, biases and sinks about 0. */
static void add(struct reference *r, uint64_t *x, const char *name, uint64_t n0, uint64_t n1,
                uint64_t n2)
{
    need(r->n_tensors < REFERENCE_TENSORS, "too many tensors");
    size_t i = r->n_tensors++, last = strlen(name);
    bool bias = last > 5 && strcmp(name + last - 5, ".bias") == 0;
    bool norm = n1 == 0 && !bias && strstr(name, "sinks") == NULL;
    size_t n = n0 * (n1 > 0 ? n1 : 1) * (n2 > 0 ? n2 : 1);
    snprintf(r->tensors[i].name, sizeof(r->tensors[i].name), "%s", name);
    r->tensors[i].n_dims = n2 > 0 ? 3 : n1 > 0 ? 2 : 1;
    r->tensors[i].ne[0] = n0;
    r->tensors[i].ne[1] = n1 > 0 ? n1 : 1;
    r->tensors[i].ne[2] = n2 > 0 ? n2 : 1;
    r->tensors[i].values = malloc(n * sizeof(float));
    need(r->tensors[i].values != NULL, "memory");
    float scale = bias ? 0.5f : norm ? 0.4f : n1 == 0 ? 1 : 2.0f / sqrtf((float)n0);
    for (size_t v = 0; v < n; v++) {
        r->tensors[i].values[v] = (norm ? 1 : 0) + scale * random_value(x);
    }
}

static void add_layer_tensor(struct reference *r, uint64_t *x, uint32_t layer, const char *name,
                             uint64_t n0, uint64_t n1, uint64_t n2)
{
    char full[96];
    snprintf(full, sizeof(full), "blk.%u.%s", layer, name);
    add(r, x, full, n0, n1, n2);
}

static void add_attention(struct reference *r, uint64_t *x, uint32_t l)
{
    const struct reference_spec *s = &r->spec;
    uint64_t q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    if (!s->no_pre_norms) {
        add_layer_tensor(r, x, l, "attn_norm.weight", s->n_embd, 0, 0);
    }
    if (s->norm_bias) {
        add_layer_tensor(r, x, l, "attn_norm.bias", s->n_embd, 0, 0);
    }
    const struct {
        const char *weight, *bias;
        uint64_t width;
    } parts[] = {{"attn_q.weight", "attn_q.bias", q},
                 {"attn_k.weight", "attn_k.bias", kv},
                 {"attn_v.weight", "attn_v.bias", kv},
                 {"attn_qkv.weight", "attn_qkv.bias", q + 2 * kv}};
    for (size_t i = s->fused_qkv ? 3 : 0; i < (s->fused_qkv ? 4 : 3); i++) {
        add_layer_tensor(r, x, l, parts[i].weight, s->n_embd, parts[i].width, 0);
        if (s->qkv_bias) {
            add_layer_tensor(r, x, l, parts[i].bias, parts[i].width, 0, 0);
        }
    }
    if (s->qk_norm != REFERENCE_QK_PLAIN) {
        bool wide = s->qk_norm == REFERENCE_QK_WIDE;
        add_layer_tensor(r, x, l, "attn_q_norm.weight", wide ? q : s->head_dim, 0, 0);
        add_layer_tensor(r, x, l, "attn_k_norm.weight", wide ? kv : s->head_dim, 0, 0);
    }
    if (s->sinks) {
        add_layer_tensor(r, x, l, "attn_sinks.weight", s->n_heads, 0, 0);
    }
    add_layer_tensor(r, x, l, "attn_output.weight", q, s->n_embd, 0);
    if (s->out_bias) {
        add_layer_tensor(r, x, l, "attn_output.bias", s->n_embd, 0, 0);
    }
    if (s->post_norms || s->second_norm_is_post_attention) {
        add_layer_tensor(r, x, l, "post_attention_norm.weight", s->n_embd, 0, 0);
    }
}

/* One feed-forward; suffix "", "_exps" or "_shexp". n: matrices of experts, 0 for one alone. */
static void add_gated(struct reference *r, uint64_t *x, uint32_t l, const char *suffix,
                      uint64_t width, uint64_t n)
{
    const struct reference_spec *s = &r->spec;
    bool fused = n > 0 ? s->fused_experts : s->fused_gate_up;
    const struct {
        const char *stem;
        bool there;
        uint64_t n_in, n_out;
    } parts[] = {
        {"ffn_gate", !s->ungated && !fused, s->n_embd, width},
        {n > 0 && fused ? "ffn_gate_up" : "ffn_up", true, s->n_embd, fused ? 2 * width : width},
        {"ffn_down", true, width, s->n_embd}};
    for (size_t i = 0; i < 3; i++) {
        char name[64];
        if (!parts[i].there) {
            continue;
        }
        snprintf(name, sizeof(name), "%s%s.weight", parts[i].stem, suffix);
        add_layer_tensor(r, x, l, name, parts[i].n_in, parts[i].n_out, n);
        if (s->ff_bias) {
            snprintf(name, sizeof(name), "%s%s.bias", parts[i].stem, suffix);
            add_layer_tensor(r, x, l, name, parts[i].n_out, n, 0);
        }
    }
}

static void add_feed_forward(struct reference *r, uint64_t *x, uint32_t l)
{
    const struct reference_spec *s = &r->spec;
    if (!s->no_pre_norms && !s->parallel && !s->second_norm_is_post_attention) {
        add_layer_tensor(r, x, l, "ffn_norm.weight", s->n_embd, 0, 0);
        if (s->norm_bias) {
            add_layer_tensor(r, x, l, "ffn_norm.bias", s->n_embd, 0, 0);
        }
    }
    if (s->n_experts == 0) {
        add_gated(r, x, l, "", s->n_ff, 0);
    } else {
        add_layer_tensor(r, x, l, "ffn_gate_inp.weight", s->n_embd, s->n_experts, 0);
        if (s->ff_bias) {
            add_layer_tensor(r, x, l, "ffn_gate_inp.bias", s->n_experts, 0, 0);
        }
        add_gated(r, x, l, "_exps", s->n_ff_expert, s->n_experts);
    }
    if (s->n_ff_shared > 0) {
        add_gated(r, x, l, "_shexp", s->n_ff_shared, 0);
    }
    if (s->shared_gate) {
        add_layer_tensor(r, x, l, "ffn_gate_inp_shexp.weight", s->n_embd, 0, 0);
    }
    if (s->post_norms) {
        add_layer_tensor(r, x, l, "post_ffw_norm.weight", s->n_embd, 0, 0);
    }
}

void reference_init(struct reference *r, const struct reference_spec *spec)
{
    memset(r, 0, sizeof(*r));
    r->spec = *spec;
    uint64_t x = (spec->seed + 1) * 0x9e3779b97f4a7c15u;
    add(r, &x, "token_embd.weight", spec->n_embd, TINY_VOCAB, 0);
    for (uint32_t l = 0; l < spec->n_layers; l++) {
        add_attention(r, &x, l);
        add_feed_forward(r, &x, l);
    }
    add(r, &x, "output_norm.weight", spec->n_embd, 0, 0);
    if (spec->norm_bias) {
        add(r, &x, "output_norm.bias", spec->n_embd, 0, 0);
    }
    if (spec->untied) {
        add(r, &x, "output.weight", spec->n_embd, TINY_VOCAB, 0);
    }
    if (spec->head_bias) {
        add(r, &x, "output.bias", TINY_VOCAB, 0, 0);
    }
}

void reference_finish(struct reference *r)
{
    for (size_t i = 0; i < r->n_tensors; i++) {
        free(r->tensors[i].values);
    }
    memset(r, 0, sizeof(*r));
}

/* ---- the file ---------------------------------------------------------------------------- */

static void add_u32(struct gguf_writer *w, const char *arch, const char *key, uint32_t value)
{
    char name[96];
    snprintf(name, sizeof(name), "%s.%s", arch, key);
    need(gguf_writer_add_u32(w, name, value) == 0, name);
}

static void add_f32(struct gguf_writer *w, const char *arch, const char *key, double value)
{
    char name[96];
    snprintf(name, sizeof(name), "%s.%s", arch, key);
    need(gguf_writer_add_f32(w, name, (float)value) == 0, name);
}

static void add_keys(struct gguf_writer *w, const struct reference_spec *s)
{
    gguf_writer_add_string(w, "general.architecture", s->arch);
    add_u32(w, s->arch, "context_length", 512);
    add_u32(w, s->arch, "embedding_length", s->n_embd);
    add_u32(w, s->arch, "block_count", s->n_layers);
    add_u32(w, s->arch, "feed_forward_length", s->n_ff);
    add_u32(w, s->arch, "attention.head_count", s->n_heads);
    add_u32(w, s->arch, "attention.head_count_kv", s->n_kv_heads);
    add_u32(w, s->arch, "attention.key_length", s->head_dim);
    add_u32(w, s->arch, "attention.value_length", s->head_dim);
    add_u32(w, s->arch, "rope.dimension_count", s->n_rot > 0 ? s->n_rot : s->head_dim);
    add_f32(w, s->arch, "rope.freq_base", s->base);
    add_f32(w, s->arch,
            s->layer_norm ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon",
            EPS);
    if (s->window > 0) {
        add_u32(w, s->arch, "attention.sliding_window", s->window);
    }
    if (s->n_experts > 0) {
        add_u32(w, s->arch, "expert_count", s->n_experts);
        add_u32(w, s->arch, "expert_used_count", s->n_used);
        add_u32(w, s->arch, "expert_feed_forward_length", s->n_ff_expert);
    }
    if (s->n_ff_shared > 0) {
        add_u32(w, s->arch, "expert_shared_feed_forward_length", s->n_ff_shared);
    }
    tiny_add_vocabulary(w);
    if (s->add_keys != NULL) {
        s->add_keys(w);
    }
}

/* Tensors [first, last), and the keys: the model's in the first part, the split's where there are
 * several. */
static void write_part(const struct reference *r, const char *path, size_t first, size_t last,
                       uint32_t part, uint32_t n_parts)
{
    struct gguf_writer *w;
    need(gguf_writer_create(path, &w) == 0, path);
    if (part == 0) {
        add_keys(w, &r->spec);
    }
    if (n_parts > 1) {
        gguf_writer_add_u32(w, "split.no", part);
        gguf_writer_add_u32(w, "split.count", n_parts);
        gguf_writer_add_u32(w, "split.tensors.count", (uint32_t)r->n_tensors);
    }
    for (size_t i = first; i < last; i++) {
        need(gguf_writer_add_tensor(w, r->tensors[i].name, FMT_TYPE_F32, r->tensors[i].n_dims,
                                    r->tensors[i].ne) == 0,
             r->tensors[i].name);
    }
    need(gguf_writer_begin_data(w) == 0, "data");
    for (size_t i = first; i < last; i++) {
        const uint64_t *ne = r->tensors[i].ne;
        need(gguf_writer_write(w, r->tensors[i].values, ne[0] * ne[1] * ne[2] * sizeof(float)) == 0,
             "values");
    }
    need(gguf_writer_finish(w) == 0, path);
    gguf_writer_destroy(w);
}

void reference_write(const struct reference *r, const char *path)
{
    write_part(r, path, 0, r->n_tensors, 0, 1);
}

void reference_write_parts(const struct reference *r, const char *stem, uint32_t n_parts)
{
    for (uint32_t part = 0; part < n_parts; part++) {
        char path[256];
        snprintf(path, sizeof(path), "%s-%05u-of-%05u.gguf", stem, part + 1, n_parts);
        write_part(r, path, r->n_tensors * part / n_parts, r->n_tensors * (part + 1) / n_parts,
                   part, n_parts);
    }
}

/* ---- the mathematics --------------------------------------------------------------------- */

/* What the functions of one layer share. */
struct pass {
    const struct reference *r;
    const struct reference_spec *s;
    uint32_t layer;
};

/* A tensor's values, or NULL. */
static const float *find(const struct reference *r, const char *name)
{
    for (size_t i = 0; i < r->n_tensors; i++) {
        if (strcmp(r->tensors[i].name, name) == 0) {
            return r->tensors[i].values;
        }
    }
    return NULL;
}

static const float *get(const struct pass *p, const char *stem, const char *suffix,
                        const char *kind)
{
    char name[64];
    snprintf(name, sizeof(name), "blk.%u.%s%s.%s", p->layer, stem, suffix, kind);
    return find(p->r, name);
}

static void product(const float *weight, const float *bias, const double *x, uint32_t n_in,
                    uint32_t n_out, double *y)
{
    for (uint32_t o = 0; o < n_out; o++) {
        double sum = bias != NULL ? bias[o] : 0;
        for (uint32_t i = 0; i < n_in; i++) {
            sum += (double)weight[(size_t)o * n_in + i] * x[i];
        }
        y[o] = sum;
    }
}

static void norm(const struct reference_spec *s, const float *weight, const float *bias,
                 const double *x, uint32_t n, double *y)
{
    double mean = 0, square = 0;
    for (uint32_t i = 0; i < n; i++) {
        mean += s->layer_norm ? x[i] / n : 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        square += (x[i] - mean) * (x[i] - mean) / n;
    }
    for (uint32_t i = 0; i < n; i++) {
        y[i] = (x[i] - mean) / sqrt(square + EPS) * weight[i] + (bias != NULL ? bias[i] : 0);
    }
}

static double activate(enum reference_act act, double x)
{
    if (act == REFERENCE_GELU_TANH) {
        return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    }
    return x / (1 + exp(-x));
}

static double combine(enum reference_act act, double gate, double up)
{
    if (act != REFERENCE_SWIGLU_OAI) {
        return activate(act, gate) * up;
    }
    gate = gate < OAI_LIMIT ? gate : OAI_LIMIT;
    up = up < OAI_LIMIT ? up : OAI_LIMIT;
    up = up > -OAI_LIMIT ? up : -OAI_LIMIT;
    return gate / (1 + exp(-OAI_ALPHA * gate)) * (up + 1);
}

/* Angle per position of pair i, and the factor of the rotated values. */
static double frequency(const struct pass *p, uint32_t i, double *ret_magnitude)
{
    const struct reference_spec *s = p->s;
    bool local = s->windowed[p->layer] && s->local_base > 0;
    double base = local ? s->local_base : s->base;
    double f = pow(base, -2.0 * i / s->n_rot);
    *ret_magnitude = 1;
    if (s->yarn_factor == 0 || local) {
        return f;
    }
    double per_turn = s->n_rot / (2 * log(base));
    double low = floor(per_turn * log(s->n_ctx_orig / (32 * 2 * M_PI)));
    double high = ceil(per_turn * log(s->n_ctx_orig / (1 * 2 * M_PI)));
    low = fmax(low, 0);
    high = fmin(high, s->n_rot - 1);
    double ramp = fmin(fmax((i - low) / fmax(high - low, 0.001), 0), 1);
    *ret_magnitude =
        (1 + 0.1 * log(s->yarn_factor)) / (1 + 0.1 * s->yarn_log_mul * log(s->yarn_factor));
    return f * (1 - ramp) + f / s->yarn_factor * ramp;
}

static void rotate(const struct pass *p, double *heads, uint32_t n_heads, size_t position)
{
    const struct reference_spec *s = p->s;
    if (s->nope_step > 0 && (p->layer + 1) % s->nope_step == 0) {
        return;
    }
    for (uint32_t h = 0; h < n_heads; h++) {
        double *x = heads + (size_t)h * s->head_dim;
        for (uint32_t i = 0; i < s->n_rot / 2; i++) {
            double magnitude, angle = (double)position * frequency(p, i, &magnitude);
            double *a = &x[s->rotate_halves ? i : 2 * i];
            double *b = &x[s->rotate_halves ? i + s->n_rot / 2 : 2 * i + 1];
            double c = cos(angle) * magnitude, d = sin(angle) * magnitude;
            double turned = *a * c - *b * d;
            *b = *a * d + *b * c;
            *a = turned;
        }
    }
}

static void norm_heads(const struct pass *p, double *heads, uint32_t n_heads, const char *stem)
{
    const struct reference_spec *s = p->s;
    const float *weight = get(p, stem, "", "weight");
    if (s->qk_norm == REFERENCE_QK_WIDE) {
        norm(s, weight, NULL, heads, n_heads * s->head_dim, heads);
    }
    for (uint32_t h = 0; s->qk_norm == REFERENCE_QK_PER_HEAD && h < n_heads; h++) {
        norm(s, weight, NULL, heads + h * s->head_dim, s->head_dim, heads + h * s->head_dim);
    }
}

/* Queries, keys and values of one row, side by side. */
static void project(const struct pass *p, const double *x, size_t position, double *qkv)
{
    const struct reference_spec *s = p->s;
    uint32_t q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    if (s->fused_qkv) {
        product(get(p, "attn_qkv", "", "weight"),
                s->qkv_bias ? get(p, "attn_qkv", "", "bias") : NULL, x, s->n_embd, q + 2 * kv, qkv);
    } else {
        static const char *const stems[] = {"attn_q", "attn_k", "attn_v"};
        const uint32_t first[] = {0, q, q + kv}, width[] = {q, kv, kv};
        for (size_t i = 0; i < 3; i++) {
            product(get(p, stems[i], "", "weight"),
                    s->qkv_bias ? get(p, stems[i], "", "bias") : NULL, x, s->n_embd, width[i],
                    qkv + first[i]);
        }
    }
    norm_heads(p, qkv, s->n_heads, "attn_q_norm");
    norm_heads(p, qkv + q, s->n_kv_heads, "attn_k_norm");
    rotate(p, qkv, s->n_heads, position);
    rotate(p, qkv + q, s->n_kv_heads, position);
}

/* One head of one row over all rows that it sees. qkv (n_rows, width). */
static void attend(const struct pass *p, const double *qkv, uint32_t width, size_t row,
                   uint32_t head, double *out)
{
    const struct reference_spec *s = p->s;
    uint32_t group = head / (s->n_heads / s->n_kv_heads), dim = s->head_dim;
    uint32_t k_at = s->n_heads * dim + group * dim, v_at = k_at + s->n_kv_heads * dim;
    double scale = s->attn_scale > 0 ? s->attn_scale : 1 / sqrt(dim);
    bool windowed = s->window > 0 && s->windowed[p->layer];
    size_t first = windowed && row + 1 > s->window ? row + 1 - s->window : 0;
    double total = s->sinks ? exp((double)get(p, "attn_sinks", "", "weight")[head]) : 0;
    memset(out, 0, dim * sizeof(*out));
    for (size_t t = first; t <= row; t++) {
        double score = 0;
        for (uint32_t i = 0; i < dim; i++) {
            score += qkv[row * width + head * dim + i] * qkv[t * width + k_at + i];
        }
        double weight = exp(score * scale);
        total += weight;
        for (uint32_t i = 0; i < dim; i++) {
            out[i] += weight * qkv[t * width + v_at + i];
        }
    }
    for (uint32_t i = 0; i < dim; i++) {
        out[i] /= total;
    }
}

/* y += factor * feed-forward(x); expert: which matrix of the tensors. */
static void feed_forward(const struct pass *p, const char *suffix, uint32_t expert, uint32_t width,
                         const double *x, double factor, double *y)
{
    const struct reference_spec *s = p->s;
    bool fused = get(p, "ffn_gate", suffix, "weight") == NULL && !s->ungated;
    const char *up_stem = fused && strcmp(suffix, "_exps") == 0 ? "ffn_gate_up" : "ffn_up";
    const char *const stems[] = {"ffn_gate", up_stem, "ffn_down"};
    const float *weights[3], *biases[3];
    for (size_t i = 0; i < 3; i++) {
        uint32_t n_out = i == 2 ? s->n_embd : i == 1 && fused ? 2 * width : width;
        weights[i] = get(p, stems[i], suffix, "weight");
        biases[i] = s->ff_bias ? get(p, stems[i], suffix, "bias") : NULL;
        if (weights[i] != NULL) {
            weights[i] += (size_t)expert * s->n_embd * (i == 1 && fused ? 2 : 1) * width;
        }
        if (biases[i] != NULL) {
            biases[i] += (size_t)expert * n_out;
        }
    }
    double *gate = calloc(3 * (size_t)width, sizeof(*gate)), *up = gate + width;
    double *out = calloc(s->n_embd, sizeof(*out));
    if (fused) {
        product(weights[1], biases[1], x, s->n_embd, 2 * width, gate);
    } else {
        product(weights[1], biases[1], x, s->n_embd, width, up);
        if (!s->ungated) {
            product(weights[0], biases[0], x, s->n_embd, width, gate);
        }
    }
    for (uint32_t i = 0; i < width; i++) {
        up[i] = s->ungated ? activate(s->act, up[i]) : combine(s->act, gate[i], up[i]);
    }
    product(weights[2], biases[2], up, width, s->n_embd, out);
    for (uint32_t i = 0; i < s->n_embd; i++) {
        y[i] += factor * out[i];
    }
    free(gate);
    free(out);
}

static void mixture(const struct pass *p, const double *x, double *y)
{
    const struct reference_spec *s = p->s;
    double *logits = calloc(s->n_experts, sizeof(*logits));
    bool *chosen = calloc(s->n_experts, sizeof(*chosen));
    product(get(p, "ffn_gate_inp", "", "weight"),
            s->ff_bias ? get(p, "ffn_gate_inp", "", "bias") : NULL, x, s->n_embd, s->n_experts,
            logits);
    double all = 0, of_chosen = 0;
    for (uint32_t e = 0; e < s->n_experts; e++) {
        all += exp(logits[e]);
    }
    for (uint32_t n = 0; n < s->n_used; n++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t e = 0; e < s->n_experts; e++) {
            if (!chosen[e] && (best == UINT32_MAX || logits[e] > logits[best])) {
                best = e;
            }
        }
        chosen[best] = true;
        of_chosen += exp(logits[best]);
    }
    for (uint32_t e = 0; e < s->n_experts; e++) {
        if (chosen[e]) {
            double weight = exp(logits[e]) / (s->raw_experts ? all : of_chosen);
            feed_forward(p, "_exps", e, s->n_ff_expert, x, weight, y);
        }
    }
    free(logits);
    free(chosen);
}

static void branch_2(const struct pass *p, const double *x, double *y)
{
    const struct reference_spec *s = p->s;
    if (s->n_experts == 0) {
        feed_forward(p, "", 0, s->n_ff, x, 1, y);
        return;
    }
    mixture(p, x, y);
    if (s->n_ff_shared > 0) {
        double gate = 0;
        if (s->shared_gate) {
            product(get(p, "ffn_gate_inp_shexp", "", "weight"), NULL, x, s->n_embd, 1, &gate);
        }
        feed_forward(p, "_shexp", 0, s->n_ff_shared, x, s->shared_gate ? 1 / (1 + exp(-gate)) : 1,
                     y);
    }
}

/* x += residual_scale * (normed) branch */
static void join(const struct pass *p, const char *post_norm, double *branch, double *x)
{
    const struct reference_spec *s = p->s;
    if (s->post_norms) {
        norm(s, get(p, post_norm, "", "weight"), NULL, branch, s->n_embd, branch);
    }
    for (uint32_t i = 0; i < s->n_embd; i++) {
        x[i] += (s->residual_scale > 0 ? s->residual_scale : 1) * branch[i];
    }
}

static void read_stream(const struct pass *p, const char *stem, const double *x, double *h)
{
    const struct reference_spec *s = p->s;
    if (s->no_pre_norms) {
        memcpy(h, x, s->n_embd * sizeof(*h));
    } else {
        norm(s, get(p, stem, "", "weight"), s->norm_bias ? get(p, stem, "", "bias") : NULL, x,
             s->n_embd, h);
    }
}

/* x (n, n_embd) through one layer. */
static void layer(const struct pass *p, double *x, size_t n)
{
    const struct reference_spec *s = p->s;
    uint32_t q = s->n_heads * s->head_dim, width = q + 2 * s->n_kv_heads * s->head_dim;
    double *qkv = calloc(n * width, sizeof(*qkv)), *h = calloc(n * s->n_embd, sizeof(*h));
    double *att = calloc(q, sizeof(*att)), *branch = calloc(s->n_embd, sizeof(*branch));
    for (size_t row = 0; row < n; row++) {
        read_stream(p, "attn_norm", x + row * s->n_embd, h + row * s->n_embd);
        project(p, h + row * s->n_embd, row, qkv + row * width);
    }
    for (size_t row = 0; row < n; row++) {
        double *xr = x + row * s->n_embd, *hr = h + row * s->n_embd;
        for (uint32_t head = 0; head < s->n_heads; head++) {
            attend(p, qkv, width, row, head, att + (size_t)head * s->head_dim);
        }
        product(get(p, "attn_output", "", "weight"),
                s->out_bias ? get(p, "attn_output", "", "bias") : NULL, att, q, s->n_embd, branch);
        join(p, "post_attention_norm", branch, xr);
        if (!s->parallel) {
            read_stream(p, s->second_norm_is_post_attention ? "post_attention_norm" : "ffn_norm",
                        xr, hr);
        }
        memset(branch, 0, s->n_embd * sizeof(*branch));
        branch_2(p, hr, branch);
        join(p, "post_ffw_norm", branch, xr);
    }
    free(qkv);
    free(h);
    free(att);
    free(branch);
}

void reference_logits(const struct reference *r, const struct reference_spec *spec,
                      const int32_t *tokens, size_t n, double *ret)
{
    const struct reference_spec *s = spec;
    const float *embd = find(r, "token_embd.weight");
    const float *head = s->untied ? find(r, "output.weight") : embd;
    double *x = calloc(n * s->n_embd, sizeof(*x));
    for (size_t i = 0; i < n * s->n_embd; i++) {
        size_t token = (size_t)tokens[i / s->n_embd];
        x[i] = (s->embed_scale > 0 ? s->embed_scale : 1) *
               (double)embd[token * s->n_embd + i % s->n_embd];
    }
    for (uint32_t l = 0; l < s->n_layers; l++) {
        layer(&(struct pass){r, s, l}, x, n);
    }
    for (size_t row = 0; row < n; row++) {
        double *xr = x + row * s->n_embd;
        norm(s, find(r, "output_norm.weight"), s->norm_bias ? find(r, "output_norm.bias") : NULL,
             xr, s->n_embd, xr);
        product(head, s->head_bias ? find(r, "output.bias") : NULL, xr, s->n_embd, TINY_VOCAB,
                ret + row * TINY_VOCAB);
        for (uint32_t i = 0; i < TINY_VOCAB; i++) {
            ret[row * TINY_VOCAB + i] /= s->logit_divisor > 0 ? s->logit_divisor : 1;
        }
    }
    free(x);
}
