/* plugins/cpu/unroll.h - what the vector kernels need from the compiler: functions that must be
 * specialised by constant arguments, and loops over register arrays that must vanish. A build that
 * wants neither (tests/emulated, where a register is an array) defines CPU_SPECIALISE, CPU_UNROLL
 * and CPU_CHAIN itself. */
#ifndef PLUGINS_CPU_UNROLL_H
#define PLUGINS_CPU_UNROLL_H

#ifndef CPU_SPECIALISE
#define CPU_SPECIALISE static inline __attribute__((always_inline))
#endif

/* CPU_UNROLL_4: four steps at a time of a loop that stays one. */
#ifdef CPU_UNROLL
#define CPU_UNROLL_4
#elif defined(__clang__)
#define CPU_UNROLL   _Pragma("clang loop unroll(full)")
#define CPU_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define CPU_UNROLL   _Pragma("GCC unroll 16")
#define CPU_UNROLL_4 _Pragma("GCC unroll 4")
#endif

/* Makes the compiler take a pointer as it finds it: addresses near it become offsets from it
 * instead of pointers of their own, which it would keep in memory. */
#define CPU_KEEP(pointer) __asm__("" : "+r"(pointer))

/* What is computed from the pointer belongs to this place, and what it points to is in memory:
 * where branches begin with the same steps the compiler would take those in front of all of them,
 * and keep their results wherever it can. */
#define CPU_APART(pointer) __asm__ volatile("" : "+r"(pointer) : : "memory")

/* Makes the compiler add to a vector in the order that is written: it would make a tree of the sums
 * instead, and keep the leaves in memory. */
#ifndef CPU_CHAIN
#define CPU_CHAIN(vector) __asm__ volatile("" : "+x"(vector))
#endif

/* Makes the compiler take a number from memory again, instead of a register that holds it (or a
 * vector of it) through loops which need all of them. */
#define CPU_KEEP_IN_MEMORY(number) __asm__("" : "+m"(number))

#endif
