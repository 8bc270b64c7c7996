/* tools/synth/shape.c - the table of shapes and its overrides. */
#include "tools/synth/shape.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SYNTH_MAX_VALUE  (1u << 24) /* of any number in a shape but rope_base */
#define SYNTH_MIN_VOCAB  259        /* <unk>, <s>, </s> and one token per byte */
#define SYNTH_MAX_LAYERS 4096
#define SYNTH_MAX_TEXT   512

enum arch_index {
    LLAMA,
    QWEN2,
    QWEN3,
    QWEN3MOE,
    SMOLLM3,
    OLMO2,
    GEMMA2,
    GRANITEMOE,
    GPT_OSS,
};

static const struct synth_arch archs[] = {
    [LLAMA] = {"llama", SYNTH_EXPERTS | SYNTH_ROUGH_EPS},
    [QWEN2] = {"qwen2", SYNTH_QKV_BIAS},
    [QWEN3] = {"qwen3", SYNTH_QK_NORM},
    [QWEN3MOE] = {"qwen3moe", SYNTH_QK_NORM | SYNTH_EXPERTS | SYNTH_NOT_DENSE},
    [SMOLLM3] = {"smollm3", 0},
    [OLMO2] = {"olmo2", SYNTH_QK_NORM_WIDE | SYNTH_POST_NORMS | SYNTH_NO_PRE_NORMS},
    [GEMMA2] = {"gemma2", SYNTH_POST_NORMS | SYNTH_SOFTCAPS},
    [GRANITEMOE] = {"granitemoe", SYNTH_SCALES | SYNTH_EXPERTS},
    [GPT_OSS] = {"gpt-oss", SYNTH_QKV_BIAS | SYNTH_BIASES | SYNTH_SINKS | SYNTH_NORM_2_NAME |
                                SYNTH_YARN | SYNTH_EXPERTS | SYNTH_NOT_DENSE | SYNTH_ROUGH_EPS},
};

#define N_ARCHS (sizeof(archs) / sizeof(archs[0]))

/* name, arch, layers, width, heads, KV heads, head, feed-forward, vocabulary, context, rotary base,
 * tied, experts, used, their width, window */
static const struct synth_shape shapes[] = {
    {"tinyllama-1.1b", &archs[LLAMA], 22, 2048, 32, 4, 64, 5632, 32000, 32768, 10000, 0, 0, 0, 0,
     0},
    {"llama-3.2-1b", &archs[LLAMA], 16, 2048, 32, 8, 64, 8192, 128256, 131072, 500000, 1, 0, 0, 0,
     0},
    {"llama-3.2-3b", &archs[LLAMA], 28, 3072, 24, 8, 128, 8192, 128256, 131072, 500000, 1, 0, 0, 0,
     0},
    {"llama-3.1-8b", &archs[LLAMA], 32, 4096, 32, 8, 128, 14336, 128256, 131072, 500000, 0, 0, 0, 0,
     0},
    {"mixtral-8x7b", &archs[LLAMA], 32, 4096, 32, 8, 128, 14336, 32000, 32768, 1000000, 0, 8, 2,
     14336, 0},
    {"qwen2.5-0.5b", &archs[QWEN2], 24, 896, 14, 2, 64, 4864, 151936, 32768, 1000000, 1, 0, 0, 0,
     0},
    {"qwen3-0.6b", &archs[QWEN3], 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1000000, 1, 0, 0, 0,
     0},
    {"qwen3-30b-a3b", &archs[QWEN3MOE], 48, 2048, 32, 4, 128, 6144, 151936, 40960, 1000000, 0, 128,
     8, 768, 0},
    {"smollm3-3b", &archs[SMOLLM3], 36, 2048, 16, 4, 128, 11008, 128256, 65536, 5000000, 1, 0, 0, 0,
     0},
    {"olmo2-1b", &archs[OLMO2], 16, 2048, 16, 16, 128, 8192, 100352, 4096, 500000, 0, 0, 0, 0, 0},
    {"gemma-2-2b", &archs[GEMMA2], 26, 2304, 8, 4, 256, 9216, 256000, 8192, 10000, 1, 0, 0, 0,
     4096},
    {"granite-3.0-1b-a400m", &archs[GRANITEMOE], 24, 1024, 16, 8, 64, 512, 49155, 4096, 10000, 1,
     32, 8, 512, 0},
    {"gpt-oss-20b", &archs[GPT_OSS], 24, 2880, 64, 8, 64, 2880, 201088, 131072, 150000, 0, 32, 4,
     2880, 128},
    {"tiny", &archs[LLAMA], 2, 64, 8, 2, 8, 192, 512, 2048, 10000, 0, 0, 0, 0, 0},
    {"tiny-moe", &archs[LLAMA], 2, 64, 8, 2, 8, 192, 512, 2048, 10000, 0, 8, 2, 96, 0},
};

