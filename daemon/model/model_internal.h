/* daemon/model/model_internal.h - a model's parts; private to model*.c. */
#ifndef DAEMON_MODEL_MODEL_INTERNAL_H
#define DAEMON_MODEL_MODEL_INTERNAL_H

#include "daemon/model/digest.h"
#include "daemon/model/model.h"
#include "daemon/model/packed.h"
#include "daemon/model/program.h"
#include "daemon/model/weight_scan.h"

#include <stdatomic.h>

struct model {
    atomic_uint refs;
    char *name, *path;
    struct gguf *gguf;
    struct tokenizer *tokenizer;
    struct model_shape shape;
    struct kv_layout layout;
    struct kv_identity identity;
    struct model_program program;
    struct packed_weights *packed; /* shared */
    uint32_t *guards;              /* of the file's parts */
    uint32_t n_guards;
    struct backend *backend;   /* owns the program's context */
    struct backend *attention; /* another one for attention alone, or NULL */
    void *prepared;            /* the backend's program */
    uint32_t n_ctx, n_threads, max_batch_rows, max_out_rows;
    uint64_t n_params;
    double load_ms;
    uint64_t weight_bytes_per_token;
    char description[96];
    char type_name[16];
    /* Whoever takes the model when its last reference goes; NULL: it is destroyed at once. */
    void (*retire)(void *arg, struct model *m);
    void *retire_arg;
};

struct loading { /* what a load carries along */
    const struct model_options *options;
    struct io *io;
    const atomic_bool *cancel;
    model_progress_fn progress;
    void *progress_arg;
    uint64_t done, total;
    struct weight_scan scan; /* of the file that is being read */
    struct digest *digest;   /* of the bytes read, or NULL: it is known */
    struct fmt_error *err;
};
void loading_report(struct loading *l, const char *stage, uint64_t done, uint64_t total);

/* The mapped file survives being cut: see model_is_damaged(). -ENOMEM, -ENOSPC, with a sentence. */
int model_guard_init(struct model *m, struct fmt_error *err);

/* Weights and identity: reads what has to be read, packs what is not packed yet. */
int model_weights_init(struct model *m, struct loading *l);
void model_weights_finish(struct model *m); /* guards as well; the file is still mapped */

/* What the KV cache knows the model by; weights: the digest of its files. -ENOMEM. */
int model_identity_init(struct model *m, const struct digest_value *weights);

/* Counts and names what model_facts() tells, when everything is loaded. */
void model_facts_init(struct model *m);

#endif
