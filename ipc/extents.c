#include "ipc/extents.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

void extents_init(struct extents *e, uint64_t first, uint64_t bytes)
{
    assert(first % EXTENTS_ALIGN == 0 && bytes <= UINT64_MAX - first);
    memset(e, 0, sizeof(*e));
    e->first = first;
    e->bytes = bytes;
}

int extents_take(struct extents *e, uint64_t bytes, uint64_t *ret_offset)
{
    if (e->count == EXTENTS_MAX || bytes > e->bytes) {
        return -ENOSPC;
    }
    uint64_t need = (bytes + EXTENTS_ALIGN - 1) / EXTENTS_ALIGN * EXTENTS_ALIGN;
    need = need > 0 ? need : EXTENTS_ALIGN; /* places of nothing differ, too */
    uint64_t at = e->first;
    uint32_t i = 0;
    while (i < e->count && e->live[i].offset - at < need) {
        at = e->live[i].offset + e->live[i].bytes;
        i++;
    }
    if (i == e->count && e->first + e->bytes - at < need) {
        return -ENOSPC;
    }
    memmove(&e->live[i + 1], &e->live[i], (e->count - i) * sizeof(e->live[0]));
    e->live[i].offset = at;
    e->live[i].bytes = need;
    e->count++;
    e->used += need;
    *ret_offset = at;
    return 0;
}

int extents_give(struct extents *e, uint64_t offset)
{
    uint32_t i = 0;
    while (i < e->count && e->live[i].offset < offset) {
        i++;
    }
    if (i == e->count || e->live[i].offset != offset) {
        return -ENOENT;
    }
    e->used -= e->live[i].bytes;
    e->count--;
    memmove(&e->live[i], &e->live[i + 1], (e->count - i) * sizeof(e->live[0]));
    return 0;
}
