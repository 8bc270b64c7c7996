/* tools/convert/gguf_checkpoint.c - GGUF files in and out. A split model comes out as one file. */
#include "tools/convert/checkpoint.h"

#include "format/gguf.h"
#include "format/gguf_write.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct gguf_checkpoint {
    struct checkpoint base;
    struct gguf *g;
};

struct ck_output {
    struct gguf_writer *writer;
    const char *path;
};

static const struct gguf *gguf_of(const struct checkpoint *c)
{
    return ((const struct gguf_checkpoint *)c)->g;
}

/* ---- in ---------------------------------------------------------------------------------- */

static void key_of(const struct ck_shape *s, const char *suffix, char key[128])
{
    snprintf(key, 128, "%s.%s", s->architecture, suffix);
}

/* One number of the architecture's; an array of equal ones is one, too. */
static int read_number(const struct gguf *g, const struct ck_shape *s, const char *suffix,
                       uint32_t fallback, uint32_t max, uint32_t *ret, struct fmt_error *err)
{
    char key[128];
    enum gguf_value_type type;
    uint64_t count;
    int32_t values[CK_MAX_LAYERS];
    key_of(s, suffix, key);
    uint32_t value = fallback;
    int rc = gguf_get_u32(g, key, &value);
    if (rc == -EINVAL && gguf_get_array(g, key, &type, &count) == 0 && count > 0 &&
        count <= CK_MAX_LAYERS && gguf_get_i32s(g, key, values, count) == 0) {
        for (uint64_t i = 1; i < count; i++) {
            if (values[i] != values[0]) {
                return fmt_fail(err, -ENOTSUP, "%s: key %s: layers differ in their heads",
                                gguf_path(g), key);
            }
        }
        value = (uint32_t)values[0];
        rc = 0;
    }
    if ((rc == -ENOENT && fallback == 0) || (rc < 0 && rc != -ENOENT) || value < 1 || value > max) {
        return fmt_fail(err, -EINVAL, "%s: key %s must be there and lie in 1..%u", gguf_path(g),
                        key, max);
    }
    *ret = value;
    return 0;
}

static int read_shape(const struct gguf *g, struct ck_shape *s, struct fmt_error *err)
{
    struct gguf_string architecture;
    uint32_t n_embd;
    bool causal = true;
    char key[128];
    if (gguf_get_string(g, "general.architecture", &architecture) < 0 ||
        architecture.bytes >= sizeof(s->architecture)) {
        return fmt_fail(err, -EINVAL, "%s: key general.architecture is missing or too long",
                        gguf_path(g));
    }
    memcpy(s->architecture, architecture.data, architecture.bytes);
    s->architecture[architecture.bytes] = '\0';
    key_of(s, "attention.causal", key);
    if (gguf_get_bool(g, key, &causal) == 0 && !causal) {
        return fmt_fail(err, -ENOTSUP, "%s: an encoder: it keeps no K and V to make smaller",
                        gguf_path(g));
    }
    int rc = read_number(g, s, "block_count", 0, CK_MAX_LAYERS, &s->n_layers, err);
    rc = rc < 0 ? rc : read_number(g, s, "embedding_length", 0, 1u << 20, &n_embd, err);
    rc = rc < 0 ? rc : read_number(g, s, "attention.head_count", 0, CK_MAX_HEADS, &s->n_heads, err);
    rc = rc < 0 ? rc
                : read_number(g, s, "attention.head_count_kv", s->n_heads, s->n_heads,
                              &s->n_kv_heads, err);
    if (rc < 0) {
        return rc;
    }
    uint32_t dim = n_embd / s->n_heads;
    rc = read_number(g, s, "attention.key_length", dim, 1u << 14, &s->k_dim, err);
    rc = rc < 0 ? rc : read_number(g, s, "attention.value_length", dim, 1u << 14, &s->v_dim, err);
    s->rope_pairs = s->cache_pairs = ck_gguf_pairs(s->architecture);
    return rc < 0 ? rc
                  : read_number(g, s, "rope.dimension_count", s->k_dim, s->k_dim, &s->n_rot, err);
}

static void take_tensor(const struct gguf_tensor *from, struct ck_tensor *to)
{
    uint64_t n = 1;
    for (uint32_t i = 1; i < from->n_dims; i++) {
        n *= from->ne[i];
    }
    *to = (struct ck_tensor){
        .name = from->name.data,
        .type = fmt_type_info(from->type),
        .is_matrix = from->n_dims > 1,
        .n_rows = from->n_dims > 1 ? n : from->ne[0],
        .row_values = from->n_dims > 1 ? from->ne[0] : 1,
        .data = from->data,
        .bytes = from->bytes,
    };
    ck_role_by_name(to);
}

static void close_gguf(struct checkpoint *c)
{
    struct gguf_checkpoint *gc = (struct gguf_checkpoint *)c;
    gguf_close(gc->g);
    free(c->tensors);
    free(gc);
}

/* ---- out --------------------------------------------------------------------------------- */

