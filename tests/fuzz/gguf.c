/* Any bytes as a GGUF file: opening must refuse or accept without a fault, and what is accepted
 * must be readable to the last key and tensor. */
#include "format/gguf.h"
#include "format/types.h"

#include <stdlib.h>
#include <string.h>

#define MAX_ELEMENTS   4096
#define MAX_BLOCK      256
#define MAX_TERMINATED 512

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void read_array(const struct gguf *g, const char *key)
{
    static struct gguf_string strings[MAX_ELEMENTS];
    static float floats[MAX_ELEMENTS];
    static int32_t integers[MAX_ELEMENTS];
    enum gguf_value_type type;
    uint64_t count;

    if (gguf_get_array(g, key, &type, &count) < 0 || count > MAX_ELEMENTS) {
        return;
    }
    gguf_get_f32s(g, key, floats, count);
    gguf_get_i32s(g, key, integers, count);
    if (gguf_get_strings(g, key, strings, count) == 0) {
        size_t sum = 0;
        for (uint64_t i = 0; i < count; i++) {
            for (size_t b = 0; b < strings[i].bytes; b++) {
                sum += (uint8_t)strings[i].data[b];
            }
        }
        if (sum == SIZE_MAX) {
            abort(); /* cannot be; keeps the loop from being optimised away */
        }
    }
}

static void read_key(const struct gguf *g, struct gguf_string name)
{
    char key[MAX_TERMINATED];
    uint32_t u32;
    uint64_t u64;
    float f32;
    bool flag;
    struct gguf_string text;

    if (name.bytes >= sizeof(key)) {
        return;
    }
    memcpy(key, name.data, name.bytes);
    key[name.bytes] = '\0';
    /* A key with a NUL inside cannot be named by a C string; all others must be found. */
    if (!gguf_has_key(g, key)) {
        if (strlen(key) == name.bytes) {
            abort();
        }
        return;
    }
    gguf_get_u32(g, key, &u32);
    gguf_get_u64(g, key, &u64);
    gguf_get_f32(g, key, &f32);
    gguf_get_bool(g, key, &flag);
    gguf_get_string(g, key, &text);
    read_array(g, key);
}

static void read_tensor(const struct gguf *g, const struct gguf_tensor *tensor)
{
    static float values[MAX_BLOCK];
    const struct fmt_type_info *type = fmt_type_info(tensor->type);
    if (type == NULL || gguf_find_tensor(g, tensor->name.data) != tensor) {
        abort();
    }
    type->dequantise(tensor->data, values, type->n_block);
    /* And the last block, which is the one that could lie outside. */
    type->dequantise((const uint8_t *)tensor->data + tensor->bytes - type->block_bytes, values,
                     type->n_block);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct gguf *g = NULL;
    struct fmt_error err = {""};
    if (gguf_open_memory(data, bytes, &g, &err) < 0) {
        if (err.text[0] == '\0' || g != NULL) {
            abort();
        }
        return 0;
    }
    for (size_t i = 0; i < gguf_n_keys(g); i++) {
        read_key(g, gguf_key_at(g, i));
    }
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        read_tensor(g, gguf_tensor_at(g, i));
    }
    gguf_close(g);
    return 0;
}
