/* Data files: a class's slots, which of them are free, and the mapping. */
#include "daemon/kv/guard.h"
#include "daemon/kv/store_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define GROW_PART 8 /* of what the bound leaves */

/* ---- opening ------------------------------------------------------------------------------ */

static int map_zeros(size_t bytes, void **ret)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return -ENOMEM;
    }
    *ret = memory;
    return 0;
}

static size_t slots_bytes(const struct store_class *c)
{
    return (size_t)c->n_max * sizeof(c->slots[0]);
}

static size_t used_bytes(const struct store_class *c)
{
    return ((size_t)c->n_max + 63) / 64 * sizeof(c->used[0]);
}

/* Tables of n_max slots and the mapping of the file. What was made on failure is undone by
 * store_class_close(). */
static int make_tables(struct kv_store *s, struct store_class *c)
{
    void *memory;
    int rc = map_zeros(slots_bytes(c), &memory);
    if (rc < 0) {
        return rc;
    }
    c->slots = memory;
    rc = map_zeros(used_bytes(c), &memory);
    if (rc < 0) {
        return rc;
    }
    c->used = memory;
    rc = map_zeros(used_bytes(c), &memory);
    if (rc < 0) {
        return rc;
    }
    c->holes = memory;
    size_t bytes = (size_t)(c->n_max * c->slot_bytes);
    rc = s->files.map(s->files.self, c->fd, 0, bytes, NULL, &memory);
    if (rc < 0) {
        return rc;
    }
    rc = kv_guard_add(memory, bytes, c->slot_bytes, &c->guard);
    if (rc < 0) {
        s->files.unmap(s->files.self, memory, bytes);
        return rc;
    }
    c->map = memory;
    return 0;
}

/* A file that is longer than it may be was made under a larger bound: the rest goes. */
static int fit_file(struct kv_store *s, struct store_class *c, bool fresh)
{
    uint64_t bytes;
    int rc = s->files.size(s->files.self, c->fd, &bytes);
    uint64_t bytes_max = fresh ? 0 : c->n_max * c->slot_bytes;
    if (rc == 0 && bytes > bytes_max) {
        bytes = bytes_max;
        rc = s->files.truncate(s->files.self, c->fd, bytes);
    }
    /* The last slot is there when its block is, with or without what pads it. */
    uint64_t pad = c->slot_bytes - c->block_bytes;
    c->n_slots = rc == 0 ? (uint32_t)((bytes + pad) / c->slot_bytes) : 0;
    c->n_free = c->n_slots;
    return rc;
}

static int class_fail(struct kv_store *s, uint32_t layer_class, int rc, struct fmt_error *err)
{
    return fmt_fail(err, rc, "%s.c%u: %s", s->name, layer_class,
                    rc == -EPERM ? "it belongs to somebody else, or others have access to it"
                                 : strerrordesc_np(-rc));
}

int store_class_open(struct kv_store *s, uint32_t layer_class, bool fresh, bool *ret_made,
                     struct fmt_error *err)
{
    struct store_class *c = &s->classes[layer_class];
    char what[8], name[STORE_FILE_NAME_BYTES];
    *c = (struct store_class){.fd = -1, .block_bytes = s->identity.block_bytes[layer_class]};
    c->slot_bytes = (c->block_bytes + STORE_PAGE_BYTES - 1) & ~(uint64_t)(STORE_PAGE_BYTES - 1);
    uint64_t n_max = s->bytes_max / c->slot_bytes;
    c->n_max = n_max < STORE_NONE ? (uint32_t)n_max : STORE_NONE - 1;
    s->n_classes = layer_class + 1;

    snprintf(what, sizeof(what), "c%u", layer_class);
    store_file_name(s, what, name);
    int rc = s->files.open(s->files.self, s->folder, name, IO_OPEN_EXISTING, &c->fd);
    *ret_made = rc == -ENOENT;
    if (rc == -ENOENT) {
        rc = s->files.open(s->files.self, s->folder, name, IO_OPEN_CREATE, &c->fd);
    }
    rc = rc < 0 ? rc : fit_file(s, c, fresh);
    rc = rc < 0 ? rc : make_tables(s, c);
    if (rc < 0) {
        return class_fail(s, layer_class, rc, err);
    }
    store_class_intact(s, layer_class); /* from now on it gets no smaller */
    return 0;
}

