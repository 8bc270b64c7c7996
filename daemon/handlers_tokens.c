/* Text to tokens and back: text.tokenize, text.detokenize, and the prompts of other methods. Long
 * inputs go to the task pool. */
#include "daemon/handlers_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A detokenised text must fit a frame with its head. */
#define DETOKENIZED_BYTES_MAX (PROTO_FRAME_BYTES_MAX - 64u)

/* ---- encoding ---------------------------------------------------------------------------- */

static void encode_work(struct task *t)
{
    struct call *call = call_of_task(t);
    const struct call_encode *in = &call->encode;
    const struct tokenize_options options = {.add_special = in->add_special,
                                             .parse_special = in->parse_special};
    call->task_result =
        tokenizer_encode(model_tokenizer(call->model), in->text.data ? in->text.data : "",
                         in->text.bytes, options, PROTO_TOKENS_MAX, &call->tokens, &call->n_tokens);
}

static void encode_done(struct task *t)
{
    struct call *call = call_of_task(t);
    int rc = call->task_result;
    call->wait = CALL_WAIT_NOTHING;
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
    } else if (rc == -E2BIG) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'%s' gives more than %u tokens",
                  call->encode.field, PROTO_TOKENS_MAX);
    } else if (rc == -ENOMEM) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory to encode a text of %zu bytes",
                  call->encode.text.bytes);
    } else if (rc < 0) {
        call_fail(call, PROTO_E_INTERNAL, "the tokenizer failed: %s", strerror(-rc));
    } else {
        call->encode.then(call);
    }
}

void call_tokenise(struct call *call, const struct call_encode *encode)
{
    call->encode = *encode;
    if (encode->text.bytes > SERVICE_INLINE_TEXT_BYTES) {
        call_run(call, encode_work, encode_done);
        return;
    }
    encode_work(&call->task);
    encode_done(&call->task);
}

bool call_check_tokens(struct call *call, const char *field, struct proto_tokens tokens)
{
    uint32_t n_vocab = tokenizer_n_vocab(model_tokenizer(call->model));
    for (size_t i = 0; i < tokens.count; i++) {
        if (tokens.ids[i] < 0 || (uint32_t)tokens.ids[i] >= n_vocab) {
            call_fail(call, PROTO_E_INVALID_PARAMS,
                      "'%s', item %zu: %d is no token id; the vocabulary has 0 to %u", field, i,
                      tokens.ids[i], n_vocab - 1);
            return false;
        }
    }
    return true;
}

/* ---- text.tokenize ----------------------------------------------------------------------- */

static void tokenized(struct call *call)
{
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 1);
    ipc_pack_str(b, "tokens");
    ipc_pack_tokens(b, call->tokens, call->n_tokens);
    call_end(call);
}

static void tokenize_with_model(struct call *call)
{
    const struct proto_text_tokenize *p = &call->params.text_tokenize;
    call_tokenise(call, &(struct call_encode){.field = "text",
                                              .text = p->text,
                                              .add_special = p->add_special,
                                              .parse_special = p->parse_special,
                                              .then = tokenized});
}

void handle_text_tokenize(struct call *call)
{
    call_with_model(call, call->params.text_tokenize.model, tokenize_with_model);
}

/* ---- text.detokenize --------------------------------------------------------------------- */

static void decode_work(struct task *t)
{
    struct call *call = call_of_task(t);
    const struct proto_text_detokenize *p = &call->params.text_detokenize;
    call->task_result =
        tokenizer_decode(model_tokenizer(call->model), p->tokens.ids, p->tokens.count, p->special,
                         &call->text, &call->text_bytes);
}

static void decode_done(struct task *t)
{
    struct call *call = call_of_task(t);
    int rc = call->task_result;
    call->wait = CALL_WAIT_NOTHING;
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
    } else if (rc < 0) {
        call_fail(call, rc == -ENOMEM ? PROTO_E_NO_MEMORY : PROTO_E_INTERNAL,
                  "the tokens cannot be decoded: %s", strerror(-rc));
    } else if (call->text_bytes > DETOKENIZED_BYTES_MAX) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'tokens': their text has %zu bytes; a message has %u at most", call->text_bytes,
                  PROTO_FRAME_BYTES_MAX);
    } else {
        struct ipc_buffer *b = call_begin_result(call);
        ipc_pack_map(b, 1);
        ipc_pack_str(b, "text");
        ipc_pack_text(b, call->text ? call->text : "", call->text_bytes);
        call_end(call);
    }
}

static void detokenize_with_model(struct call *call)
{
    struct proto_tokens tokens = call->params.text_detokenize.tokens;
    if (!call_check_tokens(call, "tokens", tokens)) {
        return;
    }
    if (tokens.count > SERVICE_INLINE_TOKENS) {
        call_run(call, decode_work, decode_done);
        return;
    }
    decode_work(&call->task);
    decode_done(&call->task);
}

void handle_text_detokenize(struct call *call)
{
    call_with_model(call, call->params.text_detokenize.model, detokenize_with_model);
}
