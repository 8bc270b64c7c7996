/* Reading and facts: any thread. */
#include "daemon/kv/guard.h"
#include "daemon/kv/store_internal.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14; others answer -EINVAL */
#endif

const void *kv_store_data(const struct kv_store *s, uint32_t layer_class, uint32_t slot)
{
    const struct store_class *c = &s->classes[layer_class];
    return (const char *)c->map + slot * c->slot_bytes;
}

static bool in_range(const struct kv_store *s, const struct kv_store_block *b)
{
    return b->layer_class < s->n_classes && b->slot < s->classes[b->layer_class].n_max;
}

bool kv_store_marked(const struct kv_store *s, const struct kv_store_block *b)
{
    const struct store_class *c = &s->classes[b->layer_class];
    return !in_range(s, b) ||
           kv_guard_marked(c->guard, (size_t)(b->slot * c->slot_bytes), (size_t)c->block_bytes);
}

int kv_store_verify(const struct kv_store *s, const struct kv_store_block *b)
{
    if (!in_range(s, b)) {
        return -EBADMSG;
    }
    const struct store_class *c = &s->classes[b->layer_class];
    void *data = (void *)kv_store_data(s, b->layer_class, b->slot);
    /* Maps and reads all pages in one call, and tells what cannot be read. Where the kernel does
     * not know it, or pages go away again, the guard does. */
    if (madvise(data, (size_t)c->block_bytes, MADV_POPULATE_READ) < 0) {
        if (errno == EFAULT || errno == EHWPOISON) {
            return -EIO;
        }
        madvise(data, (size_t)c->block_bytes, MADV_WILLNEED);
    }
    uint64_t checksum = XXH3_64bits(data, (size_t)c->block_bytes);
    if (kv_store_marked(s, b)) {
        return -EIO;
    }
    return checksum == b->checksum ? 0 : -EBADMSG;
}

bool kv_store_in_memory(const struct kv_store *s, const struct kv_store_block *b)
{
    unsigned char pages[256];
    const size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE), step = sizeof(pages) * page_bytes;
    if (!in_range(s, b)) {
        return true; /* there is nothing to read */
    }
    char *data = (char *)kv_store_data(s, b->layer_class, b->slot);
    size_t bytes = (size_t)s->classes[b->layer_class].block_bytes;
    for (size_t at = 0; at < bytes; at += step) {
        size_t n = bytes - at < step ? bytes - at : step;
        if (mincore(data + at, n, pages) < 0) {
            return false;
        }
        for (size_t i = 0; i < (n + page_bytes - 1) / page_bytes; i++) {
            if (!(pages[i] & 1)) {
                return false;
            }
        }
    }
    return true;
}

void kv_store_will_need(const struct kv_store *s, const struct kv_store_block *b)
{
    if (in_range(s, b)) {
        madvise((void *)kv_store_data(s, b->layer_class, b->slot),
                (size_t)s->classes[b->layer_class].block_bytes, MADV_WILLNEED);
    }
}

bool kv_store_intact(struct kv_store *s)
{
    bool intact = true;
    for (uint32_t i = 0; i < s->n_classes; i++) {
        intact = store_class_intact(s, i) && intact;
    }
    return intact;
}

/* ---- facts ---------------------------------------------------------------------------------- */

void store_publish(struct kv_store *s)
{
    struct kv_store_stats *f = &s->facts;
    f->n_blocks = store_n_live(s);
    f->bytes_live = 0;
    f->bytes_aside = s->bytes_aside;
    f->bytes_files = store_bytes_files(s) + s->bytes_aside;
    f->bytes_max = s->bytes_max;
    for (uint32_t i = 0; i < s->n_classes; i++) {
        const struct store_class *c = &s->classes[i];
        uint64_t bytes_left = f->bytes_files - s->bytes_aside < s->bytes_max
                                  ? s->bytes_max - (f->bytes_files - s->bytes_aside)
                                  : 0;
        uint64_t to_grow = bytes_left / c->slot_bytes;
        uint64_t n_more = c->n_max - c->n_slots + c->n_holes;
        f->bytes_live += c->n_live * c->block_bytes;
        f->n_room[i] = c->n_free - c->n_holes + (to_grow < n_more ? to_grow : n_more);
    }
    pthread_mutex_lock(&s->lock);
    s->shared.facts = *f;
    pthread_mutex_unlock(&s->lock);
}

void kv_store_stats(struct kv_store *s, struct kv_store_stats *ret)
{
    pthread_mutex_lock(&s->lock);
    *ret = s->shared.facts;
    pthread_mutex_unlock(&s->lock);
}
