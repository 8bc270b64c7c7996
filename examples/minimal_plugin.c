/* minimal_plugin.c - a complete attention backend for gqad: plain C, host memory, nothing else.
 * Build: cc -O2 -shared -fPIC -fvisibility=hidden minimal_plugin.c -o minimal.so -lm
 * To try a kernel, replace attend_head(), which is one query head of one row and walks the
 * positions that the row sees with a running maximum. The context is the host itself. */
#include <gqa/plugin.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

struct job {
    const struct gqa_attn_layer *l;
    const struct gqa_attn_batch *b;
    const struct gqa_attn_io *io;
};

static float load(uint32_t type, const void *p, size_t i)
{
    uint16_t h = type == GQA_TYPE_F16 ? ((const uint16_t *)p)[i] : 0;
    uint32_t bits = (h & 0x8000u) << 16 | (h & 0x7fffu) << 13; /* exponent 112 too small */
    float f, scale = (h & 0x7c00) < 0x7c00 ? 0x1p112f : (h & 0x3ff) != 0 ? NAN : INFINITY;
    memcpy(&f, &bits, sizeof(f));
    return type == GQA_TYPE_F16 ? f * scale : ((const float *)p)[i];
}

static void store(uint32_t type, void *p, size_t i, float x)
{
    float a = fabsf(x);
    int exponent = a >= 0x1p-14f && a < 65520.0f ? ilogbf(a) : -14;
    float units = rintf(ldexpf(a, 10 - exponent)); /* 1024 to 2048, fewer for a subnormal */
    int rest = isnan(x) ? 0x7e00 : a >= 65520.0f ? 0x7c00 : (exponent + 14) * 1024 + (int)units;
    uint16_t h = (uint16_t)(rest | (signbit(x) ? 0x8000 : 0));
    size_t size = type == GQA_TYPE_F16 ? sizeof(h) : sizeof(x);
    memcpy((char *)p + i * size, type == GQA_TYPE_F16 ? (void *)&h : (void *)&x, size);
}

/* The position of a row of the batch, and the blocks of the sequence that it belongs to. */
static uint32_t find(const struct job *j, uint32_t row, void *const **ret_pages)
{
    const struct gqa_attn_seq *s = j->b->seqs;
    while (row - s->first_row >= s->n_rows) {
        s++;
    }
    *ret_pages = s->tables[j->l->layer_class].pages;
    return s->n_past + row - s->first_row;
}

static void append_row(void *arg, uint32_t row, uint32_t worker)
{
    const struct job *j = arg;
    const struct gqa_attn_layer *l = j->l;
    void *const *pages;
    uint32_t position = find(j, row, &pages), t = position % GQA_KV_BLOCK_TOKENS;
    char *page = pages[position / GQA_KV_BLOCK_TOKENS];
    for (uint32_t i = 0; i < l->n_kv_heads * l->k_dim; i++) {
        store(l->k_type, page + l->k_offset + i / l->k_dim * l->k_head_bytes,
              gqa_k_index(l->k_dim, t, i % l->k_dim), j->io->k[row * j->io->k_stride + i]);
    }
    for (uint32_t i = 0; i < l->n_kv_heads * l->v_dim; i++) {
        store(l->v_type, page + l->v_offset + i / l->v_dim * l->v_head_bytes,
              gqa_v_index(l->v_dim, t, i % l->v_dim), j->io->v[row * j->io->v_stride + i]);
    }
}

static void attend_head(void *arg, uint32_t index, uint32_t worker)
{
    const struct job *j = arg;
    const struct gqa_attn_layer *l = j->l;
    uint32_t row = index / l->n_heads, head = index % l->n_heads, t, d;
    void *const *pages;
    uint32_t group = head / (l->n_heads / l->n_kv_heads), position = find(j, row, &pages);
    const float *q = j->io->q + row * j->io->q_stride + head * l->k_dim;
    float *out = j->io->out + row * j->io->out_stride + head * l->v_dim;
    float max = l->sinks ? l->sinks[head] : -INFINITY, sum = l->sinks ? 1.0f : 0.0f;
    memset(out, 0, l->v_dim * sizeof(*out));
    uint32_t seen = l->window && position >= l->window ? l->window : position + 1;
    for (t = position + 1 - seen; t <= position; t++) {
        const char *page = pages[t / GQA_KV_BLOCK_TOKENS];
        const char *k = page + l->k_offset + group * l->k_head_bytes;
        const char *v = page + l->v_offset + group * l->v_head_bytes;
        float score = 0.0f;
        for (d = 0; d < l->k_dim; d++) {
            score += q[d] * load(l->k_type, k, gqa_k_index(l->k_dim, t % GQA_KV_BLOCK_TOKENS, d));
        }
        score *= l->scale;
        score = l->softcap > 0.0f ? l->softcap * tanhf(score / l->softcap) : score;
        float top = fmaxf(max, score), old = expf(max - top), new = expf(score - top);
        max = top;
        sum = sum * old + new;
        for (d = 0; d < l->v_dim; d++) {
            size_t i = gqa_v_index(l->v_dim, t % GQA_KV_BLOCK_TOKENS, d);
            out[d] = out[d] * old + load(l->v_type, v, i) * new;
        }
    }
    for (d = 0; d < l->v_dim; d++) {
        out[d] /= sum;
    }
}

static int supports(void *context, const struct gqa_attn_layer *l, struct gqa_reason *reason)
{
    snprintf(reason->text, sizeof(reason->text), "minimal: KV types but F32 and F16, or flags");
    return (l->k_type | l->v_type) <= GQA_TYPE_F16 && l->flags == 0 ? 0 : -ENOTSUP;
}

static int append(void *context, const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                  const struct gqa_attn_io *io)
{
    const struct gqa_host *host = context;
    host->parallel(host->data, append_row, &(struct job){l, b, io}, b->n_rows);
    return 0;
}

static int attend(void *context, const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                  const struct gqa_attn_io *io)
{
    const struct gqa_host *host = context;
    host->parallel(host->data, attend_head, &(struct job){l, b, io}, b->n_rows * l->n_heads);
    return 0;
}

static const void *get_interface(void *context, const char *name)
{
    static const struct gqa_attention a = {sizeof(a), 0, 1, supports, append, attend, NULL};
    return strcmp(name, GQA_ATTENTION_0) == 0 ? &a : NULL;
}

static int probe(struct gqa_probe *ret) /* score 0: chosen by name, never by preference */
{
    *ret = (struct gqa_probe){ret->struct_size, 1, 0, 0, "c", "c", "host memory", ""};
    return 0;
}

static int open_context(const struct gqa_host *host, const char *options, void **ret_context,
                        struct gqa_reason *reason)
{
    snprintf(reason->text, sizeof(reason->text), "minimal: knows no option \"%s\"", options);
    *ret_context = options[0] == 0 ? (void *)host : *ret_context;
    return options[0] == 0 ? 0 : -EINVAL;
}

static void close_context(void *context)
{
}

GQA_PLUGIN_NOTE;
GQA_PLUGIN_EXPORT const struct gqa_plugin gqa_plugin = {
    GQA_PLUGIN_HEADER, "minimal",     "1",          __VERSION__, probe,
    open_context,      get_interface, close_context};
