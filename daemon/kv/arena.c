#include "daemon/kv/arena.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>

#define SLAB_BYTES  (2u << 20) /* a huge page; larger blocks get slabs of their own size */
#define PAGE_BYTES  4096u
#define MAX_SIZES   64 /* different block sizes at once: models times layer classes */
#define BLOCK_ALIGN 64u

/* A slab is one mapping cut into blocks of one size. */
struct kv_slab {
    struct kv_slab *next;
    char *memory;
    size_t bytes;
    uint32_t size_index; /* the list it belongs to */
    uint32_t n_blocks, n_used;
    struct kv_block blocks[];
};

struct size_list { /* all slabs of one block size */
    uint64_t block_bytes;
    struct kv_slab *slabs;
    struct kv_block *free_list; /* of all slabs */
};

struct kv_arena {
    uint64_t bytes_max;
    uint64_t bytes_mapped;
    uint64_t bytes_aside; /* of the bound, not mapped here */
    struct size_list sizes[MAX_SIZES];
    uint32_t n_sizes;
    uint64_t n_allocated; /* blocks, ever */
    /* Written by the engine thread, read by the loop for statistics. */
    _Atomic uint64_t bytes_used, blocks_used;
};

int kv_arena_create(uint64_t bytes_max, struct kv_arena **ret)
{
    struct kv_arena *a = calloc(1, sizeof(*a));
    if (a == NULL) {
        return -ENOMEM;
    }
    a->bytes_max = bytes_max;
    *ret = a;
    return 0;
}

static void slab_destroy(struct kv_arena *a, struct kv_slab *s)
{
    munmap(s->memory, s->bytes);
    a->bytes_mapped -= s->bytes;
    free(s);
}

void kv_arena_destroy(struct kv_arena *a)
{
    if (a == NULL) {
        return;
    }
    for (uint32_t i = 0; i < a->n_sizes; i++) {
        while (a->sizes[i].slabs != NULL) {
            struct kv_slab *s = a->sizes[i].slabs;
            a->sizes[i].slabs = s->next;
            slab_destroy(a, s);
        }
    }
    free(a);
}

/* A list without slabs may be taken over by another size. */
static int find_size(struct kv_arena *a, uint64_t block_bytes, uint32_t *ret)
{
    uint32_t vacant = a->n_sizes;
    for (uint32_t i = 0; i < a->n_sizes; i++) {
        if (a->sizes[i].block_bytes == block_bytes) {
            *ret = i;
            return 0;
        }
        if (a->sizes[i].slabs == NULL) {
            vacant = i;
        }
    }
    if (vacant == MAX_SIZES) {
        return -ENOMEM;
    }
    if (vacant == a->n_sizes) {
        a->n_sizes++;
    }
    a->sizes[vacant] = (struct size_list){.block_bytes = block_bytes};
    *ret = vacant;
    return 0;
}

/* Small blocks share a huge page; a larger one gets whole pages of its own. */
static uint64_t slab_bytes_of(uint64_t block_bytes)
{
    return block_bytes <= SLAB_BYTES / 2
               ? SLAB_BYTES
               : (block_bytes + PAGE_BYTES - 1) & ~(uint64_t)(PAGE_BYTES - 1);
}

static int slab_create(struct kv_arena *a, uint32_t size_index)
{
    struct size_list *list = &a->sizes[size_index];
    uint64_t bytes = slab_bytes_of(list->block_bytes);
    if (bytes > a->bytes_max - a->bytes_mapped - a->bytes_aside) {
        return -ENOMEM;
    }
    uint32_t n_blocks = (uint32_t)(bytes / list->block_bytes);
    struct kv_slab *s = calloc(1, sizeof(*s) + n_blocks * sizeof(s->blocks[0]));
    if (s == NULL) {
        return -ENOMEM;
    }
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        free(s);
        return -ENOMEM;
    }
    /* Advice only: huge pages save TLB misses, and prompts stay out of core dumps. */
    madvise(memory, bytes, MADV_HUGEPAGE);
    madvise(memory, bytes, MADV_DONTDUMP);
    s->memory = memory;
    s->bytes = bytes;
    s->size_index = size_index;
    s->n_blocks = n_blocks;
    for (uint32_t i = n_blocks; i-- > 0;) {
        s->blocks[i] = (struct kv_block){
            .data = s->memory + i * list->block_bytes,
            .slab = s,
            .next_free = list->free_list,
        };
        list->free_list = &s->blocks[i];
    }
    s->next = list->slabs;
    list->slabs = s;
    a->bytes_mapped += bytes;
    return 0;
}

