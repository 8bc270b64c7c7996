/* daemon/kv/guard.h - memory-mapped files that shrink or fail to read do not end the process.
 *
 * Reading a mapped page that the file does not have any more, or that the disk cannot deliver, is a
 * SIGBUS. The handler looks the address up in a table of our mappings. Inside one, it notes the
 * unit (a block's slot, a page of a model) that the address lies in, puts zeros over that unit, and
 * the reading thread goes on; whoever used the bytes asks kv_guard_marked() before it believes
 * them. Any other address gets what it would have got without us: the action that was there before,
 * by default the end of the process.
 *
 * The table is static and lock-free: the handler reads it on whichever thread faults, at any time.
 * All functions may be called from any thread; a mapping is added and removed by its owner, who
 * removes it before it unmaps. A mark is set before the zeros can be seen. */
#ifndef DAEMON_KV_GUARD_H
#define DAEMON_KV_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KV_GUARD_MAX 1024 /* mappings at once */

/* Once, from main, before other threads exist. 0 or -errno. Again: nothing happens, 0. */
int kv_guard_install(void);

/* [memory, memory + bytes), whole pages, in units of unit_bytes (a multiple of the page size, the
 * last one may be shorter). *ret_id names the mapping in the calls below. -EINVAL: not whole pages;
 * -ENOSPC: the table is full; -ENOMEM: no memory for a bit per unit. */
int kv_guard_add(void *memory, size_t bytes, size_t unit_bytes, uint32_t *ret_id);
void kv_guard_remove(uint32_t id);

/* Whether zeros may have been read in place of any of these bytes since the marks were cleared. */
bool kv_guard_marked(uint32_t id, size_t offset, size_t bytes);

/* Marks bytes that are known to be lost although nobody has met a fault there yet, and counts that
 * as a fault. */
void kv_guard_mark(uint32_t id, size_t offset, size_t bytes);

/* Forgets the marks of these bytes. The zeros stay until the owner maps the file there again, which
 * it does before it clears. */
void kv_guard_clear(uint32_t id, size_t offset, size_t bytes);

/* Faults taken by all mappings so far: as long as this does not change, nothing was marked. */
uint64_t kv_guard_faults(void);

#endif
