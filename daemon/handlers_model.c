/* model.load, model.unload, model.list, model.info, model.ops. */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void terminate(struct proto_string s, char *ret, size_t capacity)
{
    snprintf(ret, capacity, "%.*s", (int)s.bytes, s.data);
}

/* ---- model.load -------------------------------------------------------------------------- */

static void answer_info(struct call *call)
{
    pack_model_info(call_begin_result(call), call->model, call_may_see_paths(call));
    call_end(call);
}

static void loaded(struct call *call)
{
    log_info("model '%s' is loaded for uid %u", model_name(call->model), call->uid);
    answer_info(call);
}

static bool read_cache_type(struct call *call, const char *field, struct proto_string name,
                            bool present, uint32_t *ret)
{
    char text[17];
    if (!present) {
        return true;
    }
    terminate(name, text, sizeof(text));
    if (kv_type_by_name(text, ret) < 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'%s' is '%s', which is not a type of the cache (f16, f32, bf16, q8_0, q4_0)",
                  field, text);
        return false;
    }
    return true;
}

void handle_model_load(struct call *call)
{
    const struct proto_model_load *p = &call->params.model_load;
    char model[PROTO_PATH_BYTES_MAX + 1];
    char name[PROTO_NAME_BYTES_MAX + 1];
    char backend[64];
    char attention[64];
    struct model_options options = {.n_ctx = p->n_ctx, .k_type = GQA_NONE, .v_type = GQA_NONE};

    if (!read_cache_type(call, "cache_type_k", p->cache_type_k, p->has_cache_type_k,
                         &options.k_type) ||
        !read_cache_type(call, "cache_type_v", p->cache_type_v, p->has_cache_type_v,
                         &options.v_type)) {
        return;
    }
    terminate(p->model, model, sizeof(model));
    if (p->has_name) {
        terminate(p->name, name, sizeof(name));
    }
    if (p->has_backend) {
        terminate(p->backend, backend, sizeof(backend));
        options.backend = backend;
    }
    if (p->has_attention) {
        terminate(p->attention, attention, sizeof(attention));
        options.attention_backend = attention;
    }
    call_load(call, model, p->has_name ? name : NULL, &options, loaded);
}

/* ---- model.unload ------------------------------------------------------------------------ */

void handle_model_unload(struct call *call)
{
    struct service *s = call->service;
    char name[PROTO_PATH_BYTES_MAX + 1];
    terminate(call->params.model_unload.model, name, sizeof(name));

    struct model *m;
    int rc = registry_unload(s->registry, name, &m);
    if (rc == -EBUSY) {
        call_fail(call, PROTO_E_BUSY, "model '%.128s' is being loaded", name);
    } else if (rc < 0) {
        call_fail(call, PROTO_E_NOT_FOUND, "model '%.128s' is not loaded", name);
    } else {
        unload_start(call, m);
    }
}

/* ---- model.list -------------------------------------------------------------------------- */

static const char *state_name(enum registry_state state)
{
    switch (state) {
    case REGISTRY_AVAILABLE:
        return "available";
    case REGISTRY_LOADING:
        return "loading";
    case REGISTRY_LOADED:
        return "loaded";
    }
    return "unknown";
}

static void pack_entry(struct ipc_buffer *b, const struct call *call,
                       const struct registry_entry *entry)
{
    bool with_path = call_may_see_paths(call) && entry->path[0];
    ipc_pack_map(b, 3 + (with_path ? 1 : 0) + (entry->model ? 6 : 0));
    pack_kv_str(b, "name", entry->name);
    pack_kv_str(b, "state", state_name(entry->state));
    pack_kv_u64(b, "bytes", entry->bytes);
    if (with_path) {
        pack_kv_str(b, "path", entry->path);
    }
    if (entry->model) {
        struct model_facts facts;
        model_facts(entry->model, &facts);
        pack_kv_str(b, "arch", model_shape(entry->model)->arch->name);
        pack_kv_u64(b, "params", facts.n_params);
        pack_kv_str(b, "type", facts.type_name);
        pack_kv_u64(b, "n_ctx", facts.n_ctx);
        pack_kv_u64(b, "kv_bytes_per_token", kv_layout_token_bytes(model_kv_layout(entry->model)));
        pack_kv_u64(b, "n_running", engine_model_users(call->service->engine, entry->model));
    }
}

/* The task pool: folders may lie on slow disks. */
static void list_work(struct task *t)
{
    struct call *call = call_of_task(t);
    call->task_result = registry_list(call->service->registry, &call->entries, &call->n_entries);
}

static void list_done(struct task *t)
{
    struct call *call = call_of_task(t);
    int rc = call->task_result;
    call->wait = CALL_WAIT_NOTHING;
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
        return;
    }
    if (rc < 0) {
        call_fail(call, rc == -ENOMEM ? PROTO_E_NO_MEMORY : PROTO_E_IO,
                  "the models cannot be listed: %s", strerror(-rc));
        return;
    }
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 1);
    pack_kv_array(b, "models", call->n_entries);
    for (size_t i = 0; i < call->n_entries; i++) {
        pack_entry(b, call, &call->entries[i]);
    }
    call_end(call);
}

void handle_model_list(struct call *call)
{
    call_run_on_disk(call, list_work, list_done);
}

/* ---- model.info -------------------------------------------------------------------------- */

