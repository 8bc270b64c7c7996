#include "tools/convert/safetensors.h"

#include "format/checked.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct {
    const char *dtype;
    uint32_t bytes;
    int type; /* enum fmt_type, or -1 */
} dtypes[] = {
    {"F32", 4, FMT_TYPE_F32},
    {"F16", 2, FMT_TYPE_F16},
    {"BF16", 2, FMT_TYPE_BF16},
    {"F64", 8, -1},
    {"I64", 8, -1},
    {"I32", 4, -1},
    {"I16", 2, -1},
    {"I8", 1, -1},
    {"U64", 8, -1},
    {"U32", 4, -1},
    {"U16", 2, -1},
    {"U8", 1, -1},
    {"BOOL", 1, -1},
    {"F8_E4M3", 1, -1},
    {"F8_E5M2", 1, -1},
};

#define N_DTYPES (sizeof(dtypes) / sizeof(dtypes[0]))

uint64_t safetensors_value_bytes(const char *dtype)
{
    for (size_t i = 0; i < N_DTYPES; i++) {
        if (strcmp(dtypes[i].dtype, dtype) == 0) {
            return dtypes[i].bytes;
        }
    }
    return 0;
}

const struct fmt_type_info *safetensors_type(const char *dtype)
{
    for (size_t i = 0; i < N_DTYPES; i++) {
        if (strcmp(dtypes[i].dtype, dtype) == 0 && dtypes[i].type >= 0) {
            return fmt_type_info((uint32_t)dtypes[i].type);
        }
    }
    return NULL;
}

const char *safetensors_dtype(const struct fmt_type_info *type)
{
    for (size_t i = 0; i < N_DTYPES; i++) {
        if (type != NULL && dtypes[i].type == (int)type->type) {
            return dtypes[i].dtype;
        }
    }
    return NULL;
}

/* A number that is not negative. */
static bool take_u64(const json_t *j, uint64_t *ret)
{
    if (!json_is_integer(j) || json_integer_value(j) < 0) {
        return false;
    }
    *ret = (uint64_t)json_integer_value(j);
    return true;
}

/* Its shape and the bytes that it needs. False: not legal. */
static bool take_shape(const json_t *shape, uint64_t value_bytes, struct safetensor *t,
                       uint64_t *ret_bytes)
{
    uint64_t bytes = value_bytes;
    if (!json_is_array(shape) || json_array_size(shape) > CK_MAX_DIMS) {
        return false;
    }
    t->n_dims = (uint32_t)json_array_size(shape);
    for (uint32_t i = 0; i < t->n_dims; i++) {
        if (!take_u64(json_array_get(shape, i), &t->shape[i]) ||
            !checked_mul_u64(bytes, t->shape[i], &bytes)) {
            return false;
        }
    }
    *ret_bytes = bytes;
    return true;
}

static int take_tensor(const char *path, const struct safetensors *s, const char *name,
                       const json_t *about, struct safetensor *t, struct fmt_error *err)
{
    const json_t *offsets = json_object_get(about, "data_offsets");
    uint64_t bytes;
    t->name = name;
    t->dtype = json_string_value(json_object_get(about, "dtype"));
    if (t->dtype == NULL || safetensors_value_bytes(t->dtype) == 0) {
        return fmt_fail(err, -ENOTSUP, "%s: tensor %.80s: dtype '%.20s' is not known", path, name,
                        t->dtype != NULL ? t->dtype : "");
    }
    if (!take_shape(json_object_get(about, "shape"), safetensors_value_bytes(t->dtype), t,
                    &bytes)) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor %.80s: its shape is not a list of at most %u sizes", path, name,
                        CK_MAX_DIMS);
    }
    if (json_array_size(offsets) != 2 || !take_u64(json_array_get(offsets, 0), &t->begin) ||
        !take_u64(json_array_get(offsets, 1), &t->end) || t->begin > t->end ||
        t->end - t->begin != bytes || t->end > s->bytes - s->data_offset) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor %.80s: data_offsets do not hold its %" PRIu64
                        " bytes within the %" PRIu64 " of the file's data",
                        path, name, bytes, s->bytes - s->data_offset);
    }
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct safetensor *x = a, *y = b;
    int order = (x->begin > y->begin) - (x->begin < y->begin);
    return order != 0 ? order : (x->end > y->end) - (x->end < y->end);
}

