/* daemon/model/tokenizer_bpe.c - byte-level BPE: GPT-2's alphabet of bytes, merges by rank.
 *
 * Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. The file writes
 * every byte of a token as a printable character: the 188 printable Latin-1 characters stand for
 * themselves, the other 68 bytes, in order, for U+0100 to U+0143. Here pieces are the bytes
 * themselves, and a merge is a pair of token ids. */
#include "daemon/model/tokenizer_internal.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FREE_PAIR        UINT64_MAX
#define NO_RANK          UINT32_MAX
#define N_BYTE_PAIRS     65536u
#define SHORT_WORD_BYTES 24

static bool prints_as_itself(unsigned byte)
{
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

/* The byte that a character of the alphabet stands for, by code point; -1 for other characters. */
struct alphabet {
    int16_t byte[0x144];
};

static void fill_alphabet(struct alphabet *a)
{
    memset(a, 0xFF, sizeof(*a));
    int16_t stand_in = 0x100;
    for (int16_t byte = 0; byte < 256; byte++) {
        a->byte[prints_as_itself((unsigned)byte) ? byte : stand_in++] = byte;
    }
}

/* Turns a token's text into the bytes it stands for; false when a character is not in the alphabet.
 * to may be text.data's size. */
static bool to_bytes(const struct alphabet *a, struct gguf_string text, char *to, size_t *ret_bytes)
{
    const unsigned char *p = (const unsigned char *)text.data;
    size_t n = 0;
    for (size_t at = 0; at < text.bytes;) {
        unsigned point = p[at];
        size_t step = 1;
        if (point >= 0x80) {
            if (utf8_step(p + at, text.bytes - at, &step) != UTF8_VALID || step != 2) {
                return false;
            }
            point = (point & 0x1F) << 6 | (p[at + 1] & 0x3F);
        }
        if (point >= sizeof(a->byte) / sizeof(a->byte[0]) || a->byte[point] < 0) {
            return false;
        }
        to[n++] = (char)a->byte[point];
        at += step;
    }
    *ret_bytes = n;
    return true;
}

static int bpe_load_pieces(struct tokenizer *t, const struct gguf_string *texts,
                           struct fmt_error *err)
{
    (void)err;
    struct alphabet alphabet;
    fill_alphabet(&alphabet);
    char *at = t->pieces;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        struct token_entry *e = &t->tokens[i];
        struct gguf_string text = texts[i];
        e->piece = at;
        size_t bytes;
        int byte = tokenizer_parse_byte(text);
        if (e->kind == TOKEN_BYTE && byte >= 0) {
            *at = (char)byte;
            e->bytes = 1;
        } else if ((e->kind == TOKEN_NORMAL || e->kind == TOKEN_UNUSED) &&
                   to_bytes(&alphabet, text, at, &bytes)) {
            e->bytes = (uint32_t)bytes;
            e->flags |= bytes > 0 ? TOKEN_FLAG_MERGES : 0;
        } else {
            memcpy(at, text.data, text.bytes);
            e->bytes = (uint32_t)text.bytes;
            bool special = e->kind == TOKEN_CONTROL || e->kind == TOKEN_UNKNOWN ||
                           e->kind == TOKEN_USER_DEFINED;
            e->flags |= special && e->bytes > 0 ? TOKEN_FLAG_SPECIAL : 0;
        }
        at += e->bytes;
    }
    return 0;
}

/* Both seeds are the tokenizer's own: a file cannot know which pairs will collide. */
static inline struct merge_slot *merge_slot(const struct merge_table *m, uint64_t pair)
{
    unsigned __int128 wide = (unsigned __int128)(pair ^ m->seed) * m->factor;
    uint32_t i = (uint32_t)((uint64_t)wide ^ (uint64_t)(wide >> 64)) & m->mask;
    while (m->slots[i].pair != pair && m->slots[i].pair != FREE_PAIR) {
        i = (i + 1) & m->mask;
    }
    return &m->slots[i];
}

static inline uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* Adds "left right"; scratch is as long as the line. A merge of anything that is not a token, or
 * that does not give one, can never happen and is left out. */
