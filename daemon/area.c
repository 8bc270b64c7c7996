#include "daemon/area.h"

#include <errno.h>

void area_init(struct area *a, uint8_t *data, uint64_t in_bytes, uint64_t out_bytes,
               void (*unused)(struct area *a))
{
    *a = (struct area){.data = data, .in_bytes = in_bytes, .n_refs = 1, .unused = unused};
    pthread_mutex_init(&a->lock, NULL);
    extents_init(&a->lent, in_bytes, out_bytes);
}

void area_finish(struct area *a)
{
    pthread_mutex_destroy(&a->lock);
}

struct area *area_ref(struct area *a)
{
    if (a) {
        a->n_refs++;
    }
    return a;
}

void area_unref(struct area *a)
{
    if (a && --a->n_refs == 0) {
        a->unused(a);
    }
}

void area_retire(struct area *a)
{
    pthread_mutex_lock(&a->lock);
    a->retired = true;
    pthread_mutex_unlock(&a->lock);
}

bool area_is_retired(struct area *a)
{
    pthread_mutex_lock(&a->lock);
    bool retired = a->retired;
    pthread_mutex_unlock(&a->lock);
    return retired;
}

int area_take(struct area *a, uint64_t bytes, uint64_t *ret_offset, void **ret)
{
    uint64_t offset = 0;
    if (!a || bytes < AREA_BYTES_MIN) {
        return -ENOSPC;
    }
    pthread_mutex_lock(&a->lock);
    int rc = a->retired ? -ENOSPC : extents_take(&a->lent, bytes, &offset);
    pthread_mutex_unlock(&a->lock);
    if (rc == 0) {
        *ret_offset = offset;
        *ret = a->data + offset;
    }
    return rc;
}

void area_give(struct area *a, uint64_t offset)
{
    pthread_mutex_lock(&a->lock);
    extents_give(&a->lent, offset);
    pthread_mutex_unlock(&a->lock);
}
