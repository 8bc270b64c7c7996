#include "daemon/kv/store_format.h"

#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* Fuzzers would find nothing but the checksum: built for them, any checksum is right. */
static bool checksum_equal(uint64_t is, uint64_t should_be)
{
#ifdef GQAD_FUZZING
    return true;
#else
    return is == should_be;
#endif
}

static uint64_t header_checksum(struct store_header h)
{
    h.checksum = 0;
    return XXH3_64bits(&h, sizeof(h));
}

void store_header_make(struct store_header *h, const struct kv_store_identity *id, uint64_t epoch,
                       uint64_t base)
{
    *h = (struct store_header){
        .format_version = KV_STORE_FORMAT_VERSION,
        .layout_version = id->layout_version,
        .epoch = epoch,
        .base = base,
        .n_classes = id->n_classes,
    };
    memcpy(h->magic, STORE_MAGIC, sizeof(h->magic));
    memcpy(h->id, id->id, sizeof(h->id));
    memcpy(h->block_bytes, id->block_bytes, id->n_classes * sizeof(h->block_bytes[0]));
    memcpy(h->about, id->about, strnlen(id->about, sizeof(h->about) - 1));
    h->checksum = header_checksum(*h);
}

const char *store_header_check(const struct store_header *h, const struct kv_store_identity *id)
{
    if (memcmp(h->magic, STORE_MAGIC, sizeof(h->magic)) != 0) {
        return "it is no index of a block store";
    }
    if (h->format_version != KV_STORE_FORMAT_VERSION) {
        return "its format has another version";
    }
    if (!checksum_equal(h->checksum, header_checksum(*h))) {
        return "its header is damaged";
    }
    if (memcmp(h->id, id->id, sizeof(h->id)) != 0 || h->layout_version != id->layout_version) {
        return "its blocks are of another identity or layout version";
    }
    if (h->n_classes != id->n_classes ||
        memcmp(h->block_bytes, id->block_bytes, id->n_classes * sizeof(h->block_bytes[0])) != 0) {
        return "its blocks have other sizes";
    }
    return NULL;
}

static uint64_t record_checksum(const struct store_record *r, uint64_t epoch)
{
    struct store_record copy = *r;
    copy.checksum = 0;
    return XXH3_64bits_withSeed(&copy, sizeof(copy), epoch);
}

void store_record_seal(struct store_record *r, uint64_t epoch, uint64_t generation)
{
    r->generation = generation;
    r->checksum = record_checksum(r, epoch);
}

bool store_record_intact(const struct store_record *r, uint64_t epoch, uint64_t generation)
{
    return r->generation == generation &&
           (r->type == STORE_PUT || r->type == STORE_DROP || r->type == STORE_USE) &&
           checksum_equal(r->checksum, record_checksum(r, epoch));
}

void store_put_make(struct store_record *r, const struct kv_store_block *b, uint64_t bytes)
{
    memset(r, 0, sizeof(*r));
    r->type = STORE_PUT;
    r->put = (struct store_put){
        .key = b->key,
        .parent = b->parent,
        .layer_class = b->layer_class,
        .slot = b->slot,
        .bytes = bytes,
        .checksum = b->checksum,
        .used_s = b->used_s,
        .hits = b->hits,
        .flags = b->flags,
        .position = b->position,
    };
    memcpy(r->put.tokens, b->tokens, sizeof(r->put.tokens));
}

void store_put_read(const struct store_record *r, struct kv_store_block *ret)
{
    const struct store_put *p = &r->put;
    *ret = (struct kv_store_block){
        .key = p->key,
        .parent = p->parent,
        .layer_class = p->layer_class,
        .flags = p->flags,
        .position = p->position,
        .slot = p->slot,
        .checksum = p->checksum,
        .used_s = p->used_s,
        .hits = p->hits,
    };
    memcpy(ret->tokens, p->tokens, sizeof(ret->tokens));
}
