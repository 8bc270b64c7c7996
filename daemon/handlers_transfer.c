/* kv.export and kv.import: a prompt's cached prefix leaves for another daemon, or comes from one.
 *
 * The engine finds, holds and makes room (engine_transfer.c); bytes are copied on the task pool,
 * one piece at a time, since a mapped file may have to be read for it. An export waits for its
 * client before it makes the next piece. An import belongs to the connection: its pieces are calls,
 * one at a time, and a piece that fails, or the connection's end, drops all of it. */
#include "daemon/handlers_internal.h"

#include "daemon/kv/numbers.h"
#include "daemon/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIECE_BYTES (1u << 20) /* sent at once: packing it must not hold up the loop */
_Static_assert(PIECE_BYTES <= PROTO_KV_PIECE_BYTES_MAX, "what is exported can be imported");

struct transfer {
    struct engine_kv_call engine;
    struct call *call;
    void (*then)(struct call *call); /* the loop, when the engine has done it */
    /* Exports. */
    struct kv_export *export; /* the engine's */
    uint32_t index;           /* of the block */
    uint64_t offset;          /* in the block */
    size_t piece_bytes;
    uint64_t checksum; /* of the block */
    uint8_t *piece;    /* (PIECE_BYTES) */
    bool failed;
    struct ipc_error error; /* failed: why */
    /* Imports. */
    bool accepted; /* the import may go on */
};

/* ---- the engine -------------------------------------------------------------------------- */

static void on_loop(struct task *t)
{
    struct call *call = call_of_task(t);
    call->wait = CALL_WAIT_NOTHING;
    call->transfer->then(call);
}

/* The engine thread. */
static void on_engine_done(void *arg)
{
    struct call *call = arg;
    struct service *s = call->service;
    call->task = (struct task){.done = on_loop};
    s->host.post(s->host.data, &call->task);
}

static void ask_engine(struct call *call, enum engine_kv_op op, void (*then)(struct call *call))
{
    struct transfer *t = call->transfer;
    t->then = then;
    t->engine.op = op;
    t->engine.done = on_engine_done;
    t->engine.arg = call;
    call->wait = CALL_WAIT_POST;
    int rc = engine_kv(call->service->engine, &t->engine);
    if (rc < 0) {
        t->engine.result = rc;
        call->wait = CALL_WAIT_NOTHING;
        then(call);
    }
}

static enum proto_error_code code_of(int rc)
{
    switch (rc) {
    case -ENOENT:
    case -ESTALE:
        return PROTO_E_NOT_FOUND;
    case -EBUSY:
        return PROTO_E_BUSY;
    case -ENOMEM:
        return PROTO_E_NO_MEMORY;
    case -EINVAL:
        return PROTO_E_INVALID_PARAMS;
    case -ESHUTDOWN:
        return PROTO_E_DRAINING;
    default:
        return PROTO_E_IO;
    }
}

static void fail_as_engine_says(struct call *call)
{
    const struct engine_kv_call *e = &call->transfer->engine;
    const char *why = e->result == -ESHUTDOWN  ? "the daemon is about to end"
                      : e->err.text[0] != '\0' ? e->err.text
                                               : strerror(-e->result);
    call_fail(call, code_of(e->result), "%s", why);
}

static bool begin_transfer(struct call *call)
{
    struct transfer *t = calloc(1, sizeof(*t));
    if (!t) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a transfer");
        return false;
    }
    t->call = call;
    call->transfer = t;
    return true;
}

static void name_model(struct call *call)
{
    struct engine_kv_call *e = &call->transfer->engine;
    call_realm(call, e->realm);
    e->uid = call->uid;
    e->model = model_kv_identity(call->model);
    e->layout = model_kv_layout(call->model);
}

static void print_id(const uint8_t id[16], char ret[33])
{
    for (int i = 0; i < 16; i++) {
        snprintf(ret + 2 * i, 3, "%02x", id[i]);
    }
}

/* ---- kv.export --------------------------------------------------------------------------- */

