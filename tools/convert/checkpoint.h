/* tools/convert/checkpoint.h - a model's weights as they lie in files, whatever the container.
 *
 * Two containers are known: GGUF files, and folders of Hugging Face (config.json and safetensors).
 * Either is mapped read-only; a tensor is a view of the mapping, and what is written is streamed,
 * so that memory does not depend on the model's size. Files are hostile input: sizes and offsets
 * are checked before they are believed. Functions return 0 or -errno with a sentence. */
#ifndef TOOLS_CONVERT_CHECKPOINT_H
#define TOOLS_CONVERT_CHECKPOINT_H

#include "format/error.h"
#include "format/types.h"

#define CK_MAX_LAYERS 1024u
#define CK_MAX_HEADS  1024u
#define CK_MAX_DIMS   8u

/* What a tensor has to do with heads. Biases have the role of their matrix. */
enum ck_role {
    CK_OTHER,
    CK_Q,      /* rows: query heads */
    CK_K,      /* rows: KV heads */
    CK_V,      /* rows: KV heads */
    CK_QKV,    /* rows: all of q, then k, then v */
    CK_OUT,    /* columns: query heads; its bias is CK_OTHER */
    CK_SINKS,  /* one value per query head */
    CK_K_NORM, /* gains of one head, that all have in common */
};

struct ck_tensor {
    const char *name;
    enum ck_role role;
    uint32_t layer;                   /* of all roles but CK_OTHER */
    const struct fmt_type_info *type; /* NULL: one that can only be copied */
    bool is_matrix;                   /* more than one dimension */
    /* (n_rows, row_values); a vector is a column, n_rows values of one each. */
    uint64_t n_rows, row_values;
    const uint8_t *data;
    uint64_t bytes;
};

/* Which dimensions of a head RoPE turns together. */
enum ck_pairs {
    CK_PAIRS_UNKNOWN,
    CK_PAIRS_NEIGHBOURS, /* 2i and 2i + 1 */
    CK_PAIRS_HALVES,     /* i and i + n_rot / 2 */
};

struct ck_shape {
    char architecture[64];
    uint32_t n_layers, n_heads, n_kv_heads, k_dim, v_dim;
    uint32_t n_rot;            /* dimensions that RoPE turns, the first of a head */
    enum ck_pairs rope_pairs;  /* of Q and K in this checkpoint */
    enum ck_pairs cache_pairs; /* of K in a calibration, which is of the model as GGUF */
};

/* How an architecture's Q and K lie in a GGUF; also by the model_type of Hugging Face. */
enum ck_pairs ck_gguf_pairs(const char *architecture);

/* What becomes of a tensor: the rest stays as it is. */
struct ck_outcome {
    const struct fmt_type_info *type;
    uint64_t n_rows;
};

/* What the written files say of themselves. */
struct ck_facts {
    uint32_t n_kv_heads;
    const struct fmt_type_info *type; /* that all matrices were written in, or NULL */
    const char *how;                  /* a sentence for whoever finds the file */
};

struct checkpoint;

/* Where the bytes of the tensors go, in their order. */
struct ck_output;

struct ck_container {
    /* Types that a written tensor may have. */
    bool (*can_write)(const struct fmt_type_info *type);
    /* outcomes: one for each tensor. Nothing is at path before finish. */
    int (*begin)(const struct checkpoint *c, const char *path, const struct ck_outcome *outcomes,
                 const struct ck_facts *facts, struct ck_output **ret, struct fmt_error *err);
    int (*write)(struct ck_output *o, const void *data, size_t bytes, struct fmt_error *err);
    int (*finish)(struct ck_output *o, struct fmt_error *err); /* then destroy all the same */
    void (*destroy)(struct ck_output *o);                      /* NULL is legal */
    void (*close)(struct checkpoint *c);
};

struct checkpoint {
    const struct ck_container *container;
    struct ck_shape shape;
    struct ck_tensor *tensors; /* (n_tensors) */
    size_t n_tensors;
};

/* A folder is one of Hugging Face, a file a GGUF. */
int checkpoint_open(const char *path, struct checkpoint **ret, struct fmt_error *err);
void checkpoint_close(struct checkpoint *c); /* NULL is legal */

int gguf_checkpoint_open(const char *path, struct checkpoint **ret, struct fmt_error *err);
int hf_checkpoint_open(const char *path, struct checkpoint **ret, struct fmt_error *err);

/* The tensor of that role in that layer, matrix or vector, or NULL. */
const struct ck_tensor *checkpoint_find(const struct checkpoint *c, enum ck_role role,
                                        uint32_t layer, bool is_matrix);

/* Sets role and layer by the tensor's name, as GGUF or as Hugging Face writes it. */
void ck_role_by_name(struct ck_tensor *t);

/* Whether the tensors are those of attention as it is understood here: K and V of every layer, with
 * the rows that the heads need; nothing that hangs on single KV heads otherwise. -ENOTSUP or
 * -EINVAL. */
int checkpoint_check(const struct checkpoint *c, struct fmt_error *err);

/* Its pages may go: it was read. */
void ck_tensor_release(const struct ck_tensor *t);

/* One row as float32. ret has room for row_values. */
static inline void ck_row(const struct ck_tensor *t, uint64_t row, float *ret)
{
    uint64_t row_bytes = t->bytes / t->n_rows;
    t->type->dequantise(t->data + row * row_bytes, ret, (size_t)t->row_values);
}

#endif
