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

static const struct synth_shape shapes[] = {
    {"tinyllama-1.1b", SYNTH_LLAMA, 22, 2048, 32, 4, 64, 5632, 32000, 32768, 10000, 0},
    {"llama-3.2-1b", SYNTH_LLAMA, 16, 2048, 32, 8, 64, 8192, 128256, 131072, 500000, 1},
    {"llama-3.2-3b", SYNTH_LLAMA, 28, 3072, 24, 8, 128, 8192, 128256, 131072, 500000, 1},
    {"llama-3.1-8b", SYNTH_LLAMA, 32, 4096, 32, 8, 128, 14336, 128256, 131072, 500000, 0},
    {"qwen2.5-0.5b", SYNTH_QWEN2, 24, 896, 14, 2, 64, 4864, 151936, 32768, 1000000, 1},
    {"qwen3-0.6b", SYNTH_QWEN3, 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1000000, 1},
    {"tiny", SYNTH_LLAMA, 2, 64, 8, 2, 8, 192, 512, 2048, 10000, 0},
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
};

#define N_NUMBERS (sizeof(numbers) / sizeof(numbers[0]))

#define SYNTH_FAIL(err, ...) (snprintf((err)->text, sizeof((err)->text), __VA_ARGS__), -EINVAL)

static const char *const arch_names[] = {
    [SYNTH_LLAMA] = "llama", [SYNTH_QWEN2] = "qwen2", [SYNTH_QWEN3] = "qwen3"};

const char *synth_arch_name(enum synth_arch arch)
{
    return arch_names[arch];
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
    for (size_t i = 0; i < sizeof(arch_names) / sizeof(arch_names[0]); i++) {
        if (strcmp(arch_names[i], value) == 0) {
            shape->arch = (enum synth_arch)i;
            return 0;
        }
    }
    return SYNTH_FAIL(err, "arch is '%.40s', not one of llama, qwen2, qwen3", value);
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

static int check_shape(const struct synth_shape *s, struct synth_error *err)
{
    for (size_t i = 0; i < N_NUMBERS; i++) {
        uint32_t value;
        memcpy(&value, (const char *)s + numbers[i].offset, sizeof(value));
        bool is_flag = numbers[i].offset == offsetof(struct synth_shape, tied);
        bool is_base = numbers[i].offset == offsetof(struct synth_shape, rope_base);
        uint32_t low = is_flag ? 0 : 1;
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
    return 0;
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
