#include "daemon/model/dry_breakers.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TAIL_TOKENS_MAX 20 /* of the rest of a text that a token begins */

const struct gguf_string dry_breakers_default[4] = {{"\n", 1}, {":", 1}, {"\"", 1}, {"*", 1}};

/* The tokens of one text from one byte on; NULL and 0: it is empty, or has none. */
struct tail {
    int32_t *token;
    size_t n;
    bool known;  /* it was asked for */
    bool absent; /* the vocabulary cannot write it */
};

struct entry { /* token head begins a breaker, and tail follows */
    int32_t head;
    const struct tail *tail;
};

struct dry_breakers {
    uint32_t n_vocab;
    uint64_t *heads; /* a bit per token: whether it is one */
    struct entry *entry;
    size_t n_entries, capacity; /* by ascending head */
    /* From byte i of text t: tails[t][i]; tails[t][0] is the empty one. */
    struct tail tails[DRY_BREAKERS_MAX][DRY_BREAKER_BYTES_MAX];
};

/* The tail that follows the first `from` bytes of a text. 0 and *ret (NULL: it cannot be written);
 * -ENOMEM. */
static int find_tail(struct dry_breakers *b, const struct tokenizer *t, size_t text,
                     struct gguf_string bytes, size_t from, const struct tail **ret)
{
    struct tail *tail = &b->tails[text][from];
    if (!tail->known) {
        int rc = tokenizer_encode(t, bytes.data + from, bytes.bytes - from,
                                  (struct tokenize_options){0}, SIZE_MAX, &tail->token, &tail->n);
        if (rc == -ENOMEM) {
            return rc;
        }
        tail->absent = rc < 0;
        tail->n = tail->n < TAIL_TOKENS_MAX ? tail->n : TAIL_TOKENS_MAX;
        tail->known = true;
    }
    *ret = tail->absent ? NULL : tail;
    return 0;
}

static int add_entry(struct dry_breakers *b, int32_t head, const struct tail *tail)
{
    if (b->n_entries == b->capacity) {
        size_t capacity = b->capacity > 0 ? b->capacity * 2 : 64;
        struct entry *entry = reallocarray(b->entry, capacity, sizeof(*entry));
        if (entry == NULL) {
            return -ENOMEM;
        }
        b->entry = entry;
        b->capacity = capacity;
    }
    b->entry[b->n_entries++] = (struct entry){head, tail};
    b->heads[(uint32_t)head / 64] |= UINT64_C(1) << ((uint32_t)head % 64);
    return 0;
}

/* Where one text begins within one token. */
static int match_token(struct dry_breakers *b, const struct tokenizer *t, int32_t token,
                       struct gguf_string piece, size_t text, struct gguf_string bytes)
{
    bool begins[DRY_BREAKER_BYTES_MAX] = {false}; /* the token ends with so many of its bytes */
    for (size_t at = 0; at < piece.bytes; at++) {
        size_t left = piece.bytes - at;
        size_t common = left < bytes.bytes ? left : bytes.bytes;
        if (memcmp(piece.data + at, bytes.data, common) != 0) {
            continue;
        }
        if (common == bytes.bytes) {
            return add_entry(b, token, &b->tails[text][0]);
        }
        begins[common] = true;
    }
    for (size_t from = 1; from < bytes.bytes; from++) {
        const struct tail *tail = NULL;
        int rc = begins[from] ? find_tail(b, t, text, bytes, from, &tail) : 0;
        rc = rc == 0 && tail != NULL ? add_entry(b, token, tail) : rc;
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

static int match_vocabulary(struct dry_breakers *b, const struct tokenizer *t,
                            const struct gguf_string *texts, size_t n_texts)
{
    bool first[256] = {false};
    for (size_t i = 0; i < n_texts; i++) {
        first[(unsigned char)texts[i].data[0]] = true;
    }
    for (uint32_t token = 0; token < b->n_vocab; token++) {
        struct gguf_string piece = {"", 0};
        bool possible = false;
        tokenizer_piece(t, (int32_t)token, true, &piece);
        for (size_t i = 0; i < piece.bytes && !possible; i++) {
            possible = first[(unsigned char)piece.data[i]];
        }
        for (size_t i = 0; i < n_texts && possible; i++) {
            int rc = match_token(b, t, (int32_t)token, piece, i, texts[i]);
            if (rc < 0) {
                return rc;
            }
        }
    }
    return 0;
}

int dry_breakers_create(const struct tokenizer *t, const struct gguf_string *texts, size_t n_texts,
                        struct dry_breakers **ret)
{
    bool valid = n_texts <= DRY_BREAKERS_MAX;
    for (size_t i = 0; valid && i < n_texts; i++) {
        valid = texts[i].bytes >= 1 && texts[i].bytes <= DRY_BREAKER_BYTES_MAX;
    }
    if (!valid) {
        return -EINVAL;
    }
    struct dry_breakers *b = calloc(1, sizeof(*b));
    if (b == NULL) {
        return -ENOMEM;
    }
    b->n_vocab = tokenizer_n_vocab(t);
    b->heads = calloc(b->n_vocab / 64 + 1, sizeof(*b->heads));
    int rc = b->heads == NULL ? -ENOMEM : match_vocabulary(b, t, texts, n_texts);
    if (rc < 0) {
        dry_breakers_destroy(b);
        return rc;
    }
    *ret = b;
    return 0;
}

void dry_breakers_destroy(struct dry_breakers *b)
{
    if (b == NULL) {
        return;
    }
    for (size_t text = 0; text < DRY_BREAKERS_MAX; text++) {
        for (size_t from = 0; from < DRY_BREAKER_BYTES_MAX; from++) {
            free(b->tails[text][from].token);
        }
    }
    free(b->entry);
    free(b->heads);
    free(b);
}

/* The first entry of that head; n_entries when there is none. */
static size_t first_entry(const struct dry_breakers *b, int32_t head)
{
    uint32_t bit = (uint32_t)head;
    if (bit >= b->n_vocab || (b->heads[bit / 64] >> (bit % 64) & 1) == 0) {
        return b->n_entries;
    }
    size_t low = 0, high = b->n_entries;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (b->entry[middle].head < head) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Whether the tokens that follow recent[at] are the tail's. */
static bool tail_follows(const struct tail *tail, const int32_t *recent, size_t at)
{
    if (tail->n > at) {
        return false;
    }
    for (size_t i = 0; i < tail->n; i++) {
        if (tail->token[i] != recent[at - 1 - i]) {
            return false;
        }
    }
    return true;
}

size_t dry_breakers_since(const struct dry_breakers *b, const int32_t *recent, size_t n)
{
    for (size_t at = 0; b != NULL && at < n; at++) {
        bool found = false;
        size_t longest = 0;
        for (size_t e = first_entry(b, recent[at]);
             e < b->n_entries && b->entry[e].head == recent[at]; e++) {
            const struct tail *tail = b->entry[e].tail;
            if (tail_follows(tail, recent, at)) {
                found = true;
                longest = tail->n > longest ? tail->n : longest;
            }
        }
        if (found) {
            return at - longest;
        }
    }
    return n;
}

bool dry_breakers_in_token(const struct dry_breakers *b, int32_t token)
{
    if (b == NULL) {
        return false;
    }
    for (size_t e = first_entry(b, token); e < b->n_entries && b->entry[e].head == token; e++) {
        if (b->entry[e].tail->n == 0) {
            return true;
        }
    }
    return false;
}
