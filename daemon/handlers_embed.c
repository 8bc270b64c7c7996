/* text.embed: from texts to a request of many inputs, and from its vectors to the result. */
#include "daemon/handlers_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a result holds beside its vectors, for each input and altogether. */
#define RESULT_ITEM_BYTES 8u
#define RESULT_HEAD_BYTES 512u

static struct proto_strings texts_of(const struct proto_text_embed *p)
{
    return p->has_inputs ? p->inputs : (struct proto_strings){&p->prompt, 1};
}

/* "'prompt'" or "'inputs', item 3": which input a message is about. */
static const char *input_name(const struct call *call, size_t input, char name[40])
{
    const struct proto_text_embed *p = &call->params.text_embed;
    if (p->has_inputs) {
        snprintf(name, 40, "'inputs', item %zu", input);
    } else {
        snprintf(name, 40, "%s", p->has_tokens ? "'tokens'" : "'prompt'");
    }
    return name;
}

/* ---- what is asked for ------------------------------------------------------------------- */

static bool check_embed(struct call *call)
{
    const struct proto_text_embed *p = &call->params.text_embed;
    if (p->has_prompt + p->has_tokens + p->has_inputs != 1) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "give exactly one of 'prompt', 'tokens' and 'inputs'");
        return false;
    }
    if ((p->has_tokens && p->tokens.count == 0) || (p->has_inputs && p->inputs.count == 0)) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'%s' needs at least one",
                  p->has_tokens ? "tokens" : "inputs");
        return false;
    }
    if (p->has_kv_policy &&
        (p->kv_policy.bytes != 4 || memcmp(p->kv_policy.data, "full", 4) != 0)) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'kv_policy' is '%.*s'; embeddings are of the whole text: only full",
                  (int)p->kv_policy.bytes, p->kv_policy.data);
        return false;
    }
    if (!p->normalize && p->has_embd_normalize && p->embd_normalize != EMBEDDING_NORM_NONE) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'normalize' is false, but 'embd_normalize' is %d: they contradict each other",
                  p->embd_normalize);
        return false;
    }
    if (p->has_query && p->has_tokens) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'query' goes with texts, not with 'tokens'");
        return false;
    }
    return true;
}

/* The pooling that the caller, or else the model, wants; false when it cannot be had. */
static bool choose_pooling(struct call *call, enum pooling *ret)
{
    const struct proto_text_embed *p = &call->params.text_embed;
    *ret = model_shape(call->model)->pooling;
    if (p->has_pooling && pooling_by_name(p->pooling.data, p->pooling.bytes, ret) < 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'pooling' is '%.*s'; it must be none, mean, cls, last or rank",
                  (int)p->pooling.bytes, p->pooling.data);
        return false;
    }
    if (*ret == POOLING_RANK && model_n_scores(call->model) == 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'pooling' is rank, but model '%s' has no classifier (cls.weight, "
                  "cls.output.weight)",
                  model_name(call->model));
        return false;
    }
    if (*ret != POOLING_RANK && p->has_query) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'query' goes with pooling rank; it is %s",
                  pooling_name(*ret));
        return false;
    }
    return true;
}

/* How wide vectors are to be; false when the model's are not so wide, or all of them would not fit
 * the result's message. */
static bool choose_width(struct call *call, enum pooling pooling, size_t n_inputs, uint32_t *ret)
{
    const struct proto_text_embed *p = &call->params.text_embed;
    uint32_t width =
        pooling == POOLING_RANK ? model_n_scores(call->model) : model_shape(call->model)->n_embd;
    if (p->n_dims > width) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'n_dims' is %u; the model gives %u", p->n_dims,
                  width);
        return false;
    }
    width = p->n_dims > 0 ? p->n_dims : width;
    uint64_t bytes =
        (uint64_t)n_inputs * (width * sizeof(float) + RESULT_ITEM_BYTES) + RESULT_HEAD_BYTES;
    if (pooling != POOLING_NONE && bytes > PROTO_FRAME_BYTES_MAX) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'inputs': %zu vectors of %u values do not fit a message of %u bytes; "
                  "send fewer at once",
                  n_inputs, width, PROTO_FRAME_BYTES_MAX);
        return false;
    }
    *ret = width;
    return true;
}

/* ---- texts to tokens --------------------------------------------------------------------- */

static int encode(struct call *call, struct proto_string text, struct request_input *ret,
                  size_t max_tokens)
{
    const struct proto_text_embed *p = &call->params.text_embed;
    const struct tokenize_options options = {.add_special = p->add_special,
                                             .parse_special = p->parse_special};
    return tokenizer_encode(model_tokenizer(call->model), text.data, text.bytes, options,
                            max_tokens, &ret->tokens, &ret->n_tokens);
}

/* The token that some vocabularies put a second time between two texts; TOKEN_NONE. WordPiece has
 * the one that ends every text, whatever its file says. */
