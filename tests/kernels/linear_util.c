/* tests/kernels/linear_util.c - see linear_util.h. */
#include "tests/kernels/linear_util.h"

#include "format/types.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define THREADS_MAX 16u

const uint32_t test_quant_types[] = {GQA_TYPE_Q4_0, GQA_TYPE_Q4_1, GQA_TYPE_Q5_0,   GQA_TYPE_Q5_1,
                                     GQA_TYPE_Q8_0, GQA_TYPE_Q2_K, GQA_TYPE_Q3_K,   GQA_TYPE_Q4_K,
                                     GQA_TYPE_Q5_K, GQA_TYPE_Q6_K, GQA_TYPE_IQ4_NL, GQA_TYPE_IQ4_XS,
                                     GQA_TYPE_MXFP4};
const uint32_t test_n_quant_types = sizeof(test_quant_types) / sizeof(test_quant_types[0]);
const uint32_t test_float_types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16};
const uint32_t test_n_float_types = sizeof(test_float_types) / sizeof(test_float_types[0]);

uint64_t test_random_u64(struct test_random *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

float test_random_normal(struct test_random *r)
{
    /* Four uniform 16-bit numbers: variance 4/12 of the range's square. */
    uint64_t bits = test_random_u64(r);
    float sum = 0.0f;
    for (int i = 0; i < 4; i++) {
        sum += (float)(bits >> 16 * i & 0xffff) / 65536.0f - 0.5f;
    }
    return sum * 1.7320508f;
}

uint64_t test_seed(const char *test)
{
    const char *text = getenv("GQAD_TEST_SEED");
    uint64_t seed = text != NULL ? strtoull(text, NULL, 0) : 20240607;
    fprintf(stderr, "%s: seed %llu\n", test, (unsigned long long)seed);
    return seed;
}

struct team {
    gqa_task_fn fn;
    void *arg;
    uint32_t n_tasks;
    atomic_uint next, worker;
};

static void *team_member(void *arg)
{
    struct team *team = arg;
    uint32_t worker = atomic_fetch_add(&team->worker, 1), index;

    while ((index = atomic_fetch_add(&team->next, 1)) < team->n_tasks) {
        team->fn(team->arg, index, worker);
    }
    return NULL;
}

static void host_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    const struct test_host *h = data;
    struct team team = {.fn = fn, .arg = arg, .n_tasks = n_tasks};
    pthread_t threads[THREADS_MAX];

    if (h->host.n_threads == 1) {
        for (uint32_t i = n_tasks; i > 0; i--) {
            fn(arg, i - 1, 0);
        }
        return;
    }
    for (uint32_t i = 1; i < h->host.n_threads; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, team_member, &team), 0);
    }
    team_member(&team);
    for (uint32_t i = 1; i < h->host.n_threads; i++) {
        pthread_join(threads[i], NULL);
    }
}

static void *host_allocate(void *data, size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory != NULL) {
        memset(memory, 0, bytes);
    }
    return memory;
}

static void host_release(void *data, void *memory, size_t bytes)
{
    free(memory);
}

static void host_log(void *data, int level, const char *message)
{
    fprintf(stderr, "%s\n", message);
}

void test_host_init(struct test_host *h, uint32_t n_threads)
{
    h->host = (struct gqa_host){
        .struct_size = sizeof(struct gqa_host),
        .abi_major = GQA_PLUGIN_ABI_MAJOR,
        .abi_minor = GQA_PLUGIN_ABI_MINOR,
        .n_threads = n_threads,
        .data = h,
        .log = host_log,
        .parallel = host_parallel,
        .allocate = host_allocate,
        .release = host_release,
    };
}

/* Where a quantised block keeps the numbers that all its values are multiplied with. */
static const struct {
    uint32_t type;
    int at[2]; /* offsets of scale and minimum; -1: none */
    int is_exponent;
} places[] = {
    {GQA_TYPE_Q4_0, {0, -1}, 0},   {GQA_TYPE_Q4_1, {0, 2}, 0},    {GQA_TYPE_Q5_0, {0, -1}, 0},
    {GQA_TYPE_Q5_1, {0, 2}, 0},    {GQA_TYPE_Q8_0, {0, -1}, 0},   {GQA_TYPE_Q2_K, {80, 82}, 0},
    {GQA_TYPE_Q3_K, {108, -1}, 0}, {GQA_TYPE_Q4_K, {0, 2}, 0},    {GQA_TYPE_Q5_K, {0, 2}, 0},
    {GQA_TYPE_Q6_K, {208, -1}, 0}, {GQA_TYPE_IQ4_NL, {0, -1}, 0}, {GQA_TYPE_IQ4_XS, {0, -1}, 0},
    {GQA_TYPE_MXFP4, {0, -1}, 1},
};

