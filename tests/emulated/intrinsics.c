/* tests/emulated/intrinsics.c - the emulation against what the processor's manual says: rounding,
 * ends of ranges, NaN, masks. What rests on it is only as good. */
#include <immintrin.h>

#include <criterion/criterion.h>
#include <stdio.h>

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state >> 16;
}

/* A float of any bits, or one whose exponent is low.. low + range - 1. */
static float next_float(uint64_t *state, uint32_t low, uint32_t range)
{
    uint32_t bits = (uint32_t)next(state);
    float f;

    if (range > 0) {
        bits = (bits & 0x807fffffu) | (low + (bits >> 23) % range) << 23;
    }
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static int same(float a, float b)
{
    return (isnan(a) && isnan(b)) || memcmp(&a, &b, sizeof(a)) == 0;
}

/* Against libm's: any bits, sums that cancel, products with few bits (ties), subnormal results. */
Test(intrinsics, multiply_add_rounds_once)
{
    uint64_t state = 88172645463325252u;

    for (int round = 0; round < 20000; round++) {
        union lanes64 a, b, c, r, n;
        for (int i = 0; i < 16; i++) {
            int mode = (round + i) % 4;
            uint32_t range = mode == 0 ? 0 : (mode == 3 ? 20 : 50), low = mode == 3 ? 20 : 100;
            a.f32[i] = next_float(&state, 100, mode == 0 ? 0 : 50);
            b.f32[i] = next_float(&state, low, range);
            c.f32[i] = next_float(&state, mode == 3 ? 0 : 100, mode == 3 ? 3 : range);
            if (mode == 1) {
                a.i32[i] &= (int32_t)0xfffff000;
                b.i32[i] &= (int32_t)0xfffff000;
                c.i32[i] &= (int32_t)0xffff0000;
            }
        }
        __m512 x = lanes64_to___m512(a), y = lanes64_to___m512(b), z = lanes64_to___m512(c);
        r = lanes64_of(_mm512_fmadd_ps(x, y, z));
        n = lanes64_of(_mm512_fnmadd_ps(x, y, z));
        for (int i = 0; i < 16; i++) {
            float sum = fmaf(a.f32[i], b.f32[i], c.f32[i]);
            float difference = fmaf(-a.f32[i], b.f32[i], c.f32[i]);
            cr_assert(same(r.f32[i], sum) && same(n.f32[i], difference), "%a %a %a: %a and %a",
                      (double)a.f32[i], (double)b.f32[i], (double)c.f32[i], (double)r.f32[i],
                      (double)n.f32[i]);
        }
    }
}

Test(intrinsics, floats_to_integers_and_scales)
{
    static const struct {
        float x, y;      /* y: power */
        int32_t rounded; /* x */
        float nearest, scaled;
    } rows[] = {
        {0.5f, 1.0f, 0, 0.0f, 1.0f},
        {1.5f, -1.0f, 2, 2.0f, 0.75f},
        {-2.5f, 0.9f, -2, -2.0f, -2.5f},
        {-3.5f, -0.1f, -4, -4.0f, -1.75f},
        {0x1.8p30f, -149.0f, 0x60000000, 0x1.8p30f, 0x1.8p-119f},
        {0x1p31f, 97.0f, INT32_MIN, 0x1p31f, INFINITY},
        {1.0f, -149.0f, 1, 1.0f, 0x1p-149f},
        {1.0f, -150.0f, 1, 1.0f, 0.0f},
        {3.0f, -150.0f, 3, 3.0f, 0x1p-148f},
        {-INFINITY, 3.0f, INT32_MIN, -INFINITY, -INFINITY},
        {1.0f, -INFINITY, 1, 1.0f, 0.0f},
        {1.0f, INFINITY, 1, 1.0f, INFINITY},
        {NAN, 0.0f, INT32_MIN, NAN, NAN},
    };

    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        __m512 x = _mm512_set1_ps(rows[i].x), y = _mm512_set1_ps(rows[i].y);
        union lanes64 rounded = lanes64_of_int(_mm512_cvtps_epi32(x));
        union lanes64 nearest = lanes64_of(_mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT));
        union lanes64 scaled = lanes64_of(_mm512_scalef_ps(x, y));
        union lanes64 masked = lanes64_of(_mm512_maskz_scalef_ps(2, x, y));
        cr_expect_eq(rounded.i32[15], rows[i].rounded, "row %zu", i);
        cr_expect(same(nearest.f32[0], rows[i].nearest), "row %zu", i);
        cr_expect(same(scaled.f32[7], rows[i].scaled), "row %zu: %a", i, (double)scaled.f32[7]);
        cr_expect(same(masked.f32[1], rows[i].scaled) && masked.f32[2] == 0.0f, "row %zu", i);
    }
}