static int32_t second_separator(const struct model *m)
{
    const struct gguf *g = model_gguf(m);
    bool adds = false;
    uint32_t id = 0;
    if (strcmp(tokenizer_kind(model_tokenizer(m)), "bert") == 0 ||
        gguf_get_bool(g, "tokenizer.ggml.add_sep_token", &adds) < 0 || !adds ||
        gguf_get_u32(g, "tokenizer.ggml.seperator_token_id", &id) < 0 ||
        id >= tokenizer_n_vocab(model_tokenizer(m))) {
        return TOKEN_NONE;
    }
    return (int32_t)id;
}

/* Query and text as one input, as rerankers were trained: each ends with the EOS or SEP that the
 * tokenizer adds, and only the first begins with a BOS or CLS. *io is the text's tokens. */
static int join_query(struct call *call, const struct request_input *query,
                      struct request_input *io, size_t max_tokens)
{
    const struct tokenizer *t = model_tokenizer(call->model);
    bool special = call->params.text_embed.add_special;
    int32_t separator = special ? second_separator(call->model) : TOKEN_NONE;
    size_t skip = special && io->n_tokens > 0 && io->tokens[0] == tokenizer_bos(t) ? 1 : 0;
    size_t n = query->n_tokens + (separator != TOKEN_NONE) + io->n_tokens - skip;
    if (n > max_tokens) {
        return -E2BIG;
    }
    int32_t *joined = malloc((n + 1) * sizeof(*joined));
    if (!joined) {
        return -ENOMEM;
    }
    size_t at = query->n_tokens;
    if (at > 0) {
        memcpy(joined, query->tokens, at * sizeof(*joined));
    }
    if (separator != TOKEN_NONE) {
        joined[at++] = separator;
    }
    if (io->n_tokens > skip) {
        memcpy(joined + at, io->tokens + skip, (io->n_tokens - skip) * sizeof(*joined));
    }
    free(io->tokens);
    *io = (struct request_input){joined, n};
    return 0;
}

/* Encodes all texts into the request's inputs. n_tokens counts those of the texts that are done,
 * so that a failure can be told by its text. */
static void encode_work(struct task *t)
{
    struct call *call = call_of_task(t);
    const struct proto_text_embed *p = &call->params.text_embed;
    struct proto_strings texts = texts_of(p);
    struct request_embed *e = &call->request->embed;
    struct request_input query = {NULL, 0};
    size_t room = PROTO_TOKENS_MAX;
    int rc = p->has_query ? encode(call, p->query, &query, room) : 0;
    for (call->n_encoded = 0; rc == 0 && call->n_encoded < texts.count;) {
        struct request_input *input = &e->inputs[call->n_encoded];
        rc = encode(call, texts.items[call->n_encoded], input, room);
        rc = rc == 0 && p->has_query ? join_query(call, &query, input, room) : rc;
        if (rc == 0) {
            room -= input->n_tokens;
            call->n_encoded++;
        }
    }
    free(query.tokens);
    call->task_result = rc;
}

static void embed_submit(struct call *call);

static void encode_done(struct task *t)
{
    struct call *call = call_of_task(t);
    char name[40];
    int rc = call->task_result;
    call->wait = CALL_WAIT_NOTHING;
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
    } else if (rc == -E2BIG) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "%s: all texts together give more than %u tokens",
                  input_name(call, call->n_encoded, name), PROTO_TOKENS_MAX);
    } else if (rc == -ENOMEM) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory to encode the texts");
    } else if (rc < 0) {
        call_fail(call, PROTO_E_INTERNAL, "%s: the tokenizer failed: %s",
                  input_name(call, call->n_encoded, name), strerror(-rc));
    } else {
        embed_submit(call);
    }
}

static void encode_texts(struct call *call)
{
    const struct proto_text_embed *p = &call->params.text_embed;
    struct proto_strings texts = texts_of(p);
    size_t bytes = p->query.bytes * texts.count;
    for (size_t i = 0; i < texts.count; i++) {
        bytes += texts.items[i].bytes;
    }
    if (bytes > SERVICE_INLINE_TEXT_BYTES) {
        call_run(call, encode_work, encode_done);
        return;
    }
    encode_work(&call->task);
    encode_done(&call->task);
}

/* ---- the request ------------------------------------------------------------------------- */