void store_class_close(struct kv_store *s, uint32_t layer_class)
{
    struct store_class *c = &s->classes[layer_class];
    if (c->map != NULL) {
        kv_guard_remove(c->guard);
        s->files.unmap(s->files.self, c->map, (size_t)(c->n_max * c->slot_bytes));
    }
    if (c->used != NULL) {
        munmap(c->used, used_bytes(c));
    }
    if (c->holes != NULL) {
        munmap(c->holes, used_bytes(c));
    }
    if (c->slots != NULL) {
        munmap(c->slots, slots_bytes(c));
    }
    if (c->fd >= 0) {
        s->files.close(s->files.self, c->fd);
    }
    *c = (struct store_class){.fd = -1};
}

/* ---- free slots --------------------------------------------------------------------------- */

uint64_t store_bytes_files(const struct kv_store *s)
{
    uint64_t bytes = s->index.bytes;
    for (uint32_t i = 0; i < s->n_classes; i++) {
        const struct store_class *c = &s->classes[i];
        bytes += (c->n_slots - c->n_holes) * c->slot_bytes;
    }
    return bytes;
}

/* How many slots the bound leaves to a class, beyond those that its file has. */
static uint64_t slots_to_grow(const struct kv_store *s, const struct store_class *c)
{
    uint64_t bytes = store_bytes_files(s) + s->bytes_aside;
    uint64_t left = bytes < s->bytes_max ? (s->bytes_max - bytes) / c->slot_bytes : 0;
    return left < c->n_max - c->n_slots ? left : c->n_max - c->n_slots;
}

static int grow(struct kv_store *s, struct store_class *c)
{
    if (slots_to_grow(s, c) == 0 && s->bytes_aside > 0) {
        store_aside_keep(s, 0); /* files that nobody can use give way to those that are used */
    }
    /* Ever smaller steps towards the bound: other classes want their part of it. */
    uint64_t n_left = slots_to_grow(s, c);
    uint64_t n = n_left / GROW_PART;
    n = n < STORE_GROW_BYTES / c->slot_bytes ? n : STORE_GROW_BYTES / c->slot_bytes;
    n = n == 0 ? 1 : n;
    if (n_left == 0) {
        return -EDQUOT;
    }
    uint64_t end = c->n_slots * c->slot_bytes;
    int rc = s->files.allocate(s->files.self, c->fd, end, n * c->slot_bytes);
    if (rc == -ENOSPC && n > 1) {
        n = 1;
        rc = s->files.allocate(s->files.self, c->fd, end, c->slot_bytes);
    }
    if (rc == 0) {
        c->n_slots += (uint32_t)n;
        c->n_free += (uint32_t)n;
    }
    return rc;
}

/* The first free slot at or after the hint, round about. */
static uint32_t find_free(struct store_class *c, bool holes_too)
{
    uint32_t n_words = (c->n_slots + 63) / 64;
    uint32_t word = c->hint < c->n_slots ? c->hint / 64 : 0;
    for (uint32_t i = 0; i < n_words; i++, word = word + 1 < n_words ? word + 1 : 0) {
        uint64_t taken = c->used[word] | (holes_too ? 0 : c->holes[word]);
        if (taken != UINT64_MAX) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(~taken);
            if (slot < c->n_slots) {
                c->hint = slot;
                return slot;
            }
        }
    }
    return STORE_NONE;
}

/* Makes space for a free slot that was punched. */
static int fill_hole(struct kv_store *s, struct store_class *c, uint32_t slot)
{
    if (store_bytes_files(s) + s->bytes_aside + c->slot_bytes > s->bytes_max) {
        return -EDQUOT;
    }
    int rc = s->files.allocate(s->files.self, c->fd, slot * c->slot_bytes, (size_t)c->slot_bytes);
    if (rc == 0) {
        c->holes[slot / 64] &= ~(1ull << slot % 64);
        c->n_holes--;
    }
    return rc;
}

/* A free slot that has space on the disk. */
static int find_slot(struct kv_store *s, struct store_class *c, uint32_t *ret_slot)
{
    bool only_holes = c->n_free == c->n_holes;
    *ret_slot = find_free(c, only_holes);
    if (*ret_slot == STORE_NONE) {
        return -EDQUOT;
    }
    return only_holes ? fill_hole(s, c, *ret_slot) : 0;
}

