#include "daemon/model/model_internal.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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
                        o->path, tokenizer_n_vocab(m->tokenizer), m->shape.n_vocab);
    }
    uint32_t n_ctx_max = m->shape.n_ctx_max > 0 ? m->shape.n_ctx_max : UINT32_MAX;
    if (o->n_ctx > n_ctx_max) {
        return fmt_fail(l->err, -ENOTSUP,
                        "%s: a context of %u was asked for, but beyond %u tokens this model scales "
                        "its scores by position, which is not supported",
                        o->path, o->n_ctx, n_ctx_max);
    }
    if (o->n_ctx > m->shape.n_ctx_train && (m->shape.arch->flags & ARCH_POSITIONS)) {
        return fmt_fail(l->err, -EINVAL,
                        "%s: a context of %u was asked for, but the model has learned %u positions",
                        o->path, o->n_ctx, m->shape.n_ctx_train);
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
    return rc < 0 ? fmt_fail(l->err, rc, "%s: no KV layout for types %s and %s: %s", m->path,
                             kv_type_name(l->options->k_type), kv_type_name(l->options->v_type),
                             strerror(-rc))
                  : 0;
}

static int open_backends(struct model *m, struct loading *l, struct backend_catalogue *catalogue,
                         struct pool *pool)
{
    struct gqa_reason reason = {""};
    const struct model_options *o = l->options;
    int rc = backend_open(catalogue, o->backend, pool, &m->backend, &reason);
    if (rc < 0) {
        return fmt_fail(l->err, rc, "backend %s: %s", o->backend != NULL ? o->backend : "(default)",
                        reason.text);
    }
    if (backend_program(m->backend) == NULL) {
        return fmt_fail(l->err, -ENOTSUP, "backend %s has attention only: give it as attention=",
                        backend_spec(m->backend));
    }
    if (o->attention_backend != NULL) {
        rc = backend_open(catalogue, o->attention_backend, pool, &m->attention, &reason);
        if (rc < 0) {
            return fmt_fail(l->err, rc, "attention backend %s: %s", o->attention_backend,
                            reason.text);
        }
    }
    struct backend *attention = m->attention != NULL ? m->attention : m->backend;
    const uint32_t needed = GQA_ATTN_CAP_NO_COMMIT | GQA_ATTN_CAP_MUTUAL;
    if (model_is_encoder(m) && (backend_attention(attention)->caps & needed) != needed) {
        return fmt_fail(l->err, -ENOTSUP,
                        "attention backend %s: has no attention to both sides, which %s needs",
                        backend_spec(attention), m->shape.arch->name);
    }
    for (uint32_t i = 0; i < m->program.n_attn_layers; i++) {
        rc = backend_attention(attention)->supports(backend_context(attention),
                                                    &m->program.attn_layers[i], &reason);
        if (rc < 0) {
            return fmt_fail(l->err, rc, "attention backend %s, layer %u: %s",
                            backend_spec(attention), i, reason.text);
        }
    }
    m->n_threads = pool_n_threads(pool);
    return 0;
}

