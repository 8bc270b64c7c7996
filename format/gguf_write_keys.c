/* format/gguf_write_keys.c - encoding keys and values into the writer's memory. */
#include "format/checked.h"
#include "format/gguf_write_internal.h"

#include <errno.h>
#include <stdlib.h>

static int append(struct gguf_writer *w, const void *data, size_t bytes)
{
    uint64_t needed;
    if (w->rc < 0) {
        return w->rc;
    }
    if (!checked_add_u64(w->keys_bytes, bytes, &needed) || needed > SIZE_MAX / 2) {
        return gguf_writer_fail(w, -EFBIG);
    }
    if (needed > w->keys_capacity) {
        size_t capacity = needed > 2048 ? (size_t)needed * 2 : 4096;
        uint8_t *grown = realloc(w->keys, capacity);
        if (grown == NULL) {
            return gguf_writer_fail(w, -ENOMEM);
        }
        w->keys = grown;
        w->keys_capacity = capacity;
    }
    if (bytes > 0) {
        memcpy(w->keys + w->keys_bytes, data, bytes);
        w->keys_bytes += bytes;
    }
    return 0;
}

static int append_u32(struct gguf_writer *w, uint32_t value)
{
    return append(w, &value, sizeof(value));
}

static int append_string(struct gguf_writer *w, const char *data, uint64_t bytes)
{
    append(w, &bytes, sizeof(bytes));
    return append(w, data, (size_t)bytes);
}

/* Begins a key: checks it, and appends its name and its value's type. Errors stick, so that callers
 * check the last of their appends alone. */
static int begin_key(struct gguf_writer *w, const char *key, enum gguf_value_type type)
{
    size_t bytes = strlen(key);
    if (w->rc < 0) {
        return w->rc;
    }
    if (w->in_data || bytes == 0 || bytes > GGUF_MAX_KEY_BYTES) {
        return gguf_writer_fail(w, -EINVAL);
    }
    if (w->n_keys == GGUF_MAX_KEYS) {
        return gguf_writer_fail(w, -EFBIG);
    }
    for (size_t i = 0; i < w->n_keys; i++) {
        if (strcmp(w->key_names[i], key) == 0) {
            return gguf_writer_fail(w, -EEXIST);
        }
    }
    char **grown = realloc(w->key_names, (w->n_keys + 1) * sizeof(*grown));
    if (grown == NULL) {
        return gguf_writer_fail(w, -ENOMEM);
    }
    w->key_names = grown;
    w->key_names[w->n_keys] = strdup(key);
    if (w->key_names[w->n_keys] == NULL) {
        return gguf_writer_fail(w, -ENOMEM);
    }
    w->n_keys++;
    append_string(w, key, bytes);
    return append_u32(w, type);
}

static int begin_array(struct gguf_writer *w, const char *key, enum gguf_value_type element_type,
                       uint64_t count)
{
    begin_key(w, key, GGUF_ARRAY);
    append_u32(w, element_type);
    return append(w, &count, sizeof(count));
}

int gguf_writer_add_u32(struct gguf_writer *w, const char *key, uint32_t value)
{
    if (strcmp(key, "general.alignment") == 0) {
        /* Tensors are placed as they are declared: the alignment must be known before. */
        if (w->n_tensors > 0 || value < GGUF_MIN_ALIGNMENT || (value & (value - 1)) != 0) {
            return gguf_writer_fail(w, -EINVAL);
        }
        w->alignment = value;
    }
    begin_key(w, key, GGUF_U32);
    return append_u32(w, value);
}

int gguf_writer_add_f32(struct gguf_writer *w, const char *key, float value)
{
    begin_key(w, key, GGUF_F32);
    return append(w, &value, sizeof(value));
}

int gguf_writer_add_bool(struct gguf_writer *w, const char *key, bool value)
{
    uint8_t byte = value ? 1 : 0;
    begin_key(w, key, GGUF_BOOL);
    return append(w, &byte, sizeof(byte));
}

int gguf_writer_add_string(struct gguf_writer *w, const char *key, const char *value)
{
    begin_key(w, key, GGUF_STRING);
    return append_string(w, value, strlen(value));
}

int gguf_writer_add_strings(struct gguf_writer *w, const char *key,
                            const struct gguf_string *values, uint64_t count)
{
    int rc = begin_array(w, key, GGUF_STRING, count);
    for (uint64_t i = 0; i < count && rc == 0; i++) {
        rc = append_string(w, values[i].data, values[i].bytes);
    }
    return rc;
}

/* count elements of four bytes each. */
static int add_words(struct gguf_writer *w, const char *key, enum gguf_value_type element_type,
                     const void *values, uint64_t count)
{
    uint64_t bytes;
    if (!checked_mul_u64(count, 4, &bytes)) {
        return gguf_writer_fail(w, -EFBIG);
    }
    begin_array(w, key, element_type, count);
    return append(w, values, (size_t)bytes);
}

int gguf_writer_add_f32s(struct gguf_writer *w, const char *key, const float *values,
                         uint64_t count)
{
    return add_words(w, key, GGUF_F32, values, count);
}

int gguf_writer_add_i32s(struct gguf_writer *w, const char *key, const int32_t *values,
                         uint64_t count)
{
    return add_words(w, key, GGUF_I32, values, count);
}

int gguf_writer_copy_key(struct gguf_writer *w, const struct gguf *g, size_t index)
{
    const struct gguf_part *part = &g->parts[0];
    const struct gguf_value *v = &part->values[index];
    char key[GGUF_MAX_KEY_BYTES + 1];
    uint32_t alignment;
    if (index >= part->n_values) {
        return gguf_writer_fail(w, -EINVAL);
    }
    memcpy(key, v->key.data, v->key.bytes);
    key[v->key.bytes] = '\0';
    if (strcmp(key, "general.alignment") == 0) {
        return gguf_get_u32(g, key, &alignment) < 0 ? gguf_writer_fail(w, -EINVAL)
                                                    : gguf_writer_add_u32(w, key, alignment);
    }
    if (v->type == GGUF_ARRAY) {
        begin_array(w, key, v->element_type, v->count);
    } else {
        begin_key(w, key, v->type);
    }
    return append(w, v->data, (size_t)v->bytes);
}
