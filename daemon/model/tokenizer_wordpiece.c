/* daemon/model/tokenizer_wordpiece.c - WordPiece, the vocabulary of BERT and its kin.
 *
 * Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019. A text is cleaned
 * (control characters go, accents and capitals too where the model was trained without them), cut
 * at white space, around every punctuation mark and every Chinese character, and each word becomes
 * the longest piece that it begins with, then the longest that continues it, and so on; a word that
 * does not work out is one UNKNOWN. A GGUF file marks the pieces that begin a word with U+2581
 * instead of marking the others with "##": here that is a space in front of the word.
 *
 * Accents are what the original drops: marks without a width of their own (Mn) of the canonical
 * decomposition. */
#include "daemon/model/tokenizer_internal.h"
#include "daemon/model/utf8.h"

#include <utf8proc.h>

#include <errno.h>
#include <string.h>

#define MAX_WORD_CHARACTERS 100 /* the original's limit: a longer word is UNKNOWN */
#define MAX_DECOMPOSED      32  /* code points of one; Unicode has 4 at most */
#define MAX_UTF8_BYTES      4
#define META_SPACE          0x2581
#define REPLACEMENT         0xFFFD

struct word {
    char text[1 + MAX_WORD_CHARACTERS * MAX_UTF8_BYTES]; /* a space, and the word */
    size_t bytes;                                        /* 1: empty */
    size_t characters;                                   /* also those that found no room */
};

