/* The index: reading it, appending to it, and writing it anew.
 *
 * What a torn end means. A position of an index file is written at most once: appends go forwards,
 * and after anything odd (a record that is not intact, an append that failed) nothing is appended
 * to that file any more, a new one takes its place. A record carries its generation, the header's
 * base plus its position, and its checksum is seeded with the file's random epoch. So an intact
 * record is the one that was put there, wherever it stands, and an intact record after a torn one
 * may be believed: it is no leftover of an earlier life of these sectors, and no record is followed
 * by another one of the same position.
 *
 * What a lost record costs. Of a PUT: the block. Of a DROP: the block comes back, with the data
 * that it was written with; or with other data, when the slot was used again, which the checksum
 * tells; and if the record of that other block is intact, it comes later and takes the slot over.
 * Of a USE: a little history. A purge leaves no old record behind, since it writes the index anew.
 */
#include "daemon/kv/store_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ---- reading ------------------------------------------------------------------------------- */

/* Calls fn for every position of the index; record is NULL where none is intact. */
static int scan(struct kv_store *s, uint32_t n_records,
                int (*fn)(struct kv_store *s, void *arg, uint32_t position,
                          const struct store_record *record),
                void *arg)
{
    int rc = 0;
    for (uint32_t at = 0; at < n_records && rc == 0;) {
        uint32_t n = n_records - at < STORE_BUFFER_RECORDS ? n_records - at : STORE_BUFFER_RECORDS;
        rc = s->files.read(s->files.self, s->index.fd, s->buffer, (size_t)n * STORE_RECORD_BYTES,
                           (uint64_t)(at + 1) * STORE_RECORD_BYTES);
        for (uint32_t i = 0; i < n && rc == 0; i++) {
            const struct store_record *r = &s->buffer[i];
            bool intact = store_record_intact(r, s->index.epoch, s->index.base + at + i);
            rc = fn(s, arg, at + i, intact ? r : NULL);
        }
        at += n;
    }
    return rc;
}

struct keys {       /* which slot a key was claimed for last; open addressing, a power of two */
    uint64_t *refs; /* store_ref(), 0: vacant. The slot's own key says whether it still holds */
    uint32_t capacity, n;
};

static uint64_t *keys_find(struct kv_store *s, struct keys *k, struct kv_key key,
                           uint32_t layer_class)
{
    uint64_t hash = XXH3_64bits_withSeed(&key, sizeof(key), s->index.epoch);
    for (uint64_t i = hash;; i++) {
        uint64_t *ref = &k->refs[i & (k->capacity - 1)];
        if (*ref == 0) {
            return ref;
        }
        uint32_t slot = (uint32_t)(*ref - 1);
        if ((*ref - 1) >> 32 == layer_class &&
            kv_key_equal(s->classes[layer_class].slots[slot].key, key)) {
            return ref;
        }
    }
}

static int keys_reserve(struct kv_store *s, struct keys *k)
{
    if (k->n < k->capacity / 2) {
        return 0;
    }
    struct keys wider = {.capacity = k->capacity == 0 ? 256 : 2 * k->capacity};
    wider.refs = calloc(wider.capacity, sizeof(wider.refs[0]));
    if (wider.refs == NULL) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < k->capacity; i++) {
        if (k->refs[i] != 0) {
            uint32_t layer_class = (uint32_t)((k->refs[i] - 1) >> 32);
            uint32_t slot = (uint32_t)(k->refs[i] - 1);
            uint64_t *place =
                keys_find(s, &wider, s->classes[layer_class].slots[slot].key, layer_class);
            wider.n += *place == 0;
            *place = k->refs[i];
        }
    }
    free(k->refs);
    *k = wider;
    return 0;
}

struct reading {
    struct keys keys;
    uint32_t n_refused;
    uint32_t n_end; /* positions up to the last that holds anything */
};

static bool slot_live(const struct store_class *c, uint32_t slot)
{
    return (c->used[slot / 64] & 1ull << slot % 64) != 0 && c->slots[slot].state == SLOT_LIVE;
}

