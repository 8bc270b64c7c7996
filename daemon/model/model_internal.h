/* daemon/model/model_internal.h - a model's parts; private to model*.c. */
#ifndef DAEMON_MODEL_MODEL_INTERNAL_H
#define DAEMON_MODEL_MODEL_INTERNAL_H

#include "daemon/model/digest.h"
#include "daemon/model/model.h"
#include "daemon/model/pack.h"
#include "daemon/model/program.h"

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
    struct packed_weights packed;
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

/* What the KV cache knows the model by; weights: the digest of its files. -ENOMEM. */
int model_identity_init(struct model *m, const struct digest_value *weights);

/* Counts and names what model_facts() tells, when everything is loaded. */
void model_facts_init(struct model *m);

#endif
