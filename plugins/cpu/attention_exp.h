/* plugins/cpu/attention_exp.h - the numbers behind the vector levels' exp and tanh.
 *
 * exp(x) for x <= 0: n = round(x / ln 2), r = x - n ln 2 in two steps, a polynomial for exp(r) on
 * |r| <= ln 2 / 2, then times 2^n. The polynomial is 1 + r + r^2 (c2 + c3 r + ... + c6 r^4), fitted
 * to interpolate where the error of a minimax fit would vanish: 4e-9 before rounding, 7.2e-8
 * relative after it, exactly 1 at 0. Below CPU_EXP_LEAST, where results would be subnormal, exp is
 * 0.
 *
 * tanh(y) = sign(y) (1 - e) / (1 + e) with e = exp(-2 |y|); below CPU_TANH_SMALL, where that
 * cancels, the odd polynomial of Cephes' tanhf. */
#ifndef PLUGINS_CPU_ATTENTION_EXP_H
#define PLUGINS_CPU_ATTENTION_EXP_H

#define CPU_EXP_LEAST  (-87.33654f)
#define CPU_EXP_LOG2E  1.44269504f
#define CPU_EXP_LN2_HI 0x1.62e4p-1f /* 15 bits: n times it is exact */
#define CPU_EXP_LN2_LO 0x1.7f7d1cp-20f
#define CPU_EXP_C2     0.5f
#define CPU_EXP_C3     0x1.555484p-3f
#define CPU_EXP_C4     0x1.5554ecp-5f
#define CPU_EXP_C5     0x1.124188p-7f
#define CPU_EXP_C6     0x1.6d471ap-10f

#define CPU_TANH_SMALL 0.625f
#define CPU_TANH_C3    (-3.33332819422e-1f)
#define CPU_TANH_C5    1.33314422036e-1f
#define CPU_TANH_C7    (-5.37397155531e-2f)
#define CPU_TANH_C9    2.06390887954e-2f
#define CPU_TANH_C11   (-5.70498872745e-3f)

#endif
