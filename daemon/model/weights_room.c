#include "daemon/model/weights_room.h"

#include "daemon/kv/guard.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_BYTES (2u << 20)

int weights_room_init(struct weights_room *r, uint64_t bytes)
{
    struct weights_room made = {.bytes = bytes};
    if (bytes > SIZE_MAX - HUGE_BYTES) {
        return -ENOMEM;
    }
    made.reserved_bytes = (size_t)bytes + HUGE_BYTES;
    made.reserved = mmap(NULL, made.reserved_bytes, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made.reserved == MAP_FAILED) {
        return -ENOMEM;
    }
    uintptr_t start = ((uintptr_t)made.reserved + HUGE_BYTES - 1) & ~(uintptr_t)(HUGE_BYTES - 1);
    made.memory = (void *)start;
    int rc = kv_guard_add(made.memory, (size_t)bytes, HUGE_BYTES, &made.guard);
    if (rc < 0) {
        munmap(made.reserved, made.reserved_bytes);
        return rc;
    }
    *r = made;
    return 0;
}

void weights_room_finish(struct weights_room *r)
{
    if (r->reserved != NULL) {
        kv_guard_remove(r->guard);
        munmap(r->reserved, r->reserved_bytes);
    }
    memset(r, 0, sizeof(*r));
}

int weights_room_clear(struct weights_room *r)
{
    void *memory = mmap(r->memory, (size_t)r->bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (memory == MAP_FAILED) {
        return -ENOMEM;
    }
    kv_guard_clear(r->guard, 0, (size_t)r->bytes);
    madvise(memory, (size_t)r->bytes, MADV_HUGEPAGE);
    madvise(memory, (size_t)r->bytes, MADV_DONTDUMP);
    return 0;
}

void weights_room_seal(struct weights_room *r)
{
    mprotect(r->memory, (size_t)r->bytes, PROT_READ);
}

int weights_room_map(struct weights_room *r, const struct io_files *files, int fd, uint64_t offset)
{
    void *memory;
    int rc = files->map(files->self, fd, offset, (size_t)r->bytes, r->memory, &memory);
    if (rc < 0) {
        /* The kernel may have taken away what was there. */
        kv_guard_mark(r->guard, 0, (size_t)r->bytes);
        mmap(r->memory, (size_t)r->bytes, PROT_READ,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        return rc;
    }
    /* Asks for large pages where they are read from the disk; those that are there are used. */
    madvise(memory, (size_t)r->bytes, MADV_HUGEPAGE);
    return 0;
}

int weights_room_populate(struct weights_room *r)
{
    uint64_t memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    if (r->bytes > memory_bytes / 2) {
        return 0;
    }
    /* Kernels before 5.14 do not know it, and pages then come when they are touched. */
    int rc = madvise(r->memory, (size_t)r->bytes, MADV_POPULATE_READ);
    return rc < 0 && (errno == EFAULT || errno == EHWPOISON) ? -EIO : 0;
}

bool weights_room_is_damaged(const struct weights_room *r)
{
    return r->reserved != NULL && kv_guard_marked(r->guard, 0, (size_t)r->bytes);
}
