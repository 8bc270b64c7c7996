/* plugins/cpu/isa.h - the levels of the cpu backend, and which of them run here.
 *
 * One static library per level, built with that level's flags; the dispatch files get none. Each
 * level fills one table of kernels per family (attention, linear, elementwise); a NULL entry falls
 * back to that of the level below. */
#ifndef PLUGINS_CPU_ISA_H
#define PLUGINS_CPU_ISA_H

#include <stdint.h>

enum cpu_isa {
    CPU_ISA_C = 0,       /* the reference: plain C, the truth for all others */
    CPU_ISA_AVX2 = 1,    /* AVX2, FMA, F16C */
    CPU_ISA_AVXVNNI = 2, /* the same and AVX-VNNI */
    CPU_ISA_AVX512 = 3,  /* AVX-512 F, BW, DQ, VL, VNNI */
    CPU_ISA_AMX = 4,     /* the same and BF16, and tiles of int8 and bf16 */
    CPU_ISA_COUNT
};

/* "c", "avx2", "avxvnni", "avx512", "amx" */
const char *cpu_isa_name(enum cpu_isa isa);

/* 0 and *ret, or -EINVAL for an unknown name. */
int cpu_isa_by_name(const char *name, enum cpu_isa *ret);

/* The level whose instructions a level has besides its own, or -1 below the reference. A processor
 * with AVX-512 need not have AVX-VNNI. */
static inline int cpu_isa_below(enum cpu_isa isa)
{
    return isa == CPU_ISA_AVX512 ? (int)CPU_ISA_AVX2 : (int)isa - 1;
}

/* Whether processor and operating system (XCR0) can run the level. Tiles need the kernel's
 * permission besides, which the host asks for before it has threads (docs/plugin-abi.md). */
int cpu_isa_usable(enum cpu_isa isa);

/* The best usable level but amx, which has met an emulation only and serves nobody who has not
 * asked for it by name. avxvnni has met no other either; its one instruction is avx512's, on half
 * as many lanes. */
enum cpu_isa cpu_isa_best(void);

#endif