/* The list of that size, with a free block. */
static int find_free(struct kv_arena *a, uint64_t block_bytes, uint32_t *ret)
{
    int rc = find_size(a, block_bytes, ret);
    return rc == 0 && a->sizes[*ret].free_list == NULL ? slab_create(a, *ret) : rc;
}

int kv_arena_alloc(struct kv_arena *a, uint64_t block_bytes, struct kv_block **ret)
{
    uint32_t index;
    if (block_bytes == 0 || block_bytes % BLOCK_ALIGN != 0) {
        return -EINVAL;
    }
    int rc = find_free(a, block_bytes, &index);
    if (rc == -ENOMEM) { /* lists of other sizes and their slabs may have become free */
        kv_arena_trim(a);
        rc = find_free(a, block_bytes, &index);
    }
    if (rc < 0) {
        return rc;
    }
    struct kv_block *b = a->sizes[index].free_list;
    a->sizes[index].free_list = b->next_free;
    b->slab->n_used++;
    b->next_free = NULL;
    b->refs = 1;
    b->version = ++a->n_allocated;
    a->bytes_used += block_bytes;
    a->blocks_used++;
    *ret = b;
    return 0;
}

struct kv_block *kv_block_ref(struct kv_block *b)
{
    b->refs++;
    return b;
}

void kv_block_unref(struct kv_arena *a, struct kv_block *b)
{
    if (b == NULL || --b->refs > 0) {
        return;
    }
    struct size_list *list = &a->sizes[b->slab->size_index];
    b->next_free = list->free_list;
    list->free_list = b;
    b->slab->n_used--;
    a->bytes_used -= list->block_bytes;
    a->blocks_used--;
}

uint64_t kv_arena_bytes_for(uint64_t block_bytes, uint64_t n_blocks)
{
    uint64_t slab_bytes = slab_bytes_of(block_bytes);
    uint64_t per_slab = slab_bytes / block_bytes;
    uint64_t n_slabs = n_blocks / per_slab + (n_blocks % per_slab != 0);
    return n_slabs > UINT64_MAX / slab_bytes ? UINT64_MAX : n_slabs * slab_bytes;
}

/* Takes the blocks of slabs without blocks in use off the free list. */
static void forget_free_blocks(struct size_list *list)
{
    struct kv_block **link = &list->free_list;
    while (*link != NULL) {
        struct kv_block *b = *link;
        if (b->slab->n_used == 0) {
            *link = b->next_free;
        } else {
            link = &b->next_free;
        }
    }
}

void kv_arena_trim(struct kv_arena *a)
{
    for (uint32_t i = 0; i < a->n_sizes; i++) {
        forget_free_blocks(&a->sizes[i]);
        struct kv_slab **link = &a->sizes[i].slabs;
        while (*link != NULL) {
            struct kv_slab *s = *link;
            if (s->n_used == 0) {
                *link = s->next;
                slab_destroy(a, s);
            } else {
                link = &s->next;
            }
        }
    }
}

int kv_arena_set_aside(struct kv_arena *a, uint64_t bytes)
{
    if (bytes > a->bytes_max - a->bytes_mapped - a->bytes_aside) {
        kv_arena_trim(a);
    }
    if (bytes > a->bytes_max - a->bytes_mapped - a->bytes_aside) {
        return -ENOMEM;
    }
    a->bytes_aside += bytes;
    a->bytes_used += bytes;
    return 0;
}

void kv_arena_give_aside(struct kv_arena *a, uint64_t bytes)
{
    a->bytes_aside -= bytes;
    a->bytes_used -= bytes;
}

uint64_t kv_arena_bytes_used(const struct kv_arena *a)
{
    return a->bytes_used;
}

uint64_t kv_arena_bytes_max(const struct kv_arena *a)
{
    return a->bytes_max;
}

uint64_t kv_arena_blocks_used(const struct kv_arena *a)
{
    return a->blocks_used;
}