/* An encoder sees all of a text in one step, and keeps nothing of it. */
static bool check_input(struct call *call, size_t i)
{
    size_t n_tokens = call->request->embed.inputs[i].n_tokens;
    uint32_t n_ctx = model_n_ctx(call->model);
    uint32_t n_batch = model_max_batch_rows(call->model);
    bool in_one_step = model_is_encoder(call->model);
    char name[40];
    if (n_tokens == 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "%s gives no token", input_name(call, i, name));
        return false;
    }
    if (n_tokens > n_ctx) {
        call_fail(call, PROTO_E_CONTEXT_EXCEEDED, "%s has %zu tokens; the context has room for %u",
                  input_name(call, i, name), n_tokens, n_ctx);
        return false;
    }
    if (in_one_step && n_tokens > n_batch) {
        call_fail(call, PROTO_E_CONTEXT_EXCEEDED,
                  "%s has %zu tokens; an encoder takes a text in one step, and steps have %u "
                  "(batch_size)",
                  input_name(call, i, name), n_tokens, n_batch);
        return false;
    }
    return true;
}

static void embed_submit(struct call *call)
{
    for (size_t i = 0; i < call->request->embed.n_inputs; i++) {
        if (!check_input(call, i)) {
            return;
        }
    }
    call_submit(call);
}

/* Makes room for inputs and vectors; the request owns all of it. */
static bool begin_embed(struct call *call, enum pooling pooling, uint32_t width, size_t n_inputs)
{
    const struct proto_text_embed *p = &call->params.text_embed;
    struct request *r = call_begin_request(call, REQUEST_EMBED);
    if (!r) {
        return false;
    }
    /* Only where the last row alone is wanted can others' blocks stand in for rows, and only blocks
     * that change no bit of it. */
    bool last_row = pooling == POOLING_LAST || pooling == POOLING_RANK;
    r->cache_exact = true;
    if (!p->cache_prompt || !last_row || model_is_encoder(call->model)) {
        r->realm[0] = '\0';
    }
    r->embed.pooling = pooling;
    r->embed.norm = p->normalize ? p->embd_normalize : EMBEDDING_NORM_NONE;
    r->embed.width = width;
    r->embed.inputs = calloc(n_inputs, sizeof(*r->embed.inputs));
    r->embed.vectors =
        pooling != POOLING_NONE ? calloc(n_inputs, width * sizeof(*r->embed.vectors)) : NULL;
    if (!r->embed.inputs || (pooling != POOLING_NONE && !r->embed.vectors)) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for %zu vectors of %u values", n_inputs,
                  width);
        return false;
    }
    r->embed.n_inputs = n_inputs;
    return call_fill_scheduling(call, p->priority, p->deadline_ms);
}

static void embed_with_model(struct call *call)
{
    const struct proto_text_embed *p = &call->params.text_embed;
    size_t n_inputs = texts_of(p).count;
    enum pooling pooling;
    uint32_t width;
    if (!choose_pooling(call, &pooling) || !choose_width(call, pooling, n_inputs, &width) ||
        (p->has_tokens && !call_check_tokens(call, "tokens", p->tokens)) ||
        !begin_embed(call, pooling, width, n_inputs)) {
        return;
    }
    if (!p->has_tokens) {
        encode_texts(call);
        return;
    }
    struct request_input *input = &call->request->embed.inputs[0];
    input->tokens = malloc(p->tokens.count * sizeof(*input->tokens));
    if (!input->tokens) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a prompt of %zu tokens", p->tokens.count);
        return;
    }
    memcpy(input->tokens, p->tokens.ids, p->tokens.count * sizeof(*input->tokens));
    input->n_tokens = p->tokens.count;
    embed_submit(call);
}

void handle_text_embed(struct call *call)
{
    if (check_embed(call)) {
        call_with_model(call, call->params.text_embed.model, embed_with_model);
    }
}

/* ---- the result -------------------------------------------------------------------------- */

void call_deliver_embeddings(struct call *call, const struct request_event *ev)
{
    const uint64_t shape[2] = {ev->n_rows, call->request->embed.width};
    struct ipc_buffer *b = call_begin_event(call);
    ipc_pack_map(b, 3);
    pack_kv_u64(b, "input", ev->part);
    pack_kv_u64(b, "first_row", ev->first_row);
    ipc_pack_str(b, "embeddings");
    call_pack_rows(call, b, ev, shape, 2);
    call_end_event(call);
}

void call_answer_embed(struct call *call, const struct request *r)
{
    const struct request_embed *e = &r->embed;
    bool pooled = e->pooling != POOLING_NONE;
    const uint64_t shape[2] = {e->n_inputs, e->width};
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, pooled ? 6 : 5);
    pack_kv_str(b, "pooling", pooling_name(e->pooling));
    pack_kv_u64(b, "n_dims", e->width);
    pack_kv_u64(b, "n_prompt", r->n_prompt);
    pack_kv_u64(b, "n_cached", r->n_cached);
    pack_kv_array(b, "n_tokens", e->n_inputs);
    for (size_t i = 0; i < e->n_inputs; i++) {
        ipc_pack_u64(b, e->inputs[i].n_tokens);
    }
    if (pooled) {
        ipc_pack_str(b, "embeddings");
        call_pack_tensor(call, b, e->vectors, shape, 2);
    }
    call_end(call);
}
