/* plugins/cpu/unroll.h - what the vector kernels need from the compiler: functions that must be
 * specialised by constant arguments, and loops over register arrays that must vanish. A build that
 * wants neither (tests/emulated, where a register is an array) defines both names itself. */
#ifndef PLUGINS_CPU_UNROLL_H
#define PLUGINS_CPU_UNROLL_H

#ifndef CPU_SPECIALISE
#define CPU_SPECIALISE static inline __attribute__((always_inline))
#endif

#ifdef CPU_UNROLL
#elif defined(__clang__)
#define CPU_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CPU_UNROLL _Pragma("GCC unroll 16")
#endif

/* Makes the compiler take a pointer as it finds it: addresses near it become offsets from it
 * instead of pointers of their own, which it would keep in memory. */
#define CPU_KEEP(pointer) __asm__("" : "+r"(pointer))

#endif