static bool can_write(const struct fmt_type_info *type)
{
    return type != NULL && type->quantise != NULL &&
           (type->type == FMT_TYPE_F32 || type->type == FMT_TYPE_F16 ||
            type->type == FMT_TYPE_BF16 || type->type == FMT_TYPE_Q8_0);
}

/* general.file_type, where all matrices are of one type. */
static uint32_t file_type_of(const struct fmt_type_info *type)
{
    switch (type->type) {
    case FMT_TYPE_F32:
        return 0;
    case FMT_TYPE_Q8_0:
        return 7;
    case FMT_TYPE_BF16:
        return 32;
    default:
        return 1;
    }
}

static bool key_is(struct gguf_string key, const char *name)
{
    return key.bytes == strlen(name) && memcmp(key.data, name, key.bytes) == 0;
}

/* The keys of the source, but for what the conversion says anew. */
static int add_keys(struct gguf_writer *w, const struct checkpoint *c, const struct ck_facts *facts)
{
    const struct gguf *g = gguf_of(c);
    char kv_key[128];
    key_of(&c->shape, "attention.head_count_kv", kv_key);
    for (size_t i = 0; i < gguf_n_keys(g); i++) {
        struct gguf_string key = gguf_key_at(g, i);
        bool split = key.bytes > 6 && memcmp(key.data, "split.", 6) == 0;
        bool said_anew = key_is(key, kv_key) || key_is(key, "gqad.converted") ||
                         (facts->type != NULL && key_is(key, "general.file_type"));
        if (!split && !said_anew) {
            gguf_writer_copy_key(w, g, i);
        }
    }
    if (facts->type != NULL) {
        gguf_writer_add_u32(w, "general.file_type", file_type_of(facts->type));
    }
    gguf_writer_add_string(w, "gqad.converted", facts->how);
    return gguf_writer_add_u32(w, kv_key, facts->n_kv_heads);
}

static int fail_output(const struct ck_output *o, int rc, struct fmt_error *err)
{
    return fmt_fail(err, rc, "%s: %s", o->path, strerror(-rc));
}

static void destroy_output(struct ck_output *o)
{
    if (o != NULL) {
        gguf_writer_destroy(o->writer);
        free(o);
    }
}

static int begin_output(const struct checkpoint *c, const char *path,
                        const struct ck_outcome *outcomes, const struct ck_facts *facts,
                        struct ck_output **ret, struct fmt_error *err)
{
    const struct gguf *g = gguf_of(c);
    struct ck_output *o = calloc(1, sizeof(*o));
    if (o == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", path);
    }
    o->path = path;
    int rc = gguf_writer_create(path, &o->writer);
    rc = rc < 0 ? rc : add_keys(o->writer, c, facts);
    for (size_t i = 0; rc == 0 && i < c->n_tensors; i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        uint64_t ne[GGUF_MAX_DIMS];
        memcpy(ne, t->ne, sizeof(ne));
        if (outcomes[i].n_rows != c->tensors[i].n_rows) {
            ne[t->n_dims > 1] = outcomes[i].n_rows;
        }
        rc = gguf_writer_add_tensor(o->writer, t->name.data, outcomes[i].type->type, t->n_dims, ne);
    }
    rc = rc < 0 ? rc : gguf_writer_begin_data(o->writer);
    if (rc < 0) {
        rc = fail_output(o, rc, err);
        destroy_output(o);
        return rc;
    }
    *ret = o;
    return 0;
}

static int write_output(struct ck_output *o, const void *data, size_t bytes, struct fmt_error *err)
{
    int rc = gguf_writer_write(o->writer, data, bytes);
    return rc < 0 ? fail_output(o, rc, err) : 0;
}

static int finish_output(struct ck_output *o, struct fmt_error *err)
{
    int rc = gguf_writer_finish(o->writer);
    return rc < 0 ? fail_output(o, rc, err) : 0;
}

static const struct ck_container gguf_container = {
    .can_write = can_write,
    .begin = begin_output,
    .write = write_output,
    .finish = finish_output,
    .destroy = destroy_output,
    .close = close_gguf,
};

int gguf_checkpoint_open(const char *path, struct checkpoint **ret, struct fmt_error *err)
{
    struct gguf_checkpoint *gc = calloc(1, sizeof(*gc));
    if (gc == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", path);
    }
    struct checkpoint *c = &gc->base;
    c->container = &gguf_container;
    int rc = gguf_open(path, &gc->g, err);
    rc = rc < 0 ? rc : read_shape(gc->g, &c->shape, err);
    if (rc == 0) {
        c->tensors = calloc(gguf_n_tensors(gc->g) + 1, sizeof(*c->tensors));
        rc = c->tensors == NULL ? fmt_fail(err, -ENOMEM, "%s: out of memory", path) : 0;
    }
    for (size_t i = 0; rc == 0 && i < gguf_n_tensors(gc->g); i++) {
        take_tensor(gguf_tensor_at(gc->g, i), &c->tensors[c->n_tensors++]);
    }
    if (rc < 0) {
        close_gguf(c);
        return rc;
    }
    *ret = c;
    return 0;
}
