/* daemon/model/tokenizer_cache.c - the words that a call has already encoded.
 *
 * Words repeat, and most are short: a slot holds a word of up to 15 bytes and up to three tokens
 * itself, so that a hit touches one cache line.
 *
 *   short word   key[0] bytes 0-7     key[1] bytes 8-14, and the length in the top byte
 *   longer word  key[0] its address   key[1] 56 bits of hash, and the length in the top byte
 *
 * One slot for each hash value: the word that came last stays. A text that is made to collide makes
 * every word a miss, which costs what encoding it costs. */
#include "daemon/model/tokenizer_internal.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_WORD_BYTES  48
#define MAX_SHORT_BYTES 15
#define MIN_SLOTS       64
#define MAX_SLOTS       32768
#define BYTES_PER_SLOT  16 /* of text: shorter texts repeat fewer words */
#define LENGTH_SHIFT    56
#define MIN_KEPT_TOKENS 256

int word_cache_init(struct word_cache *c, size_t text_bytes)
{
    uint32_t slots = MIN_SLOTS;
    while (slots < MAX_SLOTS && slots < text_bytes / BYTES_PER_SLOT) {
        slots *= 2;
    }
    *c = (struct word_cache){.mask = slots - 1};
    c->slots = calloc(slots, sizeof(*c->slots));
    return c->slots ? 0 : -ENOMEM;
}

void word_cache_finish(struct word_cache *c)
{
    free(c->slots);
    free(c->kept);
}

static inline uint64_t load64(const char *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof(v));
    return le64toh(v);
}

static inline uint64_t load32(const char *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof(v));
    return le32toh(v);
}

/* The key of 1 to MAX_SHORT_BYTES bytes: reads no byte outside of the word. */
static inline void short_key(const char *word, size_t n, uint64_t key[2])
{
    key[1] = (uint64_t)n << LENGTH_SHIFT;
    if (n >= 8) {
        key[0] = load64(word);
        key[1] |= n > 8 ? load64(word + n - 8) >> (8 * (16 - n)) : 0;
    } else if (n >= 4) {
        key[0] = load32(word) | load32(word + n - 4) << (8 * (n - 4));
    } else {
        const unsigned char *p = (const unsigned char *)word;
        key[0] = (uint64_t)p[0] | (uint64_t)p[n / 2] << (8 * (n / 2)) |
                 (uint64_t)p[n - 1] << (8 * (n - 1));
    }
}

static inline uint32_t short_hash(const uint64_t key[2])
{
    uint64_t h =
        key[0] * 0x9E3779B97F4A7C15u ^ (key[1] + 0x632BE59BD9B4E019u) * 0xD6E8FEB86659FD93u;
    h = (h ^ h >> 32) * 0x9E3779B97F4A7C15u;
    return (uint32_t)(h >> 32);
}

static inline bool holds(const struct word_slot *slot, const uint64_t key[2], const char *word,
                         size_t bytes)
{
    if (slot->key[1] != key[1]) {
        return false;
    }
    if (bytes <= MAX_SHORT_BYTES) {
        return slot->key[0] == key[0];
    }
    return memcmp((const char *)(uintptr_t)slot->key[0], word, bytes) == 0;
}

static int keep_tokens(struct word_cache *c, const int32_t *tokens, size_t n)
{
    if (n > c->kept_capacity - c->n_kept) {
        size_t capacity = c->kept_capacity * 2 + n + MIN_KEPT_TOKENS;
        int32_t *kept = reallocarray(c->kept, capacity, sizeof(*kept));
        if (!kept) {
            return -ENOMEM;
        }
        c->kept = kept;
        c->kept_capacity = capacity;
    }
    memcpy(c->kept + c->n_kept, tokens, n * sizeof(*tokens));
    c->n_kept += n;
    return 0;
}

static int encode_and_remember(const struct tokenizer *t, struct scratch *s, encode_word_fn *encode,
                               const char *word, size_t bytes, struct word_slot *slot,
                               const uint64_t key[2])
{
    size_t first = s->n_out;
    int rc = encode(t, s, word, bytes);
    size_t count = s->n_out - first;
    struct word_slot filled = {.key = {key[0], key[1]}, .count = (uint32_t)count};
    if (rc < 0) {
        return rc;
    }
    if (count <= WORD_SLOT_TOKENS) {
        for (size_t i = 0; i < count; i++) {
            filled.tokens[i] = s->out[first + i];
        }
    } else {
        filled.tokens[0] = (int32_t)s->cache.n_kept;
        if (s->cache.n_kept > INT32_MAX - count) {
            return 0; /* not remembered */
        }
        rc = keep_tokens(&s->cache, s->out + first, count);
        if (rc < 0) {
            return rc;
        }
    }
    *slot = filled;
    return 0;
}

int tokenizer_encode_cached(const struct tokenizer *t, struct scratch *s, encode_word_fn *encode,
                            const char *word, size_t bytes, bool stays)
{
    uint64_t key[2];
    uint32_t hash;
    if (bytes == 0 || bytes > (stays ? MAX_WORD_BYTES : MAX_SHORT_BYTES)) {
        return encode(t, s, word, bytes);
    }
    if (bytes <= MAX_SHORT_BYTES) {
        short_key(word, bytes, key);
        hash = short_hash(key);
    } else {
        uint64_t wide = XXH3_64bits(word, bytes);
        key[0] = (uint64_t)(uintptr_t)word;
        key[1] = wide >> 8 | (uint64_t)bytes << LENGTH_SHIFT;
        hash = (uint32_t)wide;
    }
    struct word_slot *slot = &s->cache.slots[hash & s->cache.mask];
    if (!holds(slot, key, word, bytes)) {
        return encode_and_remember(t, s, encode, word, bytes, slot, key);
    }
    const int32_t *tokens =
        slot->count <= WORD_SLOT_TOKENS ? slot->tokens : s->cache.kept + slot->tokens[0];
    int rc = 0;
    for (uint32_t i = 0; i < slot->count && rc == 0; i++) {
        rc = scratch_push(s, tokens[i]);
    }
    return rc;
}