static int apply_put(struct kv_store *s, struct reading *r, uint32_t position,
                     const struct store_record *record)
{
    struct kv_store_block b;
    store_put_read(record, &b);
    if (b.layer_class >= s->n_classes || kv_key_is_none(b.key) ||
        b.slot >= s->classes[b.layer_class].n_slots ||
        record->put.bytes != s->classes[b.layer_class].block_bytes) {
        r->n_refused++;
        return 0;
    }
    int rc = keys_reserve(s, &r->keys);
    if (rc < 0) {
        return rc;
    }
    struct store_class *c = &s->classes[b.layer_class];
    r->n_refused += slot_live(c, b.slot); /* the DROP before it is lost */
    uint64_t *place = keys_find(s, &r->keys, b.key, b.layer_class);
    uint32_t older = (uint32_t)(*place - 1);
    if (*place != 0 && older != b.slot && slot_live(c, older)) {
        store_slot_free(s, b.layer_class,
                        older); /* one key, one block: the last that was written */
        r->n_refused++;
    }
    r->keys.n += *place == 0;
    *place = store_ref(b.layer_class, b.slot);
    store_slot_claim(s, &b, position);
    return 0;
}

static void apply_entry(struct kv_store *s, struct reading *r, bool is_drop,
                        const struct store_entry *e)
{
    if (e->layer_class >= s->n_classes || e->slot >= s->classes[e->layer_class].n_slots ||
        !slot_live(&s->classes[e->layer_class], e->slot)) {
        r->n_refused++;
        return;
    }
    struct store_class *c = &s->classes[e->layer_class];
    if (is_drop) {
        store_slot_free(s, e->layer_class, e->slot);
    } else {
        atomic_store(&c->slots[e->slot].hits, e->hits);
        atomic_store(&c->slots[e->slot].used_s, e->used_s);
        atomic_store(&c->slots[e->slot].flags, e->flags);
    }
}

static bool all_zero(const struct store_record *r)
{
    static const struct store_record zeros;
    return memcmp(r, &zeros, sizeof(zeros)) == 0;
}

static int apply(struct kv_store *s, void *arg, uint32_t position,
                 const struct store_record *record)
{
    struct reading *r = arg;
    if (record == NULL) {
        /* Zeros are space that was made ahead, unless something follows; n_end tells. */
        if (!all_zero(&s->buffer[position % STORE_BUFFER_RECORDS])) {
            r->n_refused++;
            r->n_end = position + 1;
        }
        return 0;
    }
    r->n_refused += position - r->n_end; /* holes before it */
    r->n_end = position + 1;
    if (record->type == STORE_PUT) {
        return apply_put(s, r, position, record);
    }
    if (record->n_entries == 0 || record->n_entries > STORE_N_ENTRIES) {
        r->n_refused++;
        return 0;
    }
    for (uint32_t i = 0; i < record->n_entries; i++) {
        apply_entry(s, r, record->type == STORE_DROP, &record->entries[i]);
    }
    return 0;
}

int store_index_read(struct kv_store *s, struct fmt_error *err)
{
    struct reading r = {0};
    uint32_t n = (uint32_t)(s->index.bytes / STORE_RECORD_BYTES) - 1;
    int rc = scan(s, n, apply, &r);
    free(r.keys.refs);
    if (rc < 0) {
        return fmt_fail(err, rc, "%s.index: %s", s->name, strerrordesc_np(-rc));
    }
    s->index.n_records = r.n_end;
    s->facts.n_records_refused = r.n_refused;
    s->index.broken = r.n_refused > 0;
    return 0;
}

struct listing {
    void (*on_block)(void *arg, const struct kv_store_block *block);
    void *arg;
};

/* The slot that this record, and no later one, put a live block into; or NULL. */
static struct store_slot *slot_of_record(struct kv_store *s, uint32_t position,
                                         const struct store_record *record)
{
    if (record == NULL || record->type != STORE_PUT || record->put.layer_class >= s->n_classes ||
        record->put.slot >= s->classes[record->put.layer_class].n_slots ||
        !slot_live(&s->classes[record->put.layer_class], record->put.slot)) {
        return NULL;
    }
    struct store_slot *p = &s->classes[record->put.layer_class].slots[record->put.slot];
    return p->record == position ? p : NULL;
}

/* A block as it is now: what uses and flags have changed since its record. */
static void read_current(const struct store_slot *p, const struct store_record *record,
                         struct kv_store_block *ret)
{
    store_put_read(record, ret);
    ret->hits = atomic_load(&p->hits);
    ret->used_s = atomic_load(&p->used_s);
    ret->flags = atomic_load(&p->flags);
}

static int list_record(struct kv_store *s, void *arg, uint32_t position,
                       const struct store_record *record)
{
    const struct listing *l = arg;
    const struct store_slot *p = slot_of_record(s, position, record);
    if (p != NULL) {
        struct kv_store_block b;
        read_current(p, record, &b);
        l->on_block(l->arg, &b);
    }
    return 0;
}

int store_index_list(struct kv_store *s,
                     void (*on_block)(void *arg, const struct kv_store_block *block), void *arg)
{
    struct listing l = {on_block, arg};
    return s->index.fd < 0 ? 0 : scan(s, s->index.n_records, list_record, &l);
}