static int parse_header(const char *path, struct safetensors *s, struct fmt_error *err)
{
    json_error_t why;
    const char *name;
    json_t *about;
    s->header = json_loadb((const char *)s->base + 8, (size_t)s->data_offset - 8,
                           JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(s->header)) {
        return fmt_fail(err, -EINVAL, "%s: the header is not a JSON object: %s at offset %d", path,
                        s->header == NULL ? why.text : "another value",
                        s->header == NULL ? why.position + 8 : 8);
    }
    s->tensors = calloc(json_object_size(s->header) + 1, sizeof(*s->tensors));
    if (s->tensors == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", path);
    }
    json_object_foreach(s->header, name, about)
    {
        if (strcmp(name, "__metadata__") == 0) {
            continue;
        }
        int rc = take_tensor(path, s, name, about, &s->tensors[s->n_tensors++], err);
        if (rc < 0) {
            return rc;
        }
    }
    qsort(s->tensors, s->n_tensors, sizeof(*s->tensors), by_place);
    uint64_t at = 0;
    for (size_t i = 0; i < s->n_tensors; i++) {
        if (s->tensors[i].begin != at) {
            return fmt_fail(err, -EINVAL,
                            "%s: tensor %.80s begins at %" PRIu64 " of the data, not at %" PRIu64
                            " where the one before it ends",
                            path, s->tensors[i].name, s->tensors[i].begin, at);
        }
        at = s->tensors[i].end;
    }
    return 0;
}

/* Parses the file whose base and bytes are set; closes it when it is refused. */
static int parse(const char *path, struct safetensors *s, struct fmt_error *err)
{
    uint64_t header_bytes = 0;
    int rc = 0;
    if (s->bytes < sizeof(header_bytes)) {
        rc = fmt_fail(err, -EINVAL, "%s: %" PRIu64 " bytes are too short for a header", path,
                      s->bytes);
    } else {
        memcpy(&header_bytes, s->base, sizeof(header_bytes));
        if (header_bytes > SAFETENSORS_HEADER_BYTES_MAX || header_bytes > s->bytes - 8) {
            rc = fmt_fail(err, -EINVAL,
                          "%s: a header of %" PRIu64 " bytes (at most %u, and %" PRIu64
                          " are in the file)",
                          path, header_bytes, SAFETENSORS_HEADER_BYTES_MAX, s->bytes - 8);
        }
    }
    s->data_offset = 8 + header_bytes;
    rc = rc < 0 ? rc : parse_header(path, s, err);
    if (rc < 0) {
        safetensors_close(s);
    }
    return rc;
}

int safetensors_open(const char *path, struct safetensors *ret, struct fmt_error *err)
{
    struct safetensors s = {.is_mapped = true};
    struct stat st;
    void *base = MAP_FAILED;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0) {
        int rc = fmt_fail(err, -errno, "%s: %s", path, strerror(errno));
        if (fd >= 0) {
            close(fd);
        }
        return rc;
    }
    s.bytes = (uint64_t)st.st_size;
    if (s.bytes > 0) {
        base = mmap(NULL, (size_t)s.bytes, PROT_READ, MAP_SHARED, fd, 0);
    } else {
        errno = ENODATA;
    }
    int rc = base == MAP_FAILED ? fmt_fail(err, -errno, "%s: %s", path, strerror(errno)) : 0;
    close(fd);
    s.base = rc < 0 ? NULL : base;
    rc = rc < 0 ? rc : parse(path, &s, err);
    if (rc == 0) {
        *ret = s;
    }
    return rc;
}

int safetensors_open_memory(const void *data, size_t bytes, struct safetensors *ret,
                            struct fmt_error *err)
{
    struct safetensors s = {.base = data, .bytes = bytes};
    int rc = parse("(memory)", &s, err);
    if (rc == 0) {
        *ret = s;
    }
    return rc;
}

void safetensors_close(struct safetensors *s)
{
    json_decref(s->header);
    free(s->tensors);
    if (s->is_mapped && s->base != NULL) {
        munmap((void *)s->base, (size_t)s->bytes);
    }
    memset(s, 0, sizeof(*s));
}
