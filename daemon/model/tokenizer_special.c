/* daemon/model/tokenizer_special.c - tokens that are found as a whole: by name, and in a text.
 *
 * What llama.cpp does, in other words: the longest special token first, everywhere in the text;
 * then the next one, in what is left between those found. A first pass over the text finds where
 * special tokens begin, so that a thousand reserved ones cost nothing. */
#include "daemon/model/tokenizer_internal.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Files rarely say which tokens end a turn: these names do. A row with a key counts only in files
 * without that key. All of them are control tokens, whatever the file says. */
static const struct {
    const char *text;
    bool ends;
    const char *key;
} known_names[] = {
    {"</s>", true, NULL},
    {"<eos>", true, NULL},
    {"[EOS]", true, NULL},
    {"<EOT>", true, NULL},
    {"_<EOT>", true, NULL},
    {"[EOT]", true, NULL},
    {"[e~[", true, NULL},
    {"<|end|>", true, NULL},
    {"<|eot_id|>", true, NULL},
    {"<|eom_id|>", true, NULL},
    {"<|im_end|>", true, NULL},
    {"<|return|>", true, NULL},
    {"<|call|>", true, NULL},
    {"<|calls|>", true, NULL},
    {"<|flush|>", true, NULL},
    {"<|endoftext|>", true, NULL},
    {"<|end_of_text|>", true, NULL},
    {"<end_of_turn>", true, NULL},
    {"<end_of_utterance>", true, NULL},
    {"<｜end▁of▁sentence｜>", true, NULL},
    {"<|fim_pad|>", true, "tokenizer.ggml.fim_pad_token_id"},
    {"<fim-pad>", true, "tokenizer.ggml.fim_pad_token_id"},
    {"<fim_pad>", true, "tokenizer.ggml.fim_pad_token_id"},
    {"<PAD>", true, "tokenizer.ggml.fim_pad_token_id"},
    {"[PAD]", true, "tokenizer.ggml.fim_pad_token_id"},
    {"<|fim_repo|>", true, "tokenizer.ggml.fim_rep_token_id"},
    {"<|repo_name|>", true, "tokenizer.ggml.fim_rep_token_id"},
    {"<fim-repo>", true, "tokenizer.ggml.fim_rep_token_id"},
    {"<REPO>", true, "tokenizer.ggml.fim_rep_token_id"},
    {"<reponame>", true, "tokenizer.ggml.fim_rep_token_id"},
    {"<|file_sep|>", true, "tokenizer.ggml.fim_sep_token_id"},
    {"<|fim_prefix|>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"<fim-prefix>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"<fim_prefix>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"<｜fim▁begin｜>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"<PRE>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"▁<PRE>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"<|code_prefix|>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"<|prefix|>", false, "tokenizer.ggml.fim_pre_token_id"},
    {"<|fim_suffix|>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<fim-suffix>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<fim_suffix>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<｜fim▁hole｜>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<SUF>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"▁<SUF>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<|code_suffix|>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<|suffix|>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<|fim_middle|>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<fim-middle>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<fim_middle>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<｜fim▁end｜>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<MID>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"▁<MID>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<|code_middle|>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<|middle|>", false, "tokenizer.ggml.fim_mid_token_id"},
};
#define N_KNOWN_NAMES (sizeof(known_names) / sizeof(known_names[0]))

/* The file's own ids of tokens that end a generation although they are not eos. */
static const char *const ending_keys[] = {
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
};

static bool equals(struct gguf_string s, const char *text)
{
    size_t n = strlen(text);
    return s.bytes == n && memcmp(s.data, text, n) == 0;
}

static bool may_be_known(struct gguf_string s)
{
    return s.bytes > 0 && strchr("<[_\xE2", s.data[0]) != NULL && s.data[0] != '\0';
}

/* Whether the key's text contains any of the words (NULL behind the last), in any case. */
static bool text_contains(const struct gguf *g, const char *key, const char *const *words)
{
    struct gguf_string text = {NULL, 0};
    (void)gguf_get_string(g, key, &text);
    for (; *words; words++) {
        size_t n = strlen(*words);
        for (size_t i = 0; i + n <= text.bytes; i++) {
            if (strncasecmp(text.data + i, *words, n) == 0) {
                return true;
            }
        }
    }
    return false;
}

/* Some tokens swallow white space beside them, which the file does not record: llama.cpp goes by
 * the model's name, and so do we. phi-3's special tokens swallow what follows; the mask of some
 * encoders, whose text is returned, what precedes. */
static const char *mask_that_strips(const struct gguf *g)
{
    static const char *const pres[] = {"jina-v2-de", "jina-v2-es", "jina-v2-code", NULL};
    static const char *const archs[] = {"nomic-bert-moe", "jina-bert-v3", NULL};
    static const char *const names[] = {"modern-bert", NULL};
    if (text_contains(g, "tokenizer.ggml.pre", pres) ||
        text_contains(g, "general.architecture", archs)) {
        return "<mask>";
    }
    return text_contains(g, "general.name", names) ? "[MASK]" : NULL;
}

static bool strips_right(const struct gguf *g)
{
    static const char *const names[] = {"phi3", "phi-3", NULL};
    return text_contains(g, "general.name", names);
}

/* gpt-oss: where a turn ends with <|return|> or <|call|>, <|end|> only ends a message. */
static void unmark_message_end(struct tokenizer *t, const struct gguf_string *texts)
{
    int32_t end = TOKEN_NONE;
    bool returns = false, calls = false, flushes = false;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (t->tokens[i].flags & TOKEN_FLAG_EOG) {
            returns |= equals(texts[i], "<|return|>");
            calls |= equals(texts[i], "<|call|>") || equals(texts[i], "<|calls|>");
            flushes |= equals(texts[i], "<|flush|>");
            end = equals(texts[i], "<|end|>") ? (int32_t)i : end;
        }
    }
    if (end != TOKEN_NONE && end != t->eos && calls && (returns || flushes)) {
        t->tokens[end].flags &= (uint8_t)~TOKEN_FLAG_EOG;
    }
}

