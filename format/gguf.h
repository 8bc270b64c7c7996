/* format/gguf.h - reading GGUF v2 and v3 model files.
 *
 * The file is mapped read-only and parsed once; every count, length and offset is checked against
 * the file's size before it is believed and before anything is allocated. Hostile files are an
 * everyday input. A split model ("NAME-00001-of-000NN.gguf") is opened by its first part; its
 * tensors then lie in several files. All returned pointers live as long as the gguf object.
 *
 * Not thread-safe while opening; afterwards read-only and safe from any thread. */
#ifndef FORMAT_GGUF_H
#define FORMAT_GGUF_H

#include "format/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gguf;

enum gguf_value_type {
    GGUF_U8 = 0,
    GGUF_I8 = 1,
    GGUF_U16 = 2,
    GGUF_I16 = 3,
    GGUF_U32 = 4,
    GGUF_I32 = 5,
    GGUF_F32 = 6,
    GGUF_BOOL = 7,
    GGUF_STRING = 8,
    GGUF_ARRAY = 9,
    GGUF_U64 = 10,
    GGUF_I64 = 11,
    GGUF_F64 = 12,
};

#define GGUF_MAX_DIMS 4

/* Bytes of a string in the file: not terminated, not necessarily valid UTF-8. */
struct gguf_string {
    const char *data;
    size_t bytes;
};

struct gguf_tensor {
    struct gguf_string name;    /* terminated copy: name.data is a C string, without NUL inside */
    uint32_t type;              /* enum fmt_type */
    uint32_t n_dims;            /* 1..GGUF_MAX_DIMS */
    uint64_t ne[GGUF_MAX_DIMS]; /* ne[0] is the row length (contiguous); absent ones are 1 */
    uint64_t bytes;             /* size of data */
    const void *data;           /* into the mapping; aligned to the file's alignment */
    uint32_t file_index;        /* which part of a split model */
    uint64_t file_offset;       /* absolute offset inside that part */
};

/* Opens and checks a file. 0 and *ret on success; -errno and err's sentence otherwise: -EINVAL
 * malformed, -ENOTSUP version or type unknown, -EFBIG a limit was passed, or what open/mmap gave.
 * The sentence names file (without its folder), key or tensor, offset and limit. The type of every
 * tensor is known (fmt_type_info) and no two tensors overlap or share a name. */
int gguf_open(const char *path, struct gguf **ret, struct fmt_error *err);

/* The same over a buffer that the caller keeps alive (tests and fuzzers); no splits. */
int gguf_open_memory(const void *data, size_t bytes, struct gguf **ret, struct fmt_error *err);

/* Unmaps and frees; NULL is legal. */
void gguf_close(struct gguf *g);

const char *gguf_path(const struct gguf *g); /* as given to gguf_open; "(memory)" */
const char *gguf_name(const struct gguf *g); /* its last part, for messages */
uint32_t gguf_version(const struct gguf *g);
uint64_t gguf_file_bytes(const struct gguf *g); /* of all parts */

/* The parts' files: count, path, size, and a descriptor that stays the gguf object's (read-only,
 * CLOEXEC; -1 for a memory image), for readers that want the bytes without the mapping. */
uint32_t gguf_n_files(const struct gguf *g);
const char *gguf_file_path(const struct gguf *g, uint32_t index);
uint64_t gguf_one_file_bytes(const struct gguf *g, uint32_t index);
int gguf_file_fd(const struct gguf *g, uint32_t index);
const void *gguf_file_map(const struct gguf *g, uint32_t index); /* all its bytes, read-only */

size_t gguf_n_tensors(const struct gguf *g);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i);
const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name); /* or NULL */

/* Keys and values. Getters return 0 and *ret; -ENOENT when the key is absent (*ret untouched, so a
 * default can be set before the call); -EINVAL when the type or range does not fit. Integers of any
 * width convert when the value fits; floats accept F32 and F64; all accept scalars only. */
size_t gguf_n_keys(const struct gguf *g);
struct gguf_string gguf_key_at(const struct gguf *g, size_t i);
bool gguf_has_key(const struct gguf *g, const char *key);
int gguf_get_u32(const struct gguf *g, const char *key, uint32_t *ret);
int gguf_get_u64(const struct gguf *g, const char *key, uint64_t *ret);
int gguf_get_f32(const struct gguf *g, const char *key, float *ret);
int gguf_get_bool(const struct gguf *g, const char *key, bool *ret);
int gguf_get_string(const struct gguf *g, const char *key, struct gguf_string *ret);

/* Arrays: element type and count; then elements by index (index < count is the caller's duty). */
int gguf_get_array(const struct gguf *g, const char *key, enum gguf_value_type *ret_type,
                   uint64_t *ret_count);
/* Strings of an array: fills ret[0..count) with views. -EINVAL when it is not an array of strings
 * or when count differs from the array's. */
int gguf_get_strings(const struct gguf *g, const char *key, struct gguf_string *ret,
                     uint64_t count);
/* Numbers of an array, converted to float or int32 with range checks, as above; int32 also takes an
 * array of bools (some models keep their window pattern so). On -EINVAL in the middle of an array
 * the elements before it are overwritten. */
int gguf_get_f32s(const struct gguf *g, const char *key, float *ret, uint64_t count);
int gguf_get_i32s(const struct gguf *g, const char *key, int32_t *ret, uint64_t count);

#endif
