/* daemon/model/tokenizer_vocab.c - tokens, kinds and special ids out of the file; lookup by bytes.
 */
#include "daemon/model/tokenizer_internal.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#define MAX_TOKEN_TYPE    TOKEN_BYTE
#define MAX_SPECIAL_BYTES 1024 /* real ones have some dozens */

uint64_t tokenizer_random_seed(void)
{
    uint64_t seed;
    if (getrandom(&seed, sizeof(seed), GRND_NONBLOCK) != (ssize_t)sizeof(seed)) {
        seed = (uint64_t)time(NULL) ^ (uint64_t)(uintptr_t)&seed; /* early boot: better than none */
    }
    return seed;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int tokenizer_parse_byte(struct gguf_string text)
{
    if (text.bytes != 6 || memcmp(text.data, "<0x", 3) != 0 || text.data[5] != '>') {
        return -1;
    }
    int high = hex_digit(text.data[3]), low = hex_digit(text.data[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *bytes, size_t n)
{
    uint64_t hash = XXH3_64bits_withSeed(bytes, n, t->table.seed);
    uint32_t tag = (uint32_t)(hash >> 32);
    for (uint32_t i = (uint32_t)hash & t->table.mask;; i = (i + 1) & t->table.mask) {
        const struct piece_slot *slot = &t->table.slots[i];
        if (slot->token == TOKEN_NONE) {
            return TOKEN_NONE;
        }
        if (slot->tag == tag) {
            const struct token_entry *e = &t->tokens[slot->token];
            if (e->bytes == n && memcmp(e->piece, bytes, n) == 0) {
                return slot->token;
            }
        }
    }
}

/* Of two tokens with the same piece the one with the lower id is found. */
static int build_table(struct tokenizer *t)
{
    uint32_t slots = 2;
    while (slots < 2 * t->n_vocab) {
        slots *= 2;
    }
    t->table.slots = malloc(slots * sizeof(*t->table.slots));
    if (!t->table.slots) {
        return -ENOMEM;
    }
    t->table.mask = slots - 1;
    t->table.seed = tokenizer_random_seed();
    for (uint32_t i = 0; i < slots; i++) {
        t->table.slots[i].token = TOKEN_NONE;
    }
    for (uint32_t id = 0; id < t->n_vocab; id++) {
        const struct token_entry *e = &t->tokens[id];
        if (!(e->flags & TOKEN_FLAG_MERGES) || tokenizer_find(t, e->piece, e->bytes) >= 0) {
            continue;
        }
        uint64_t hash = XXH3_64bits_withSeed(e->piece, e->bytes, t->table.seed);
        uint32_t i = (uint32_t)hash & t->table.mask;
        while (t->table.slots[i].token != TOKEN_NONE) {
            i = (i + 1) & t->table.mask;
        }
        t->table.slots[i] = (struct piece_slot){(uint32_t)(hash >> 32), (int32_t)id};
    }
    return 0;
}

static void fill_byte_tokens(struct tokenizer *t)
{
    t->all_bytes = true;
    for (int b = 0; b < 256; b++) {
        if (t->byte_token[b] == TOKEN_NONE) {
            char c = (char)b;
            t->byte_token[b] = tokenizer_find(t, &c, 1);
        }
        t->all_bytes &= t->byte_token[b] != TOKEN_NONE;
    }
}

static int load_kinds(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    static const char key[] = "tokenizer.ggml.token_type";
    t->typed = gguf_has_key(g, key);
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        t->tokens[i].kind = TOKEN_NORMAL;
    }
    if (!t->typed) {
        return 0;
    }
    int32_t *types = calloc(t->n_vocab, sizeof(*types));
    if (!types) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", key);
    }
    int rc = gguf_get_i32s(g, key, types, t->n_vocab);
    if (rc < 0) {
        rc = fmt_fail(err, -EINVAL, "%s: not an array of %u integers, one for each token", key,
                      t->n_vocab);
    }
    for (uint32_t i = 0; i < t->n_vocab && rc == 0; i++) {
        if (types[i] < 0 || types[i] > MAX_TOKEN_TYPE) {
            rc = fmt_fail(err, -EINVAL, "%s[%u]: %d is no token type (0..%d)", key, i, types[i],
                          MAX_TOKEN_TYPE);
        } else if (types[i] > 0) { /* 0: undefined */
            t->tokens[i].kind = (uint8_t)types[i];
        }
    }
    free(types);
    return rc;
}

static int load_id(const struct tokenizer *t, const struct gguf *g, const char *key, int32_t *ret,
                   struct fmt_error *err)
{
    uint32_t id;
    int rc = gguf_get_u32(g, key, &id);
    if (rc == -ENOENT) {
        return 0;
    }
    if (rc < 0 || id >= t->n_vocab) {
        return fmt_fail(err, -EINVAL, "%s: not a token id below %u", key, t->n_vocab);
    }
    *ret = (int32_t)id;
    return 0;
}

/* llama.cpp's defaults for files without the keys. */
static void load_default_ids(struct tokenizer *t)
{
    static const struct {
        const struct tokenizer_model *model;
        int32_t bos, eos, unk, sep;
    } rows[] = {
        {&tokenizer_model_spm, 1, 2, 0, TOKEN_NONE},
        {&tokenizer_model_wordpiece, 101, TOKEN_NONE, 100, 102},
        {&tokenizer_model_unigram, TOKEN_NONE, 1, 2, TOKEN_NONE},
    };
    t->bos = t->eos = t->unk = t->sep = TOKEN_NONE;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (t->model != rows[i].model) {
            continue;
        }
        const int32_t n = (int32_t)t->n_vocab;
        bool spm = t->model == &tokenizer_model_spm; /* where a default must look like one */
        t->bos = rows[i].bos < n ? rows[i].bos : TOKEN_NONE;
        t->eos = rows[i].eos < n ? rows[i].eos : TOKEN_NONE;
        t->unk = rows[i].unk < n ? rows[i].unk : TOKEN_NONE;
        t->sep = rows[i].sep < n ? rows[i].sep : TOKEN_NONE;
        if (spm && t->bos >= 0 && t->tokens[t->bos].kind != TOKEN_CONTROL) {
            t->bos = TOKEN_NONE;
        }
        if (spm && t->eos >= 0 && t->tokens[t->eos].kind != TOKEN_CONTROL) {
            t->eos = TOKEN_NONE;
        }
        if (spm && t->tokens[t->unk].kind != TOKEN_UNKNOWN) {
            t->unk = TOKEN_NONE;
        }
    }
}

