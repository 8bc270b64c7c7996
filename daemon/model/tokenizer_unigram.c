/* daemon/model/tokenizer_unigram.c - unigram vocabularies: the likeliest way to cut a text.
 *
 * Kudo, "Subword Regularization", 2018. A piece's score is the logarithm of its probability; of all
 * ways to cut a text the one with the greatest sum is found by going over its characters once
 * (Viterbi). A character that no piece covers is UNKNOWN, at a score below all others.
 *
 *   text -> normalised by the file's rules, spaces put in front and merged
 *        -> words: no piece reaches over a space that follows something else
 *        -> pieces
 *
 * Successive UNKNOWNs are one. Where the vocabulary has a token for every byte, those stand for a
 * character instead. */
#include "daemon/model/tokenizer_internal.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define UNKNOWN_PENALTY 10.0
#define MAX_PIECE_BYTES 1024 /* bounds the work for each character; real ones have some dozens */
#define MAX_GROWTH      18   /* normalised bytes for each of the text; NFKC needs at most 11 */
#define GROWTH_FLOOR    64
#define MIN_LATTICE     64

static const char META_SPACE[] = "\xE2\x96\x81"; /* U+2581 */

/* ---- normalisation --------------------------------------------------------------------------- */

struct normaliser {
    bool prepend, merge;
    bool in_word, prepended;
    char *to; /* NULL: only measure */
    size_t bytes;
};

static void put(struct normaliser *n, char byte)
{
    if (n->to) {
        n->to[n->bytes] = byte;
    }
    n->bytes++;
}

static void put_all(struct normaliser *n, struct gguf_string s)
{
    for (size_t i = 0; i < s.bytes; i++) {
        if (s.data[i] == ' ') {
            n->in_word = false;
            if (!n->merge) {
                put(n, ' ');
            }
            continue;
        }
        if (!n->in_word) {
            n->in_word = true;
            if (n->merge || (n->prepend && !n->prepended)) {
                put(n, ' ');
                n->prepended = true;
            }
        }
        put(n, s.data[i]);
    }
}

/* What stands at the text's start, normalised; returns how much of the text that is. */
static size_t normalise_next(const struct tokenizer *t, const char *text, size_t bytes,
                             struct gguf_string *ret)
{
    size_t n = charsmap_find(t->charsmap, text, bytes, ret);
    if (n > 0) {
        return n;
    }
    if (utf8_step((const unsigned char *)text, bytes, &n) == UTF8_VALID) {
        *ret = (struct gguf_string){text, n};
        return n;
    }
    *ret = (struct gguf_string){"\xEF\xBF\xBD", 3};
    return 1;
}

static int normalise(const struct tokenizer *t, const char *text, size_t bytes, char *to,
                     size_t *ret_bytes)
{
    struct normaliser n = {.prepend = t->prepend_space, .merge = t->merge_spaces, .to = to};
    size_t limit = bytes * MAX_GROWTH + GROWTH_FLOOR; /* a text has at most 2^30 bytes */
    limit = limit < TOKENIZER_MAX_TEXT_BYTES ? limit : TOKENIZER_MAX_TEXT_BYTES;
    for (size_t at = 0; at < bytes;) {
        struct gguf_string s;
        at += normalise_next(t, text + at, bytes - at, &s);
        if (s.bytes > limit || n.bytes > limit - s.bytes) {
            return -E2BIG;
        }
        put_all(&n, s);
    }
    *ret_bytes = n.bytes;
    return 0;
}

/* U+2581 is a space to the pieces, but not to the rules about spaces: only here it becomes one. */
static size_t unescape_in_place(char *text, size_t bytes)
{
    char *to = text, *from = text, *end = text + bytes;
    while (from < end) {
        char *meta = memmem(from, (size_t)(end - from), META_SPACE, strlen(META_SPACE));
        size_t n = (size_t)((meta ? meta : end) - from);
        memmove(to, from, n);
        to += n;
        from += n;
        if (meta) {
            *to++ = ' ';
            from += strlen(META_SPACE);
        }
    }
    return (size_t)(to - text);
}

