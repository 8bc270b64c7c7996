/* tools/convert/safetensors.h - one file of tensors as Hugging Face writes them.
 *
 *   | header bytes u64 | header: JSON | data |
 *
 * The header maps names to {"dtype", "shape", "data_offsets": [begin, end]}, offsets counting from
 * the data's beginning; "__metadata__" is a map of strings. Here the tensors must lie one behind
 * the other without gaps, as the format says, and the numbers must fit the file's size. */
#ifndef TOOLS_CONVERT_SAFETENSORS_H
#define TOOLS_CONVERT_SAFETENSORS_H

#include "tools/convert/checkpoint.h"

#include <jansson.h>

#define SAFETENSORS_HEADER_BYTES_MAX (100u << 20)

struct safetensor {
    const char *name;  /* the header's */
    const char *dtype; /* "BF16", ... */
    uint32_t n_dims;
    uint64_t shape[CK_MAX_DIMS]; /* slowest first */
    uint64_t begin, end;         /* in the data */
};

struct safetensors {
    const uint8_t *base; /* the mapping, or the caller's buffer */
    bool is_mapped;
    uint64_t bytes, data_offset;
    json_t *header;
    struct safetensor *tensors; /* (n_tensors), by their place in the data */
    size_t n_tensors;
};

int safetensors_open(const char *path, struct safetensors *ret, struct fmt_error *err);
/* The same over a buffer that the caller keeps alive. */
int safetensors_open_memory(const void *data, size_t bytes, struct safetensors *ret,
                            struct fmt_error *err);
void safetensors_close(struct safetensors *s); /* zeroed is legal */

/* The type of values, or NULL where they can only be copied. */
const struct fmt_type_info *safetensors_type(const char *dtype);
const char *safetensors_dtype(const struct fmt_type_info *type); /* the opposite, or NULL */

/* Bytes of one value, 0 for a dtype that the format does not have. */
uint64_t safetensors_value_bytes(const char *dtype);

#endif
