/* daemon/model/model.h - one loaded model: file, tokenizer, shape, program, KV geometry.
 *
 * Reference counted (atomic) and immutable once loaded, but for its plan (plan.h): which backends
 * compute it may change between two steps. The plan's program belongs to the engine thread, the
 * rest may be read from any thread. */
#ifndef DAEMON_MODEL_MODEL_H
#define DAEMON_MODEL_MODEL_H

#include "daemon/backend/backend.h"
#include "daemon/io/io.h"
#include "daemon/kv/cache.h"
#include "daemon/kv/layout.h"
#include "daemon/model/arch.h"
#include "daemon/model/tokenizer.h"
#include "format/gguf.h"

#include <stdatomic.h>

struct model;
struct plan; /* plan.h */
struct weights_cache;

struct model_options {
    const char *path;
    const char *name;              /* the name that clients use */
    uint32_t n_ctx;                /* 0: the file's own context length */
    uint32_t k_type, v_type;       /* enum gqa_type of the cache */
    uint32_t max_batch_rows;       /* rows of one step */
    uint32_t max_out_rows;         /* rows of one step that give outputs */
    const char *backend;           /* spec for the program, or NULL: the best */
    const char *attention_backend; /* spec for attention alone, or NULL: the program's */
    const char *digests;           /* file that remembers digests of weights, or NULL */
    struct weights_cache *weights; /* where packed weights are kept, or NULL; outlives the model */
};

/* Progress of a load; called on the loading thread and on the io thread, never both at once. */
typedef void (*model_progress_fn)(void *arg, const char *stage, uint64_t done, uint64_t total);

/* Loads in the calling thread (never the loop): maps and checks the file, reads it through io with
 * progress where that is new (so that I/O errors are errors, not faults), maps packed weights or
 * packs them, prepares the program. */
int model_load(const struct model_options *options, struct backend_catalogue *catalogue,
               struct pool *pool, struct io *io, const atomic_bool *cancel,
               model_progress_fn progress, void *progress_arg, struct model **ret,
               struct fmt_error *err);
struct model *model_ref(struct model *m);
void model_unref(struct model *m); /* NULL is legal */

/* Who gets the model with its last reference, in the thread that drops it: giving back gigabytes
 * takes long, and the loop drops references too. It must call model_destroy() in the end. Set once,
 * by the owner, before the model is shared. */
void model_on_last_unref(struct model *m, void (*retire)(void *arg, struct model *m), void *arg);
void model_destroy(struct model *m);

const char *model_name(const struct model *m);
const struct gguf *model_gguf(const struct model *m);
const struct tokenizer *model_tokenizer(const struct model *m);
const struct model_shape *model_shape(const struct model *m);
const struct kv_layout *model_kv_layout(const struct model *m);
uint32_t model_n_ctx(const struct model *m);
/* What blocks of its KV cache have in common: equal for the same weights, context scaling, cache
 * types and numerics, however often it is loaded. */
const struct kv_identity *model_kv_identity(const struct model *m);
uint32_t model_max_batch_rows(const struct model *m); /* of one step */
uint32_t model_max_out_rows(const struct model *m);   /* of these, that give outputs */
/* Whether every token sees every other: a text is then one step, and there is no KV. */
bool model_is_encoder(const struct model *m);
uint32_t model_n_scores(const struct model *m); /* of its classifier; 0: it has none */

/* Whether one of its mapped files could not be read, because it was cut or the disk failed: zeros
 * have stood in for its bytes, and no result counts. It stays so; a new load may do better. Any
 * thread. */
bool model_is_damaged(const struct model *m);

struct model_facts { /* what model.info tells beyond the shape */
    const char *path, *description, *type_name;
    uint64_t file_bytes, n_params, packed_bytes, mapped_bytes;
    const char *packed_source;       /* "none", "file": mapped, "packed": by this load */
    bool packed_in_file;             /* the packed weights are a mapped file by now */
    uint64_t weight_bytes_per_token; /* read by one decode step */
    uint64_t flops_per_token;        /* of matrix products, at depth 0 */
    uint32_t n_ctx;
    double load_ms;
    char program_backend[128], attention_backend[128], isa[64]; /* now: another may come */
    const char *unit;
    uint32_t n_threads;
};
void model_facts(const struct model *m, struct model_facts *ret);

/* What its ops took since it was loaded, or its plan changed, by kind: see gqa_op_time. Returns how
 * many of ret are filled; 0 where the backend keeps no times. Any thread. */
#define MODEL_OP_KINDS_MAX 32u
size_t model_op_times(const struct model *m, struct gqa_op_time *ret, size_t max);
const char *model_op_name(uint32_t kind); /* "linear" */

/* ---- one step, on the engine thread ----------------------------------------------------------
 * Runs the batch through program and attention. Outputs are valid until the next step. */
enum model_wants { MODEL_WANTS_LOGITS = 1, MODEL_WANTS_EMBEDDINGS = 2, MODEL_WANTS_SCORES = 4 };
/* Rows whose attention is counted: the last ones of a sequence of the batch
 * (gqa_attention.observe).
 */
struct model_observer {
    uint32_t seq, n_rows;
    uint32_t n_votes;
    float *const *votes; /* by layer (n_kv_heads, n_votes), added to; NULL: not this layer's */
};
struct model_batch {
    uint32_t n_rows, n_out;
    const int32_t *tokens;
    const uint32_t *positions;
    const uint32_t *out_rows;
    const struct gqa_attn_batch *attention;
    uint32_t wants; /* enum model_wants: the rest is not computed */
    uint32_t n_observers;
    const struct model_observer *observers;
};
struct model_outputs {
    const float *logits;     /* (n_out, n_vocab); each NULL where it is not wanted */
    const float *embeddings; /* (n_out, n_embd) hidden states after the last norm */
    const float *scores;     /* (n_out, model_n_scores()) */
};
int model_step(struct model *m, const struct model_batch *batch, struct model_outputs *ret);

#endif
