#include "plugins/cpu/glu.h"
const struct cpu_glu_kernels cpu_glu_avx2 = {0};
