/* plugins/cuda/ops.cu - the small ops of a program: each reads and writes its rows once, at the speed
 * of memory. Sums have one order whatever the number of rows. */
#include "plugins/cuda/device.cuh"

/* ---- activations of a GLU ---------------------------------------------------------------- */

DEVICE float gated(float x, float z)
{
    return x / (1.0f + expf(-z));
}

DEVICE float swiglu_oai(float gate, float up, float alpha, float limit)
{
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    return gated(gate, alpha * gate) * (up + 1.0f);
}

DEVICE float activation(uint32_t kind, float x)
{
    const float twice_root = 1.5957691216057308f;       /* 2 sqrt(2 / pi) */
    const float minus_root_half = -0.70710678118654752f;

    switch (kind) {
    case CUDA_MAP_SILU:
        return gated(x, x);
    case CUDA_MAP_GELU_TANH:
        return gated(x, twice_root * x * (1.0f + 0.044715f * x * x));
    case CUDA_MAP_GELU:
        return 0.5f * x * erfcf(minus_root_half * x);
    default:
        return x < 0.0f ? 0.0f : x;
    }
}

/* What a GLU makes of a value; b is 1 where there is nothing to multiply with. */
DEVICE float activate(uint32_t kind, float a, float b, float alpha, float limit)
{
    return kind == CUDA_MAP_SWIGLU_OAI ? swiglu_oai(a, b, alpha, limit) : activation(kind, a) * b;
}

/* ---- activations for products ------------------------------------------------------------ */

/* A block whose values are all smaller counts as zeros, as on the cpu. */
#define PEAK_MIN 1e-36f

/* The row that the i-th of a grid is laid out as, and its values. */
struct input_row {
    uint32_t row;
    const float *src;
};

DEVICE input_row find_input(const cuda_quantise_args &p, uint32_t i)
{
    uint32_t row = p.slots != NULL ? p.slots[i] : i;
    return {row, p.src + (p.n_each != 0 ? i / p.n_each : row) * p.stride};
}

DEVICE float input_value(const cuda_quantise_args &p, const float *src, uint32_t k)
{
    float x = src[k];

    if (p.act < CUDA_MAP_SILU) {
        return x;
    }
    return activate(p.act, x, p.up != 0 ? src[k + p.up] : 1.0f, p.alpha, p.limit);
}

/* To int8 with a scale for each 32 values: a warp for a block. Grid (n_rows, n_blocks / 8). */
KERNEL __launch_bounds__(256) gqa_quantise(const cuda_quantise_args p)
{
    uint32_t lane = threadIdx.x % 32, block = blockIdx.y * 8 + threadIdx.x / 32;
    uint32_t k = block * CUDA_BLOCK + lane;

    if (block >= p.n_blocks) {
        return;
    }
    const input_row input = find_input(p, blockIdx.x);
    uint32_t row = input.row;
    float x = k < p.k ? input_value(p, input.src, k) : 0.0f;
    uint32_t peak_bits = __float_as_uint(x) & 0x7fffffffu;
    for (uint32_t i = 16; i > 0; i /= 2) {
        peak_bits = max(peak_bits, __shfl_xor_sync(WARP_ALL, peak_bits, i));
    }
    float peak = __uint_as_float(peak_bits), scale = 0.0f;
    int32_t q = 0;
    if (peak_bits >= 0x7f800000u) {
        scale = __uint_as_float(0x7fc00000u);
    } else if (peak >= PEAK_MIN) {
        q = __float2int_rn(__fmul_rn(x, __fdiv_rn(127.0f, peak)));
        scale = __fdiv_rn(peak, 127.0f);
    }
    int32_t sum = q;
    for (uint32_t i = 8; i > 0; i /= 2) {
        sum += __shfl_xor_sync(WARP_ALL, sum, i);
    }
    uint64_t at = (uint64_t)(row / CUDA_TILE) * p.n_blocks + block;
    uint32_t g = row % CUDA_TILE;
    p.q[at * 256 + (g * 4 + lane % 16 / 4) * 8 + lane / 16 * 4 + lane % 4] = (uint8_t)q;
    if (lane % 16 == 0) {
        p.sums[(at * CUDA_TILE + g) * 2 + lane / 16] = sum;
    }
    if (lane == 0) {
        p.scales[at * CUDA_TILE + g] = scale;
    }
}

/* To pairs of f16 or bf16, high and low. f16 rows whose largest value would not fit are divided by a power of two, which
 * the product's end takes back. Grid (n_rows). */