static int load_special_ids(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    int32_t eot = TOKEN_NONE, eom = TOKEN_NONE, cls = TOKEN_NONE;
    load_default_ids(t);
    const struct {
        const char *key;
        int32_t *id;
        bool ends;
    } rows[] = {
        {"tokenizer.ggml.cls_token_id", &cls, false},
        {"tokenizer.ggml.bos_token_id", &t->bos, false},
        {"tokenizer.ggml.eos_token_id", &t->eos, true},
        {"tokenizer.ggml.eot_token_id", &eot, true},
        {"tokenizer.ggml.eom_token_id", &eom, true},
        {"tokenizer.ggml.unknown_token_id", &t->unk, false},
        {"tokenizer.ggml.seperator_token_id", &t->sep, false}, /* so spelled in all files */
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        int rc = load_id(t, g, rows[i].key, rows[i].id, err);
        if (rc < 0) {
            return rc;
        }
        if (rows[i].ends && *rows[i].id != TOKEN_NONE) {
            t->tokens[*rows[i].id].flags |= TOKEN_FLAG_EOG;
        }
    }
    /* An encoder's [CLS] is its first token: files have it under one key or the other. */
    bool wordpiece = t->model == &tokenizer_model_wordpiece;
    if (wordpiece && cls != TOKEN_NONE && !gguf_has_key(g, "tokenizer.ggml.bos_token_id")) {
        t->bos = cls;
    }
    return 0;
}

/* add_bos_token and add_eos_token: *ret holds the default. A file that asks for a token which it
 * does not have is refused; a default is dropped. */
