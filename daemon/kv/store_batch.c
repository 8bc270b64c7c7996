/* Batches: data, sync, records, sync, and only then done.
 *
 * Every failure ends in one of three ways. A full disk: the writes fail, their slots are free
 * again, persistence pauses. A sync of data that failed: the kernel may have dropped the pages and
 * call them clean, so a second sync would lie; the slots are burnt and the writes fail. Anything
 * about the index after its first byte: it is broken and gets written anew before anything else. */
#include "daemon/kv/store_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

struct hashing {         /* of one span's pieces, as they are copied */
    XXH3_state_t *state; /* one for all: spans are copied one after another */
    struct kv_store_write *w;
    uint64_t bytes, seen;
};

struct batch {
    struct kv_store_write *writes[STORE_BATCH_WRITES];
    int results[STORE_BATCH_WRITES];
    uint32_t n;
    struct kv_store_call *call; /* its turn comes after the writes; or NULL */
};

/* ---- the queue ------------------------------------------------------------------------------ */

/* Under the lock. */
static void take_writes(struct kv_store *s, struct batch *b)
{
    uint64_t bytes = 0;
    struct kv_store_write *w;
    /* After a failure one write shows whether the disk is well again: it may cost its slot. */
    uint32_t n_max = s->pause_code != 0 ? 1 : STORE_BATCH_WRITES;
    while (b->n < n_max && bytes < STORE_BATCH_BYTES && (w = s->shared.writes) != NULL &&
           (s->shared.calls == NULL || w->turn < s->shared.calls->turn)) {
        s->shared.writes = w->next;
        bytes += s->classes[w->block.layer_class].block_bytes;
        b->results[b->n] = 0;
        b->writes[b->n++] = w;
    }
    if (s->shared.writes == NULL) {
        s->shared.writes_end = &s->shared.writes;
    }
    struct kv_store_call *call = s->shared.calls;
    if (call != NULL && (s->shared.writes == NULL || call->turn < s->shared.writes->turn)) {
        s->shared.calls = call->next;
        s->shared.calls_end = call->next == NULL ? &s->shared.calls : s->shared.calls_end;
        b->call = call;
    }
}

void store_drop_slot(struct kv_store *s, uint32_t layer_class, uint32_t slot)
{
    struct store_class *c = &s->classes[layer_class];
    struct store_slot *p = &c->slots[slot];
    p->state = SLOT_DROPPING;
    p->forgotten = true;
    p->next_drop = s->drops;
    s->drops = store_ref(layer_class, slot);
    c->n_live--;
}

void store_take_drops(struct kv_store *s)
{
    uint64_t ref = s->shared.drops;
    s->shared.drops = 0;
    while (ref != 0) {
        uint32_t layer_class = (uint32_t)((ref - 1) >> 32), slot = (uint32_t)(ref - 1);
        struct store_slot *p = &s->classes[layer_class].slots[slot];
        ref = p->next_drop;
        if (p->state == SLOT_LIVE) {
            store_drop_slot(s, layer_class, slot);
        } else {
            p->forgotten = false;
        }
    }
}

void store_free_drops(struct kv_store *s)
{
    pthread_mutex_lock(&s->lock);
    while (s->drops != 0) {
        uint32_t layer_class = (uint32_t)((s->drops - 1) >> 32), slot = (uint32_t)(s->drops - 1);
        struct store_slot *p = &s->classes[layer_class].slots[slot];
        s->drops = p->next_drop;
        p->forgotten = false;
        store_slot_free(s, layer_class, slot);
    }
    pthread_mutex_unlock(&s->lock);
}

/* ---- failures ------------------------------------------------------------------------------- */

void store_pause(struct kv_store *s, int rc, const char *what)
{
    s->pause_code = rc;
    s->paused_until_ms = s->now_ms(s->now_arg) + s->pause_ms;
    s->facts.n_failures++;
    s->facts.state = rc == -ENOSPC ? KV_STORE_PAUSED_FULL : KV_STORE_PAUSED_ERROR;
    snprintf(s->facts.sentence, sizeof(s->facts.sentence), "%s.%s: %s", s->name, what,
             strerrordesc_np(-rc));
}

static void resume(struct kv_store *s)
{
    s->pause_code = 0;
    s->facts.state = KV_STORE_OK;
    s->facts.sentence[0] = '\0';
}

/* A code of one write, and what that says about the store. The first code stays. */
static void fail_write(struct kv_store *s, struct batch *b, uint32_t i, int rc)
{
    char what[8];
    if (b->results[i] != 0) {
        return;
    }
    b->results[i] = rc;
    if (rc != -EDQUOT) {
        snprintf(what, sizeof(what), "c%u", b->writes[i]->block.layer_class);
        store_pause(s, rc, what);
    }
}