int store_index_open(struct kv_store *s, struct fmt_error *err)
{
    char name[STORE_FILE_NAME_BYTES];
    struct store_header h;
    store_file_name(s, "index", name);
    int rc = s->files.open(s->files.self, s->folder, name, IO_OPEN_EXISTING, &s->index.fd);
    if (rc == -ENOENT) {
        s->index.fd = -1;
        return 1;
    }
    rc = rc < 0 ? rc : s->files.size(s->files.self, s->index.fd, &s->index.bytes);
    const char *why =
        rc == 0 && (s->index.bytes < sizeof(h) || s->index.bytes > STORE_INDEX_BYTES_MAX)
            ? "its length cannot be right"
            : NULL;
    if (rc == 0 && why == NULL) {
        rc = s->files.read(s->files.self, s->index.fd, &h, sizeof(h), 0);
        why = rc == 0 ? store_header_check(&h, &s->identity) : NULL;
    }
    if (rc == 0 && why != NULL) {
        s->files.close(s->files.self, s->index.fd);
        s->index = (struct store_index){.fd = -1};
        rc = store_set_aside(s);
        return rc < 0 ? fmt_fail(err, rc, "%s.index: %s, and it cannot be set aside: %s", s->name,
                                 why, strerrordesc_np(-rc))
                      : 1;
    }
    if (rc < 0) {
        return fmt_fail(err, rc, "%s.index: %s", s->name,
                        rc == -EPERM ? "it belongs to somebody else, or others have access to it"
                                     : strerrordesc_np(-rc));
    }
    s->index.epoch = h.epoch;
    s->index.base = h.base;
    return 0;
}

/* ---- appending ----------------------------------------------------------------------------- */

int store_write_one(struct kv_store *s, int fd, const void *data, size_t bytes, uint64_t offset)
{
    struct io_span span = {.fd = fd, .offset = offset, .data = data, .bytes = bytes};
    int rc = s->files.write(s->files.self, &span, 1);
    s->facts.bytes_index_written += rc == 0 ? bytes : 0;
    return rc;
}

static int output_write(struct kv_store *s)
{
    struct store_index *x = &s->index;
    uint64_t offset = (uint64_t)(x->n_records + 1) * STORE_RECORD_BYTES;
    size_t bytes = (size_t)s->n_output * STORE_RECORD_BYTES;
    if (x->broken) {
        return -EIO;
    }
    if (offset + bytes > x->bytes) {
        int rc = s->files.allocate(s->files.self, x->fd, x->bytes, STORE_INDEX_GROW_BYTES);
        if (rc < 0) {
            x->broken = x->unsynced; /* else nothing was written: the file is as good as before */
            return rc;
        }
        x->bytes += STORE_INDEX_GROW_BYTES;
    }
    for (uint32_t i = 0; i < s->n_output; i++) {
        store_record_seal(&s->output[i], x->epoch, x->base + x->n_records + i);
    }
    x->unsynced = true;
    x->n_records += s->n_output; /* written or not: these positions have had their turn */
    s->n_output = 0;
    int rc = store_write_one(s, x->fd, s->output, bytes, offset);
    x->broken = rc < 0;
    return rc;
}

int store_output_next(struct kv_store *s, struct store_record **ret)
{
    int rc = s->n_output == STORE_BUFFER_RECORDS ? output_write(s) : 0;
    if (rc < 0) {
        return rc;
    }
    *ret = &s->output[s->n_output++];
    memset(*ret, 0, sizeof(**ret));
    return 0;
}

int store_output_sync(struct kv_store *s)
{
    int rc = s->n_output > 0 ? output_write(s) : 0;
    if (rc < 0 || !s->index.unsynced) {
        return rc;
    }
    rc = s->files.sync(s->files.self, s->index.fd);
    s->index.unsynced = false;
    s->index.broken = rc < 0;
    return rc;
}

/* ---- a new index ---------------------------------------------------------------------------- */

uint32_t store_n_live(const struct kv_store *s)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->n_classes; i++) {
        n += s->classes[i].n_live;
    }
    return n;
}

struct rewriting {
    struct store_index fresh;
};

static int rewrite_flush(struct kv_store *s, struct rewriting *w)
{
    struct store_index *x = &w->fresh;
    int rc = store_write_one(s, x->fd, s->output, (size_t)s->n_output * STORE_RECORD_BYTES,
                             (uint64_t)(x->n_records + 1) * STORE_RECORD_BYTES);
    x->n_records += s->n_output;
    s->n_output = 0;
    return rc;
}

