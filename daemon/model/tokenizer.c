/* daemon/model/tokenizer.c - the calls of tokenizer.h; the kinds are rows of one table. */
#include "daemon/model/tokenizer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const struct tokenizer_model *const models[] = {
    &tokenizer_model_spm,
    &tokenizer_model_bpe,
    &tokenizer_model_wordpiece,
    &tokenizer_model_unigram,
};
#define N_MODELS (sizeof(models) / sizeof(models[0]))

static int find_model(const struct gguf *g, const struct tokenizer_model **ret,
                      struct fmt_error *err)
{
    struct gguf_string name;
    if (gguf_get_string(g, "tokenizer.ggml.model", &name) < 0) {
        return fmt_fail(err, -EINVAL, "tokenizer.ggml.model: missing, or not a string");
    }
    for (size_t i = 0; i < N_MODELS; i++) {
        if (strlen(models[i]->name) == name.bytes &&
            memcmp(models[i]->name, name.data, name.bytes) == 0) {
            *ret = models[i];
            return 0;
        }
    }
    int shown = name.bytes < 40 ? (int)name.bytes : 40;
    return fmt_fail(err, -ENOTSUP,
                    "tokenizer.ggml.model: unknown kind '%.*s'; known: llama gpt2 bert t5", shown,
                    name.data);
}

void tokenizer_destroy(struct tokenizer *t)
{
    if (!t) {
        return;
    }
    pre_tokenizer_destroy(t->pre);
    tokenizer_free_specials(t);
    free(t->merges.slots);
    free(t->merges.bytes);
    free(t->table.slots);
    sorted_pieces_finish(&t->sorted);
    charsmap_destroy(t->charsmap);
    free(t->scores);
    free(t->priority);
    free(t->pieces);
    free(t->tokens);
    free(t);
}

int tokenizer_create(const struct gguf *g, struct tokenizer **ret, struct fmt_error *err)
{
    const struct tokenizer_model *model = NULL;
    int rc = find_model(g, &model, err);
    if (rc < 0) {
        return rc;
    }
    struct tokenizer *t = calloc(1, sizeof(*t));
    if (!t) {
        return fmt_fail(err, -ENOMEM, "tokenizer: out of memory");
    }
    t->model = model;
    rc = tokenizer_load_vocab(t, g, err);
    if (rc < 0) {
        tokenizer_destroy(t);
        return rc;
    }
    *ret = t;
    return 0;
}

const char *tokenizer_kind(const struct tokenizer *t)
{
    return t->model->name;
}

const char *tokenizer_pre(const struct tokenizer *t)
{
    return t->pre ? pre_tokenizer_name(t->pre) : "";
}

uint32_t tokenizer_n_vocab(const struct tokenizer *t)
{
    return t->n_vocab;
}

int32_t tokenizer_bos(const struct tokenizer *t)
{
    return t->bos;
}

int32_t tokenizer_eos(const struct tokenizer *t)
{
    return t->eos;
}

bool tokenizer_adds_bos(const struct tokenizer *t)
{
    return t->add_bos;
}

static bool in_vocab(const struct tokenizer *t, int32_t token)
{
    return token >= 0 && (uint32_t)token < t->n_vocab;
}

bool tokenizer_is_eog(const struct tokenizer *t, int32_t token)
{
    return in_vocab(t, token) && (t->tokens[token].flags & TOKEN_FLAG_EOG);
}

enum token_kind tokenizer_token_kind(const struct tokenizer *t, int32_t token)
{
    return in_vocab(t, token) ? (enum token_kind)t->tokens[token].kind : TOKEN_UNUSED;
}

