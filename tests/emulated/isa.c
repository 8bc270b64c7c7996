/* tests/emulated/isa.c - plugins/cpu/isa.c for tests of one emulated level, EMULATED_LEVEL: it runs
 * on any processor, and beside it the reference. The others are left to the tests of tests/kernels,
 * which run them natively. */
#include "plugins/cpu/isa.h"

#include <errno.h>
#include <string.h>

static const char *const isa_names[CPU_ISA_COUNT] = {"c", "avx2", "avxvnni", "avx512", "amx"};

const char *cpu_isa_name(enum cpu_isa isa)
{
    if (isa == EMULATED_LEVEL) {
        return isa == CPU_ISA_AMX      ? "amx (emulated)"
               : isa == CPU_ISA_AVX512 ? "avx512 (emulated)"
                                       : "avxvnni (emulated)";
    }
    return isa_names[isa];
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

/* Emulated AVX-VNNI has AVX2's own code beside it. */
static int emulated_usable(void)
{
    return EMULATED_LEVEL != CPU_ISA_AVXVNNI ||
           (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}

int cpu_isa_usable(enum cpu_isa isa)
{
    return isa == CPU_ISA_C || (isa == EMULATED_LEVEL && emulated_usable());
}

enum cpu_isa cpu_isa_best(void)
{
    return emulated_usable() ? EMULATED_LEVEL : CPU_ISA_C;
}