/* ---- the likeliest pieces -------------------------------------------------------------------- */

static int reserve_lattice(struct scratch *s, size_t n)
{
    if (n <= s->lattice_capacity) {
        return 0;
    }
    size_t capacity = n * 2 > MIN_LATTICE ? n * 2 : MIN_LATTICE;
    struct lattice_node *nodes = reallocarray(s->lattice, capacity, sizeof(*nodes));
    if (!nodes) {
        return -ENOMEM;
    }
    s->lattice = nodes;
    s->lattice_capacity = capacity;
    return 0;
}

static void offer(struct lattice_node *end, double score, uint32_t start, int32_t token)
{
    if (score > end->score) {
        *end = (struct lattice_node){.score = score, .start = start, .token = token};
    }
}

/* Offers every piece that begins with the character of step bytes at start; without one that is
 * just this character, UNKNOWN. */
static void offer_pieces(const struct tokenizer *t, struct scratch *s, const char *word,
                         size_t bytes, size_t start, size_t step)
{
    struct lattice_node *nodes = s->lattice;
    double before = nodes[start].score;
    struct piece_walk w = sorted_pieces_begin(&t->sorted, word[start]);
    bool covered = false;
    for (size_t end = start + 1; w.low < w.high; end++) {
        s->n_steps++;
        int32_t token = sorted_pieces_here(t, &t->sorted, &w);
        if (token != TOKEN_NONE) {
            covered |= w.depth == step;
            offer(&nodes[end], before + (double)t->scores[token], (uint32_t)start, token);
        }
        if (end == bytes) {
            break;
        }
        sorted_pieces_step(t, &t->sorted, &w, word[end]);
    }
    if (!covered) {
        offer(&nodes[start + step], before + t->unknown_score, (uint32_t)start, TOKEN_NONE);
    }
}

static int push_best(const struct tokenizer *t, struct scratch *s, const char *word, size_t bytes)
{
    struct lattice_node *nodes = s->lattice;
    for (uint32_t end = (uint32_t)bytes; end > 0; end = nodes[end].start) {
        nodes[nodes[end].start].next = end;
    }
    bool after_unknown = false;
    int rc = 0;
    for (uint32_t start = 0; start < bytes && rc == 0; start = nodes[start].next) {
        const struct lattice_node *end = &nodes[nodes[start].next];
        bool unknown = end->token == TOKEN_NONE;
        if (!unknown) {
            rc = scratch_push(s, end->token);
        } else if (t->bytes_for_unknown) {
            rc = tokenizer_push_bytes(t, s, word + start, nodes[start].next - start);
        } else if (!after_unknown) {
            rc = t->unk == TOKEN_NONE ? -EILSEQ : scratch_push(s, t->unk);
        }
        after_unknown = unknown;
    }
    return rc;
}

static int encode_word(const struct tokenizer *t, struct scratch *s, const char *word, size_t bytes)
{
    int rc = reserve_lattice(s, bytes + 1);
    if (rc < 0) {
        return rc;
    }
    struct lattice_node *nodes = s->lattice;
    nodes[0] = (struct lattice_node){.token = TOKEN_NONE};
    for (size_t i = 1; i <= bytes; i++) {
        nodes[i] = (struct lattice_node){.score = -DBL_MAX, .token = TOKEN_NONE};
    }
    for (size_t at = 0, step; at < bytes; at += step) {
        (void)utf8_step((const unsigned char *)word + at, bytes - at, &step);
        offer_pieces(t, s, word, bytes, at, step);
    }
    return push_best(t, s, word, bytes);
}

