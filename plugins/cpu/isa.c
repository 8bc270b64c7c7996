/* plugins/cpu/isa.c - which levels this processor and this kernel can run.
 *
 * A level needs both: the processor's word for the instructions (CPUID) and the operating system's
 * for saving their registers (XCR0, read with XGETBV). Everything is asked anew on every call:
 * callers ask when a context opens, never in a hot path, and so no state is kept. */
#include "plugins/cpu/isa.h"

#include <errno.h>
#include <string.h>

static const char *const isa_names[CPU_ISA_COUNT] = {"c", "avx2", "avxvnni", "avx512", "amx"};

const char *cpu_isa_name(enum cpu_isa isa)
{
    return (unsigned)isa < CPU_ISA_COUNT ? isa_names[isa] : "unknown";
}

int cpu_isa_by_name(const char *name, enum cpu_isa *ret)
{
    for (int i = 0; i < CPU_ISA_COUNT; i++) {
        if (strcmp(name, isa_names[i]) == 0) {
            *ret = (enum cpu_isa)i;
            return 0;
        }
    }
    return -EINVAL;
}

#if defined(__x86_64__)

#include <asm/prctl.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define XCR0_YMM   0x06u /* SSE and AVX state */
#define XCR0_ZMM   0xe6u /* and the opmask registers, the upper halves of zmm0-15, and zmm16-31 */
#define XCR0_TILES 0x60000u /* the tiles' shapes and their data */

/* Names that not every compiler's <cpuid.h> has. */
#define LEAF7_EDX_AMX_BF16      (1u << 22)
#define LEAF7_EDX_AMX_TILE      (1u << 24)
#define LEAF7_EDX_AMX_INT8      (1u << 25)
#define LEAF7_1_EAX_AVX_VNNI    (1u << 4)
#define LEAF7_1_EAX_AVX512_BF16 (1u << 5)

struct cpu_words {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx;
    uint32_t leaf7_1_eax;
    uint64_t xcr0;
};

/* XGETBV as inline assembly: the intrinsic would need -mxsave, and this file gets no
 * flags. */
static uint64_t read_xcr0(void)
{
    uint32_t low, high;

    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static struct cpu_words read_words(void)
{
    struct cpu_words w = {0};
    uint32_t eax, ebx, ecx, edx;

    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        w.leaf1_ecx = ecx;
    }
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        w.leaf7_ebx = ebx;
        w.leaf7_ecx = ecx;
        w.leaf7_edx = edx;
        if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
            w.leaf7_1_eax = eax;
        }
    }
    if (w.leaf1_ecx & bit_OSXSAVE) {
        w.xcr0 = read_xcr0();
    }
    return w;
}

static int has(uint32_t word, uint32_t bits)
{
    return (word & bits) == bits;
}

/* Linux lets a process use the tiles' 8 KiB of state only when it has asked for them. */
static int tiles_permitted(void)
{
    uint64_t components = 0;

    return syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &components) == 0 &&
           (components & XCR0_TILES) == XCR0_TILES;
}

int cpu_isa_usable(enum cpu_isa isa)
{
    struct cpu_words w = read_words();
    int avx2 = (w.xcr0 & XCR0_YMM) == XCR0_YMM && has(w.leaf1_ecx, bit_AVX | bit_FMA | bit_F16C) &&
               has(w.leaf7_ebx, bit_AVX2);

    int avx512 = avx2 && (w.xcr0 & XCR0_ZMM) == XCR0_ZMM &&
                 has(w.leaf7_ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
                 has(w.leaf7_ecx, bit_AVX512VNNI);

    switch (isa) {
    case CPU_ISA_C:
        return 1;
    case CPU_ISA_AVX2:
        return avx2;
    case CPU_ISA_AVXVNNI:
        return avx2 && has(w.leaf7_1_eax, LEAF7_1_EAX_AVX_VNNI);
    case CPU_ISA_AVX512:
        return avx512;
    case CPU_ISA_AMX:
        return avx512 && (w.xcr0 & XCR0_TILES) == XCR0_TILES &&
               has(w.leaf7_1_eax, LEAF7_1_EAX_AVX512_BF16) &&
               has(w.leaf7_edx, LEAF7_EDX_AMX_TILE | LEAF7_EDX_AMX_INT8 | LEAF7_EDX_AMX_BF16) &&
               tiles_permitted();
    default:
        return 0;
    }
}

#else

int cpu_isa_usable(enum cpu_isa isa)
{
    return isa == CPU_ISA_C;
}

#endif

enum cpu_isa cpu_isa_best(void)
{
    for (int i = CPU_ISA_AVX512; i > CPU_ISA_C; i--) {
        if (cpu_isa_usable((enum cpu_isa)i)) {
            return (enum cpu_isa)i;
        }
    }
    return CPU_ISA_C;
}
