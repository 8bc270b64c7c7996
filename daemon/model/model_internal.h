/* daemon/model/model_internal.h - a model's parts; private to model*.c. */
#ifndef DAEMON_MODEL_MODEL_INTERNAL_H
#define DAEMON_MODEL_MODEL_INTERNAL_H

#include "daemon/model/digest.h"
#include "daemon/model/model.h"
#include "daemon/model/packed.h"
#include "daemon/model/plan_internal.h"
#include "daemon/model/program.h"
#include "daemon/model/shadow.h"
#include "daemon/model/weight_scan.h"

#include <pthread.h>
#include <stdatomic.h>

struct model {
    atomic_uint refs;
    char *name, *path;
    struct gguf *gguf;
    struct tokenizer *tokenizer;
    struct model_shape shape;
    struct kv_layout layout;
    struct digest_value digest;   /* of the weights */
    struct model_program program; /* as no backend has changed it yet: plans have their own */
    uint32_t *guards;             /* of the file's parts */
    uint32_t n_guards;
    /* What further plans are made with; they outlive the model. */
    struct backend_catalogue *catalogue;
    struct pool *pool;
    struct weights_cache *weights_cache;
    pthread_mutex_t lock; /* of what follows */
    struct plan *plan;    /* written by the engine thread only, which reads it without the lock */
    struct model_standby standby; /* the engine thread's */
    struct model_shadow shadow;
    struct identity *identities; /* of all plans so far */
    uint32_t n_ctx, n_threads, max_batch_rows, max_out_rows;
    uint64_t n_params;
    double load_ms;
    char description[96];
    char type_name[16];
    /* Whoever takes the model when its last reference goes; NULL: it is destroyed at once. */
    void (*retire)(void *arg, struct model *m);
    void *retire_arg;
};

/* A model's plan changes under a constant model. */
static inline void model_lock(const struct model *m)
{
    pthread_mutex_lock((pthread_mutex_t *)(uintptr_t)&m->lock);
}
static inline void model_unlock(const struct model *m)
{
    pthread_mutex_unlock((pthread_mutex_t *)(uintptr_t)&m->lock);
}

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

/* The weights of the first plan: reads what has to be read, packs what is not packed yet. */
int model_weights_init(struct model *m, struct plan *p, struct loading *l);
void model_guard_finish(struct model *m); /* the file is still mapped */

/* What the KV cache knows the model by when that plan computes it: the same pointer for the same
 * identity, and the model's. NULL without memory. */
const struct kv_identity *model_identity(struct model *m, const struct plan *p);
void model_identities_finish(struct model *m);

/* Counts and names what model_facts() tells, when everything is loaded. */
void model_facts_init(struct model *m);

#endif
