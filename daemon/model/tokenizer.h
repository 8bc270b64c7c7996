/* daemon/model/tokenizer.h - text to tokens and back, with the vocabulary of a GGUF file.
 *
 * Four kinds, by tokenizer.ggml.model: "llama" (SentencePiece with scores and byte fallback),
 * "gpt2" (byte-level BPE with merges and a pre-tokeniser named by tokenizer.ggml.pre), "bert"
 * (WordPiece) and "t5" (unigram). More kinds plug in behind the same table of functions.
 *
 * A tokenizer is immutable after creation; all calls are safe from any thread at once (scratch
 * memory is per call). Texts are bytes with a length: NUL and invalid UTF-8 are legal input and
 * round-trip. (Two texts do not come back: U+2581, which is a space to every SentencePiece
 * vocabulary, and what a vocabulary without byte tokens knows only as its UNKNOWN token. WordPiece
 * and unigram vocabularies normalise a text: what comes back is its pieces.) The gguf object must
 * outlive the tokenizer. */
#ifndef DAEMON_MODEL_TOKENIZER_H
#define DAEMON_MODEL_TOKENIZER_H

#include "format/gguf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* As tokenizer.ggml.token_type numbers them. */
enum token_kind {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_USER_DEFINED = 4,
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6,
};

#define TOKEN_NONE (-1)

struct tokenize_options {
    bool add_special;   /* BOS/EOS as the file's add_bos_token / add_eos_token say; "bert": always
                         * [CLS] (tokenizer_bos) and [SEP] */
    bool parse_special; /* control tokens written out in the text become their ids */
};

/* 0 and *ret; -EINVAL or -ENOTSUP (unknown model or pre-tokeniser: the sentence lists the known
 * ones) with err filled. */
int tokenizer_create(const struct gguf *g, struct tokenizer **ret, struct fmt_error *err);
void tokenizer_destroy(struct tokenizer *t); /* NULL is legal */

const char *tokenizer_kind(const struct tokenizer *t); /* "llama", "gpt2", "bert", "t5" */
const char *tokenizer_pre(const struct tokenizer *t);  /* pre-tokeniser's name, or "" */
uint32_t tokenizer_n_vocab(const struct tokenizer *t);
int32_t tokenizer_bos(const struct tokenizer *t); /* TOKEN_NONE when the file has none */
int32_t tokenizer_eos(const struct tokenizer *t);
bool tokenizer_adds_bos(const struct tokenizer *t);
/* Whether generation ends at this token: eos, eot, and the known names of end-of-turn tokens. */
bool tokenizer_is_eog(const struct tokenizer *t, int32_t token);
enum token_kind tokenizer_token_kind(const struct tokenizer *t, int32_t token);

/* Encodes bytes of text. *ret_tokens is malloc'ed (the caller frees it; NULL when count is 0).
 * -E2BIG past max_tokens, -ENOMEM; -EILSEQ when the vocabulary has no token for a byte of the text
 * and no UNKNOWN token; text is never truncated. */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t bytes,
                     struct tokenize_options options, size_t max_tokens, int32_t **ret_tokens,
                     size_t *ret_count);

/* The bytes one token stands for inside a text (leading space of SPM pieces included). Control
 * and unknown tokens give nothing unless special is true. The view lives as long as the tokenizer.
 * -ERANGE when the id is outside the vocabulary. */
int tokenizer_piece(const struct tokenizer *t, int32_t token, bool special,
                    struct gguf_string *ret);

/* Decodes a whole sequence: the inverse of encode, byte for byte (the space that an SPM encoder
 * puts in front of a text is taken away again, also after a BOS). *ret_text is malloc'ed and
 * terminated. -ERANGE names no id: check with tokenizer_n_vocab first. */
int tokenizer_decode(const struct tokenizer *t, const int32_t *tokens, size_t count, bool special,
                     char **ret_text, size_t *ret_bytes);

#endif
