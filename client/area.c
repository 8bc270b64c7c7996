/* client/area.c - the data area beside the rings: what requests and answers name by handle instead
 * of carrying it. */
#include "client/internal.h"

#include <errno.h>

/* ---- what the daemon gives --------------------------------------------------------------- */

static int find(const struct client_ring *r, const struct ipc_handle *h, const uint8_t **ret)
{
    const struct ring_sizes *s = &r->map.sizes;
    uint64_t end = s->in_bytes + s->out_bytes;
    if (h->offset < s->in_bytes || h->offset > end || h->bytes > end - h->offset) {
        return -EPROTO;
    }
    *ret = r->map.data + h->offset;
    return 0;
}

static int find_again(void *arg, const struct ipc_handle *h, const uint8_t **ret)
{
    return find(arg, h, ret);
}

/* The first time a message is read: what it names is lent to us with it. */
static int find_and_borrow(void *arg, const struct ipc_handle *h, const uint8_t **ret)
{
    struct client_ring *r = arg;
    if (r->n_borrowed == EXTENTS_MAX) {
        return -EPROTO; /* more than a daemon can lend */
    }
    int rc = find(r, h, ret);
    if (rc == 0) {
        r->borrowed[r->n_borrowed++] = h->offset;
    }
    return rc;
}

int client_ring_resolve(struct client_ring *r, struct ipc_message *m)
{
    return ipc_message_resolve(m, find_and_borrow, r);
}

int client_ring_keep(struct client_ring *r, struct ipc_message *m)
{
    int rc = ipc_message_resolve(m, find_again, r);
    return rc < 0 ? rc
                  : ipc_message_own(m, r->map.data, r->map.sizes.in_bytes + r->map.sizes.out_bytes);
}

void client_ring_give_back(struct gqa *g)
{
    struct client_ring *r = g->ring;
    struct ipc_buffer b;
    if (r->n_borrowed == 0 || g->lost < 0) {
        return;
    }
    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "$give");
    ipc_pack_array(&b, r->n_borrowed);
    for (size_t i = 0; i < r->n_borrowed; i++) {
        ipc_pack_u64(&b, r->borrowed[i]);
    }
    if (client_send(g, &b, NULL) == 0) {
        r->n_borrowed = 0;
    }
    ipc_buffer_finish(&b);
}

/* ---- what the program gives -------------------------------------------------------------- */

int gqa_shared_take(struct gqa *g, size_t bytes, void **ret)
{
    uint64_t offset = 0;
    if (!gqa_has_ring(g)) {
        return -ENOTSUP;
    }
    int r = extents_take(&g->ring->mine, bytes, &offset);
    if (r == 0) {
        *ret = g->ring->map.data + offset;
    }
    return r;
}

int gqa_shared_give(struct gqa *g, void *data)
{
    if (g->ring == NULL || (uint8_t *)data < g->ring->map.data ||
        (uint8_t *)data >= g->ring->map.data + g->ring->map.sizes.in_bytes) {
        return -ENOENT;
    }
    return extents_give(&g->ring->mine, (uint64_t)((uint8_t *)data - g->ring->map.data));
}

/* The handle of bytes that lie in our part. */
static int handle_of(const struct gqa *g, const void *data, size_t bytes, struct ipc_handle *ret)
{
    const uint8_t *at = data;
    if (g->ring == NULL || at < g->ring->map.data) {
        return -EINVAL;
    }
    uint64_t offset = (uint64_t)(at - g->ring->map.data);
    if (offset > g->ring->map.sizes.in_bytes || bytes > g->ring->map.sizes.in_bytes - offset) {
        return -EINVAL;
    }
    *ret = (struct ipc_handle){.offset = offset, .bytes = bytes};
    return 0;
}

int gqa_params_shared(struct gqa_params *p, const char *key, const struct gqa *g, const void *data,
                      size_t bytes)
{
    struct ipc_handle handle = {0, 0};
    return client_params_handle(p, key, handle_of(g, data, bytes, &handle) == 0 ? &handle : NULL);
}
