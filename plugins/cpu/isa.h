/* plugins/cpu/isa.h - the levels of the cpu backend, and which of them run here.
 *
 * One static library per level, built with that level's flags; the dispatch files get none. Each
 * level fills one table of kernels per family (attention, linear, elementwise); a NULL entry falls
 * back to the next lower level's. */
#ifndef PLUGINS_CPU_ISA_H
#define PLUGINS_CPU_ISA_H

#include <stdint.h>

enum cpu_isa {
    CPU_ISA_C = 0,      /* the reference: plain C, the truth for all others */
    CPU_ISA_AVX2 = 1,   /* AVX2, FMA, F16C */
    CPU_ISA_AVX512 = 2, /* AVX-512 F, BW, DQ, VL, VNNI */
    CPU_ISA_AMX = 3,    /* the same and BF16, and tiles of int8 and bf16 */
    CPU_ISA_COUNT
};

/* "c", "avx2", "avx512", "amx" */
const char *cpu_isa_name(enum cpu_isa isa);

/* 0 and *ret, or -EINVAL for an unknown name. */
int cpu_isa_by_name(const char *name, enum cpu_isa *ret);

/* Whether processor and operating system (XCR0) can run the level. Tiles need the kernel's
 * permission besides, which the host asks for before it has threads (docs/plugin-abi.md). */
int cpu_isa_usable(enum cpu_isa isa);

/* The best usable level that has run on a processor of its own: amx has met an emulation only, and
 * serves nobody who has not asked for it by name. */
enum cpu_isa cpu_isa_best(void);

#endif