int test_block_set_scales(uint32_t type, uint8_t *block, float scale, float min)
{
    size_t i = 0;

    while (places[i].type != type) {
        i++;
        cr_assert(i < sizeof(places) / sizeof(places[0]), "type %u", type);
    }
    if (places[i].is_exponent) {
        int exponent;
        if (!isfinite(scale)) {
            return 0;
        }
        frexpf(scale, &exponent); /* |scale| in [2^(exponent - 1), 2^exponent) */
        block[places[i].at[0]] = (uint8_t)(exponent - 1 + 127);
        return 1;
    }
    for (int j = 0; j < 2 && places[i].at[j] >= 0; j++) {
        uint16_t half = fmt_f32_to_f16(j == 0 ? scale : min);
        memcpy(block + places[i].at[j], &half, sizeof(half));
    }
    return 1;
}

static void random_block(uint32_t type, uint8_t *block, struct test_random *r)
{
    uint32_t bytes = fmt_type_info(type)->block_bytes;

    for (uint32_t i = 0; i < bytes; i++) {
        block[i] = (uint8_t)test_random_u64(r);
    }
    test_block_set_scales(type, block, test_random_normal(r) * 0.01f,
                          test_random_normal(r) * 0.01f);
}

void test_weight_random(struct test_weight *w, struct test_random *r, uint32_t type, uint32_t n,
                        uint32_t k)
{
    const struct fmt_type_info *info = fmt_type_info(type);
    uint64_t bytes = fmt_type_bytes(info, k) * n;

    memset(w, 0, sizeof(*w));
    w->file = malloc(bytes);
    cr_assert_not_null(w->file);
    if (info->n_block == 1) {
        for (uint64_t i = 0; i < (uint64_t)n * k; i++) {
            float value = test_random_normal(r);
            info->quantise(&value, (uint8_t *)w->file + i * info->block_bytes, 1);
        }
    } else {
        for (uint64_t at = 0; at < bytes; at += info->block_bytes) {
            random_block(type, (uint8_t *)w->file + at, r);
        }
    }
    w->weight = (struct gqa_weight){
        .name = "test", .type = type, .n_dims = 2, .ne = {k, n, 1, 1}, .data = w->file};
    test_weight_pack(w);
}

void test_weight_experts(struct test_weight *w, struct test_random *r, uint32_t type, uint32_t n,
                         uint32_t k, uint32_t n_experts)
{
    test_weight_random(w, r, type, n * n_experts, k);
    w->weight.n_dims = 3;
    w->weight.ne[1] = n;
    w->weight.ne[2] = n_experts;
    test_weight_pack(w);
}

struct test_weight test_weight_expert(const struct test_weight *w, uint32_t expert)
{
    struct test_weight one = *w;
    uint64_t file_bytes = fmt_type_bytes(fmt_type_info(w->weight.type), w->weight.ne[0]);

    one.packed = NULL;
    one.file = (uint8_t *)w->file + file_bytes * w->weight.ne[1] * expert;
    one.weight.data = one.file;
    one.weight.n_dims = 2;
    one.weight.ne[2] = 1;
    test_weight_pack(&one);
    return one;
}

void test_weight_pack(struct test_weight *w)
{
    uint64_t bytes = cpu_weights_packed_bytes(&w->weight);
    uint64_t n = w->weight.ne[1] * w->weight.ne[2];

    if (bytes == 0) {
        return;
    }
    free(w->packed);
    w->packed = aligned_alloc(64, (bytes + 63) / 64 * 64);
    cr_assert_not_null(w->packed);
    memset(w->packed, 0xa5, bytes); /* pack must write every byte */
    for (uint64_t row = 0; row < n; row += CPU_STRIP_ROWS) {
        uint64_t rows = n - row < CPU_STRIP_ROWS ? n - row : CPU_STRIP_ROWS;
        cr_assert_eq(cpu_weights_pack(&w->weight, row, rows, w->packed), 0);
    }
    w->weight.packed = w->packed;
    w->weight.packed_bytes = bytes;
}

void test_weight_finish(struct test_weight *w)
{
    free(w->file);
    free(w->packed);
}

void test_weight_row(const struct test_weight *w, uint32_t o, float *ret)
{
    const struct fmt_type_info *info = fmt_type_info(w->weight.type);
    uint64_t row_bytes = fmt_type_bytes(info, w->weight.ne[0]);

    info->dequantise((const uint8_t *)w->file + o * row_bytes, ret, w->weight.ne[0]);
}

void test_linear_run(const struct test_weight *w, enum cpu_isa isa, uint32_t n_threads,
                     const float *x, uint32_t n_rows, const float *bias, float *y)
{
    struct test_host host;
    struct cpu_linear linear;
    struct cpu_matrix matrix;
    struct gqa_reason reason = {""};

    test_host_init(&host, n_threads);
    cr_assert_eq(cpu_matrix_init(&matrix, &w->weight, &reason), 0, "%s", reason.text);
    matrix.bias = bias;
    cr_assert_eq(cpu_linear_init(&linear, &host.host, isa, n_rows, matrix.k), 0);
    struct cpu_product product = {.matrix = &matrix, .dst = y, .dst_stride = matrix.n};
    cpu_linear_run(&linear, x, matrix.k, n_rows, &product, 1);
    cpu_linear_finish(&linear);
}