#define N_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static const struct {
    const char *key;
    size_t offset;
} numbers[] = {
    {"n_layers", offsetof(struct synth_shape, n_layers)},
    {"n_embd", offsetof(struct synth_shape, n_embd)},
    {"n_heads", offsetof(struct synth_shape, n_heads)},
    {"n_kv_heads", offsetof(struct synth_shape, n_kv_heads)},
    {"head_dim", offsetof(struct synth_shape, head_dim)},
    {"n_ff", offsetof(struct synth_shape, n_ff)},
    {"n_vocab", offsetof(struct synth_shape, n_vocab)},
    {"n_ctx", offsetof(struct synth_shape, n_ctx)},
    {"rope_base", offsetof(struct synth_shape, rope_base)},
    {"tied", offsetof(struct synth_shape, tied)},
    {"n_experts", offsetof(struct synth_shape, n_experts)},
    {"n_used", offsetof(struct synth_shape, n_used)},
    {"n_ff_expert", offsetof(struct synth_shape, n_ff_expert)},
    {"window", offsetof(struct synth_shape, window)},
};

#define N_NUMBERS (sizeof(numbers) / sizeof(numbers[0]))

#define SYNTH_FAIL(err, ...) (snprintf((err)->text, sizeof((err)->text), __VA_ARGS__), -EINVAL)

const struct synth_arch *synth_arch_at(size_t i)
{
    return i < N_ARCHS ? &archs[i] : NULL;
}

const struct synth_shape *synth_shape_at(size_t i)
{
    return i < N_SHAPES ? &shapes[i] : NULL;
}

static int find_shape(const char *name, struct synth_shape *ret, struct synth_error *err)
{
    for (size_t i = 0; i < N_SHAPES; i++) {
        if (strcmp(shapes[i].name, name) == 0) {
            *ret = shapes[i];
            return 0;
        }
    }
    return SYNTH_FAIL(err, "no shape is called '%.60s' (--help lists them)", name);
}

static int set_arch(const char *value, struct synth_shape *shape, struct synth_error *err)
{
    for (size_t i = 0; i < N_ARCHS; i++) {
        if (strcmp(archs[i].name, value) == 0) {
            shape->arch = &archs[i];
            return 0;
        }
    }
    return SYNTH_FAIL(err, "arch is '%.40s', which is not one of those that --help lists", value);
}

/* Sets one key; *given collects which of numbers[] were set. */
static int set_key(const char *key, const char *value, struct synth_shape *shape, unsigned *given,
                   struct synth_error *err)
{
    if (strcmp(key, "arch") == 0) {
        return set_arch(value, shape, err);
    }
    for (size_t i = 0; i < N_NUMBERS; i++) {
        if (strcmp(numbers[i].key, key) != 0) {
            continue;
        }
        char *end;
        errno = 0;
        unsigned long number = strtoul(value, &end, 10);
        if (*value < '0' || *value > '9' || *end != '\0' || errno != 0 || number > UINT32_MAX) {
            return SYNTH_FAIL(err, "%s is '%.40s', not a number", key, value);
        }
        uint32_t stored = (uint32_t)number;
        memcpy((char *)shape + numbers[i].offset, &stored, sizeof(stored));
        *given |= 1u << i;
        return 0;
    }
    return SYNTH_FAIL(err, "'%.40s' is no key of a shape (--help lists them)", key);
}

static bool was_given(unsigned given, const char *key)
{
    for (size_t i = 0; i < N_NUMBERS; i++) {
        if (strcmp(numbers[i].key, key) == 0) {
            return (given & 1u << i) != 0;
        }
    }
    return false;
}