static void send_head(struct call *call)
{
    const struct kv_export *x = call->transfer->export;
    const struct kv_identity *identity = model_kv_identity(call->model);
    char id[33];
    print_id(identity->id, id);
    struct ipc_buffer *b = call_begin_event(call);
    ipc_pack_map(b, 7);
    pack_kv_str(b, "id", id);
    pack_kv_str(b, "about", identity->about);
    pack_kv_u64(b, "layout_version", GQA_KV_LAYOUT_VERSION);
    pack_kv_u64(b, "n_tokens", x->n_tokens);
    pack_kv_u64(b, "n_blocks", x->n_blocks);
    pack_kv_u64(b, "bytes", x->bytes);
    pack_kv_array(b, "classes", x->layout.n_classes);
    for (uint32_t c = 0; c < x->layout.n_classes; c++) {
        ipc_pack_map(b, 2);
        pack_kv_u64(b, "block_bytes", x->layout.classes[c].block_bytes);
        pack_kv_u64(b, "window", x->layout.classes[c].desc.window);
    }
    call_end_event(call);
}

static void send_piece(struct call *call)
{
    const struct transfer *t = call->transfer;
    const struct kv_export_block *block = &t->export->blocks[t->index];
    struct ipc_buffer *b = call_begin_event(call);
    ipc_pack_map(b, 8);
    pack_kv_u64(b, "layer_class", block->layer_class);
    pack_kv_u64(b, "position", block->position);
    pack_kv_u64(b, "flags", block->flags);
    ipc_pack_str(b, "tokens");
    ipc_pack_tokens(b, t->export->tokens + (size_t)block->position * GQA_KV_BLOCK_TOKENS,
                    GQA_KV_BLOCK_TOKENS);
    pack_kv_u64(b, "bytes", block->bytes);
    pack_kv_u64(b, "checksum", t->checksum);
    pack_kv_u64(b, "offset", t->offset);
    ipc_pack_str(b, "data");
    ipc_pack_bin(b, t->piece, t->piece_bytes);
    call_end_event(call);
}

static void export_ended(struct call *call)
{
    const struct transfer *t = call->transfer;
    if (t->failed) {
        call_fail_error(call, &t->error);
        return;
    }
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
        return;
    }
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 3);
    pack_kv_u64(b, "n_tokens", t->engine.n_kept_tokens);
    pack_kv_u64(b, "n_blocks", t->index);
    pack_kv_u64(b, "bytes", t->engine.piece.bytes);
    call_end(call);
}

/* The engine lets go of the blocks, then the call is answered. */
static void end_export(struct call *call)
{
    struct transfer *t = call->transfer;
    t->engine.n_kept_tokens = t->export->n_tokens; /* for the result: the export is about to go */
    t->engine.piece.bytes = t->export->bytes;
    t->engine.export = t->export;
    t->export = NULL;
    ask_engine(call, ENGINE_KV_EXPORT_END, export_ended);
}

static void fail_export(struct call *call, int rc)
{
    struct transfer *t = call->transfer;
    t->failed = true;
    if (rc == -ECANCELED) {
        ipc_error_set(&t->error, PROTO_E_NOT_FOUND,
                      "the blocks were purged while they were exported");
    } else if (rc == -ENOMEM) {
        ipc_error_set(&t->error, PROTO_E_NO_MEMORY, "no memory for a piece of %u bytes",
                      PIECE_BYTES);
    } else {
        ipc_error_set(&t->error, PROTO_E_IO,
                      "position %u, class %u: the block on disk is not what was written",
                      t->export->blocks[t->index].position,
                      t->export->blocks[t->index].layer_class);
    }
    end_export(call);
}

/* The task pool. */
static void read_work(struct task *task)
{
    struct call *call = call_of_task(task);
    struct transfer *t = call->transfer;
    const struct kv_export_block *block = &t->export->blocks[t->index];
    uint64_t left = block->bytes - t->offset;
    t->piece_bytes = left < PIECE_BYTES ? (size_t)left : PIECE_BYTES;
    int rc = t->offset == 0 ? kv_export_checksum(t->export, t->index, &t->checksum) : 0;
    call->task_result =
        rc < 0 ? rc : kv_export_read(t->export, t->index, t->offset, t->piece_bytes, t->piece);
}

static void next_piece(struct call *call);

static void read_done(struct task *task)
{
    struct call *call = call_of_task(task);
    struct transfer *t = call->transfer;
    call->wait = CALL_WAIT_NOTHING;
    engine_kick(call->service->engine); /* a purge may have waited for us */
    if (call_is_stopped(call)) {
        end_export(call);
        return;
    }
    if (call->task_result < 0) {
        fail_export(call, call->task_result);
        return;
    }
    send_piece(call);
    t->offset += t->piece_bytes;
    if (t->offset == t->export->blocks[t->index].bytes) {
        t->index++;
        t->offset = 0;
    }
    next_piece(call);
}