void tokenizer_mark_names(struct tokenizer *t, const struct gguf *g,
                          const struct gguf_string *texts)
{
    bool absent[N_KNOWN_NAMES];
    for (size_t k = 0; k < N_KNOWN_NAMES; k++) {
        absent[k] = !known_names[k].key || !gguf_has_key(g, known_names[k].key);
    }
    bool rstrip = strips_right(g);
    const char *mask = mask_that_strips(g);
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        struct token_entry *e = &t->tokens[i];
        for (size_t k = 0; may_be_known(texts[i]) && k < N_KNOWN_NAMES; k++) {
            if (absent[k] && equals(texts[i], known_names[k].text)) {
                e->kind = TOKEN_CONTROL;
                e->flags |= known_names[k].ends ? TOKEN_FLAG_EOG : 0;
            }
        }
        if (rstrip && !equals(texts[i], "<unk>") && !equals(texts[i], "<s>") &&
            !equals(texts[i], "<|endoftext|>")) {
            e->flags |= TOKEN_FLAG_RSTRIP;
        }
        if (mask && equals(texts[i], mask)) {
            e->flags |= TOKEN_FLAG_LSTRIP;
        }
    }
    for (size_t k = 0; k < sizeof(ending_keys) / sizeof(ending_keys[0]); k++) {
        uint32_t id;
        if (gguf_get_u32(g, ending_keys[k], &id) == 0 && id < t->n_vocab) {
            t->tokens[id].flags |= TOKEN_FLAG_EOG;
        }
    }
    unmark_message_end(t, texts);
}

static int by_length(const void *a, const void *b, void *tokenizer)
{
    const struct tokenizer *t = tokenizer;
    int32_t x = t->specials.sorted.ids[*(const uint32_t *)a];
    int32_t y = t->specials.sorted.ids[*(const uint32_t *)b];
    uint32_t n = t->tokens[x].bytes, m = t->tokens[y].bytes;
    return n != m ? (n < m) - (n > m) : (x > y) - (x < y);
}

void tokenizer_free_specials(struct tokenizer *t)
{
    sorted_pieces_finish(&t->specials.sorted);
    free(t->specials.by_length);
}

