/* daemon/model/tokenizer_special.c - tokens that are found as a whole: by name, and in a text.
 *
 * What llama.cpp does, in other words: the longest special token first, everywhere in the text;
 * then the next one, in what is left between those found. A first pass over the text finds which
 * special tokens occur at all, so that a thousand reserved ones cost nothing. */
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

/* Marks in seen every special token that begins at p: narrows the sorted list byte by byte. */
static bool mark_at(const struct tokenizer *t, const char *p, size_t n, bool *seen)
{
    const struct sorted_pieces *set = &t->specials.sorted;
    struct piece_walk w = sorted_pieces_begin(set, p[0]);
    bool any = false;
    for (size_t i = 1; w.low < w.high; i++) {
        if (sorted_pieces_here(t, set, &w) != TOKEN_NONE) {
            seen[w.low] = any = true; /* the lowest id of those with this text is the one used */
        }
        if (i == n) {
            break;
        }
        sorted_pieces_step(t, set, &w, p[i]);
    }
    return any;
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
                     uint32_t index, int32_t token)
{
    const struct token_entry *e = &t->tokens[token];
    size_t at = f->list[index].offset, end = at + f->list[index].bytes;
    bool reuse = true;
    const char *match;
    while (at < end && (match = memmem(text + at, end - at, e->piece, e->bytes)) != NULL) {
        size_t found = (size_t)(match - text);
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

int tokenizer_partition(const struct tokenizer *t, const char *text, size_t bytes,
                        bool parse_special, struct fragment **ret)
{
    const struct special_set *set = &t->specials;
    struct fragments f = {.capacity = 16};
    f.list = malloc(f.capacity * sizeof(*f.list));
    bool *seen = calloc(set->sorted.n + 1, sizeof(*seen));
    int rc = f.list && seen ? 0 : -ENOMEM;
    if (rc < 0) {
        goto out;
    }
    f.list[f.n++] = (struct fragment){0, bytes, TOKEN_NONE, FRAGMENT_END};
    bool any = false;
    for (size_t i = 0; i < bytes; i++) {
        unsigned byte = (unsigned char)text[i];
        if (set->sorted.first[byte] < set->sorted.first[byte + 1]) {
            any |= mark_at(t, text + i, bytes - i, seen);
        }
    }
    for (uint32_t k = 0; any && k < set->sorted.n && rc == 0; k++) {
        int32_t token = set->sorted.ids[set->by_length[k]];
        if (!seen[set->by_length[k]] ||
            (!parse_special && t->tokens[token].kind != TOKEN_USER_DEFINED)) {
            continue;
        }
        for (uint32_t i = 0; i != FRAGMENT_END && rc == 0;) {
            uint32_t next = f.list[i].next;
            if (f.list[i].token == TOKEN_NONE) {
                rc = cut_token(t, text, &f, i, token);
            }
            i = next;
        }
    }
out:
    free(seen);
    if (rc < 0) {
        free(f.list);
        return rc;
    }
    *ret = f.list;
    return 0;
}
