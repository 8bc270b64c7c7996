/* tests/emulated/isa.c - plugins/cpu/isa.c for tests of one emulated level, EMULATED_LEVEL: it runs
 * on any processor, and beside it the reference. The others are left to the tests of tests/kernels,
 * which run them natively. */
#include "plugins/cpu/isa.h"

#include <errno.h>
#include <string.h>

static const char *const isa_names[CPU_ISA_COUNT] = {"c", "avx2", "avx512", "amx"};

const char *cpu_isa_name(enum cpu_isa isa)
{
    if (isa == EMULATED_LEVEL) {
        return isa == CPU_ISA_AMX ? "amx (emulated)" : "avx512 (emulated)";
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

int cpu_isa_usable(enum cpu_isa isa)
{
    return isa == CPU_ISA_C || isa == EMULATED_LEVEL;
}

enum cpu_isa cpu_isa_best(void)
{
    return EMULATED_LEVEL;
}