static int prepare(struct model *m, struct loading *l)
{
    /* A step has no more output rows than rows. */
    const struct model_options *o = l->options;
    m->max_batch_rows = o->max_batch_rows;
    m->max_out_rows = o->max_out_rows < o->max_batch_rows ? o->max_out_rows : o->max_batch_rows;
    if (model_is_encoder(m)) {
        m->max_out_rows = m->max_batch_rows; /* rows without logits are small */
    }
    struct gqa_program_desc desc = {
        .struct_size = sizeof(desc),
        .max_rows = m->max_batch_rows,
        .max_out_rows = m->max_out_rows,
        .n_ops = m->program.n_ops,
        .n_regs = m->program.n_regs,
        .n_weights = m->program.n_weights,
        .n_attn_layers = m->program.n_attn_layers,
        .n_rope_tables = m->program.n_rope_tables,
        .ops = m->program.ops,
        .regs = m->program.regs,
        .weights = m->program.weights,
        .attn_layers = m->program.attn_layers,
        .rope_tables = m->program.rope_tables,
    };
    struct gqa_reason reason = {""};
    int rc = backend_program(m->backend)
                 ->prepare(backend_context(m->backend), &desc, &m->prepared, &reason);
    return rc < 0 ? fmt_fail(l->err, rc, "%s: backend %s: %s", m->path, backend_spec(m->backend),
                             reason.text)
                  : 0;
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
    loading_report(&l, "map", 0, 0);
    int rc = open_file(m, &l);
    rc = rc < 0 ? rc : init_layout(m, &l);
    rc = rc < 0 ? rc
                : model_program_init(&m->program, m->gguf, &m->shape, &m->layout, m->n_ctx, err);
    rc = rc < 0 ? rc : open_backends(m, &l, catalogue, pool);
    rc = rc < 0 ? rc : model_weights_init(m, &l);
    rc = rc < 0 ? rc : prepare(m, &l);
    if (rc == 0 && model_is_damaged(m)) {
        rc = fmt_fail(err, -EIO, "%s: the file was cut, or the disk cannot read it", m->path);
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
    if (m->prepared != NULL) {
        backend_program(m->backend)->release(backend_context(m->backend), m->prepared);
    }
    backend_unref(m->attention);
    backend_unref(m->backend);
    model_weights_finish(m);
    model_program_finish(&m->program);
    kv_layout_finish(&m->layout);
    tokenizer_destroy(m->tokenizer);
    gguf_close(m->gguf);
    free(m->name);
    free(m->path);
    free(m);
}

/* ---- steps ------------------------------------------------------------------------------- */

/* Runs attention of one op on the other backend, over the program's registers in host memory. */
static int foreign_attention(struct model *m, const struct gqa_op *op,
                             const struct gqa_attn_batch *batch)
{
    const struct gqa_program *iface = backend_program(m->backend);
    void *context = backend_context(m->backend);
    const struct gqa_attention *attention = backend_attention(m->attention);
    const struct gqa_reg *regs = m->program.regs;
    const float *q = iface->data(context, m->prepared, op->src.reg);
    const float *k = iface->data(context, m->prepared, op->src2.reg);
    const float *v = iface->data(context, m->prepared, op->src3.reg);
    float *out = iface->data(context, m->prepared, op->dst.reg);
    if (q == NULL || k == NULL || v == NULL || out == NULL) {
        return -ENOTSUP;
    }
    struct gqa_attn_io io = {
        .q = q + op->src.first,
        .k = k + op->src2.first,
        .v = v + op->src3.first,
        .out = out + op->dst.first,
        .q_stride = regs[op->src.reg].width,
        .k_stride = regs[op->src2.reg].width,
        .v_stride = regs[op->src3.reg].width,
        .out_stride = regs[op->dst.reg].width,
    };
    const struct gqa_attn_layer *layer = &m->program.attn_layers[op->layer];
    void *other = backend_context(m->attention);
    int rc = attention->append(other, layer, batch, &io);
    return rc < 0 ? rc : attention->attend(other, layer, batch, &io);
}

/* The ops up to the hidden states. Without another backend for attention, they are one range. */
static int run_body(struct model *m, const struct gqa_attn_batch *batch)
{
    const struct gqa_program *iface = backend_program(m->backend);
    void *context = backend_context(m->backend);
    uint32_t first = 0;
    for (uint32_t i = 0; m->attention != NULL && i < m->program.head_op; i++) {
        if (m->program.ops[i].kind != GQA_OP_ATTENTION) {
            continue;
        }
        int rc = iface->run(context, m->prepared, first, i);
        rc = rc < 0 ? rc : foreign_attention(m, &m->program.ops[i], batch);
        if (rc < 0) {
            return rc;
        }
        first = i + 1;
    }
    return iface->run(context, m->prepared, first, m->program.head_op);
}

static int run_ops(struct model *m, const struct model_batch *batch)
{
    const struct gqa_program *iface = backend_program(m->backend);
    const struct model_program *p = &m->program;
    void *context = backend_context(m->backend);
    int rc = run_body(m, batch->attention);
    if (rc == 0 && (batch->wants & MODEL_WANTS_LOGITS)) {
        rc = iface->run(context, m->prepared, p->head_op, p->scores_op);
    }
    if (rc == 0 && (batch->wants & MODEL_WANTS_SCORES)) {
        rc = iface->run(context, m->prepared, p->scores_op, p->n_ops);
    }
    return rc;
}

/* *ret stays NULL where nobody wants it. */
static int take_output(struct model *m, bool wanted, uint32_t reg, const float **ret)
{
    if (wanted) {
        *ret = backend_program(m->backend)->data(backend_context(m->backend), m->prepared, reg);
    }
    return wanted && *ret == NULL ? -ENOTSUP : 0;
}

int model_step(struct model *m, const struct model_batch *batch, struct model_outputs *ret)
{
    const struct gqa_program *iface = backend_program(m->backend);
    void *context = backend_context(m->backend);
    struct gqa_batch b = {
        .struct_size = sizeof(b),
        .n_rows = batch->n_rows,
        .n_out = batch->n_out,
        .tokens = batch->tokens,
        .positions = batch->positions,
        .out_rows = batch->out_rows,
        .attention = batch->attention,
    };
    int rc = iface->begin(context, m->prepared, &b);
    if (rc < 0) {
        return rc;
    }
    rc = run_ops(m, batch);
    int end = iface->end(context, m->prepared);
    rc = rc < 0 ? rc : end;
    if (rc < 0) {
        return rc;
    }
    struct model_outputs out = {NULL};
    const struct model_program *p = &m->program;
    rc = take_output(m, batch->wants & MODEL_WANTS_LOGITS, p->logits_reg, &out.logits);
    rc = rc < 0
             ? rc
             : take_output(m, batch->wants & MODEL_WANTS_EMBEDDINGS, p->embd_reg, &out.embeddings);
    rc =
        rc < 0 ? rc : take_output(m, batch->wants & MODEL_WANTS_SCORES, p->scores_reg, &out.scores);
    if (rc == 0) {
        *ret = out;
    }
    return rc;
}