int tokenizer_build_specials(struct tokenizer *t)
{
    struct special_set *set = &t->specials;
    if (sorted_pieces_init(&set->sorted, t, TOKEN_FLAG_SPECIAL) < 0) {
        return -ENOMEM;
    }
    uint32_t n = set->sorted.n;
    set->by_length = calloc(n + 1, sizeof(*set->by_length));
    if (!set->by_length) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n; i++) {
        set->by_length[i] = i;
    }
    qsort_r(set->by_length, n, sizeof(*set->by_length), by_length, t);
    return 0;
}

/* Where special tokens begin, in the order of the text: what a first pass finds. A text with very
 * many is searched again for each of them instead. */
#define MAX_PLACES 65536

struct places {
    struct place {
        uint32_t piece; /* index into specials.sorted.ids */
        uint32_t at;
    } * list; /* once sorted: by piece, then by place */
    size_t n, capacity;
    uint32_t *count; /* (n of specials) how often each begins */
    bool too_many;
};

static int add_place(struct places *p, uint32_t piece, size_t at)
{
    p->count[piece]++;
    p->too_many |= p->n == MAX_PLACES;
    if (p->too_many) {
        return 0;
    }
    if (p->n == p->capacity) {
        size_t capacity = p->capacity ? p->capacity * 2 : 64;
        struct place *list = reallocarray(p->list, capacity, sizeof(*list));
        if (!list) {
            return -ENOMEM;
        }
        p->list = list;
        p->capacity = capacity;
    }
    p->list[p->n++] = (struct place){piece, (uint32_t)at};
    return 0;
}

/* Notes every special token that begins at text[at]: narrows the sorted list byte by byte. */
static int find_places_at(const struct tokenizer *t, const char *text, size_t bytes, size_t at,
                          bool parse_special, struct places *p)
{
    const struct sorted_pieces *set = &t->specials.sorted;
    struct piece_walk w = sorted_pieces_begin(set, text[at]);
    int rc = 0;
    for (size_t i = at + 1; w.low < w.high && rc == 0; i++) {
        int32_t token = sorted_pieces_here(t, set, &w);
        if (token != TOKEN_NONE && (parse_special || t->tokens[token].kind == TOKEN_USER_DEFINED)) {
            rc =
                add_place(p, w.low, at); /* of those with this text the lowest id is the one used */
        }
        if (i == bytes) {
            break;
        }
        sorted_pieces_step(t, set, &w, text[i]);
    }
    return rc;
}

static int by_piece_and_place(const void *a, const void *b)
{
    const struct place *x = a, *y = b;
    return x->piece != y->piece ? (x->piece > y->piece) - (x->piece < y->piece)
                                : (x->at > y->at) - (x->at < y->at);
}

static int find_places(const struct tokenizer *t, const char *text, size_t bytes,
                       bool parse_special, struct places *p)
{
    const struct sorted_pieces *set = &t->specials.sorted;
    p->count = calloc((size_t)set->n + 1, sizeof(*p->count));
    int rc = p->count ? 0 : -ENOMEM;
    for (size_t at = 0; at < bytes && rc == 0; at++) {
        unsigned byte = (unsigned char)text[at];
        if (set->first[byte] < set->first[byte + 1]) {
            rc = find_places_at(t, text, bytes, at, parse_special, p);
        }
    }
    if (p->n > 0) {
        qsort(p->list, p->n, sizeof(*p->list), by_piece_and_place);
    }
    return rc;
}

/* The places of one token, from the text's start to its end. */
struct place_cursor {
    const struct place *next, *end; /* NULL: search the text */
};

/* The first place of the token in text[at..end), or end. */
static size_t next_place(struct place_cursor *c, const struct token_entry *e, const char *text,
                         size_t at, size_t end)
{
    if (!c->next) {
        const char *match = memmem(text + at, end - at, e->piece, e->bytes);
        return match ? (size_t)(match - text) : end;
    }
    while (c->next < c->end && c->next->at < at) {
        c->next++;
    }
    return c->next < c->end && c->next->at + (size_t)e->bytes <= end ? c->next->at : end;
}

struct fragments {
    struct fragment *list;
    size_t n, capacity;
};

