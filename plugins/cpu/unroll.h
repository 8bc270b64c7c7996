/* plugins/cpu/unroll.h - what the vector kernels need from the compiler: functions that must be
 * specialised by constant arguments, and loops over register arrays that must vanish. */
#ifndef PLUGINS_CPU_UNROLL_H
#define PLUGINS_CPU_UNROLL_H

#define CPU_SPECIALISE static inline __attribute__((always_inline))

#if defined(__clang__)
#define CPU_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CPU_UNROLL _Pragma("GCC unroll 16")
#endif

#endif