static void fail_all(struct kv_store *s, struct batch *b, int rc)
{
    for (uint32_t i = 0; i < b->n; i++) {
        b->results[i] = b->results[i] == 0 ? rc : b->results[i];
    }
}

static void burn(struct kv_store *s, const struct kv_store_block *b)
{
    s->classes[b->layer_class].slots[b->slot].state = SLOT_BURNT;
}

/* ---- data ----------------------------------------------------------------------------------- */

static void hash_piece(void *arg, const void *data, size_t bytes)
{
    struct hashing *h = arg;
    if (h->seen == 0) {
        XXH3_64bits_reset(h->state);
    }
    XXH3_64bits_update(h->state, data, bytes);
    h->seen += bytes;
    if (h->seen == h->bytes) {
        h->w->block.checksum = XXH3_64bits_digest(h->state);
    }
}

/* A slot for every write that can have one. */
static void place(struct kv_store *s, struct batch *b)
{
    for (uint32_t i = 0; i < b->n; i++) {
        struct kv_store_block *block = &b->writes[i]->block;
        int rc = store_n_live(s) + b->n > STORE_LIVE_MAX
                     ? -EDQUOT
                     : store_slot_take(s, block->layer_class, &block->slot);
        if (rc < 0) {
            fail_write(s, b, i, rc);
        }
    }
}

static void write_data(struct kv_store *s, struct batch *b)
{
    XXH3_state_t state;
    struct io_span spans[STORE_BATCH_WRITES];
    struct hashing hashing[STORE_BATCH_WRITES];
    uint32_t of[STORE_BATCH_WRITES], n = 0;
    for (uint32_t i = 0; i < b->n; i++) {
        if (b->results[i] != 0) {
            continue;
        }
        struct kv_store_write *w = b->writes[i];
        struct store_class *c = &s->classes[w->block.layer_class];
        hashing[n] = (struct hashing){.state = &state, .w = w, .bytes = c->block_bytes};
        spans[n] = (struct io_span){.fd = c->fd,
                                    .offset = w->block.slot * c->slot_bytes,
                                    .data = w->data,
                                    .bytes = (size_t)c->block_bytes,
                                    .on_piece = hash_piece,
                                    .arg = &hashing[n]};
        of[n++] = i;
    }
    if (n == 0) {
        return;
    }
    s->files.write(s->files.self, spans, n);
    for (uint32_t i = 0; i < n; i++) {
        struct kv_store_block *block = &b->writes[of[i]]->block;
        struct store_class *c = &s->classes[block->layer_class];
        if (spans[i].result == 0) {
            c->unsynced = true;
            s->facts.bytes_data_written += c->block_bytes;
            continue;
        }
        fail_write(s, b, of[i], spans[i].result);
        if (spans[i].result == -ENOSPC) {
            store_slot_free(s, block->layer_class, block->slot);
        } else {
            burn(s, block);
        }
    }
}

static void sync_data(struct kv_store *s, struct batch *b)
{
    for (uint32_t k = 0; k < s->n_classes; k++) {
        struct store_class *c = &s->classes[k];
        int rc = c->unsynced ? s->files.sync(s->files.self, c->fd) : 0;
        c->unsynced = false;
        for (uint32_t i = 0; i < b->n && rc < 0; i++) {
            if (b->writes[i]->block.layer_class == k && b->results[i] == 0) {
                fail_write(s, b, i, rc);
                burn(s, &b->writes[i]->block);
            }
        }
    }
}

/* ---- records -------------------------------------------------------------------------------- */

struct entries { /* a DROP or USE record that is being filled */
    enum store_record_type type;
    struct store_record *record;
};

static int next_entry(struct kv_store *s, struct entries *e, struct store_entry **ret)
{
    if (e->record == NULL || e->record->n_entries == STORE_N_ENTRIES) {
        int rc = store_output_next(s, &e->record);
        if (rc < 0) {
            return rc;
        }
        e->record->type = e->type;
    }
    *ret = &e->record->entries[e->record->n_entries++];
    return 0;
}

static int put_drops(struct kv_store *s)
{
    struct entries e = {.type = STORE_DROP};
    struct store_entry *entry;
    int rc = 0;
    uint64_t next;
    for (uint64_t ref = s->drops; ref != 0 && rc == 0; ref = next) {
        uint32_t layer_class = (uint32_t)((ref - 1) >> 32), slot = (uint32_t)(ref - 1);
        next = s->classes[layer_class].slots[slot].next_drop;
        rc = next_entry(s, &e, &entry);
        if (rc == 0) {
            entry->layer_class = layer_class;
            entry->slot = slot;
        }
    }
    return rc;
}