static void next_piece(struct call *call)
{
    struct transfer *t = call->transfer;
    if (t->index == t->export->n_blocks) {
        end_export(call);
        return;
    }
    if (call->caller->congested) {
        call->wait = CALL_WAIT_READER;
        return;
    }
    call->task =
        (struct task){.work = read_work, .done = read_done, .uid = call->uid, .asks_disk = true};
    call->wait = CALL_WAIT_TASK;
    if (call->service->host.run(call->service->host.data, &call->task) < 0) {
        call->wait = CALL_WAIT_NOTHING;
        fail_export(call, -ENOMEM);
    }
}

void transfer_go_on(struct call *call)
{
    call->wait = CALL_WAIT_NOTHING;
    next_piece(call);
}

void transfer_stop(struct call *call)
{
    call->wait = CALL_WAIT_NOTHING;
    end_export(call);
}

static void export_begun(struct call *call)
{
    struct transfer *t = call->transfer;
    if (t->engine.result < 0) {
        fail_as_engine_says(call);
        return;
    }
    t->export = t->engine.export;
    t->piece = malloc(PIECE_BYTES);
    if (call_is_stopped(call)) {
        end_export(call);
    } else if (!t->piece) {
        fail_export(call, -ENOMEM);
    } else {
        send_head(call);
        next_piece(call);
    }
}

static void export_prompt(struct call *call)
{
    if (!begin_transfer(call)) {
        return;
    }
    struct engine_kv_call *e = &call->transfer->engine;
    name_model(call);
    e->tokens = call->tokens;
    e->n_tokens = call->n_tokens;
    ask_engine(call, ENGINE_KV_EXPORT, export_begun);
}

static void export_with_model(struct call *call)
{
    if (call_check_decoder(call)) {
        call_take_prompt(call, export_prompt);
    }
}

void handle_kv_export(struct call *call)
{
    if (call_check_prompt(call)) {
        call_with_model(call, call->params.kv_export.model, export_with_model);
    }
}

/* ---- kv.import --------------------------------------------------------------------------- */

/* Tells the engine to drop it; its idle limit does so where there is no memory to say it. */
static void on_dropped(void *arg)
{
    free(arg);
}

static void drop_import(struct service *s, uint64_t number)
{
    struct engine_kv_call *drop = number != 0 ? calloc(1, sizeof(*drop)) : NULL;
    if (drop) {
        drop->op = ENGINE_KV_IMPORT_DROP;
        drop->import = number;
        drop->done = on_dropped;
        drop->arg = drop;
        if (engine_kv(s->engine, drop) < 0) {
            free(drop);
        }
    }
}

void caller_drop_import(struct caller *c)
{
    if (!c->importing) { /* else the piece under way does it when it ends */
        drop_import(c->service, c->import);
    }
    c->import = 0;
}

void transfer_destroy(struct call *call)
{
    struct transfer *t = call->transfer;
    if (!t) {
        return;
    }
    if (call->method == PROTO_KV_IMPORT) {
        if (call->caller) {
            call->caller->importing = false;
            call->caller->import = t->accepted ? t->engine.import : 0;
        }
        if (!call->caller || !t->accepted) {
            drop_import(call->service, t->engine.import);
        }
    }
    free(t->piece);
    free(t);
    call->transfer = NULL;
}

static void import_kept(struct call *call)
{
    const struct engine_kv_call *e = &call->transfer->engine;
    if (e->result < 0) {
        fail_as_engine_says(call);
        return;
    }
    log_info("KV cache of %s: uid %u has imported a prefix of %u tokens, %u of them new", e->realm,
             call->uid, e->n_kept_tokens, e->n_new_tokens);
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 2);
    pack_kv_u64(b, "n_tokens", e->n_kept_tokens);
    pack_kv_u64(b, "n_new", e->n_new_tokens);
    call->transfer->engine.import = 0; /* the engine is done with it */
    call->transfer->accepted = true;
    call_end(call);
}

static void piece_written(struct call *call)
{
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
    } else if (call->params.kv_import.last) {
        ask_engine(call, ENGINE_KV_IMPORT_KEEP, import_kept);
    } else {
        call->transfer->accepted = true;
        call_end_empty(call);
    }
}

/* The task pool. The block is checked when its last byte has come; also for numbers that would
 * make a step fail which others take part in. */