static bool is_space(utf8proc_int32_t c)
{
    return (c >= 0x9 && c <= 0xD) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

static bool is_dropped(utf8proc_int32_t c, utf8proc_category_t category)
{
    return c == 0 || c == REPLACEMENT || category == UTF8PROC_CATEGORY_CC ||
           category == UTF8PROC_CATEGORY_CF || category == UTF8PROC_CATEGORY_CO ||
           category == UTF8PROC_CATEGORY_CS;
}

static bool is_punctuation(utf8proc_int32_t c)
{
    utf8proc_category_t k = utf8proc_category(c);
    bool symbol = k >= UTF8PROC_CATEGORY_SM && k <= UTF8PROC_CATEGORY_SO;
    return (k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO) || (c < 0x7F && symbol);
}

/* The blocks that the original lists; Japanese and Korean scripts are words. */
static bool is_chinese(utf8proc_int32_t c)
{
    return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) ||
           (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B73F) ||
           (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B820 && c <= 0x2CEAF) ||
           (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

/* Longest piece first; false when the word cannot be made of pieces. */
static int push_pieces(const struct tokenizer *t, struct scratch *s, const char *word, size_t bytes,
                       bool *ret_whole)
{
    for (size_t at = 0; at < bytes;) {
        struct piece_walk w = sorted_pieces_begin(&t->sorted, word[at]);
        int32_t longest = TOKEN_NONE;
        size_t length = 0;
        for (size_t i = at + 1; w.low < w.high; i++) {
            s->n_steps++;
            int32_t here = sorted_pieces_here(t, &t->sorted, &w);
            if (here != TOKEN_NONE) {
                longest = here;
                length = w.depth;
            }
            if (i == bytes) {
                break;
            }
            sorted_pieces_step(t, &t->sorted, &w, word[i]);
        }
        if (longest == TOKEN_NONE) {
            *ret_whole = false;
            return 0;
        }
        int rc = scratch_push(s, longest);
        if (rc < 0) {
            return rc;
        }
        at += length;
    }
    *ret_whole = true;
    return 0;
}

static int push_unknown(const struct tokenizer *t, struct scratch *s)
{
    return t->unk == TOKEN_NONE ? -EILSEQ : scratch_push(s, t->unk);
}

static int encode_word(const struct tokenizer *t, struct scratch *s, const char *word, size_t bytes)
{
    size_t first = s->n_out;
    bool whole = false;
    int rc = push_pieces(t, s, word, bytes, &whole);
    if (rc < 0 || whole) {
        return rc;
    }
    s->n_out = first;
    return push_unknown(t, s);
}

static int end_word(const struct tokenizer *t, struct scratch *s, struct word *w)
{
    int rc = 0;
    if (w->characters > MAX_WORD_CHARACTERS) {
        rc = push_unknown(t, s);
    } else if (w->characters > 0) {
        rc = tokenizer_encode_cached(t, s, encode_word, w->text, w->bytes, false);
    }
    w->bytes = 1;
    w->characters = 0;
    return rc;
}

/* A character of the cleaned text; alone: it is a word. */
static int add_character(const struct tokenizer *t, struct scratch *s, struct word *w,
                         utf8proc_int32_t c, bool alone)
{
    alone |= is_punctuation(c);
    int rc = alone ? end_word(t, s, w) : 0;
    w->characters++;
    if (w->characters <= MAX_WORD_CHARACTERS) {
        c = c == META_SPACE ? ' ' : c; /* as the pieces have it */
        w->bytes += (size_t)utf8proc_encode_char(c, (utf8proc_uint8_t *)w->text + w->bytes);
    }
    return rc == 0 && alone ? end_word(t, s, w) : rc;
}

/* A character of the text: none, one, or several of the cleaned text. */
static int clean_character(const struct tokenizer *t, struct scratch *s, struct word *w,
                           utf8proc_int32_t c)
{
    utf8proc_int32_t parts[MAX_DECOMPOSED] = {c};
    utf8proc_ssize_t n = 1;
    if (t->strip_accents && c >= 0x80) {
        int last_class = 0;
        n = utf8proc_decompose_char(c, parts, MAX_DECOMPOSED, UTF8PROC_DECOMPOSE, &last_class);
        if (n < 0 || n > MAX_DECOMPOSED) {
            parts[0] = c;
            n = 1;
        }
    }
    bool alone = is_chinese(c);
    int rc = 0;
    for (utf8proc_ssize_t i = 0; i < n && rc == 0; i++) {
        if (t->strip_accents && utf8proc_category(parts[i]) == UTF8PROC_CATEGORY_MN) {
            continue;
        }
        utf8proc_int32_t part = t->lowercase ? utf8proc_tolower(parts[i]) : parts[i];
        rc = add_character(t, s, w, part, alone);
    }
    return rc;
}

static int wordpiece_encode(const struct tokenizer *t, struct scratch *s, const char *text,
                            size_t bytes, bool after_special)
{
    (void)after_special;
    struct word w = {.text = " ", .bytes = 1};
    int rc = 0;
    for (size_t at = 0, step; at < bytes && rc == 0; at += step) {
        const unsigned char *p = (const unsigned char *)text + at;
        utf8proc_int32_t c = REPLACEMENT;
        if (utf8_step(p, bytes - at, &step) == UTF8_VALID) {
            (void)utf8proc_iterate(p, (utf8proc_ssize_t)step, &c);
        }
        if (is_space(c)) {
            rc = end_word(t, s, &w);
        } else if (!is_dropped(c, utf8proc_category(c))) {
            rc = clean_character(t, s, &w, c);
        }
    }
    return rc == 0 ? end_word(t, s, &w) : rc;
}

static int load_flag(const struct gguf *g, const char *name, bool *ret, struct fmt_error *err)
{
    int rc = gguf_get_bool(g, name, ret);
    return rc < 0 && rc != -ENOENT ? fmt_fail(err, -EINVAL, "%s: not a bool", name) : 0;
}

static int wordpiece_load(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    if (t->bos == TOKEN_NONE || t->sep == TOKEN_NONE) {
        return fmt_fail(err, -EINVAL,
                        "tokenizer.ggml.%s: a vocabulary of kind bert needs the token",
                        t->bos == TOKEN_NONE ? "bos_token_id" : "seperator_token_id");
    }
    t->add_bos = t->add_sep = true;
    t->add_space_prefix = true;
    t->lowercase = true;
    int rc = load_flag(g, "tokenizer.ggml.normalizer.lowercase", &t->lowercase, err);
    t->strip_accents = t->lowercase;
    if (rc == 0) {
        rc = load_flag(g, "tokenizer.ggml.normalizer.strip_accents", &t->strip_accents, err);
    }
    if (rc == 0 && sorted_pieces_init(&t->sorted, t, TOKEN_FLAG_MERGES) < 0) {
        rc = fmt_fail(err, -ENOMEM, "tokenizer.ggml.tokens: out of memory");
    }
    return rc;
}

const struct tokenizer_model tokenizer_model_wordpiece = {
    .name = "bert",
    .load_pieces = tokenizer_load_meta_pieces,
    .load = wordpiece_load,
    .encode = wordpiece_encode,
};
