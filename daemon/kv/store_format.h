/* daemon/kv/store_format.h - the index of a store, as it lies in the file.
 *
 * docs/kv-layout.md, "On disk", draws it. Little-endian; every struct is one sector of 512 bytes.
 * Functions are pure: no state, any thread. */
#ifndef DAEMON_KV_STORE_FORMAT_H
#define DAEMON_KV_STORE_FORMAT_H

#include "daemon/kv/store.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian");

#define STORE_RECORD_BYTES 512u
#define STORE_PAGE_BYTES   4096u /* slots of the data files are multiples of it */
#define STORE_N_ENTRIES    20u

struct store_header {
    uint8_t magic[8]; /* STORE_MAGIC */
    uint32_t format_version;
    uint32_t layout_version;
    uint64_t checksum; /* XXH3-64 over the sector with this field zero */
    uint64_t epoch;    /* random; seed of the records' checksums */
    uint64_t base;     /* generation of the record at position 0 */
    uint8_t id[16];
    uint32_t n_classes;
    uint32_t reserved;
    uint64_t block_bytes[KV_MAX_CLASSES];
    char about[128];
    uint8_t zeros[512 - 256];
};
_Static_assert(sizeof(struct store_header) == STORE_RECORD_BYTES, "a sector");
_Static_assert(offsetof(struct store_header, id) == 40, "drawn in kv-layout.md");
_Static_assert(offsetof(struct store_header, block_bytes) == 64, "drawn in kv-layout.md");
_Static_assert(offsetof(struct store_header, about) == 128, "drawn in kv-layout.md");

#define STORE_MAGIC "GQAKVIX\n"

enum store_record_type { /* four letters each, as a dump of the file shows them */
                         STORE_PUT = 0x21545550, /* "PUT!": a block lies in a slot */
                         STORE_DROP =
                             0x504f5244, /* "DROP": slots do not hold their blocks any more */
                         STORE_USE = 0x21455355, /* "USE!": hits, time of use and flags of blocks */
};

struct store_put {
    struct kv_key key, parent;
    uint32_t layer_class;
    uint32_t slot;
    uint64_t bytes;    /* of data: the class's block_bytes */
    uint64_t checksum; /* XXH3-64 of the data */
    uint64_t used_s;
    uint32_t hits;
    uint32_t flags;
    uint32_t position;
    uint32_t reserved;
    int32_t tokens[KV_BLOCK_TOKENS];
};

struct store_entry { /* DROP: layer_class and slot only, the rest is zero */
    uint32_t layer_class;
    uint32_t slot;
    uint64_t used_s;
    uint32_t hits;
    uint32_t flags;
};

struct store_record {
    uint32_t type;       /* enum store_record_type */
    uint32_t n_entries;  /* DROP, USE: 1 to STORE_N_ENTRIES; PUT: 0 */
    uint64_t generation; /* the header's base + the record's position */
    uint64_t checksum;   /* XXH3-64 over the sector with this field zero, seeded with the epoch */
    union {
        struct store_put put;
        struct store_entry entries[STORE_N_ENTRIES];
        uint8_t bytes[STORE_RECORD_BYTES - 24];
    };
};
_Static_assert(sizeof(struct store_record) == STORE_RECORD_BYTES, "a sector");
_Static_assert(sizeof(struct store_entry) == 24, "drawn in kv-layout.md");
_Static_assert(offsetof(struct store_put, layer_class) == 32, "drawn in kv-layout.md");
_Static_assert(offsetof(struct store_put, checksum) == 48, "drawn in kv-layout.md");
_Static_assert(offsetof(struct store_put, tokens) == 80, "drawn in kv-layout.md");
_Static_assert(sizeof(struct store_put) == 336, "drawn in kv-layout.md");

void store_header_make(struct store_header *h, const struct kv_store_identity *id, uint64_t epoch,
                       uint64_t base);

/* What keeps the index from being used, or NULL: it is one of this identity. */
const char *store_header_check(const struct store_header *h, const struct kv_store_identity *id);

/* Sets generation and checksum. The rest of the record must be filled, unused bytes zero. */
void store_record_seal(struct store_record *r, uint64_t epoch, uint64_t generation);

/* Whether the sector is the intact record of this generation. What it says is not checked. */
bool store_record_intact(const struct store_record *r, uint64_t epoch, uint64_t generation);

void store_put_make(struct store_record *r, const struct kv_store_block *b, uint64_t bytes);
void store_put_read(const struct store_record *r, struct kv_store_block *ret);

#endif
