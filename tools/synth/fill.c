/* tools/synth/fill.c - random blocks.
 *
 * Quantised blocks are not made by quantising random floats: their bits are drawn directly, which
 * writes at the disk's speed and is just as good for measuring, because no kernel's time depends on
 * the values. So the levels are uniformly distributed, and the scales are chosen for the wanted
 * deviation. Every bit pattern is one that a real quantiser can produce (Q8_0 has no -128). Types
 * whose levels are not evenly spaced, or whose blocks would be laborious to draw, are quantised
 * after all.
 *
 * Levels such as Q4_0's -8..7 have a mean of -1/2. Were all scales positive, that bias would add up
 * coherently from layer to layer until it was all that is left of the signal; so the signs of the
 * scales are random, as they are in real files. */
#include "tools/synth/fill.h"

#include "format/types.h"

#include <stdbool.h>
#include <string.h>

/* Deviation of n equally likely consecutive integers is sqrt((n^2 - 1) / 12). */
#define DEVIATION_16_LEVELS  4.6098f
#define DEVIATION_32_LEVELS  9.2331f
#define DEVIATION_64_LEVELS  18.4729f
#define DEVIATION_255_LEVELS 73.6116f
#define SQRT_3               1.7320508f /* half width of a uniform distribution of deviation 1 */

/* splitmix64 (Steele, Lea, Flood 2014): one addition and a mix per 64 bits. */
static uint64_t next(struct synth_random *random)
{
    uint64_t z = random->state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

struct synth_random synth_random_of(uint64_t seed, uint64_t tensor_index)
{
    struct synth_random mixed = {seed};
    uint64_t a = next(&mixed);
    mixed.state = a ^ tensor_index * 0xd1342543de82ef95;
    return (struct synth_random){next(&mixed)};
}

static void fill_bytes(struct synth_random *random, uint8_t *dst, size_t n)
{
    while (n > 0) {
        uint64_t bits = next(random);
        size_t piece = n < sizeof(bits) ? n : sizeof(bits);
        memcpy(dst, &bits, piece);
        dst += piece;
        n -= piece;
    }
}

/* Uniform in [-1, 1). */
static float uniform(uint64_t bits)
{
    return (float)(int32_t)(uint32_t)bits * 0x1p-31f;
}

static void store_f16(uint8_t *at, float value)
{
    uint16_t bits = fmt_f32_to_f16(value);
    memcpy(at, &bits, sizeof(bits));
}

/* A block's scale: within a quarter of step, of random sign. */
static float random_scale(struct synth_random *random, float step)
{
    uint64_t bits = next(random);
    float scale = step * (1.0f + 0.25f * uniform(bits));
    return (bits >> 63) != 0 ? -scale : scale;
}

static void fill_floats(uint32_t type, float mean, float deviation, struct synth_random *random,
                        uint8_t *dst, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float value = mean + deviation * SQRT_3 * uniform(next(random));
        uint16_t half;
        switch (type) {
        case FMT_TYPE_F32:
            memcpy(dst + i * sizeof(value), &value, sizeof(value));
            break;
        case FMT_TYPE_F16:
            store_f16(dst + i * sizeof(half), value);
            break;
        default:
            half = fmt_f32_to_bf16(value);
            memcpy(dst + i * sizeof(half), &half, sizeof(half));
            break;
        }
    }
}

static void fill_q8_0(struct synth_random *random, float deviation, uint8_t *block)
{
    store_f16(block, random_scale(random, deviation / DEVIATION_255_LEVELS));
    fill_bytes(random, block + 2, 32);
    for (size_t i = 2; i < 34; i++) {
        block[i] = block[i] == 0x80 ? 0 : block[i];
    }
}

/* value = d * scale * q - dmin * min. With dmin = 7.5 * d and every min equal to its scale the
 * values are d * scale * (q - 7.5): centred. Scales are 48..63, in the packing of quant_k.c. */
static void fill_q4_k(struct synth_random *random, float deviation, uint8_t *block)
{
    const float mean_scale = 55.5f;
    float d = deviation / (DEVIATION_16_LEVELS * mean_scale);
    uint64_t bits = next(random);
    d *= 1.0f + 0.25f * uniform(bits);
    store_f16(block, d);
    store_f16(block + 2, 7.5f * d);
    for (size_t s = 0; s < 4; s++) {
        uint8_t first = (uint8_t)(48 | (bits >> (32 + 4 * s) & 0xf));
        uint8_t second = (uint8_t)(48 | (bits >> (48 + 4 * s) & 0xf));
        uint8_t packed = (uint8_t)(first | (second >> 4) << 6);
        block[4 + s] = packed;
        block[8 + s] = packed;
        block[12 + s] = (uint8_t)((second & 0xf) | (second & 0xf) << 4);
    }
    fill_bytes(random, block + 16, 128);
}

static void fill_q6_k(struct synth_random *random, float deviation, uint8_t *block)
{
    const float mean_scale = 80.0f; /* magnitudes are 64..95 */
    fill_bytes(random, block, 128 + 64);
    for (size_t s = 0; s < 16; s += 8) {
        uint64_t bits = next(random);
        for (size_t j = 0; j < 8; j++) {
            int magnitude = 64 + (int)(bits >> (8 * j) & 31);
            bool negative = (bits >> (8 * j + 7) & 1) != 0;
            block[192 + s + j] = (uint8_t)(int8_t)(negative ? -magnitude : magnitude);
        }
    }
    store_f16(block + 208, random_scale(random, deviation / (DEVIATION_64_LEVELS * mean_scale)));
}

/* One block of a type that has an encoder. */
static void fill_quantised(const struct fmt_type_info *type, float deviation,
                           struct synth_random *random, uint8_t *block)
{
    float x[256];
    for (size_t i = 0; i < type->n_block; i++) {
        x[i] = deviation * SQRT_3 * uniform(next(random));
    }
    type->quantise(x, block, type->n_block);
}

void synth_fill(uint32_t type, float mean, float deviation, struct synth_random *random, void *dst,
                size_t n_blocks)
{
    const size_t block_bytes = fmt_type_info(type)->block_bytes;
    uint8_t *block = dst;
    if (fmt_type_info(type)->n_block == 1) {
        fill_floats(type, mean, deviation, random, block, n_blocks);
        return;
    }
    for (size_t i = 0; i < n_blocks; i++, block += block_bytes) {
        switch (type) {
        case FMT_TYPE_Q4_0:
            store_f16(block, random_scale(random, deviation / DEVIATION_16_LEVELS));
            fill_bytes(random, block + 2, 16);
            break;
        case FMT_TYPE_Q5_0:
            store_f16(block, random_scale(random, deviation / DEVIATION_32_LEVELS));
            fill_bytes(random, block + 2, 20);
            break;
        case FMT_TYPE_Q8_0:
            fill_q8_0(random, deviation, block);
            break;
        case FMT_TYPE_Q4_K:
            fill_q4_k(random, deviation, block);
            break;
        case FMT_TYPE_Q6_K:
            fill_q6_k(random, deviation, block);
            break;
        default:
            fill_quantised(fmt_type_info(type), deviation, random, block);
            break;
        }
    }
}