KERNEL __launch_bounds__(256) gqa_halve(const cuda_quantise_args p)
{
    __shared__ uint32_t room[OP_THREADS / 32];
    const input_row input = find_input(p, blockIdx.x);
    uint32_t row = input.row, g = row % CUDA_TILE;
    uint32_t down = halves_down(p.k, p.bf16, room,
                                [&](uint32_t k) { return input_value(p, input.src, k); });
    float factor = __uint_as_float((127 - down) << 23);
    for (uint32_t k = threadIdx.x; k < p.n_blocks * CUDA_BLOCK; k += OP_THREADS) {
        uint64_t at = (uint64_t)(row / CUDA_TILE) * p.n_blocks + k / CUDA_BLOCK;
        uint32_t in = k % 16, word = k % 32 / 16 * 2 + in / 8;
        uint16_t *to = (uint16_t *)p.q + at * 512 + (g * 4 + in % 8 / 2) * 8 + word * 2 + in % 2;
        uint32_t high, low;
        float x = k < p.k ? input_value(p, input.src, k) : 0.0f;
        split_halves(__fmul_rn(x, factor), p.bf16, high, low);
        to[0] = (uint16_t)high;
        to[256] = (uint16_t)low;
    }
    if (threadIdx.x == 0) {
        p.scales[row] = __uint_as_float((127 + down) << 23);
    }
}

/* ---- norm, rope -------------------------------------------------------------------------- */

/* dst = norm(src) * weight + bias over groups of dim values. Grid (groups, rows). */
KERNEL __launch_bounds__(256) gqa_norm(const cuda_norm_args p)
{
    __shared__ float room[OP_THREADS / 32];
    const float *src = p.src + blockIdx.y * p.src_stride + blockIdx.x * p.dim;
    float *dst = p.dst + blockIdx.y * p.dst_stride + blockIdx.x * p.dim;
    float mean = 0.0f, sum = 0.0f;

    if (p.layer) {
        for (uint32_t i = threadIdx.x; i < p.dim; i += OP_THREADS) {
            sum += src[i];
        }
        mean = block_sum(sum, room) / (float)p.dim;
        sum = 0.0f;
    }
    for (uint32_t i = threadIdx.x; i < p.dim; i += OP_THREADS) {
        float x = src[i] - mean;
        sum = fmaf(x, x, sum);
    }
    float inverse = 1.0f / sqrtf(block_sum(sum, room) / (float)p.dim + p.eps);
    for (uint32_t i = threadIdx.x; i < p.dim; i += OP_THREADS) {
        float x = (src[i] - mean) * inverse;
        x = p.weight != NULL ? x * p.weight[i] : x;
        dst[i] = p.bias != NULL ? x + p.bias[i] : x;
    }
}

/* Rotates pairs in place by angles whose cosines and sines the host computed. Grid (rows). */
KERNEL __launch_bounds__(256) gqa_rope(const cuda_rope_args p)
{
    const float *cosines = p.cosines + (uint64_t)blockIdx.x * p.n_freqs;
    const float *sines = p.sines + (uint64_t)blockIdx.x * p.n_freqs;
    uint32_t n_pairs = p.width / p.head_dim * p.n_freqs;

    for (uint32_t i = threadIdx.x; i < n_pairs; i += OP_THREADS) {
        uint32_t f = i % p.n_freqs;
        float *head = p.dst + blockIdx.x * p.stride + i / p.n_freqs * p.head_dim;
        float *a = head + (p.half ? f : 2 * f), *b = p.half ? a + p.n_freqs : a + 1;
        float x = *a, y = *b;
        *a = x * cosines[f] - y * sines[f];
        *b = x * sines[f] + y * cosines[f];
    }
}

/* ---- value by value ---------------------------------------------------------------------- */

/* Grid (width / 256, rows). */
KERNEL __launch_bounds__(256) gqa_map(const cuda_map_args p)
{
    uint32_t i = blockIdx.x * OP_THREADS + threadIdx.x, row = blockIdx.y;

    if (i >= p.width) {
        return;
    }
    float a = p.a[(p.rows != NULL ? p.rows[row] : row) * p.a_stride + i];
    float b = p.b != NULL ? p.b[row * p.b_stride + i] : 1.0f;
    float *dst = p.dst + row * p.dst_stride + i;
    switch (p.kind) {
    case CUDA_MAP_SCALE:
        *dst = p.scale * a;
        break;
    case CUDA_MAP_ADD:
        *dst = a + p.scale * b;
        break;
    case CUDA_MAP_SOFTCAP:
        *dst = p.scale * tanhf(a / p.scale);
        break;
    default:
        *dst = activate(p.kind, a, b, p.alpha, p.limit);
        break;
    }
}