static int unigram_encode(const struct tokenizer *t, struct scratch *s, const char *text,
                          size_t bytes, bool after_special)
{
    (void)after_special; /* a fragment is always a text of its own */
    size_t n;
    int rc = normalise(t, text, bytes, NULL, &n);
    if (rc < 0 || n == 0) {
        return rc;
    }
    char *word = scratch_keep(s, n);
    if (!word) {
        return -ENOMEM;
    }
    (void)normalise(t, text, bytes, word, &n);
    size_t left = unescape_in_place(word, n), before = s->n_out;
    while (left > 0 && rc == 0) {
        size_t length = tokenizer_word_end(t, word, left), first = s->n_out;
        rc = tokenizer_encode_cached(t, s, encode_word, word, length, true);
        bool joins = rc == 0 && s->n_out > first && first > before && !t->bytes_for_unknown &&
                     s->out[first] == t->unk && s->out[first - 1] == t->unk;
        if (joins) { /* successive UNKNOWNs are one, also from word to word */
            s->n_out--;
            memmove(s->out + first, s->out + first + 1, (s->n_out - first) * sizeof(*s->out));
        }
        word += length;
        left -= length;
    }
    return rc;
}

/* ---- loading --------------------------------------------------------------------------------- */

static int load_flag(const struct gguf *g, const char *key, bool *ret, struct fmt_error *err)
{
    int rc = gguf_get_bool(g, key, ret);
    return rc < 0 && rc != -ENOENT ? fmt_fail(err, -EINVAL, "%s: not a bool", key) : 0;
}

/* Scores of user-defined pieces are 0: nothing is likelier. */
static int load_scores(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    int rc = tokenizer_read_scores(t, g, &t->scores, err);
    double least = FLT_MAX;
    for (uint32_t i = 0; i < t->n_vocab && rc == 0; i++) {
        const struct token_entry *e = &t->tokens[i];
        if (!isfinite(t->scores[i])) {
            return fmt_fail(err, -EINVAL, "tokenizer.ggml.scores[%u]: not a finite number", i);
        }
        if ((e->flags & TOKEN_FLAG_MERGES) && e->bytes > MAX_PIECE_BYTES) {
            return fmt_fail(err, -EINVAL,
                            "tokenizer.ggml.tokens[%u]: a piece of %u bytes (limit %d)", i,
                            e->bytes, MAX_PIECE_BYTES);
        }
        if (e->kind == TOKEN_NORMAL && (double)t->scores[i] < least) {
            least = (double)t->scores[i];
        }
        if (e->kind == TOKEN_USER_DEFINED) {
            t->scores[i] = 0;
        }
    }
    t->unknown_score = least - UNKNOWN_PENALTY;
    return rc;
}

/* Whether tokens of type byte exist for all bytes: pieces of one byte do not count. */
static bool has_byte_tokens(const struct tokenizer *t)
{
    for (int b = 0; b < 256; b++) {
        int32_t token = t->byte_token[b];
        if (token == TOKEN_NONE || t->tokens[token].kind != TOKEN_BYTE) {
            return false;
        }
    }
    return true;
}

static int unigram_load(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    int rc = load_flag(g, "tokenizer.ggml.add_space_prefix", &t->prepend_space, err);
    if (rc == 0) {
        rc = load_flag(g, "tokenizer.ggml.remove_extra_whitespaces", &t->merge_spaces, err);
    }
    if (rc == 0) {
        rc = load_scores(t, g, err);
    }
    if (rc == 0) {
        rc = charsmap_load(g, &t->charsmap, err);
    }
    if (rc == 0 && sorted_pieces_init(&t->sorted, t, TOKEN_FLAG_MERGES) < 0) {
        rc = fmt_fail(err, -ENOMEM, "tokenizer.ggml.tokens: out of memory");
    }
    t->add_space_prefix = t->prepend_space || t->merge_spaces;
    t->words_end_at_spaces = tokenizer_words_end_at_spaces(t);
    t->bytes_for_unknown = has_byte_tokens(t);
    t->add_eos = true;
    return rc;
}

const struct tokenizer_model tokenizer_model_unigram = {
    .name = "t5",
    .load_pieces = tokenizer_load_meta_pieces,
    .load = unigram_load,
    .encode = unigram_encode,
};
