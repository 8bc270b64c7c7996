#include "daemon/kv/guard.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

/* begin says whether an entry is in use: it is stored last when one is added (release) and zeroed
 * first when one is removed. The handler loads it first (acquire), and again at the end. */
struct entry {
    _Atomic uintptr_t begin;
    _Atomic uintptr_t end;
    _Atomic size_t unit_bytes;
    _Atomic uint32_t taken;   /* by kv_guard_add */
    _Atomic uint64_t n_marks; /* ever set; 0: none of the bits is */
    _Atomic uint64_t *marks; /* a bit for every unit; mapped, so that untouched ones take nothing */
    size_t marks_bytes;
};

static struct entry table[KV_GUARD_MAX];
static _Atomic uint32_t n_entries; /* the handler looks at no more */
static _Atomic uint64_t n_faults;
static struct sigaction previous; /* what foreign addresses get */
static _Atomic uint32_t installed;

static struct entry *find(uintptr_t address)
{
    uint32_t n = atomic_load(&n_entries);
    for (uint32_t i = 0; i < n; i++) {
        struct entry *e = &table[i];
        /* Pairs with the release in kv_guard_add: the other fields belong to this begin. They still
         * do when begin has not changed afterwards. */
        uintptr_t begin = atomic_load_explicit(&e->begin, memory_order_acquire);
        if (begin != 0 && address >= begin && address < atomic_load(&e->end) &&
            atomic_load(&e->begin) == begin) {
            return e;
        }
    }
    return NULL;
}

/* Async-signal-safe: atomics and one mmap. True when the thread may go on. */
static bool cover(uintptr_t address)
{
    struct entry *e = find(address);
    if (e == NULL) {
        return false;
    }
    uintptr_t begin = atomic_load(&e->begin), end = atomic_load(&e->end);
    size_t unit_bytes = atomic_load(&e->unit_bytes);
    if (begin == 0) {
        return false;
    }
    uint64_t unit = (address - begin) / unit_bytes;
    uintptr_t from = begin + unit * unit_bytes;
    size_t bytes = end - from < unit_bytes ? end - from : unit_bytes;
    /* The mark first: whoever reads one of the zeros finds it. And the count before the bit:
     * whoever finds the bit set by another thread relies on the count. */
    atomic_fetch_add(&e->n_marks, 1);
    atomic_fetch_or(&e->marks[unit / 64], 1ull << unit % 64);
    atomic_fetch_add(&n_faults, 1);
    return mmap((void *)from, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
           MAP_FAILED;
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    int saved = errno;
    /* A code above zero is the kernel's: a fault, with an address. kill() has none. */
    if (info->si_code <= 0 || !cover((uintptr_t)info->si_addr)) {
        sigaction(SIGBUS, &previous, NULL);
        if (info->si_code <= 0) {
            raise(SIGBUS); /* delivered when this handler returns */
        }
        /* A fault is simply met again. */
    }
    errno = saved;
}

int kv_guard_install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};
    if (atomic_load(&installed)) {
        return 0;
    }
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &previous) < 0) {
        return -errno;
    }
    atomic_store(&installed, 1);
    return 0;
}

int kv_guard_add(void *memory, size_t bytes, size_t unit_bytes, uint32_t *ret_id)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (memory == NULL || (uintptr_t)memory % page != 0 || bytes == 0 || bytes % page != 0 ||
        unit_bytes == 0 || unit_bytes % page != 0) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < KV_GUARD_MAX; i++) {
        struct entry *e = &table[i];
        uint32_t vacant = 0;
        if (!atomic_compare_exchange_strong(&e->taken, &vacant, 1)) {
            continue;
        }
        size_t n_units = bytes / unit_bytes + (bytes % unit_bytes != 0);
        e->marks_bytes = (n_units + 63) / 64 * sizeof(e->marks[0]);
        void *marks = mmap(NULL, e->marks_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (marks == MAP_FAILED) {
            atomic_store(&e->taken, 0);
            return -ENOMEM;
        }
        e->marks = marks;
        atomic_store(&e->n_marks, 0);
        atomic_store(&e->end, (uintptr_t)memory + bytes);
        atomic_store(&e->unit_bytes, unit_bytes);
        /* Pairs with the acquire in find(). */
        atomic_store_explicit(&e->begin, (uintptr_t)memory, memory_order_release);
        uint32_t n = atomic_load(&n_entries);
        while (n <= i && !atomic_compare_exchange_weak(&n_entries, &n, i + 1)) {
        }
        *ret_id = i;
        return 0;
    }
    return -ENOSPC;
}

void kv_guard_remove(uint32_t id)
{
    struct entry *e = &table[id];
    atomic_store(&e->begin, 0);
    munmap((void *)e->marks, e->marks_bytes);
    e->marks = NULL;
    atomic_store(&e->taken, 0);
}

/* The units that [offset, offset + bytes) lies in: *ret_first up to, not with, *ret_end. */
static void units_of(const struct entry *e, size_t offset, size_t bytes, uint64_t *ret_first,
                     uint64_t *ret_end)
{
    size_t unit_bytes = atomic_load(&e->unit_bytes);
    *ret_first = offset / unit_bytes;
    *ret_end = (offset + bytes - 1) / unit_bytes + 1;
}

bool kv_guard_marked(uint32_t id, size_t offset, size_t bytes)
{
    struct entry *e = &table[id];
    if (bytes == 0 || atomic_load(&e->n_marks) == 0) {
        return false;
    }
    uint64_t first, end;
    units_of(e, offset, bytes, &first, &end);
    for (uint64_t unit = first; unit < end; unit++) {
        if ((atomic_load(&e->marks[unit / 64]) & 1ull << unit % 64) != 0) {
            return true;
        }
    }
    return false;
}

void kv_guard_mark(uint32_t id, size_t offset, size_t bytes)
{
    struct entry *e = &table[id];
    uint64_t first, end;
    if (bytes == 0) {
        return;
    }
    units_of(e, offset, bytes, &first, &end);
    atomic_fetch_add(&e->n_marks, end - first);
    for (uint64_t unit = first; unit < end; unit++) {
        atomic_fetch_or(&e->marks[unit / 64], 1ull << unit % 64);
    }
    atomic_fetch_add(&n_faults, 1);
}

void kv_guard_clear(uint32_t id, size_t offset, size_t bytes)
{
    struct entry *e = &table[id];
    if (bytes == 0 || atomic_load(&e->n_marks) == 0) {
        return;
    }
    uint64_t first, end;
    units_of(e, offset, bytes, &first, &end);
    for (uint64_t unit = first; unit < end; unit++) {
        atomic_fetch_and(&e->marks[unit / 64], ~(1ull << unit % 64));
    }
}

uint64_t kv_guard_faults(void)
{
    return atomic_load(&n_faults);
}
