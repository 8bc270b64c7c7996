/* daemon/model/tokenizer_spm.c - SentencePiece vocabularies: scores, spaces as U+2581, byte tokens.
 *
 * Kudo and Richardson, "SentencePiece", 2018; the pair with the best score merges first, as in
 * llama.cpp. The file writes U+2581 where a text has a space; here the pieces hold real spaces and
 * a text is encoded as it is (U+2581 in a text is a space to such a vocabulary, and comes back as
 * one: the only text that does not survive the round trip).
 *
 * Where no piece has a space after another character, no merge can reach over the start of a word,
 * and words are encoded one by one, which is much faster than the whole text at once. */
#include "daemon/model/tokenizer_internal.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char META_SPACE[] = "\xE2\x96\x81"; /* U+2581 */
#define META_SPACE_BYTES (sizeof(META_SPACE) - 1)

/* Copies text with a space for every U+2581; returns the copy's size. */
static size_t unescape(char *to, const char *from, size_t bytes)
{
    const char *start = to, *end = from + bytes;
    while (from < end) {
        const char *meta = memmem(from, (size_t)(end - from), META_SPACE, META_SPACE_BYTES);
        size_t n = (size_t)((meta ? meta : end) - from);
        memcpy(to, from, n);
        to += n;
        from += n;
        if (meta) {
            *to++ = ' ';
            from += META_SPACE_BYTES;
        }
    }
    return (size_t)(to - start);
}

static bool has_meta_space(const char *text, size_t bytes)
{
    return memmem(text, bytes, META_SPACE, META_SPACE_BYTES) != NULL;
}

static int load_byte_token(struct tokenizer *t, uint32_t id, struct gguf_string text, char *piece,
                           struct fmt_error *err)
{
    int byte = tokenizer_parse_byte(text);
    if (byte < 0) {
        return fmt_fail(err, -EINVAL,
                        "tokenizer.ggml.tokens[%u]: a byte token must be written <0xHH>", id);
    }
    *piece = (char)byte;
    t->tokens[id].bytes = 1;
    if (t->byte_token[byte] == TOKEN_NONE) {
        t->byte_token[byte] = (int32_t)id;
    }
    return 0;
}

int tokenizer_load_meta_pieces(struct tokenizer *t, const struct gguf_string *texts,
                               struct fmt_error *err)
{
    char *at = t->pieces;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        struct token_entry *e = &t->tokens[i];
        struct gguf_string text = texts[i];
        e->piece = at;
        if (!t->typed && tokenizer_parse_byte(text) >= 0) {
            e->kind = TOKEN_BYTE;
        }
        bool plain = e->kind == TOKEN_NORMAL || e->kind == TOKEN_UNUSED ||
                     (e->kind == TOKEN_USER_DEFINED && has_meta_space(text.data, text.bytes));
        if (e->kind == TOKEN_BYTE) {
            int rc = load_byte_token(t, i, text, at, err);
            if (rc < 0) {
                return rc;
            }
        } else if (plain) {
            e->bytes = (uint32_t)unescape(at, text.data, text.bytes);
            bool real_space = text.bytes > 0 && memchr(text.data, ' ', text.bytes) != NULL;
            e->flags |= e->bytes > 0 && !real_space ? TOKEN_FLAG_MERGES : 0;
        } else {
            memcpy(at, text.data, text.bytes);
            e->bytes = (uint32_t)text.bytes;
            e->flags |= e->bytes > 0 ? TOKEN_FLAG_SPECIAL : 0;
        }
        at += e->bytes;
    }
    return 0;
}

/* Greater scores get smaller numbers, in the order of the floats. */
static uint32_t score_priority(float score)
{
    score += 0.0f; /* -0 and 0 are equal scores */
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return ~ascending;
}

int tokenizer_read_scores(const struct tokenizer *t, const struct gguf *g, float **ret,
                          struct fmt_error *err)
{
    static const char key[] = "tokenizer.ggml.scores";
    enum gguf_value_type type;
    uint64_t count;
    if (gguf_get_array(g, key, &type, &count) < 0 || count != t->n_vocab) {
        return fmt_fail(err, -EINVAL,
                        "%s: a vocabulary of kind %s needs one score for each of "
                        "its %u tokens",
                        key, t->model->name, t->n_vocab);
    }
    float *scores = calloc(t->n_vocab, sizeof(*scores));
    if (!scores) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", key);
    }
    int rc = gguf_get_f32s(g, key, scores, t->n_vocab);
    if (rc < 0) {
        rc = fmt_fail(err, -EINVAL, "%s: not an array of numbers", key);
    }
    for (uint32_t i = 0; i < t->n_vocab && rc == 0; i++) {
        if (isnan(scores[i])) {
            rc = fmt_fail(err, -EINVAL, "%s[%u]: not a number", key, i);
        }
    }
    if (rc < 0) {
        free(scores);
        return rc;
    }
    *ret = scores;
    return 0;
}