/* A unit of the mapping that was covered with zeros shows the file again. */
static int uncover(struct kv_store *s, struct store_class *c, uint32_t slot)
{
    size_t offset = (size_t)(slot * c->slot_bytes);
    if (!kv_guard_marked(c->guard, offset, c->slot_bytes)) {
        return 0;
    }
    void *at = (char *)c->map + offset;
    int rc = s->files.map(s->files.self, c->fd, offset, c->slot_bytes, at, &at);
    if (rc == 0) {
        kv_guard_clear(c->guard, offset, c->slot_bytes);
    }
    return rc;
}

int store_slot_take(struct kv_store *s, uint32_t layer_class, uint32_t *ret_slot)
{
    struct store_class *c = &s->classes[layer_class];
    int rc = c->n_free == 0 ? grow(s, c) : 0;
    if (rc < 0) {
        return rc;
    }
    uint32_t slot;
    rc = find_slot(s, c, &slot);
    rc = rc < 0 ? rc : uncover(s, c, slot);
    if (rc < 0) {
        return rc;
    }
    c->used[slot / 64] |= 1ull << slot % 64;
    c->n_free--;
    c->slots[slot].state = SLOT_WRITING;
    *ret_slot = slot;
    return 0;
}

void store_slot_free(struct kv_store *s, uint32_t layer_class, uint32_t slot)
{
    struct store_class *c = &s->classes[layer_class];
    struct store_slot *p = &c->slots[slot];
    c->n_live -= p->state == SLOT_LIVE;
    p->state = SLOT_FREE;
    p->record = STORE_NONE;
    atomic_store(&p->dirty, false);
    c->used[slot / 64] &= ~(1ull << slot % 64);
    c->n_free++;
}

void store_slot_live(struct kv_store *s, const struct kv_store_block *b, uint32_t record)
{
    struct store_class *c = &s->classes[b->layer_class];
    struct store_slot *p = &c->slots[b->slot];
    c->n_live += p->state != SLOT_LIVE;
    p->state = SLOT_LIVE;
    p->key = b->key;
    p->record = record;
    atomic_store(&p->dirty, false);
    atomic_store(&p->hits, b->hits);
    atomic_store(&p->used_s, b->used_s);
    atomic_store(&p->flags, b->flags);
}

void store_slot_claim(struct kv_store *s, const struct kv_store_block *b, uint32_t record)
{
    struct store_class *c = &s->classes[b->layer_class];
    uint64_t bit = 1ull << b->slot % 64;
    c->n_free -= (c->used[b->slot / 64] & bit) == 0;
    c->used[b->slot / 64] |= bit;
    store_slot_live(s, b, record);
}

/* ---- files that others have cut ------------------------------------------------------------- */

int store_class_check(struct kv_store *s, uint32_t layer_class)
{
    struct store_class *c = &s->classes[layer_class];
    uint64_t bytes, whole = c->n_slots * c->slot_bytes;
    int rc = s->files.size(s->files.self, c->fd, &bytes);
    if (rc < 0 || bytes + (c->slot_bytes - c->block_bytes) >= whole) {
        return rc;
    }
    size_t offset = (size_t)(bytes / c->slot_bytes * c->slot_bytes);
    kv_guard_mark(c->guard, offset, (size_t)whole - offset);
    return s->files.allocate(s->files.self, c->fd, bytes, whole - bytes);
}

/* The io thread: the file takes less and less, and who looks before the end knows nothing. */
static void begin_punches(struct kv_store *s, struct store_class *c)
{
    pthread_mutex_lock(&s->lock);
    c->n_punches++;
    pthread_mutex_unlock(&s->lock);
}

static void end_punches(struct kv_store *s, struct store_class *c)
{
    pthread_mutex_lock(&s->lock);
    c->n_punches++;
    c->allocated = 0;
    pthread_mutex_unlock(&s->lock);
}

bool store_class_intact(struct kv_store *s, uint32_t layer_class)
{
    struct store_class *c = &s->classes[layer_class];
    uint64_t now;
    pthread_mutex_lock(&s->lock);
    uint32_t n_punches = c->n_punches;
    uint64_t before = c->allocated;
    pthread_mutex_unlock(&s->lock);
    if (n_punches % 2 != 0 || s->files.allocated == NULL ||
        s->files.allocated(s->files.self, c->fd, &now) < 0) {
        return true;
    }
    pthread_mutex_lock(&s->lock);
    bool punched = c->n_punches != n_punches; /* meanwhile: the next look will tell */
    /* File systems count a little differently from time to time: less than a slot is no cut. */
    bool intact = punched || now + c->slot_bytes > before;
    if (!intact) {
        kv_guard_mark(c->guard, 0, (size_t)(c->n_max * c->slot_bytes));
    }
    if (!punched && c->allocated == before) { /* nobody else has looked since */
        c->allocated = now;
    }
    pthread_mutex_unlock(&s->lock);
    return intact;
}

