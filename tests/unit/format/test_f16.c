/* float16 and bfloat16: all 65536 values both ways, and every rounding case between neighbours. */
#include "format/types.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

static uint32_t bits_of(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static float float_of(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

/* A float16 by its definition. */
static double f16_by_algebra(uint16_t h)
{
    int exponent = h >> 10 & 0x1f;
    double mantissa = h & 0x3ff;
    double magnitude = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
    return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

Test(f16, every_value_is_its_definition_and_comes_back)
{
    for (uint32_t i = 0; i <= 0xffff; i++) {
        uint16_t h = (uint16_t)i;
        float f = fmt_f16_to_f32(h);
        if ((h & 0x7c00) != 0x7c00) {
            cr_assert_eq((double)f, f16_by_algebra(h), "%04x", h);
            cr_assert_eq(signbit(f) != 0, (h & 0x8000) != 0, "%04x", h);
            cr_assert_eq(fmt_f32_to_f16(f), h, "%04x", h);
        } else if ((h & 0x3ff) == 0) {
            cr_assert_eq(bits_of(f), h == 0x7c00 ? 0x7f800000 : 0xff800000, "%04x", h);
            cr_assert_eq(fmt_f32_to_f16(f), h, "%04x", h);
        } else {
            cr_assert(isnan(f), "%04x", h);
            cr_assert_eq(fmt_f32_to_f16(f), h | 0x200, "%04x becomes quiet", h);
        }
    }
}

Test(f16, values_between_neighbours_round_to_the_nearest_even)
{
    for (uint32_t i = 0; i < 0x7c00; i++) {
        uint16_t low = (uint16_t)i, high = (uint16_t)(i + 1);
        /* Behind the last finite value comes the one that 2^16 would be. */
        double above = high == 0x7c00 ? 65536.0 : (double)fmt_f16_to_f32(high);
        float middle = (float)(((double)fmt_f16_to_f32(low) + above) / 2); /* exact */
        uint16_t even = (low & 1) == 0 ? low : high;
        cr_assert_eq(fmt_f32_to_f16(middle), even, "%04x", low);
        cr_assert_eq(fmt_f32_to_f16(nextafterf(middle, 0.0f)), low, "%04x", low);
        cr_assert_eq(fmt_f32_to_f16(nextafterf(middle, INFINITY)), high, "%04x", low);
        cr_assert_eq(fmt_f32_to_f16(-middle), even | 0x8000, "%04x", low);
    }
    cr_expect_eq(fmt_f32_to_f16(3e38f), 0x7c00);
    cr_expect_eq(fmt_f32_to_f16(1e-45f), 0);
    cr_expect(isnan(fmt_f16_to_f32(fmt_f32_to_f16(float_of(0x7f800001)))));
}

#if defined(__FLT16_MAX__)
Test(f16, agrees_with_the_compiler_on_many_floats)
{
    /* Every 4099th bit pattern: all exponents, signs and mixed mantissas. */
    for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 4099) {
        float f = float_of((uint32_t)bits);
        _Float16 h = (_Float16)f;
        uint16_t expected;
        memcpy(&expected, &h, sizeof(expected));
        if (!isnan(f)) {
            cr_assert_eq(fmt_f32_to_f16(f), expected, "%08x", (uint32_t)bits);
        }
    }
}
#endif

Test(bf16, every_value_comes_back)
{
    for (uint32_t i = 0; i <= 0xffff; i++) {
        uint16_t h = (uint16_t)i;
        float f = fmt_bf16_to_f32(h);
        cr_assert_eq(bits_of(f), i << 16, "%04x", h);
        cr_assert_eq(fmt_f32_to_bf16(f), isnan(f) ? h | 0x40 : h, "%04x", h);
    }
}

Test(bf16, values_between_neighbours_round_to_the_nearest_even)
{
    for (uint32_t i = 0; i < 0x7f80; i++) {
        uint32_t even = (i & 1) == 0 ? i : i + 1;
        cr_assert_eq(fmt_f32_to_bf16(float_of(i << 16 | 0x8000)), even, "%04x", i);
        cr_assert_eq(fmt_f32_to_bf16(float_of(i << 16 | 0x7fff)), i, "%04x", i);
        cr_assert_eq(fmt_f32_to_bf16(float_of(i << 16 | 0x8001)), i + 1, "%04x", i);
    }
    cr_expect(isnan(fmt_bf16_to_f32(fmt_f32_to_bf16(float_of(0x7f800001)))));
}