static int put_use(struct kv_store *s, struct entries *e, uint32_t layer_class, uint32_t slot)
{
    struct store_slot *p = &s->classes[layer_class].slots[slot];
    struct store_entry *entry;
    /* Cleared before the rest is read: what changes from now on is dirty again. */
    if (p->state != SLOT_LIVE || p->record == STORE_NONE || !atomic_exchange(&p->dirty, false)) {
        return 0;
    }
    int rc = next_entry(s, e, &entry);
    if (rc == 0) {
        *entry = (struct store_entry){.layer_class = layer_class,
                                      .slot = slot,
                                      .used_s = atomic_load(&p->used_s),
                                      .hits = atomic_load(&p->hits),
                                      .flags = atomic_load(&p->flags)};
    }
    return rc;
}

static int put_uses(struct kv_store *s)
{
    struct entries e = {.type = STORE_USE};
    int rc = 0;
    s->uses_ms = s->now_ms(s->now_arg);
    for (uint32_t i = 0; i < s->n_classes; i++) {
        struct store_class *c = &s->classes[i];
        for (uint32_t word = 0; word < (c->n_slots + 63) / 64; word++) {
            for (uint64_t bits = c->used[word]; bits != 0 && rc == 0; bits &= bits - 1) {
                rc = put_use(s, &e, i, word * 64 + (uint32_t)__builtin_ctzll(bits));
            }
        }
    }
    if (rc < 0) {
        s->index.broken = true; /* flags were taken and went nowhere: a new index gets them all */
    }
    return rc;
}

static int put_blocks(struct kv_store *s, struct batch *b, uint32_t *positions)
{
    int rc = 0;
    for (uint32_t i = 0; i < b->n && rc == 0; i++) {
        if (b->results[i] != 0) {
            continue;
        }
        const struct kv_store_block *block = &b->writes[i]->block;
        struct store_record *r;
        rc = store_output_next(s, &r);
        if (rc == 0) {
            store_put_make(r, block, s->classes[block->layer_class].block_bytes);
            positions[i] = s->index.n_records + s->n_output - 1;
        }
    }
    return rc;
}

/* Names what was written, forgets what was dropped, notes uses if it is their time; synced. */
static int write_records(struct kv_store *s, struct batch *b, uint32_t *positions)
{
    bool flags = atomic_exchange(&s->flags_wait, false);
    bool uses = flags ||
                (atomic_load(&s->uses_wait) && s->now_ms(s->now_arg) - s->uses_ms >= STORE_USES_MS);
    int rc = put_drops(s);
    rc = rc < 0 ? rc : put_blocks(s, b, positions);
    if (rc == 0 && uses) {
        atomic_store(&s->uses_wait, false);
        rc = put_uses(s);
    }
    rc = rc < 0 ? rc : store_output_sync(s);
    s->n_output = 0;
    if (rc < 0 && uses) {
        s->index.broken = true; /* as above */
        atomic_store(&s->flags_wait, true);
    }
    return rc;
}

static void finish_records(struct kv_store *s, struct batch *b, const uint32_t *positions, int rc)
{
    for (uint32_t i = 0; i < b->n; i++) {
        const struct kv_store_block *block = &b->writes[i]->block;
        if (b->results[i] != 0) {
            continue;
        }
        if (rc == 0) {
            store_slot_live(s, block, positions[i]);
            s->facts.blocks_written++;
        } else {
            /* Free at once: should a record of it be in the file, nothing is written to the slot
             * before that file is replaced. */
            store_slot_free(s, block->layer_class, block->slot);
        }
    }
    if (rc == 0) {
        store_free_drops(s);
    } else {
        store_pause(s, rc, "index");
        fail_all(s, b, rc);
    }
}

/* ---- the whole ------------------------------------------------------------------------------ */

/* 0: the index takes records; else what the writes fail with. */
static int begin(struct kv_store *s)
{
    if (s->pause_code != 0 && s->now_ms(s->now_arg) < s->paused_until_ms) {
        return -EAGAIN;
    }
    for (uint32_t i = 0; i < s->n_classes; i++) {
        char what[16];
        int rc = store_class_check(s, i);
        if (rc < 0) {
            snprintf(what, sizeof(what), "c%u", i);
            store_pause(s, rc, what);
            return rc;
        }
    }
    int rc = s->index.broken ? store_index_rewrite(s) : 0;
    if (rc < 0) {
        store_pause(s, rc, "index");
    }
    return rc;
}