static void add_merge(struct tokenizer *t, const struct alphabet *a, struct gguf_string line,
                      uint32_t rank, char *scratch)
{
    const char *space = line.bytes > 1 ? memchr(line.data + 1, ' ', line.bytes - 1) : NULL;
    if (!space) {
        return;
    }
    size_t left_text = (size_t)(space - line.data), left, right;
    struct gguf_string l = {line.data, left_text};
    struct gguf_string r = {space + 1, line.bytes - left_text - 1};
    if (!to_bytes(a, l, scratch, &left) || !to_bytes(a, r, scratch + left, &right) || right == 0) {
        return;
    }
    int32_t left_id = tokenizer_find(t, scratch, left);
    int32_t right_id = tokenizer_find(t, scratch + left, right);
    int32_t joined = tokenizer_find(t, scratch, left + right);
    if (left_id < 0 || right_id < 0 || joined < 0) {
        return;
    }
    uint64_t pair = pair_of(left_id, right_id);
    struct merge_slot *slot = merge_slot(&t->merges, pair);
    if (slot->pair == FREE_PAIR) { /* of two equal lines the first counts */
        *slot = (struct merge_slot){pair, rank, joined};
    }
}

static inline struct short_merge find_merge(const struct tokenizer *t, int32_t left, int32_t right)
{
    const struct merge_slot *slot = merge_slot(&t->merges, pair_of(left, right));
    return slot->pair == FREE_PAIR ? (struct short_merge){NO_RANK, TOKEN_NONE}
                                   : (struct short_merge){slot->rank, slot->token};
}

/* What two bytes that are neighbours merge into: most of what a short word asks for. */
static int fill_byte_pairs(struct tokenizer *t)
{
    t->merges.bytes = calloc(N_BYTE_PAIRS, sizeof(*t->merges.bytes));
    if (!t->merges.bytes) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < N_BYTE_PAIRS; i++) {
        t->merges.bytes[i] = find_merge(t, t->byte_token[i >> 8], t->byte_token[i & 0xFF]);
    }
    return 0;
}

static int fill_merges(struct tokenizer *t, const struct gguf_string *lines, uint32_t count)
{
    size_t longest = 1;
    uint32_t slots = 2;
    for (uint32_t i = 0; i < count; i++) {
        longest = lines[i].bytes > longest ? lines[i].bytes : longest;
    }
    while (slots < 2 * count) {
        slots *= 2;
    }
    t->merges.slots = malloc(slots * sizeof(*t->merges.slots));
    char *scratch = malloc(longest);
    if (!t->merges.slots || !scratch) {
        free(scratch);
        return -ENOMEM;
    }
    t->merges.mask = slots - 1;
    t->merges.seed = tokenizer_random_seed();
    t->merges.factor = tokenizer_random_seed() | 1;
    for (uint32_t i = 0; i < slots; i++) {
        t->merges.slots[i].pair = FREE_PAIR;
    }
    struct alphabet alphabet;
    fill_alphabet(&alphabet);
    for (uint32_t i = 0; i < count; i++) {
        add_merge(t, &alphabet, lines[i], i, scratch);
    }
    free(scratch);
    return fill_byte_pairs(t);
}

static int bpe_load(struct tokenizer *t, const struct gguf *g, struct fmt_error *err)
{
    static const char key[] = "tokenizer.ggml.merges";
    struct gguf_string name = {"default", 7};
    int rc = gguf_get_string(g, "tokenizer.ggml.pre", &name);
    if (rc < 0 && rc != -ENOENT) {
        return fmt_fail(err, -EINVAL, "tokenizer.ggml.pre: not a string");
    }
    rc = pre_tokenizer_create(name, true, &t->pre, err);
    if (rc < 0) {
        return rc;
    }
    t->ignore_merges = pre_tokenizer_ignores_merges(t->pre);
    t->add_bos = pre_tokenizer_adds_bos(t->pre);

    enum gguf_value_type type;
    uint64_t count;
    rc = gguf_get_array(g, key, &type, &count);
    if (rc < 0 || type != GGUF_STRING || count > TOKENIZER_MAX_MERGES) {
        return fmt_fail(err, -EINVAL, "%s: not an array of at most %u strings", key,
                        TOKENIZER_MAX_MERGES);
    }
    struct gguf_string *lines = calloc(count + 1, sizeof(*lines));
    if (!lines) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", key);
    }
    rc = gguf_get_strings(g, key, lines, count);
    if (rc == 0) {
        rc = fill_merges(t, lines, (uint32_t)count);
    }
    free(lines);
    return rc < 0 ? fmt_fail(err, rc, "%s: %s", key, strerror(-rc)) : 0;
}

/* One symbol a byte: a character of the alphabet is a byte. */
static size_t bpe_split(const struct tokenizer *t, struct symbol *symbols, const char *word,
                        size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        symbols[i] = (struct symbol){
            .start = (uint32_t)i,
            .bytes = 1,
            .prev = i == 0 ? SYMBOL_END : (uint32_t)i - 1,
            .next = i + 1 == bytes ? SYMBOL_END : (uint32_t)i + 1,
            .token = t->byte_token[(unsigned char)word[i]],
        };
    }
    return bytes;
}

