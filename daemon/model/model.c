#include "daemon/log.h"
#include "daemon/model/model_internal.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* What computes a model that the best backend refuses, if nobody has named that. */
#define FALLBACK "cpu"

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* ---- loading ----------------------------------------------------------------------------- */

static int open_file(struct model *m, struct loading *l)
{
    const struct model_options *o = l->options;
    m->name = strdup(o->name);
    m->path = strdup(o->path);
    if (m->name == NULL || m->path == NULL) {
        return fmt_fail(l->err, -ENOMEM, "no memory");
    }
    int rc = gguf_open(o->path, &m->gguf, l->err);
    rc = rc < 0 ? rc : model_guard_init(m, l->err);
    rc = rc < 0 ? rc : model_shape_read(m->gguf, &m->shape, l->err);
    rc = rc < 0 ? rc : tokenizer_create(m->gguf, &m->tokenizer, l->err);
    if (rc < 0) {
        return rc;
    }
    if (tokenizer_n_vocab(m->tokenizer) > m->shape.n_vocab) {
        return fmt_fail(l->err, -EINVAL, "%s: %u tokens in the vocabulary, but %u embeddings",
                        gguf_name(m->gguf), tokenizer_n_vocab(m->tokenizer), m->shape.n_vocab);
    }
    uint32_t n_ctx_max = m->shape.n_ctx_max > 0 ? m->shape.n_ctx_max : UINT32_MAX;
    if (o->n_ctx > n_ctx_max) {
        return fmt_fail(l->err, -ENOTSUP,
                        "%s: a context of %u was asked for, but beyond %u tokens this model scales "
                        "its scores by position, which is not supported",
                        gguf_name(m->gguf), o->n_ctx, n_ctx_max);
    }
    if (o->n_ctx > m->shape.n_ctx_train && (m->shape.arch->flags & ARCH_POSITIONS)) {
        return fmt_fail(l->err, -EINVAL,
                        "%s: a context of %u was asked for, but the model has learned %u positions",
                        gguf_name(m->gguf), o->n_ctx, m->shape.n_ctx_train);
    }
    uint32_t trained = m->shape.n_ctx_train < n_ctx_max ? m->shape.n_ctx_train : n_ctx_max;
    m->n_ctx = o->n_ctx > 0 ? o->n_ctx : trained;
    return 0;
}

/* An encoder keeps no K and V: its layout has no class. */
static int init_layout(struct model *m, struct loading *l)
{
    if (model_is_encoder(m)) {
        return 0;
    }
    struct kv_layer_desc *layers = calloc(m->shape.n_layers, sizeof(*layers));
    if (layers == NULL) {
        return fmt_fail(l->err, -ENOMEM, "no memory");
    }
    for (uint32_t i = 0; i < m->shape.n_layers; i++) {
        layers[i] = (struct kv_layer_desc){
            .window = model_layer_window(&m->shape, i),
            .n_kv_heads = m->shape.n_kv_heads,
            .k_dim = m->shape.k_dim,
            .v_dim = m->shape.v_dim,
            .k_type = l->options->k_type,
            .v_type = l->options->v_type,
        };
    }
    int rc = kv_layout_init(&m->layout, layers, m->shape.n_layers);
    free(layers);
    return rc < 0 ? fmt_fail(l->err, rc, "%s: no KV layout for types %s and %s: %s",
                             gguf_name(m->gguf), kv_type_name(l->options->k_type),
                             kv_type_name(l->options->v_type), strerror(-rc))
                  : 0;
}

static int try_plan(struct model *m, struct loading *l, const struct plan_specs *specs)
{
    int rc = plan_open(m, specs, &m->plan, l->err);
    rc = rc < 0 ? rc : model_weights_init(m, m->plan, l);
    return rc < 0 ? rc : plan_prepare(m->plan, l->err);
}

static int make_plan(struct model *m, struct loading *l)
{
    /* A step has no more output rows than rows. */
    const struct model_options *o = l->options;
    struct plan_specs specs = {o->backend, o->attention_backend};
    m->max_batch_rows = o->max_batch_rows;
    m->max_out_rows = o->max_out_rows < o->max_batch_rows ? o->max_out_rows : o->max_batch_rows;
    if (model_is_encoder(m)) {
        m->max_out_rows = m->max_batch_rows; /* rows without logits are small */
    }
    int rc = try_plan(m, l, &specs);
    if (rc == -ENOTSUP && specs.program == NULL && !backend_is_default(m->catalogue, FALLBACK)) {
        log_warning("model '%s': %s; the " FALLBACK " backend computes it", m->name, l->err->text);
        plan_unref(m->plan);
        m->plan = NULL;
        l->err->text[0] = '\0';
        specs.program = FALLBACK;
        rc = try_plan(m, l, &specs);
    }
    return rc;
}

int model_load(const struct model_options *options, struct backend_catalogue *catalogue,
               struct pool *pool, struct io *io, const atomic_bool *cancel,
               model_progress_fn progress, void *progress_arg, struct model **ret,
               struct fmt_error *err)
{
    struct loading l = {options, io, cancel, progress, progress_arg, .err = err};
    double start = now_ms();
    struct model *m = calloc(1, sizeof(*m));
    if (m == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory");
    }
    atomic_init(&m->refs, 1);
    pthread_mutex_init(&m->lock, NULL);
    m->catalogue = catalogue;
    m->pool = pool;
    m->weights_cache = options->weights;
    m->n_threads = pool_n_threads(pool);
    loading_report(&l, "map", 0, 0);
    int rc = open_file(m, &l);
    rc = rc < 0 ? rc : init_layout(m, &l);
    rc = rc < 0 ? rc
                : model_program_init(&m->program, m->gguf, &m->shape, &m->layout, m->n_ctx, err);
    rc = rc < 0 ? rc : make_plan(m, &l);
    if (rc == 0 && model_is_damaged(m)) {
        rc = fmt_fail(err, -EIO, "%s: the file was cut, or the disk cannot read it",
                      gguf_name(m->gguf));
    }
    if (rc < 0) {
        model_unref(m);
        return rc;
    }
    model_facts_init(m);
    m->load_ms = now_ms() - start;
    loading_report(&l, "ready", gguf_file_bytes(m->gguf), gguf_file_bytes(m->gguf));
    *ret = m;
    return 0;
}

struct model *model_ref(struct model *m)
{
    atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
    return m;
}

void model_unref(struct model *m)
{
    if (m == NULL || atomic_fetch_sub_explicit(&m->refs, 1, memory_order_acq_rel) > 1) {
        return;
    }
    if (m->retire != NULL) {
        m->retire(m->retire_arg, m);
    } else {
        model_destroy(m);
    }
}

void model_on_last_unref(struct model *m, void (*retire)(void *arg, struct model *m), void *arg)
{
    m->retire = retire;
    m->retire_arg = arg;
}

void model_destroy(struct model *m)
{
    plan_unref(m->shadow.plan);
    plan_unref(m->standby.plan);
    plan_unref(m->plan);
    model_guard_finish(m);
    model_identities_finish(m);
    model_program_finish(&m->program);
    kv_layout_finish(&m->layout);
    tokenizer_destroy(m->tokenizer);
    gguf_close(m->gguf);
    pthread_mutex_destroy(&m->lock);
    free(m->name);
    free(m->path);
    free(m);
}

int model_step(struct model *m, const struct model_batch *batch, struct model_outputs *ret)
{
    struct backend *blame;
    return plan_step(m->plan, batch, ret, &blame);
}