static int load_add(const struct gguf *g, const char *key, int32_t id, bool *ret,
                    struct fmt_error *err)
{
    bool add = *ret && id != TOKEN_NONE;
    int rc = gguf_get_bool(g, key, &add);
    if (rc < 0 && rc != -ENOENT) {
        return fmt_fail(err, -EINVAL, "%s: not a bool", key);
    }
    if (add && id == TOKEN_NONE) {
        return fmt_fail(err, -EINVAL, "%s: set, but the file names no such token", key);
    }
    *ret = add;
    return 0;
}

static int load_pieces(struct tokenizer *t, const struct gguf *g, const struct gguf_string *texts,
                       struct fmt_error *err)
{
    size_t total = 0;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (texts[i].bytes > UINT32_MAX || __builtin_add_overflow(total, texts[i].bytes, &total)) {
            return fmt_fail(err, -EINVAL, "tokenizer.ggml.tokens[%u]: too long", i);
        }
    }
    t->pieces = malloc(total + 1); /* no piece is longer than its text */
    if (!t->pieces) {
        return fmt_fail(err, -ENOMEM, "tokenizer.ggml.tokens: out of memory");
    }
    int rc = load_kinds(t, g, err);
    if (rc == 0) {
        rc = load_special_ids(t, g, err);
    }
    if (rc == 0) {
        tokenizer_mark_names(t, g, texts);
        rc = t->model->load_pieces(t, texts, err);
    }
    return rc;
}

/* Every place of a text is compared with them. */
static int check_specials(const struct tokenizer *t, struct fmt_error *err)
{
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        const struct token_entry *e = &t->tokens[i];
        if ((e->flags & TOKEN_FLAG_SPECIAL) && e->bytes > MAX_SPECIAL_BYTES) {
            return fmt_fail(err, -EINVAL,
                            "tokenizer.ggml.tokens[%u]: a special token of %u bytes (limit %d)", i,
                            e->bytes, MAX_SPECIAL_BYTES);
        }
    }
    return 0;
}

int tokenizer_load_vocab(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    static const char key[] = "tokenizer.ggml.tokens";
    enum gguf_value_type type;
    uint64_t count;
    int rc = gguf_get_array(g, key, &type, &count);
    if (rc < 0 || type != GGUF_STRING || count == 0 || count > TOKENIZER_MAX_VOCAB) {
        return fmt_fail(err, -EINVAL, "%s: not an array of 1 to %u strings", key,
                        TOKENIZER_MAX_VOCAB);
    }
    t->n_vocab = (uint32_t)count;
    memset(t->byte_token, 0xFF, sizeof(t->byte_token)); /* TOKEN_NONE */
    t->tokens = calloc(count, sizeof(*t->tokens));
    struct gguf_string *texts = calloc(count, sizeof(*texts));
    if (!t->tokens || !texts) {
        rc = fmt_fail(err, -ENOMEM, "%s: out of memory", key);
        goto out;
    }
    rc = gguf_get_strings(g, key, texts, count);
    if (rc < 0) {
        rc = fmt_fail(err, rc, "%s: unreadable", key);
        goto out;
    }
    rc = load_pieces(t, g, texts, err);
    if (rc < 0) {
        goto out;
    }
    rc = check_specials(t, err);
    if (rc < 0) {
        goto out;
    }
    if (build_table(t) < 0 || tokenizer_build_specials(t) < 0) {
        rc = fmt_fail(err, -ENOMEM, "%s: out of memory", key);
        goto out;
    }
    fill_byte_tokens(t);
    rc = t->model->load(t, g, err);
    /* WordPiece is [CLS] text [SEP], whatever these keys say. */
    bool fixed = t->model == &tokenizer_model_wordpiece;
    if (rc == 0 && !fixed) {
        rc = load_add(g, "tokenizer.ggml.add_bos_token", t->bos, &t->add_bos, err);
    }
    if (rc == 0 && !fixed) {
        rc = load_add(g, "tokenizer.ggml.add_eos_token", t->eos, &t->add_eos, err);
    }
out:
    free(texts);
    return rc;
}