static int load_priorities(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    float *scores;
    int rc = tokenizer_read_scores(t, g, &scores, err);
    if (rc < 0) {
        return rc;
    }
    t->priority = calloc(t->n_vocab, sizeof(*t->priority));
    if (!t->priority) {
        free(scores);
        return fmt_fail(err, -ENOMEM, "tokenizer.ggml.scores: out of memory");
    }
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        t->priority[i] = score_priority(scores[i]);
    }
    free(scores);
    return 0;
}

bool tokenizer_words_end_at_spaces(const struct tokenizer *t)
{
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        const struct token_entry *e = &t->tokens[i];
        for (uint32_t j = 1; (e->flags & TOKEN_FLAG_MERGES) && j < e->bytes; j++) {
            if (e->piece[j] == ' ' && e->piece[j - 1] != ' ') {
                return false;
            }
        }
    }
    return true;
}

static int spm_load(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    t->add_bos = true;
    t->add_space_prefix = true;
    int rc = gguf_get_bool(g, "tokenizer.ggml.add_space_prefix", &t->add_space_prefix);
    if (rc < 0 && rc != -ENOENT) {
        return fmt_fail(err, -EINVAL, "tokenizer.ggml.add_space_prefix: not a bool");
    }
    t->words_end_at_spaces = tokenizer_words_end_at_spaces(t);
    return load_priorities(t, g, err);
}

/* One symbol a character; a byte that is no character's part is one of its own. */
static size_t spm_split(const struct tokenizer *t, struct symbol *symbols, const char *word,
                        size_t bytes)
{
    size_t n = 0;
    for (size_t at = 0; at < bytes;) {
        size_t step;
        if (utf8_step((const unsigned char *)word + at, bytes - at, &step) != UTF8_VALID) {
            step = 1;
        }
        symbols[n] = (struct symbol){
            .start = (uint32_t)at,
            .bytes = (uint32_t)step,
            .prev = n == 0 ? SYMBOL_END : (uint32_t)n - 1,
            .next = at + step == bytes ? SYMBOL_END : (uint32_t)n + 1,
            .token = tokenizer_find(t, word + at, step),
        };
        n++;
        at += step;
    }
    return n;
}

static bool spm_may_merge(const struct tokenizer *t, const char *word, const struct symbol *left,
                          const struct symbol *right, uint32_t *ret_priority, int32_t *ret_token)
{
    int32_t token = tokenizer_find(t, word + left->start, left->bytes + right->bytes);
    if (token == TOKEN_NONE) {
        return false;
    }
    *ret_priority = t->priority[token];
    *ret_token = token;
    return true;
}

static const struct merge_rules SPM_RULES = {spm_split, spm_may_merge};

static int encode_word(const struct tokenizer *t, struct scratch *s, const char *word, size_t bytes)
{
    return tokenizer_merge_word(t, s, &SPM_RULES, word, bytes);
}

/* Encodes a word with a space in front of it. */
static int encode_with_prefix(const struct tokenizer *t, struct scratch *s, const char *word,
                              size_t bytes)
{
    if (s->word_capacity < bytes + 1) {
        char *room = realloc(s->word, bytes + 1);
        if (!room) {
            return -ENOMEM;
        }
        s->word = room;
        s->word_capacity = bytes + 1;
    }
    s->word[0] = ' ';
    memcpy(s->word + 1, word, bytes);
    return tokenizer_encode_cached(t, s, encode_word, s->word, bytes + 1, false);
}

size_t tokenizer_word_end(const struct tokenizer *t, const char *text, size_t bytes)
{
    if (!t->words_end_at_spaces) {
        return bytes;
    }
    size_t i = 0;
    while (i < bytes && text[i] == ' ') {
        i++;
    }
    const char *space = memchr(text + i, ' ', bytes - i);
    return space ? (size_t)(space - text) : bytes;
}

static int spm_encode(const struct tokenizer *t, struct scratch *s, const char *text, size_t bytes,
                      bool after_special)
{
    if (has_meta_space(text, bytes)) {
        /* Copies live as long as the call, because the cache of words points into them. */
        char *copy = scratch_keep(s, bytes);
        if (!copy) {
            return -ENOMEM;
        }
        bytes = unescape(copy, text, bytes);
        text = copy;
    }
    bool prefix = after_special && t->add_space_prefix;
    int rc = 0;
    while (bytes > 0 && rc == 0) {
        size_t n = tokenizer_word_end(t, text, bytes);
        rc = prefix ? encode_with_prefix(t, s, text, n)
                    : tokenizer_encode_cached(t, s, encode_word, text, n, true);
        prefix = false;
        text += n;
        bytes -= n;
    }
    return rc;
}

const struct tokenizer_model tokenizer_model_spm = {
    .name = "llama",
    .load_pieces = tokenizer_load_meta_pieces,
    .load = spm_load,
    .encode = spm_encode,
};