static __m256i low_half(__m512i a)
{
    __m256i low;
    memcpy(&low, &a, sizeof(low));
    return low;
}

/* SIMDe's, as far as kernels lean on them: products of bytes and words, look-ups, what NaN does. */
Test(intrinsics, products_and_lookups)
{
    uint64_t state = 7;
    union lanes64 a, b, bytes, words, found;

    for (int round = 0; round < 1000; round++) {
        for (int i = 0; i < 64; i++) {
            a.u8[i] = round == 0 ? 255 : (uint8_t)next(&state);
            b.i8[i] = round == 0 ? -128 : (int8_t)next(&state);
        }
        __m512i x = lanes64_to_int(a), y = lanes64_to_int(b), start = _mm512_set1_epi32(-5);
        bytes = lanes64_of_int(_mm512_dpbusd_epi32(start, x, y));
        words = lanes64_of_int(_mm512_dpwssd_epi32(start, x, y));
        found = lanes64_of_int(_mm512_shuffle_epi8(x, y));
        __m256i low = _mm256_dpbusd_avx_epi32(_mm256_set1_epi32(-5), low_half(x), low_half(y));
        cr_assert_arr_eq(&low, &bytes, sizeof(low));
        for (int i = 0; i < 16; i++) {
            int32_t sum = -5, pair = -5;
            for (int j = 0; j < 4; j++) {
                sum += a.u8[4 * i + j] * b.i8[4 * i + j];
            }
            for (int j = 0; j < 2; j++) {
                pair += (int16_t)a.u16[2 * i + j] * (int16_t)b.u16[2 * i + j];
            }
            cr_assert(bytes.i32[i] == sum && words.i32[i] == pair, "round %d lane %d", round, i);
        }
        for (int i = 0; i < 64; i++) {
            uint8_t level = b.i8[i] < 0 ? 0 : a.u8[i / 16 * 16 + b.i8[i] % 16];
            cr_assert_eq(found.u8[i], level, "round %d byte %d", round, i);
        }
    }
}

Test(intrinsics, comparisons_and_extremes_of_nan)
{
    __m512 nan = _mm512_set1_ps(NAN), one = _mm512_set1_ps(1.0f);

    cr_expect_eq(_mm512_cmp_ps_mask(nan, one, _CMP_LT_OQ), 0);
    cr_expect_eq(_mm512_cmp_ps_mask(nan, one, _CMP_NLT_UQ), 0xffff);
    cr_expect_eq(_mm512_cmp_ps_mask(one, one, _CMP_NLT_UQ), 0xffff);
    cr_expect_eq(_mm512_cmp_ps_mask(nan, nan, _CMP_UNORD_Q), 0xffff);
    cr_expect_eq(_mm512_cmp_ps_mask(one, one, _CMP_UNORD_Q), 0);
    /* The second operand comes back where either is NaN. */
    cr_expect(isnan(_mm512_cvtss_f32(_mm512_min_ps(one, nan))));
    cr_expect(isnan(_mm512_cvtss_f32(_mm512_max_ps(one, nan))));
    cr_expect_eq(_mm512_cvtss_f32(_mm512_min_ps(nan, one)), 1.0f);
    cr_expect_eq(_mm512_cvtss_f32(_mm512_max_ps(nan, one)), 1.0f);
}

Test(intrinsics, lanes_change_places_and_masks_hold)
{
    float x[16], y[16] = {0}, z[16];

    for (int i = 0; i < 16; i++) {
        x[i] = (float)i;
    }
    _mm512_storeu_ps(y, _mm512_permute_ps(_mm512_loadu_ps(x), 0xb1));
    _mm512_storeu_ps(z, _mm512_shuffle_f32x4(_mm512_loadu_ps(x), _mm512_loadu_ps(x), 0x4e));
    for (int i = 0; i < 16; i++) {
        cr_expect_eq(y[i], x[i ^ 1], "lane %d", i);
        cr_expect_eq(z[i], x[(i + 8) % 16], "lane %d", i);
    }
    _mm512_mask_storeu_ps(y, 0x8001, _mm512_set1_ps(-1.0f));
    for (int i = 0; i < 16; i++) {
        cr_expect_eq(y[i], i % 15 == 0 ? -1.0f : x[i ^ 1], "lane %d", i);
    }
    /* No byte behind the mask is read: the page may end there. */
    _mm512_storeu_ps(z, _mm512_maskz_loadu_ps(0x0002, x));
    cr_expect(z[0] == 0.0f && z[1] == 1.0f && z[2] == 0.0f);
}