static int check_experts(const struct synth_shape *s, struct synth_error *err)
{
    if (s->n_experts == 0 && (s->arch->flags & SYNTH_NOT_DENSE) != 0) {
        return SYNTH_FAIL(err, "%s needs n_experts, n_used and n_ff_expert", s->arch->name);
    }
    if (s->n_experts > 0 && (s->arch->flags & SYNTH_EXPERTS) == 0) {
        return SYNTH_FAIL(err, "%s has no experts", s->arch->name);
    }
    if (s->n_experts > 0 && (s->n_used < 1 || s->n_used > s->n_experts)) {
        return SYNTH_FAIL(err, "n_used is %u of %u experts", s->n_used, s->n_experts);
    }
    if (s->n_experts > 0 && s->n_ff_expert == 0) {
        return SYNTH_FAIL(err, "n_ff_expert is 0");
    }
    return 0;
}

static int check_shape(const struct synth_shape *s, struct synth_error *err)
{
    const size_t first_optional = offsetof(struct synth_shape, n_experts);
    for (size_t i = 0; i < N_NUMBERS; i++) {
        uint32_t value;
        memcpy(&value, (const char *)s + numbers[i].offset, sizeof(value));
        bool is_flag = numbers[i].offset == offsetof(struct synth_shape, tied);
        bool is_base = numbers[i].offset == offsetof(struct synth_shape, rope_base);
        uint32_t low = is_flag || numbers[i].offset >= first_optional ? 0 : 1;
        uint32_t high = is_flag ? 1 : is_base ? UINT32_MAX : SYNTH_MAX_VALUE;
        if (value < low || value > high) {
            return SYNTH_FAIL(err, "%s is %u, not in %u..%u", numbers[i].key, value, low, high);
        }
    }
    if (s->n_layers > SYNTH_MAX_LAYERS) {
        return SYNTH_FAIL(err, "n_layers is %u, more than %d", s->n_layers, SYNTH_MAX_LAYERS);
    }
    if (s->n_vocab < SYNTH_MIN_VOCAB) {
        return SYNTH_FAIL(err, "n_vocab is %u, less than %d (three control tokens, 256 bytes)",
                          s->n_vocab, SYNTH_MIN_VOCAB);
    }
    if (s->n_heads % s->n_kv_heads != 0) {
        return SYNTH_FAIL(err, "n_heads %u is no multiple of n_kv_heads %u", s->n_heads,
                          s->n_kv_heads);
    }
    if (s->head_dim % 2 != 0) {
        return SYNTH_FAIL(err, "head_dim %u is odd", s->head_dim);
    }
    return check_experts(s, err);
}

int synth_shape_parse(const char *text, struct synth_shape *ret, struct synth_error *err)
{
    char copy[SYNTH_MAX_TEXT], *rest = NULL;
    struct synth_shape shape;
    unsigned given = 0;
    int rc;

    if (strlen(text) >= sizeof(copy)) {
        return SYNTH_FAIL(err, "longer than %d characters", SYNTH_MAX_TEXT - 1);
    }
    strcpy(copy, text);
    char *item = strtok_r(copy, ",", &rest);
    if (item != NULL && strchr(item, '=') == NULL) {
        rc = find_shape(item, &shape, err);
        item = strtok_r(NULL, ",", &rest);
    } else {
        rc = find_shape("tiny", &shape, err);
    }
    for (; rc == 0 && item != NULL; item = strtok_r(NULL, ",", &rest)) {
        char *equals = strchr(item, '=');
        if (equals == NULL) {
            return SYNTH_FAIL(err, "'%.60s' is not key=value", item);
        }
        *equals = '\0';
        rc = set_key(item, equals + 1, &shape, &given, err);
    }
    if (rc == 0 && !was_given(given, "head_dim") &&
        (was_given(given, "n_embd") || was_given(given, "n_heads")) && shape.n_heads > 0) {
        if (shape.n_embd % shape.n_heads != 0) {
            return SYNTH_FAIL(err, "n_embd %u is no multiple of n_heads %u: give head_dim too",
                              shape.n_embd, shape.n_heads);
        }
        shape.head_dim = shape.n_embd / shape.n_heads;
    }
    if (rc == 0) {
        rc = check_shape(&shape, err);
    }
    if (rc < 0) {
        return rc;
    }
    *ret = shape;
    return 0;
}
