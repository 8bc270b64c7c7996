/* <gqa/host_x86.h> - what a host does on x86-64 before it has threads, so that plugins may use all
 * of the processor. Linux only; C11 and C++11; needs nothing but libc. */
#ifndef GQA_HOST_X86_H
#define GQA_HOST_X86_H

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

#if !defined(_DEFAULT_SOURCE) && !defined(_GNU_SOURCE)
long syscall(long number, ...); /* strict C11 has <unistd.h> leave it out */
#endif

#define GQA_ARCH_REQ_XCOMP_PERM 0x1023 /* arch_prctl: since Linux 5.16 */
#define GQA_XSTATE_TILE_DATA    18     /* AMX */

/* Asks the kernel to let this process use the tile unit (AMX), whose 8 KiB of state a thread has
 * only then. Call it first in main(): the kernel refuses it once a thread has an alternate signal
 * stack that the larger state would not fit. Threads and forked children inherit the permission,
 * programs that are executed do not. Where there is no such unit nothing changes: plugins ask the
 * kernel (ARCH_GET_XCOMP_PERM) what they may use. */
static inline void gqa_host_permit_tiles(void)
{
    (void)syscall(SYS_arch_prctl, GQA_ARCH_REQ_XCOMP_PERM, GQA_XSTATE_TILE_DATA);
}

#else

static inline void gqa_host_permit_tiles(void)
{
}

#endif
#endif
