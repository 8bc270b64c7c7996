#include "daemon/model/plan_internal.h"

#include "daemon/model/model_internal.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* The program's ops are the model's; its weights may lie elsewhere for another backend. */
static int take_program(struct plan *p)
{
    const struct model_program *from = &p->model->program;
    p->program = *from;
    p->program.weights = malloc((from->n_weights + 1) * sizeof(*from->weights));
    if (p->program.weights == NULL) {
        return -ENOMEM;
    }
    memcpy(p->program.weights, from->weights, from->n_weights * sizeof(*from->weights));
    return 0;
}

static int check_attention(const struct plan *p, struct fmt_error *err)
{
    struct gqa_reason reason = {""};
    const struct model *m = p->model;
    struct backend *attention = plan_attention(p);
    const uint32_t needed = GQA_ATTN_CAP_NO_COMMIT | GQA_ATTN_CAP_MUTUAL;
    if (model_is_encoder(m) && (backend_attention(attention)->caps & needed) != needed) {
        return fmt_fail(err, -ENOTSUP,
                        "attention backend %s: has no attention to both sides, which %s needs",
                        backend_spec(attention), m->shape.arch->name);
    }
    for (uint32_t i = 0; i < p->program.n_attn_layers; i++) {
        int rc = backend_attention(attention)->supports(backend_context(attention),
                                                        &p->program.attn_layers[i], &reason);
        if (rc < 0) {
            return fmt_fail(err, rc, "attention backend %s, layer %u: %s", backend_spec(attention),
                            i, reason.text);
        }
    }
    return 0;
}

static int open_backends(struct plan *p, const struct plan_specs *specs, struct fmt_error *err)
{
    struct gqa_reason reason = {""};
    const struct model *m = p->model;
    int rc = backend_open(m->catalogue, specs->program, m->pool, &p->backend, &reason);
    if (rc < 0) {
        return fmt_fail(err, rc, "backend %s: %s",
                        specs->program != NULL ? specs->program : "(default)", reason.text);
    }
    if (backend_program(p->backend) == NULL) {
        return fmt_fail(err, -ENOTSUP,
                        "backend %s has attention only: name it as attention=, or use it with "
                        "attention_only (--attention-only)",
                        backend_spec(p->backend));
    }
    if (specs->attention != NULL) {
        rc = backend_open(m->catalogue, specs->attention, m->pool, &p->attention, &reason);
        if (rc < 0) {
            return fmt_fail(err, rc, "attention backend %s: %s", specs->attention, reason.text);
        }
    }
    return check_attention(p, err);
}

int plan_open(struct model *m, const struct plan_specs *specs, struct plan **ret,
              struct fmt_error *err)
{
    struct plan *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory");
    }
    atomic_init(&p->refs, 1);
    p->model = m;
    int rc = take_program(p);
    rc = rc < 0 ? fmt_fail(err, rc, "no memory") : open_backends(p, specs, err);
    if (rc < 0) {
        plan_unref(p);
        return rc;
    }
    *ret = p;
    return 0;
}

int plan_prepare(struct plan *p, struct fmt_error *err)
{
    const struct gqa_program_desc desc = {
        .struct_size = sizeof(desc),
        .max_rows = p->model->max_batch_rows,
        .max_out_rows = p->model->max_out_rows,
        .n_ops = p->program.n_ops,
        .n_regs = p->program.n_regs,
        .n_weights = p->program.n_weights,
        .n_attn_layers = p->program.n_attn_layers,
        .n_rope_tables = p->program.n_rope_tables,
        .ops = p->program.ops,
        .regs = p->program.regs,
        .weights = p->program.weights,
        .attn_layers = p->program.attn_layers,
        .rope_tables = p->program.rope_tables,
    };
    struct gqa_reason reason = {""};
    int rc = backend_program(p->backend)
                 ->prepare(backend_context(p->backend), &desc, &p->prepared, &reason);
    if (rc < 0) {
        return fmt_fail(err, rc, "%s: backend %s: %s", gguf_name(p->model->gguf),
                        backend_spec(p->backend), reason.text);
    }
    p->identity = model_identity(p->model, p);
    return p->identity == NULL ? fmt_fail(err, -ENOMEM, "no memory") : 0;
}

/* The weights of the plan in use where its layout is wanted too, else a file's, else packed now. */
static int take_weights(struct plan *p, struct fmt_error *err)
{
    struct model *m = p->model;
    struct plan *now = model_plan(m);
    p->packed = packed_weights_share(now->packed, p->backend, &p->program);
    plan_unref(now);
    if (p->packed != NULL) {
        return 0;
    }
    const struct packed_request request = {
        .cache = m->weights_cache,
        .digest = &m->digest,
        .backend = p->backend,
        .program = &p->program,
        .n_threads = m->n_threads,
    };
    int rc = packed_weights_find(&request, &p->packed);
    rc = rc == -ENOENT ? packed_weights_make(&request, &p->packed) : rc;
    return rc < 0 ? fmt_fail(err, rc, "%s: packing the weights for %s failed: %s",
                             gguf_name(m->gguf), backend_spec(p->backend), strerror(-rc))
                  : 0;
}

int plan_create(struct model *m, const struct plan_specs *specs, struct plan **ret,
                struct fmt_error *err)
{
    struct plan *now = model_plan(m), *p = NULL;
    struct plan_specs full = *specs;
    full.program = full.program != NULL ? full.program : backend_spec(now->backend);
    int rc = plan_open(m, &full, &p, err);
    plan_unref(now);
    rc = rc < 0 ? rc : take_weights(p, err);
    rc = rc < 0 ? rc : plan_prepare(p, err);
    if (rc < 0) {
        plan_unref(p);
        return rc;
    }
    *ret = p;
    return 0;
}

struct plan *plan_ref(struct plan *p)
{
    atomic_fetch_add_explicit(&p->refs, 1, memory_order_relaxed);
    return p;
}

void plan_unref(struct plan *p)
{
    if (p == NULL || atomic_fetch_sub_explicit(&p->refs, 1, memory_order_acq_rel) > 1) {
        return;
    }
    if (p->prepared != NULL) {
        backend_program(p->backend)->release(backend_context(p->backend), p->prepared);
    }
    backend_unref(p->attention);
    backend_unref(p->backend);
    packed_weights_unref(p->packed);
    free(p->program.weights);
    free(p);
}

struct backend *plan_backend(const struct plan *p)
{
    return p->backend;
}

struct backend *plan_attention(const struct plan *p)
{
    return p->attention != NULL ? p->attention : p->backend;
}

const struct kv_identity *plan_kv_identity(const struct plan *p)
{
    return p->identity;
}

/* ---- a model's plan ---------------------------------------------------------------------- */

struct plan *model_plan(const struct model *m)
{
    model_lock(m);
    struct plan *p = plan_ref(m->plan);
    model_unlock(m);
    return p;
}

struct plan *model_plan_now(const struct model *m)
{
    return m->plan;
}

struct model_standby *model_standby(struct model *m)
{
    return &m->standby;
}

struct plan *model_swap_plan(struct model *m, struct plan *p)
{
    pthread_mutex_lock(&m->lock);
    struct plan *old = m->plan;
    m->plan = p;
    pthread_mutex_unlock(&m->lock);
    return old;
}
