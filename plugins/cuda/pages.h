/* plugins/cuda/pages.h - copies of KV blocks on the device, behind which the host's stay.
 *
 * A block of the host is known by its address and version. Its copy is filled when a batch needs
 * tokens that the copy does not have, and stays for later steps; the oldest ones make room for new
 * ones. New tokens are written to the copy by the step and to the host's block at the step's end
 * (program_kv.c): a copy is never the only one, and dropping it loses nothing. */
#ifndef PLUGINS_CUDA_PAGES_H
#define PLUGINS_CUDA_PAGES_H

#include "plugins/cuda/context.h"

struct cuda_page {
    const void *host; /* NULL: no block's */
    uint64_t version; /* 0: not to be believed by a later batch */
    CUdeviceptr at;
    uint64_t bytes;
    uint64_t batch;   /* the last that used it */
    uint32_t n_valid; /* its first tokens that are as on the host */
    uint32_t next;    /* in its hash chain, plus 1; 0: the end */
    bool recent;      /* used since the hand came by */
};

int cuda_pages_create(struct cuda_context *c, struct cuda_pages **ret);
void cuda_pages_destroy(struct cuda_pages *p);

/* Starts a batch: what cuda_pages_get() gives stays until the next one. */
void cuda_pages_begin(struct cuda_pages *p);

/* The copy of a block of so many bytes with its first n_tokens valid, copied now if need be; host
 * NULL: any free page, for one batch. The index is good until the next batch. -ENOMEM: the device
 * has no room for the batch's pages. */
int cuda_pages_get(struct cuda_pages *p, const void *host, uint64_t version, uint64_t bytes,
                   uint32_t n_tokens, uint32_t *ret_index);

struct cuda_page *cuda_pages_at(struct cuda_pages *p, uint32_t index);

#endif