/* ---- removing ----------------------------------------------------------------------------- */

/* The next run of slots at or after from that are not live; false: there is none. */
static bool dead_run(const struct store_class *c, uint32_t from, uint32_t *ret_first,
                     uint32_t *ret_end)
{
    while (from < c->n_slots && (c->used[from / 64] & 1ull << from % 64) != 0 &&
           c->slots[from].state == SLOT_LIVE) {
        from++;
    }
    uint32_t end = from;
    while (end < c->n_slots &&
           ((c->used[end / 64] & 1ull << end % 64) == 0 || c->slots[end].state != SLOT_LIVE)) {
        end++;
    }
    *ret_first = from;
    *ret_end = end;
    return from < end;
}

int store_punch_dead(struct kv_store *s)
{
    int rc = 0;
    for (uint32_t i = 0; i < s->n_classes && rc == 0; i++) {
        struct store_class *c = &s->classes[i];
        uint32_t first, end = 0;
        bool any = false;
        begin_punches(s, c);
        while (rc == 0 && dead_run(c, end, &first, &end)) {
            rc = s->files.punch(s->files.self, c->fd, first * c->slot_bytes,
                                (end - first) * c->slot_bytes);
            any = true;
        }
        if (rc == 0 && any) {
            rc = s->files.sync(s->files.self, c->fd);
        }
        end_punches(s, c);
    }
    return rc;
}

/* The next run of free slots with space at or after from; false: there is none. */
static bool idle_run(const struct store_class *c, uint32_t from, uint32_t *ret_first,
                     uint32_t *ret_end)
{
    while (from < c->n_slots && ((c->used[from / 64] | c->holes[from / 64]) & 1ull << from % 64)) {
        from++;
    }
    uint32_t end = from;
    while (end < c->n_slots && !((c->used[end / 64] | c->holes[end / 64]) & 1ull << end % 64)) {
        end++;
    }
    *ret_first = from;
    *ret_end = end;
    return from < end;
}

/* Whether a hole takes less than a slot; tried with a free one, which is given its space before. */
static bool makes_holes(struct kv_store *s, const struct store_class *c, uint32_t slot)
{
    const struct io_files *f = &s->files;
    uint64_t offset = slot * c->slot_bytes, before, after;
    return f->allocated == NULL || (f->allocate(f->self, c->fd, offset, c->slot_bytes) == 0 &&
                                    f->allocated(f->self, c->fd, &before) == 0 &&
                                    f->punch(f->self, c->fd, offset, c->slot_bytes) == 0 &&
                                    f->allocated(f->self, c->fd, &after) == 0 && after < before);
}

static void punch_class(struct kv_store *s, struct store_class *c)
{
    uint32_t first, end = 0;
    begin_punches(s, c);
    for (uint32_t n = 0; n < STORE_PUNCHES_MAX && idle_run(c, end, &first, &end); n++) {
        if (n == 0 && !makes_holes(s, c, first)) {
            s->keeps_space = true;
            break;
        }
        if (s->files.punch(s->files.self, c->fd, first * c->slot_bytes,
                           (end - first) * c->slot_bytes) < 0) {
            break; /* what is a hole by now is only thought to take space */
        }
        for (uint32_t slot = first; slot < end; slot++) {
            c->holes[slot / 64] |= 1ull << slot % 64;
        }
        c->n_holes += end - first;
    }
    end_punches(s, c);
}

void store_punch_idle(struct kv_store *s)
{
    uint64_t idle = 0;
    for (uint32_t i = 0; i < s->n_classes; i++) {
        const struct store_class *c = &s->classes[i];
        idle += (c->n_free - c->n_holes) * c->slot_bytes;
    }
    for (uint32_t i = 0; i < s->n_classes && idle > s->bytes_max / STORE_IDLE_PART; i++) {
        if (!s->keeps_space && s->classes[i].n_free > s->classes[i].n_holes) {
            punch_class(s, &s->classes[i]);
        }
    }
}