static bool bpe_may_merge(const struct tokenizer *t, const char *word, const struct symbol *left,
                          const struct symbol *right, uint32_t *ret_priority, int32_t *ret_token)
{
    (void)word;
    if (left->token < 0 || right->token < 0) {
        return false;
    }
    const struct merge_slot *slot = merge_slot(&t->merges, pair_of(left->token, right->token));
    if (slot->pair == FREE_PAIR) {
        return false;
    }
    *ret_priority = slot->rank;
    *ret_token = slot->token;
    return true;
}

static const struct merge_rules BPE_RULES = {bpe_split, bpe_may_merge};

/* The same merging in arrays without holes: quadratic, but of so few symbols it is the faster one.
 * merges[i] is what tokens[i] and tokens[i + 1] give. */
static int encode_short(const struct tokenizer *t, struct scratch *s, const unsigned char *word,
                        size_t bytes)
{
    int32_t tokens[SHORT_WORD_BYTES];
    struct short_merge merges[SHORT_WORD_BYTES];
    size_t n = bytes;
    for (size_t i = 0; i < n; i++) {
        tokens[i] = t->byte_token[word[i]];
        if (tokens[i] == TOKEN_NONE) {
            return tokenizer_merge_word(t, s, &BPE_RULES, (const char *)word, bytes);
        }
    }
    for (size_t i = 0; i + 1 < n; i++) {
        merges[i] = t->merges.bytes[(uint32_t)word[i] << 8 | word[i + 1]];
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            best = merges[i].rank < merges[best].rank ? i : best;
        }
        if (merges[best].rank == NO_RANK) {
            break;
        }
        tokens[best] = merges[best].token;
        n--;
        for (size_t i = best + 1; i < n; i++) {
            tokens[i] = tokens[i + 1];
            merges[i - 1] = merges[i];
        }
        if (best > 0) {
            merges[best - 1] = find_merge(t, tokens[best - 1], tokens[best]);
        }
        if (best + 1 < n) {
            merges[best] = find_merge(t, tokens[best], tokens[best + 1]);
        }
    }
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        rc = scratch_push(s, tokens[i]);
    }
    return rc;
}

static int encode_word(const struct tokenizer *t, struct scratch *s, const char *word, size_t bytes)
{
    if (t->ignore_merges) {
        int32_t token = tokenizer_find(t, word, bytes);
        if (token >= 0) {
            return scratch_push(s, token);
        }
    }
    if (bytes <= SHORT_WORD_BYTES) {
        return encode_short(t, s, (const unsigned char *)word, bytes);
    }
    return tokenizer_merge_word(t, s, &BPE_RULES, word, bytes);
}

static int encode_valid(const struct tokenizer *t, struct scratch *s, const char *text,
                        size_t bytes)
{
    const uint32_t *ends;
    size_t count;
    int rc = pre_tokenizer_split(t->pre, s->pre, text, bytes, &ends, &count);
    uint32_t start = 0;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        rc = tokenizer_encode_cached(t, s, encode_word, text + start, ends[i] - start, true);
        start = ends[i];
    }
    return rc;
}

/* The bytes at the text's start that are well-formed UTF-8 (well_formed), or that are not. */
static size_t run_length(const char *text, size_t bytes, bool well_formed)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t at = 0;
    while (at < bytes) {
        size_t step;
        if ((utf8_step(p + at, bytes - at, &step) == UTF8_VALID) != well_formed) {
            break;
        }
        at += step;
    }
    return at;
}

/* The expressions see well-formed text only; a run of other bytes is a word. */
static int bpe_encode(const struct tokenizer *t, struct scratch *s, const char *text, size_t bytes,
                      bool after_special)
{
    (void)after_special;
    int rc = 0;
    while (bytes > 0 && rc == 0) {
        size_t n = run_length(text, bytes, true);
        if (n > 0) {
            rc = encode_valid(t, s, text, n);
        } else {
            n = run_length(text, bytes, false);
            rc = tokenizer_encode_cached(t, s, encode_word, text, n, true);
        }
        text += n;
        bytes -= n;
    }
    return rc;
}

const struct tokenizer_model tokenizer_model_bpe = {
    .name = "gpt2",
    .load_pieces = bpe_load_pieces,
    .load = bpe_load,
    .encode = bpe_encode,
};
