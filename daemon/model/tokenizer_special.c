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
    {"<|fim_suffix|>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<fim-suffix>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<fim_suffix>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<｜fim▁hole｜>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<SUF>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"▁<SUF>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<|code_suffix|>", false, "tokenizer.ggml.fim_suf_token_id"},
    {"<|fim_middle|>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<fim-middle>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<fim_middle>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<｜fim▁end｜>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<MID>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"▁<MID>", false, "tokenizer.ggml.fim_mid_token_id"},
    {"<|code_middle|>", false, "tokenizer.ggml.fim_mid_token_id"},
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

/* phi-3's control tokens swallow white space, which the file does not record: llama.cpp goes by the
 * model's name, and so do we. */
static bool strips_right(const struct gguf *g)
{
    struct gguf_string name = {NULL, 0};
    (void)gguf_get_string(g, "general.name", &name);
    for (size_t i = 0; i + 4 <= name.bytes; i++) {
        if (strncasecmp(name.data + i, "phi3", 4) == 0 ||
            (i + 5 <= name.bytes && strncasecmp(name.data + i, "phi-3", 5) == 0)) {
            return true;
        }
    }
    return false;
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
    }
    for (size_t k = 0; k < sizeof(ending_keys) / sizeof(ending_keys[0]); k++) {
        uint32_t id;
        if (gguf_get_u32(g, ending_keys[k], &id) == 0 && id < t->n_vocab) {
            t->tokens[id].flags |= TOKEN_FLAG_EOG;
        }
    }
    unmark_message_end(t, texts);
}

static int compare_pieces(const struct token_entry *a, const struct token_entry *b)
{
    int order = memcmp(a->piece, b->piece, a->bytes < b->bytes ? a->bytes : b->bytes);
    return order ? order : (a->bytes > b->bytes) - (a->bytes < b->bytes);
}

static int by_text(const void *a, const void *b, void *tokenizer)
{
    const struct tokenizer *t = tokenizer;
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    int order = compare_pieces(&t->tokens[x], &t->tokens[y]);
    return order ? order : (x > y) - (x < y);
}

static int by_length(const void *a, const void *b, void *tokenizer)
{
    const struct tokenizer *t = tokenizer;
    int32_t x = t->specials.by_text[*(const uint32_t *)a];
    int32_t y = t->specials.by_text[*(const uint32_t *)b];
    uint32_t n = t->tokens[x].bytes, m = t->tokens[y].bytes;
    return n != m ? (n < m) - (n > m) : (x > y) - (x < y);
}

void tokenizer_free_specials(struct tokenizer *t)
{
    free(t->specials.by_text);
    free(t->specials.by_length);
}

int tokenizer_build_specials(struct tokenizer *t)
{
    struct special_set *set = &t->specials;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        set->n += (t->tokens[i].flags & TOKEN_FLAG_SPECIAL) != 0;
    }
    set->by_text = calloc(set->n + 1, sizeof(*set->by_text));
    set->by_length = calloc(set->n + 1, sizeof(*set->by_length));
    if (!set->by_text || !set->by_length) {
        return -ENOMEM;
    }
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (t->tokens[i].flags & TOKEN_FLAG_SPECIAL) {
            set->by_length[n] = n;
            set->by_text[n++] = (int32_t)i;
        }
    }
    qsort_r(set->by_text, n, sizeof(*set->by_text), by_text, t);
    qsort_r(set->by_length, n, sizeof(*set->by_length), by_length, t);
    for (uint32_t i = 0, byte = 0; byte < 257; byte++) {
        while (i < n && (unsigned char)t->tokens[set->by_text[i]].piece[0] < byte) {
            i++;
        }
        set->first[byte] = i;
    }
    return 0;
}

/* The first of by_text[low..high), which agree in depth bytes, whose next byte is >= byte. */
static uint32_t lower_bound(const struct tokenizer *t, uint32_t low, uint32_t high, size_t depth,
                            unsigned byte)
{
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct token_entry *e = &t->tokens[t->specials.by_text[middle]];
        if (e->bytes <= depth || (unsigned char)e->piece[depth] < byte) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Marks in seen every special token that begins at p: narrows the sorted list byte by byte. */
static bool mark_at(const struct tokenizer *t, const char *p, size_t n, bool *seen)
{
    const struct special_set *set = &t->specials;
    unsigned byte = (unsigned char)p[0];
    uint32_t low = set->first[byte], high = set->first[byte + 1];
    bool any = false;
    for (size_t depth = 1; low < high; depth++) {
        if (t->tokens[set->by_text[low]].bytes == depth) {
            seen[low] = any = true;
            while (low < high && t->tokens[set->by_text[low]].bytes == depth) {
                low++; /* the same text again: the lowest id is the one that is used */
            }
        }
        if (depth == n) {
            break;
        }
        byte = (unsigned char)p[depth];
        low = lower_bound(t, low, high, depth, byte);
        high = lower_bound(t, low, high, depth, byte + 1);
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
        if (found > at) {
            struct fragment plain = {at, found - at, TOKEN_NONE, 0};
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
    bool *seen = calloc(set->n + 1, sizeof(*seen));
    int rc = f.list && seen ? 0 : -ENOMEM;
    if (rc < 0) {
        goto out;
    }
    f.list[f.n++] = (struct fragment){0, bytes, TOKEN_NONE, FRAGMENT_END};
    bool any = false;
    for (size_t i = 0; i < bytes; i++) {
        unsigned byte = (unsigned char)text[i];
        if (set->first[byte] < set->first[byte + 1]) {
            any |= mark_at(t, text + i, bytes - i, seen);
        }
    }
    for (uint32_t k = 0; any && k < set->n && rc == 0; k++) {
        int32_t token = set->by_text[set->by_length[k]];
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