static void write_work(struct task *task)
{
    struct call *call = call_of_task(task);
    const struct engine_kv_call *e = &call->transfer->engine;
    const struct kv_import_piece *p = &e->piece;
    memcpy(e->to, call->params.kv_import.data.data, p->data_bytes);
    bool whole = p->offset + p->data_bytes == p->bytes;
    const void *block = (const char *)e->to - p->offset;
    call->task_result = 0;
    if (whole && !kv_import_is_sound(block, p->bytes, p->checksum)) {
        call->task_result = -EBADMSG;
    } else if (whole &&
               !kv_numbers_are_sound(model_kv_layout(call->model), p->layer_class, block)) {
        call->task_result = -EDOM;
    }
    atomic_store_explicit(e->writing, false, memory_order_release);
}

static void write_done(struct task *task)
{
    struct call *call = call_of_task(task);
    engine_kick(call->service->engine); /* a purge may wait for that */
    const struct kv_import_piece *p = &call->transfer->engine.piece;
    call->wait = CALL_WAIT_NOTHING;
    if (call->task_result == -EDOM) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'data': position %u, class %u holds what are not numbers below 2^%u",
                  p->position, p->layer_class, KV_NUMBER_BITS_MAX);
        return;
    }
    if (call->task_result < 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'checksum': the bytes of position %u, class %u are not those that it is of",
                  p->position, p->layer_class);
        return;
    }
    piece_written(call);
}

static void piece_placed(struct call *call)
{
    struct transfer *t = call->transfer;
    if (t->engine.result < 0) {
        t->accepted = t->engine.result == -EBUSY && t->engine.import != 0; /* try it again */
        fail_as_engine_says(call);
        return;
    }
    if (t->engine.to == NULL) {
        piece_written(call);
        return;
    }
    /* The engine waits for it to have ended. */
    call->task =
        (struct task){.work = write_work, .done = write_done, .uid = call->uid, .is_owed = true};
    call->wait = CALL_WAIT_TASK;
    if (call->service->host.run(call->service->host.data, &call->task) < 0) {
        call->wait = CALL_WAIT_NOTHING;
        atomic_store_explicit(t->engine.writing, false, memory_order_release);
        engine_kick(call->service->engine);
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a task");
    }
}

/* Blocks of another model, or of the same one computed otherwise, would give other tokens. */
static bool check_identity(struct call *call)
{
    const struct proto_kv_import *p = &call->params.kv_import;
    const struct kv_identity *own = model_kv_identity(call->model);
    char id[33];
    print_id(own->id, id);
    if (p->layout_version != GQA_KV_LAYOUT_VERSION) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'layout_version' is %u; this daemon's blocks have %u", p->layout_version,
                  GQA_KV_LAYOUT_VERSION);
        return false;
    }
    if (memcmp(p->id.data, id, sizeof(id) - 1) != 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "the blocks are of '%.*s' (id %.*s), the model %s is '%s' (id %s)",
                  (int)p->about.bytes, p->about.data, (int)p->id.bytes, p->id.data,
                  model_name(call->model), own->about, id);
        return false;
    }
    return true;
}

static void import_with_model(struct call *call)
{
    const struct proto_kv_import *p = &call->params.kv_import;
    if (!call_check_decoder(call) || !check_identity(call) ||
        !call_check_tokens(call, "tokens", p->tokens)) {
        return;
    }
    struct engine_kv_call *e = &call->transfer->engine;
    name_model(call);
    e->positions_max = model_n_ctx(call->model) / GQA_KV_BLOCK_TOKENS;
    e->piece = (struct kv_import_piece){
        .layer_class = p->layer_class,
        .position = p->position,
        .flags = p->flags,
        .tokens = p->tokens.ids,
        .bytes = p->bytes,
        .checksum = p->checksum,
        .offset = p->offset,
        .data_bytes = p->data.bytes,
    };
    ask_engine(call, ENGINE_KV_IMPORT, piece_placed);
}

void handle_kv_import(struct call *call)
{
    struct caller *c = call->caller;
    if (call->service->realm[0] && !c->admin) {
        call_fail(call, PROTO_E_ACCESS_DENIED,
                  "all users share the cached prompts here: only administrators may import");
        return;
    }
    if (c->importing) {
        call_fail(call, PROTO_E_BUSY, "the piece before is still being taken in");
        return;
    }
    if (!begin_transfer(call)) {
        return;
    }
    c->importing = true;
    call->transfer->engine.import = c->import;
    call_with_model(call, call->params.kv_import.model, import_with_model);
}
