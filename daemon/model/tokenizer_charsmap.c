/* daemon/model/tokenizer_charsmap.c - the normalisation rules of a unigram vocabulary.
 *
 * tokenizer.ggml.precompiled_charsmap, as SentencePiece writes it:
 *
 *   u32 bytes of the trie | u32 units of the trie ... | replacements, each ended by NUL
 *
 * The trie is an XOR-compressed double array (Kanda, "Space- and Time-Efficient String
 * Dictionaries", 2018). A unit: bits 0-7 the byte that leads here, 8 whether a rule ends here, 9
 * whether the offset is in units of 256, 10-30 the offset to the children, which lie at (node ^
 * offset) ^ byte. The unit at a rule's own end has bit 31 set and holds the replacement's place.
 *
 * The map is hostile: every step is checked, and no rule is longer than MAX_RULE_BYTES, so that
 * units which lead in a circle cost a constant. */
#include "daemon/model/tokenizer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CHARSMAP_BYTES (16u << 20) /* the largest known has 256 KiB */
#define MAX_RULE_BYTES     256
#define VALUE_BIT          (1u << 31)

static const char key[] = "tokenizer.ggml.precompiled_charsmap";

struct charsmap {
    uint32_t *units;
    uint32_t n_units;
    const char *replacements;
    size_t replacements_bytes; /* the last is NUL */
    unsigned char *data;
};

static uint32_t read_u32(const unsigned char *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void charsmap_destroy(struct charsmap *map)
{
    if (map) {
        free(map->units);
        free(map->data);
        free(map);
    }
}

static int read_bytes(const struct gguf *g, size_t count, unsigned char **ret,
                      struct fmt_error *err)
{
    int32_t *values = calloc(count, sizeof(*values));
    unsigned char *data = malloc(count);
    if (!values || !data) {
        free(values);
        free(data);
        return fmt_fail(err, -ENOMEM, "%s: out of memory", key);
    }
    int rc = gguf_get_i32s(g, key, values, count);
    for (size_t i = 0; i < count && rc == 0; i++) {
        data[i] = (unsigned char)values[i];
    }
    free(values);
    if (rc < 0) {
        free(data);
        return fmt_fail(err, -EINVAL, "%s: unreadable", key);
    }
    *ret = data;
    return 0;
}

static int parse(struct charsmap *map, size_t count, struct fmt_error *err)
{
    size_t trie = read_u32(map->data), header = sizeof(uint32_t);
    if (trie % sizeof(uint32_t) != 0 || trie >= count - header) {
        return fmt_fail(err, -EINVAL, "%s: a trie of %zu bytes in a map of %zu", key, trie, count);
    }
    if (map->data[count - 1] != '\0') {
        return fmt_fail(err, -EINVAL, "%s: the last replacement is not terminated", key);
    }
    map->n_units = (uint32_t)(trie / sizeof(uint32_t));
    map->units = calloc((size_t)map->n_units + 1, sizeof(*map->units));
    if (!map->units) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", key);
    }
    for (uint32_t i = 0; i < map->n_units; i++) {
        map->units[i] = read_u32(map->data + header + i * sizeof(uint32_t));
    }
    map->replacements = (const char *)map->data + header + trie;
    map->replacements_bytes = count - header - trie;
    return 0;
}

int charsmap_load(const struct gguf *g, struct charsmap **ret, struct fmt_error *err)
{
    enum gguf_value_type type;
    uint64_t count;
    *ret = NULL;
    if (!gguf_has_key(g, key)) {
        return 0;
    }
    int rc = gguf_get_array(g, key, &type, &count);
    if (rc < 0 || (type != GGUF_I8 && type != GGUF_U8) || count > MAX_CHARSMAP_BYTES) {
        return fmt_fail(err, -EINVAL, "%s: not an array of at most %u bytes", key,
                        MAX_CHARSMAP_BYTES);
    }
    if (count == 0) {
        return 0;
    }
    if (count <= sizeof(uint32_t)) {
        return fmt_fail(err, -EINVAL, "%s: %u bytes are too few", key, (unsigned)count);
    }
    struct charsmap *map = calloc(1, sizeof(*map));
    if (!map) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", key);
    }
    rc = read_bytes(g, count, &map->data, err);
    if (rc == 0) {
        rc = parse(map, count, err);
    }
    if (rc < 0) {
        charsmap_destroy(map);
        return rc;
    }
    *ret = map;
    return 0;
}

static uint32_t offset_of(uint32_t unit)
{
    return (unit >> 10) << ((unit & (1u << 9)) >> 6);
}

size_t charsmap_find(const struct charsmap *map, const char *text, size_t bytes,
                     struct gguf_string *ret)
{
    if (!map || map->n_units == 0) {
        return 0;
    }
    size_t longest = 0, most = bytes < MAX_RULE_BYTES ? bytes : MAX_RULE_BYTES;
    uint32_t value = 0, node = offset_of(map->units[0]);
    for (size_t i = 0; i < most && text[i] != '\0'; i++) {
        unsigned char byte = (unsigned char)text[i];
        node ^= byte;
        if (node >= map->n_units || (map->units[node] & (VALUE_BIT | 0xFF)) != byte) {
            break;
        }
        bool ends = map->units[node] >> 8 & 1;
        node ^= offset_of(map->units[node]);
        if (ends && node < map->n_units) {
            longest = i + 1;
            value = map->units[node] & ~VALUE_BIT;
        }
    }
    if (longest == 0 || value >= map->replacements_bytes) {
        return 0;
    }
    const char *replacement = map->replacements + value;
    *ret = (struct gguf_string){replacement, strlen(replacement)};
    return longest;
}
