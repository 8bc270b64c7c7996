/* plugins/cpu/exp.h - the numbers behind the vector levels' exp and tanh.
 *
 * exp(x) for x <= 0, with tables of N = 16 (8) entries, as many as a register has lanes:
 * n = round(N x log2(e)) / N by adding and subtracting CPU_EXP_MAGIC(N), whose last bit is worth
 * 1/N; r = x log2(e) - n in two multiply-adds; then 2^n times the cubic polynomial for 2^r on
 * |r| <= 1/(2N). The sum with the magic number has N n in its lowest bits, so that its lowest 4 (3)
 * choose 2^(their value / N) from the table and the rest, shifted into the exponent, adds to it: an
 * entry has those lowest bits' own contribution taken off. The polynomial is Taylor's with the next
 * term's mean folded into C2: an error of 1.7e-9 (2.8e-8); after rounding, 1.2e-7 relative, and
 * exactly 1 at 0. Below CPU_EXP_LEAST, where results would be subnormal, exp is 0.
 *
 * tanh(y) = sign(y) (1 - e) / (1 + e) with e = exp(-2 |y|); below CPU_TANH_SMALL, where that
 * cancels, the odd polynomial of Cephes' tanhf. */
#ifndef PLUGINS_CPU_EXP_H
#define PLUGINS_CPU_EXP_H

#define CPU_EXP_LEAST    (-87.33654f)
#define CPU_EXP_LOG2E    0x1.715476p0f
#define CPU_EXP_LOG2E_LO 0x1.4ae0cp-26f
#define CPU_EXP_MAGIC(N) (0x1.8p23f / (N))
#define CPU_EXP_C1       0x1.62e43p-1f
#define CPU_EXP_C2_16    0x1.ec001p-3f
#define CPU_EXP_C2_8     0x1.ec0c9ep-3f
#define CPU_EXP_C3       0x1.c6b08ep-5f

#define CPU_TANH_SMALL 0.625f
#define CPU_TANH_C3    (-3.33332819422e-1f)
#define CPU_TANH_C5    1.33314422036e-1f
#define CPU_TANH_C7    (-5.37397155531e-2f)
#define CPU_TANH_C9    2.06390887954e-2f
#define CPU_TANH_C11   (-5.70498872745e-3f)

#endif