static int add_after(struct fragments *f, uint32_t *index, struct fragment added)
{
    if (f->n == f->capacity) {
        if (f->capacity > UINT32_MAX / 4) {
            return -E2BIG;
        }
        size_t capacity = f->capacity * 2;
        struct fragment *list = reallocarray(f->list, capacity, sizeof(*list));
        if (!list) {
            return -ENOMEM;
        }
        f->list = list;
        f->capacity = capacity;
    }
    added.next = f->list[*index].next;
    f->list[*index].next = (uint32_t)f->n;
    f->list[f->n] = added;
    *index = (uint32_t)f->n++;
    return 0;
}

/* Cuts one token out of the plain fragment at index, wherever it occurs there. A fragment's place
 * is reused by what is left of the token, or by the token itself. */
static int cut_token(const struct tokenizer *t, const char *text, struct fragments *f,
                     uint32_t index, int32_t token, struct place_cursor *places)
{
    const struct token_entry *e = &t->tokens[token];
    size_t at = f->list[index].offset, end = at + f->list[index].bytes;
    bool reuse = true;
    size_t found;
    while (at < end && (found = next_place(places, e, text, at, end)) < end) {
        int rc = 0;
        size_t before = found;
        while ((e->flags & TOKEN_FLAG_LSTRIP) && before > at &&
               isspace((unsigned char)text[before - 1])) {
            before--;
        }
        if (before > at) {
            struct fragment plain = {at, before - at, TOKEN_NONE, 0};
            if (reuse) {
                f->list[index].bytes = plain.bytes;
            } else {
                rc = add_after(f, &index, plain);
            }
            reuse = false;
        }
        if (rc == 0 && reuse) {
            f->list[index].token = token;
            reuse = false;
        } else if (rc == 0) {
            rc = add_after(f, &index, (struct fragment){found, e->bytes, token, 0});
        }
        if (rc < 0) {
            return rc;
        }
        at = found + e->bytes;
        while ((e->flags & TOKEN_FLAG_RSTRIP) && at < end && isspace((unsigned char)text[at])) {
            at++;
        }
    }
    if (!reuse && at < end) {
        return add_after(f, &index, (struct fragment){at, end - at, TOKEN_NONE, 0});
    }
    return 0;
}

/* Cuts one token out of all plain fragments; index: of its piece in the sorted list. */
static int cut_everywhere(const struct tokenizer *t, const char *text, struct fragments *f,
                          uint32_t piece, const struct places *p, size_t *first_place)
{
    struct place_cursor cursor = {NULL, NULL};
    int rc = 0;
    if (!p->too_many) {
        cursor.next = p->list + first_place[piece];
        cursor.end = cursor.next + p->count[piece];
    }
    for (uint32_t i = 0; i != FRAGMENT_END && rc == 0;) {
        uint32_t next = f->list[i].next;
        if (f->list[i].token == TOKEN_NONE) {
            rc = cut_token(t, text, f, i, t->specials.sorted.ids[piece], &cursor);
        }
        i = next;
    }
    return rc;
}

static int cut_all(const struct tokenizer *t, const char *text, struct fragments *f,
                   const struct places *p)
{
    const struct special_set *set = &t->specials;
    uint32_t n = set->sorted.n;
    size_t *first_place = calloc((size_t)n + 1, sizeof(*first_place));
    int rc = first_place ? 0 : -ENOMEM;
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        first_place[i + 1] = first_place[i] + p->count[i];
    }
    for (uint32_t k = 0; k < n && rc == 0; k++) {
        uint32_t piece = set->by_length[k];
        if (p->count[piece] > 0) {
            rc = cut_everywhere(t, text, f, piece, p, first_place);
        }
    }
    free(first_place);
    return rc;
}

int tokenizer_partition(const struct tokenizer *t, const char *text, size_t bytes,
                        bool parse_special, struct fragment **ret)
{
    struct places places = {.n = 0};
    struct fragments f = {.capacity = 16};
    f.list = malloc(f.capacity * sizeof(*f.list));
    int rc = f.list ? 0 : -ENOMEM;
    if (rc == 0) {
        f.list[f.n++] = (struct fragment){0, bytes, TOKEN_NONE, FRAGMENT_END};
        rc = find_places(t, text, bytes, parse_special, &places);
    }
    if (rc == 0 && places.n > 0) {
        rc = cut_all(t, text, &f, &places);
    }
    free(places.list);
    free(places.count);
    if (rc < 0) {
        free(f.list);
        return rc;
    }
    *ret = f.list;
    return 0;
}