static int encode_fragments(const struct tokenizer *t, struct scratch *s, const char *text,
                            const struct fragment *list, struct tokenize_options options)
{
    int rc = 0;
    if (options.add_special && t->add_bos) {
        rc = scratch_push(s, t->bos);
    }
    bool after_special = true;
    for (uint32_t i = 0; i != FRAGMENT_END && rc == 0; i = list[i].next) {
        const struct fragment *f = &list[i];
        if (f->token != TOKEN_NONE) {
            rc = scratch_push(s, f->token);
            after_special = true;
        } else {
            rc = t->model->encode(t, s, text + f->offset, f->bytes, after_special);
            after_special = false;
        }
    }
    if (rc == 0 && options.add_special && t->add_eos) {
        rc = scratch_push(s, t->eos);
    }
    if (rc == 0 && options.add_special && t->add_sep) {
        rc = scratch_push(s, t->sep);
    }
    return rc;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t bytes,
                     struct tokenize_options options, size_t max_tokens, int32_t **ret_tokens,
                     size_t *ret_count)
{
    if (bytes > TOKENIZER_MAX_TEXT_BYTES) {
        return -E2BIG;
    }
    struct scratch s;
    int rc = scratch_init(&s, t, bytes, max_tokens);
    if (rc < 0) {
        return rc;
    }
    struct fragment *list;
    rc = tokenizer_partition(t, text, bytes, options.parse_special, &list);
    if (rc == 0) {
        rc = encode_fragments(t, &s, text, list, options);
        free(list);
    }
    if (rc == 0) {
        *ret_count = s.n_out;
        *ret_tokens = NULL;
        if (s.n_out > 0) {
            *ret_tokens = s.out;
            s.out = NULL;
        }
    }
    scratch_finish(&s);
    return rc;
}

static bool is_hidden(const struct token_entry *e, bool special)
{
    return !special && (e->kind == TOKEN_CONTROL || e->kind == TOKEN_UNKNOWN);
}

int tokenizer_piece(const struct tokenizer *t, int32_t token, bool special, struct gguf_string *ret)
{
    if (!in_vocab(t, token)) {
        return -ERANGE;
    }
    const struct token_entry *e = &t->tokens[token];
    *ret = is_hidden(e, special) ? (struct gguf_string){"", 0}
                                 : (struct gguf_string){e->piece, e->bytes};
    return 0;
}

/* Whether the encoder puts a space in front of plain text that follows this token. UNKNOWN counts
 * where it can only have been written out in the text. */
static bool restarts_text(const struct tokenizer *t, const struct token_entry *e)
{
    return (e->flags & TOKEN_FLAG_SPECIAL) && (e->kind != TOKEN_UNKNOWN || t->all_bytes);
}

/* Copies the text to to, or only measures it when to is NULL. */
static size_t decode(const struct tokenizer *t, const int32_t *tokens, size_t count, bool special,
                     char *to)
{
    size_t n = 0;
    bool prefixed = t->add_space_prefix;
    for (size_t i = 0; i < count; i++) {
        const struct token_entry *e = &t->tokens[tokens[i]];
        if (!is_hidden(e, special)) {
            bool skip =
                prefixed && !(e->flags & TOKEN_FLAG_SPECIAL) && e->bytes > 0 && e->piece[0] == ' ';
            if (to) {
                memcpy(to + n, e->piece + skip, e->bytes - skip);
            }
            n += e->bytes - skip;
        }
        prefixed = t->add_space_prefix && restarts_text(t, e);
    }
    return n;
}

int tokenizer_decode(const struct tokenizer *t, const int32_t *tokens, size_t count, bool special,
                     char **ret_text, size_t *ret_bytes)
{
    for (size_t i = 0; i < count; i++) {
        if (!in_vocab(t, tokens[i])) {
            return -ERANGE;
        }
    }
    size_t bytes = decode(t, tokens, count, special, NULL);
    char *text = malloc(bytes + 1);
    if (!text) {
        return -ENOMEM;
    }
    (void)decode(t, tokens, count, special, text);
    text[bytes] = '\0';
    *ret_text = text;
    *ret_bytes = bytes;
    return 0;
}