static int rewrite_record(struct kv_store *s, void *arg, uint32_t position,
                          const struct store_record *record)
{
    struct rewriting *w = arg;
    struct store_slot *p = slot_of_record(s, position, record);
    if (p == NULL) {
        return 0;
    }
    struct kv_store_block b;
    struct store_record *r = &s->output[s->n_output];
    /* Cleared before the rest is read: what changes from now on is dirty again. */
    atomic_store(&p->dirty, false);
    read_current(p, record, &b);
    store_put_make(r, &b, record->put.bytes);
    p->record_new = w->fresh.n_records + s->n_output;
    store_record_seal(r, w->fresh.epoch, w->fresh.base + p->record_new);
    return ++s->n_output == STORE_BUFFER_RECORDS ? rewrite_flush(s, w) : 0;
}

/* Header and live records, synced. */
static int rewrite_fill(struct kv_store *s, struct rewriting *w)
{
    struct store_index *x = &w->fresh;
    struct store_header h;
    uint64_t bytes = (uint64_t)(store_n_live(s) + 1) * STORE_RECORD_BYTES + STORE_INDEX_GROW_BYTES;
    if (getrandom(&x->epoch, sizeof(x->epoch), 0) != sizeof(x->epoch)) {
        return -EIO;
    }
    x->bytes = (bytes + STORE_PAGE_BYTES - 1) & ~(uint64_t)(STORE_PAGE_BYTES - 1);
    x->base = s->index.base + s->index.n_records + 1;
    int rc = s->files.allocate(s->files.self, x->fd, 0, x->bytes);
    if (rc == 0) {
        store_header_make(&h, &s->identity, x->epoch, x->base);
        rc = store_write_one(s, x->fd, &h, sizeof(h), 0);
    }
    if (rc == 0 && s->index.fd >= 0) {
        rc = scan(s, s->index.n_records, rewrite_record, w);
    }
    if (rc == 0 && s->n_output > 0) {
        rc = rewrite_flush(s, w);
    }
    s->n_output = 0;
    return rc < 0 ? rc : s->files.sync(s->files.self, x->fd);
}

/* Calls fn for every live slot. Whole words of free slots are skipped: their memory, which takes
 * none, is not touched. */
static void each_live(struct kv_store *s, void (*fn)(struct store_slot *p))
{
    for (uint32_t i = 0; i < s->n_classes; i++) {
        struct store_class *c = &s->classes[i];
        for (uint32_t slot = 0; slot < c->n_slots; slot++) {
            if (c->used[slot / 64] == 0) {
                slot |= 63;
            } else if (slot_live(c, slot)) {
                fn(&c->slots[slot]);
            }
        }
    }
}

static void begin_slot(struct store_slot *p)
{
    p->record_new = STORE_NONE;
}

static void adopt_slot(struct store_slot *p)
{
    p->record = p->record_new; /* none: the old index has lost it meanwhile; it stays in memory */
}

static void fail_slot(struct store_slot *p)
{
    if (p->record_new != STORE_NONE) {
        atomic_store(&p->dirty, true); /* that was taken, and went nowhere */
    }
}

int store_index_rewrite(struct kv_store *s)
{
    struct rewriting w = {.fresh = {.fd = -1}};
    char name[STORE_FILE_NAME_BYTES], new_name[STORE_FILE_NAME_BYTES];
    store_file_name(s, "index", name);
    store_file_name(s, "index.new", new_name);
    each_live(s, begin_slot);
    s->n_output = 0;
    int rc = s->files.open(s->files.self, s->folder, new_name, IO_OPEN_EMPTY, &w.fresh.fd);
    if (rc < 0) {
        return rc;
    }
    rc = rewrite_fill(s, &w);
    if (rc < 0) {
        s->files.close(s->files.self, w.fresh.fd);
        s->files.unlink(s->files.self, s->folder, new_name);
        each_live(s, fail_slot);
        return rc;
    }
    /* From here on a failure leaves it open which of the two a crash would show. Both name what is
     * live now; neither may take an append. */
    rc = s->files.rename(s->files.self, s->folder, new_name, name);
    if (rc < 0) {
        s->files.close(s->files.self, w.fresh.fd);
        each_live(s, fail_slot);
        s->index.broken = true;
        return rc;
    }
    if (s->index.fd >= 0) {
        s->files.close(s->files.self, s->index.fd);
    }
    s->index = w.fresh;
    each_live(s, adopt_slot);
    s->facts.n_rewrites++;
    rc = s->files.sync_folder(s->files.self, s->folder);
    s->index.broken = rc < 0;
    if (rc == 0) {
        store_free_drops(s);
    }
    return rc;
}
