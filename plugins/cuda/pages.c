#include "plugins/cuda/pages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Device memory is taken in slabs of about so much, and this much is left to others. */
#define SLAB_BYTES  (16u << 20)
#define LEAVE_BYTES (512u << 20)
#define BUCKETS     65536u
#define SLABS_MAX   65536u

struct cuda_pages {
    struct cuda_context *context;
    struct cuda_page *pages; /* (n) */
    uint32_t n, capacity, hand;
    uint32_t *buckets; /* (BUCKETS) index plus 1; 0: empty */
    CUdeviceptr *slabs;
    uint32_t n_slabs;
    uint64_t batch;
};

int cuda_pages_create(struct cuda_context *c, struct cuda_pages **ret)
{
    struct cuda_pages *p = calloc(1, sizeof(*p));

    if (p == NULL) {
        return -ENOMEM;
    }
    p->context = c;
    p->buckets = calloc(BUCKETS, sizeof(*p->buckets));
    p->slabs = calloc(SLABS_MAX, sizeof(*p->slabs));
    if (p->buckets == NULL || p->slabs == NULL) {
        cuda_pages_destroy(p);
        return -ENOMEM;
    }
    *ret = p;
    return 0;
}

void cuda_pages_destroy(struct cuda_pages *p)
{
    if (p == NULL) {
        return;
    }
    for (uint32_t i = 0; i < p->n_slabs; i++) {
        CUDA(&p->context->driver, cuMemFree)(p->slabs[i]);
    }
    free(p->slabs);
    free(p->buckets);
    free(p->pages);
    free(p);
}

void cuda_pages_begin(struct cuda_pages *p)
{
    p->batch++;
}

struct cuda_page *cuda_pages_at(struct cuda_pages *p, uint32_t index)
{
    return &p->pages[index];
}

/* Blocks are aligned to pages: the low bits say nothing. */
static uint32_t bucket_of(const void *host)
{
    return (uint32_t)(((uint64_t)(uintptr_t)host >> 6) * 0x9e3779b97f4a7c15u >> 48) % BUCKETS;
}

static void forget(struct cuda_pages *p, uint32_t index)
{
    struct cuda_page *page = &p->pages[index];

    if (page->host == NULL) {
        return;
    }
    uint32_t *link = &p->buckets[bucket_of(page->host)];
    while (*link != index + 1) {
        link = &p->pages[*link - 1].next;
    }
    *link = page->next;
    page->host = NULL;
    page->n_valid = 0;
}

/* ---- room -------------------------------------------------------------------------------- */

/* More pages of a size; -ENOMEM where the device has no more. */
static int grow(struct cuda_pages *p, uint64_t bytes)
{
    const struct cuda_driver *d = &p->context->driver;
    uint64_t room = (bytes + 255) & ~(uint64_t)255;
    uint32_t n_new = (uint32_t)(SLAB_BYTES / room) + 1;
    size_t free_bytes = 0, total = 0;

    if (p->n_slabs == SLABS_MAX || p->n > UINT32_MAX / 2 - n_new) {
        return -ENOMEM;
    }
    if (CUDA(d, cuMemGetInfo)(&free_bytes, &total) != CUDA_SUCCESS ||
        free_bytes < n_new * room + LEAVE_BYTES) {
        return -ENOMEM;
    }
    if (p->n + n_new > p->capacity) {
        uint32_t capacity = 2 * p->capacity + n_new;
        struct cuda_page *grown = realloc(p->pages, capacity * sizeof(*grown));
        if (grown == NULL) {
            return -ENOMEM;
        }
        p->pages = grown;
        p->capacity = capacity;
    }
    CUdeviceptr at;
    if (CUDA(d, cuMemAlloc)(&at, n_new * room) != CUDA_SUCCESS) {
        return -ENOMEM;
    }
    p->slabs[p->n_slabs++] = at;
    for (uint32_t i = 0; i < n_new; i++) {
        p->pages[p->n++] = (struct cuda_page){.at = at + i * room, .bytes = bytes};
    }
    return 0;
}

/* A page that this batch does not use: free ones and those not used lately first (a clock). */
static int find_victim(struct cuda_pages *p, uint64_t bytes, bool any, uint32_t *ret)
{
    for (uint64_t tries = 0; tries < 2 * (uint64_t)p->n; tries++) {
        uint32_t i = p->hand;
        struct cuda_page *page = &p->pages[i];

        p->hand = i + 1 < p->n ? i + 1 : 0;
        if (page->bytes != bytes || page->batch == p->batch) {
            continue;
        }
        if (page->host == NULL || (any && !page->recent)) {
            *ret = i;
            return 0;
        }
        page->recent = page->recent && !any;
    }
    return -ENOMEM;
}

static int take(struct cuda_pages *p, uint64_t bytes, uint32_t *ret)
{
    int r = find_victim(p, bytes, false, ret);

    if (r < 0 && grow(p, bytes) == 0) {
        p->hand = p->n - 1; /* all new ones are free */
        return find_victim(p, bytes, false, ret);
    }
    r = r < 0 ? find_victim(p, bytes, true, ret) : 0;
    if (r == 0) {
        forget(p, *ret);
    }
    return r;
}

/* ---- blocks ------------------------------------------------------------------------------ */

static bool find(const struct cuda_pages *p, const void *host, uint64_t bytes, uint32_t *ret)
{
    for (uint32_t i = p->buckets[bucket_of(host)]; i != 0; i = p->pages[i - 1].next) {
        if (p->pages[i - 1].host == host && p->pages[i - 1].bytes == bytes) {
            *ret = i - 1;
            return true;
        }
    }
    return false;
}

int cuda_pages_get(struct cuda_pages *p, const void *host, uint64_t version, uint64_t bytes,
                   uint32_t n_tokens, uint32_t *ret_index)
{
    uint32_t index;
    bool known = host != NULL && find(p, host, bytes, &index);
    int r = known ? 0 : take(p, bytes, &index);

    if (r < 0) {
        return r;
    }
    struct cuda_page *page = &p->pages[index];
    bool again = page->batch == p->batch; /* another sequence of the batch has it too */
    if (!known && host != NULL) {
        page->host = host;
        page->next = p->buckets[bucket_of(host)];
        p->buckets[bucket_of(host)] = index + 1;
    }
    if (!known || (!again && (version == 0 || version != page->version))) {
        page->n_valid = 0;
    }
    page->version = version;
    page->batch = p->batch;
    page->recent = true;
    if (host != NULL && n_tokens > page->n_valid) {
        r = cuda_upload(p->context, page->at, host, bytes);
        page->n_valid = r == 0 ? n_tokens : 0;
    }
    *ret_index = index;
    return r;
}