/* A new index when dead records outnumber live ones. That it fails matters to nobody but the disk.
 */
static void tidy(struct kv_store *s)
{
    uint32_t n_live = store_n_live(s);
    uint64_t now = s->now_ms(s->now_arg);
    if (s->index.broken || s->index.n_records <= 2 * n_live + s->rewrite_slack ||
        now < s->rewrite_ms) {
        return;
    }
    int rc = store_index_rewrite(s);
    if (rc < 0) {
        s->rewrite_ms = now + s->pause_ms;
        s->facts.n_failures++;
        if (s->index.broken) {
            store_pause(s, rc, "index");
        }
    }
}

/* Whether a write would find no slot, while some are about to be free. */
static bool waits_for_drops(const struct kv_store *s, const struct batch *b)
{
    uint32_t wanted[KV_MAX_CLASSES] = {0};
    for (uint32_t i = 0; i < b->n && s->drops != 0; i++) {
        uint32_t c = b->writes[i]->block.layer_class;
        if (++wanted[c] > s->classes[c].n_free) {
            return true;
        }
    }
    return false;
}

/* What was forgotten is free for the writes of the same batch. */
static int drop_first(struct kv_store *s)
{
    struct batch none = {.n = 0};
    int rc = write_records(s, &none, NULL);
    finish_records(s, &none, NULL, rc);
    return rc;
}

static void run_batch(struct kv_store *s, struct batch *b)
{
    uint32_t positions[STORE_BATCH_WRITES];
    uint64_t failures = s->facts.n_failures;
    int rc = begin(s);
    if (rc == 0 && waits_for_drops(s, b)) {
        rc = drop_first(s);
    }
    if (rc < 0) {
        fail_all(s, b, rc);
        return;
    }
    place(s, b);
    write_data(s, b);
    sync_data(s, b);
    finish_records(s, b, positions, write_records(s, b, positions));
    for (uint32_t i = 0; i < s->n_classes; i++) {
        store_class_intact(s, i);
    }
    s->facts.n_batches++;
    if (s->facts.n_failures == failures) {
        resume(s);
        tidy(s);
        store_punch_idle(s);
    }
}

static int run_call(struct kv_store *s, const struct kv_store_call *call)
{
    if (call->purge) {
        return store_purge_run(s, call);
    }
    /* Writes have had their own answers. */
    if (s->drops != 0 || atomic_load(&s->flags_wait)) {
        return s->pause_code != 0 ? s->pause_code : -EAGAIN;
    }
    return 0;
}

bool store_run_once(struct kv_store *s)
{
    struct batch b = {.n = 0};
    pthread_mutex_lock(&s->lock);
    take_writes(s, &b);
    store_take_drops(s);
    pthread_mutex_unlock(&s->lock);
    bool work = b.n > 0 || s->drops != 0 || atomic_load(&s->flags_wait);
    if (work) {
        run_batch(s, &b);
    }
    int rc = b.call != NULL ? run_call(s, b.call) : 0;
    store_publish(s);
    for (uint32_t i = 0; i < b.n; i++) {
        b.writes[i]->done(b.writes[i]->arg, b.results[i]);
    }
    if (b.call != NULL) {
        b.call->done(b.call->arg, rc);
    }
    return b.n > 0 || b.call != NULL;
}

void store_persist_uses(struct kv_store *s)
{
    struct batch b = {.n = 0};
    pthread_mutex_lock(&s->lock);
    store_take_drops(s);
    pthread_mutex_unlock(&s->lock);
    if (atomic_load(&s->uses_wait)) {
        atomic_store(&s->flags_wait, true);
    }
    if (s->drops != 0 || atomic_load(&s->flags_wait)) {
        run_batch(s, &b);
    }
}

void store_cancel(struct kv_store *s)
{
    struct kv_store_write *w;
    struct kv_store_call *call;
    pthread_mutex_lock(&s->lock);
    w = s->shared.writes;
    call = s->shared.calls;
    s->shared.writes = NULL;
    s->shared.writes_end = &s->shared.writes;
    s->shared.calls = NULL;
    s->shared.calls_end = &s->shared.calls;
    pthread_mutex_unlock(&s->lock);
    while (w != NULL) {
        struct kv_store_write *next = w->next;
        w->done(w->arg, -ECANCELED);
        w = next;
    }
    while (call != NULL) {
        struct kv_store_call *next = call->next;
        call->done(call->arg, -ECANCELED);
        call = next;
    }
}
