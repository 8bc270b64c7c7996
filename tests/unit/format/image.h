/* tests/unit/format/image.h - GGUF files built byte by byte in memory, right ones and wrong ones.
 */
#ifndef TESTS_FORMAT_IMAGE_H
#define TESTS_FORMAT_IMAGE_H

#include "format/gguf.h"
#include "format/types.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

struct image {
    uint8_t *bytes;
    size_t n, capacity;
};

static inline void put(struct image *image, const void *data, size_t n)
{
    if (image->n + n > image->capacity) {
        image->capacity = (image->n + n) * 2;
        image->bytes = realloc(image->bytes, image->capacity);
        cr_assert_not_null(image->bytes);
    }
    memcpy(image->bytes + image->n, data, n);
    image->n += n;
}

static inline void put_u8(struct image *image, uint8_t value)
{
    put(image, &value, sizeof(value));
}

static inline void put_u32(struct image *image, uint32_t value)
{
    put(image, &value, sizeof(value));
}

static inline void put_u64(struct image *image, uint64_t value)
{
    put(image, &value, sizeof(value));
}

static inline void put_string(struct image *image, const char *text)
{
    put_u64(image, strlen(text));
    put(image, text, strlen(text));
}

static inline void put_key(struct image *image, const char *key, uint32_t value_type)
{
    put_string(image, key);
    put_u32(image, value_type);
}

static inline void put_header(struct image *image, uint64_t n_tensors, uint64_t n_keys)
{
    put(image, "GGUF", 4);
    put_u32(image, 3);
    put_u64(image, n_tensors);
    put_u64(image, n_keys);
}

static inline void put_tensor(struct image *image, const char *name, uint32_t type, uint32_t n_dims,
                              const uint64_t *ne, uint64_t offset)
{
    put_string(image, name);
    put_u32(image, n_dims);
    for (uint32_t i = 0; i < n_dims; i++) {
        put_u64(image, ne[i]);
    }
    put_u32(image, type);
    put_u64(image, offset);
}

/* Zeros up to a multiple of alignment, then n bytes counting up: the data section. */
static inline void put_data(struct image *image, size_t alignment, size_t n)
{
    while (image->n % alignment != 0) {
        put_u8(image, 0);
    }
    for (size_t i = 0; i < n; i++) {
        put_u8(image, (uint8_t)i);
    }
}

/* A small right file: every kind of value, two tensors, nothing after the last one. */
static inline void put_valid(struct image *image)
{
    put_header(image, 2, 6);
    put_key(image, "general.architecture", GGUF_STRING);
    put_string(image, "test");
    put_key(image, "general.alignment", GGUF_U32);
    put_u32(image, 64);
    put_key(image, "test.words", GGUF_ARRAY);
    put_u32(image, GGUF_STRING);
    put_u64(image, 2);
    put_string(image, "one");
    put_string(image, "");
    put_key(image, "test.numbers", GGUF_ARRAY);
    put_u32(image, GGUF_I16);
    put_u64(image, 2);
    put(image, "\x01\x00\xff\xff", 4);
    put_key(image, "test.wide", GGUF_I64);
    put_u64(image, (uint64_t)-5);
    put_key(image, "test.flag", GGUF_BOOL);
    put_u8(image, 1);
    put_tensor(image, "a", FMT_TYPE_F32, 2, (uint64_t[]){4, 2}, 0);
    put_tensor(image, "b", FMT_TYPE_Q4_0, 1, (uint64_t[]){32}, 64);
    put_data(image, 64, 64 + 18);
}

/* Touches all that a reader of an opened file may touch. */
static inline void walk(const struct gguf *g)
{
    for (size_t i = 0; i < gguf_n_keys(g); i++) {
        cr_assert_gt(gguf_key_at(g, i).bytes, 0);
    }
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(g, i);
        const volatile uint8_t *data = tensor->data;
        cr_assert_eq(gguf_find_tensor(g, tensor->name.data), tensor);
        (void)data[0];
        (void)data[tensor->bytes - 1];
    }
}

#endif
