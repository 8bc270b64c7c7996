/* plugins/cpu/glu.c - chooses a level's activations. */
#include "plugins/cpu/glu.h"

#include <stddef.h>
#include <string.h>

void cpu_glu_kernels(enum cpu_isa isa, struct cpu_glu_kernels *ret)
{
    static const struct cpu_glu_kernels *const levels[CPU_ISA_COUNT] = {
        [CPU_ISA_C] = &cpu_glu_c,
#if defined(__x86_64__)
        [CPU_ISA_AVX2] = &cpu_glu_avx2,
        [CPU_ISA_AVX512] = &cpu_glu_avx512,
#endif
    };

    memset(ret, 0, sizeof(*ret));
    for (int level = (int)isa; level >= 0; level = cpu_isa_below((enum cpu_isa)level)) {
        for (uint32_t i = 0; levels[level] != NULL && i < CPU_GLU_KINDS; i++) {
            if (ret->act[i] == NULL) {
                ret->act[i] = levels[level]->act[i];
            }
        }
    }
}