static void pack_tokenizer(struct ipc_buffer *b, const struct tokenizer *t)
{
    pack_kv_map(b, "tokenizer", 6);
    pack_kv_str(b, "kind", tokenizer_kind(t));
    pack_kv_str(b, "pre", tokenizer_pre(t));
    pack_kv_u64(b, "n_vocab", tokenizer_n_vocab(t));
    pack_kv_i64(b, "bos", tokenizer_bos(t));
    pack_kv_i64(b, "eos", tokenizer_eos(t));
    pack_kv_bool(b, "add_bos", tokenizer_adds_bos(t));
}

static void pack_cache(struct ipc_buffer *b, const struct kv_layout *layout)
{
    const struct kv_layer_desc *first = &layout->classes[0].desc;
    pack_kv_map(b, "cache", 5);
    pack_kv_str(b, "type_k", kv_type_name(first->k_type));
    pack_kv_str(b, "type_v", kv_type_name(first->v_type));
    pack_kv_u64(b, "bytes_per_token", kv_layout_token_bytes(layout));
    pack_kv_u64(b, "block_tokens", GQA_KV_BLOCK_TOKENS);
    pack_kv_array(b, "classes", layout->n_classes);
    for (uint32_t i = 0; i < layout->n_classes; i++) {
        ipc_pack_map(b, 2);
        pack_kv_u64(b, "n_layers", layout->classes[i].n_layers);
        pack_kv_u64(b, "window", layout->classes[i].desc.window);
    }
}

static void pack_backend(struct ipc_buffer *b, const struct model_facts *facts)
{
    pack_kv_map(b, "backend", 5);
    pack_kv_str(b, "program", facts->program_backend);
    pack_kv_str(b, "attention", facts->attention_backend);
    pack_kv_str(b, "isa", facts->isa);
    pack_kv_str(b, "unit", facts->unit);
    pack_kv_u64(b, "threads", facts->n_threads);
}

void pack_model_info(struct ipc_buffer *b, const struct model *m, bool with_path)
{
    const struct model_shape *shape = model_shape(m);
    struct model_facts facts;
    model_facts(m, &facts);

    ipc_pack_map(b, 27 + (with_path ? 1 : 0));
    pack_kv_str(b, "name", model_name(m));
    if (with_path) {
        pack_kv_str(b, "path", facts.path);
    }
    pack_kv_str(b, "arch", shape->arch->name);
    pack_kv_str(b, "description", facts.description);
    pack_kv_str(b, "type", facts.type_name);
    pack_kv_u64(b, "params", facts.n_params);
    pack_kv_u64(b, "bytes", facts.file_bytes);
    pack_kv_u64(b, "n_layers", shape->n_layers);
    pack_kv_u64(b, "n_embd", shape->n_embd);
    pack_kv_u64(b, "n_heads", shape->n_heads);
    pack_kv_u64(b, "n_kv_heads", shape->n_kv_heads);
    pack_kv_u64(b, "head_dim", shape->k_dim);
    pack_kv_u64(b, "n_ff", shape->n_ff);
    pack_kv_u64(b, "n_vocab", shape->n_vocab);
    pack_kv_u64(b, "n_ctx", facts.n_ctx);
    pack_kv_u64(b, "n_ctx_train", shape->n_ctx_train);
    pack_kv_str(b, "kind", model_is_encoder(m) ? "encoder" : "decoder");
    pack_kv_str(b, "pooling", pooling_name(shape->pooling));
    pack_tokenizer(b, model_tokenizer(m));
    pack_cache(b, model_kv_layout(m));
    pack_backend(b, &facts);
    pack_kv_u64(b, "packed_bytes", facts.packed_bytes);
    pack_kv_str(b, "packed_source", facts.packed_source);
    pack_kv_bool(b, "packed_in_file", facts.packed_in_file);
    pack_kv_u64(b, "mapped_bytes", facts.mapped_bytes);
    pack_kv_u64(b, "weight_bytes_per_token", facts.weight_bytes_per_token);
    pack_kv_u64(b, "flops_per_token", facts.flops_per_token);
    pack_kv_f64(b, "load_ms", facts.load_ms);
}

/* The model that params name, into the call; false: it is not loaded, and the call is over. */
static bool take_model(struct call *call, struct proto_string model)
{
    char name[PROTO_PATH_BYTES_MAX + 1];
    terminate(model, name, sizeof(name));
    call->model = registry_get(call->service->registry, name);
    if (call->model) {
        return true;
    }
    call_fail(call, PROTO_E_NOT_FOUND, "model '%.128s' is not loaded", name);
    return false;
}

void handle_model_info(struct call *call)
{
    if (take_model(call, call->params.model_info.model)) {
        answer_info(call);
    }
}

/* ---- model.ops --------------------------------------------------------------------------- */

void handle_model_ops(struct call *call)
{
    struct gqa_op_time times[MODEL_OP_KINDS_MAX];
    if (!take_model(call, call->params.model_ops.model)) {
        return;
    }
    size_t n = model_op_times(call->model, times, MODEL_OP_KINDS_MAX);
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 1);
    pack_kv_array(b, "ops", n);
    for (size_t i = 0; i < n; i++) {
        ipc_pack_map(b, 5);
        pack_kv_str(b, "kind", model_op_name(times[i].kind));
        pack_kv_u64(b, "calls", times[i].calls);
        pack_kv_u64(b, "rows", times[i].rows);
        pack_kv_u64(b, "ns", times[i].ns);
        pack_kv_u64(b, "bytes", times[i].bytes);
    }
    call_end(call);
}
