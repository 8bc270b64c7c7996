/* tests/cuda/emulate/cublaslt.cc - a libcublasLt.so.13 for the emulated GPU: products of halves with
 * plain sums, and every argument looked at. What the plugin must not do ends the process: wrong
 * layouts, an algorithm of another shape, memory that is not aligned as was said.
 *
 * EMULATED_CUBLASLT, looked at in each call:
 *   create      there is no handle
 *   heuristic   no algorithm is known
 *   matmul      no product can be started
 *   later       none any more from the seventh on
 *   rows        a row's bits depend on how many there are
 *   wrong       results are off */
#include <cublasLt.h>

#include <gqa/tensor.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))

struct layout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t stride;
};

struct description {
    bool transposed;
};

struct preference {
    uint64_t workspace_bytes;
    uint32_t reduction, alignments;
};

/* In an algorithm's words: which shape it is for. */
#define ALGORITHM 0x6c7461ull

static int handle;
static unsigned n_matmuls;

/* For tests: products since the last call. */
API unsigned emulated_cublaslt_matmuls()
{
    unsigned n = n_matmuls;
    n_matmuls = 0;
    return n;
}

static bool is_mood(const char *name)
{
    const char *mood = getenv("EMULATED_CUBLASLT");
    return mood != nullptr && strcmp(mood, name) == 0;
}

static void demand(bool is_right, const char *what)
{
    if (!is_right) {
        fprintf(stderr, "emulated cuBLASLt: %s\n", what);
        abort();
    }
}

API cublasStatus_t cublasLtCreate(cublasLtHandle_t *ret)
{
    *ret = (cublasLtHandle_t)&handle;
    return is_mood("create") ? CUBLAS_STATUS_NOT_INITIALIZED : CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtDestroy(cublasLtHandle_t h)
{
    demand(h == (cublasLtHandle_t)&handle, "a handle of somebody else");
    return CUBLAS_STATUS_SUCCESS;
}

API size_t cublasLtGetVersion(void)
{
    return CUBLAS_VERSION;
}

API const char *cublasLtGetStatusString(cublasStatus_t status)
{
    return status == CUBLAS_STATUS_NOT_SUPPORTED       ? "the requested functionality is not supported"
           : status == CUBLAS_STATUS_NOT_INITIALIZED   ? "the library was not initialized"
           : status == CUBLAS_STATUS_EXECUTION_FAILED  ? "the GPU program failed to execute"
                                                       : "success";
}

API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *ret, cublasComputeType_t compute,
                                            cudaDataType_t scale)
{
    demand(compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F, "sums that are not float32");
    *ret = (cublasLtMatmulDesc_t) new description{false};
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d)
{
    delete (description *)d;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                  cublasLtMatmulDescAttributes_t what,
                                                  const void *value, size_t bytes)
{
    int32_t operation;
    demand(what == CUBLASLT_MATMUL_DESC_TRANSA && bytes == sizeof(operation),
           "an attribute that is not known here");
    memcpy(&operation, value, sizeof(operation));
    ((description *)d)->transposed = operation == CUBLAS_OP_T;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *ret, cudaDataType type,
                                              uint64_t rows, uint64_t columns, int64_t stride)
{
    demand(rows > 0 && columns > 0 && stride >= (int64_t)rows, "a layout of nothing");
    *ret = (cublasLtMatrixLayout_t) new layout{type, rows, columns, stride};
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l)
{
    delete (layout *)l;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *ret)
{
    *ret = (cublasLtMatmulPreference_t) new preference{0, ~0u, 0};
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p)
{
    delete (preference *)p;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                        cublasLtMatmulPreferenceAttributes_t what,
                                                        const void *value, size_t bytes)
{
    preference *p = (preference *)pref;
    uint32_t word = 0;
    if (what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) {
        demand(bytes == sizeof(p->workspace_bytes), "a size of 64 bits");
        memcpy(&p->workspace_bytes, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    demand(bytes == sizeof(word), "an attribute of 32 bits");
    memcpy(&word, value, bytes);
    if (what == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) {
        p->reduction = word;
    } else {
        demand(what >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
                   what <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES && word == 16,
               "an attribute that is not known here");
        p->alignments++;
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* Weight (k, n), transposed, and rows (k, m) to results (n, m). */
static void check_layouts(const description *d, const layout *a, const layout *b, const layout *c,
                          const layout *result)
{
    demand(d->transposed && c == result, "a product of another form");
    demand(a->type == b->type && (a->type == CUDA_R_16F || a->type == CUDA_R_16BF) &&
               result->type == CUDA_R_32F, "other types");
    demand(a->rows == b->rows && a->columns == result->rows && b->columns == result->columns,
           "dimensions that do not meet");
    demand(a->stride * 2 % 16 == 0 && b->stride * 2 % 16 == 0 && result->stride * 4 % 16 == 0,
           "strides that are not aligned");
}

API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t result, cublasLtMatmulPreference_t pref,
    int n_wanted, cublasLtMatmulHeuristicResult_t *ret, int *ret_n)
{
    const layout *weight = (const layout *)a;
    const preference *p = (const preference *)pref;
    check_layouts((description *)d, weight, (layout *)b, (layout *)c, (layout *)result);
    demand(n_wanted == 1 && p->reduction == CUBLASLT_REDUCTION_SCHEME_NONE && p->alignments == 4 &&
               p->workspace_bytes >= 1 << 20,
           "preferences that let bits depend on anything");
    *ret = {};
    ret->algo.data[0] = ALGORITHM;
    ret->algo.data[1] = weight->rows;
    ret->algo.data[2] = weight->columns;
    ret->workspaceSize = 1 << 20;
    ret->state = CUBLAS_STATUS_SUCCESS;
    *ret_n = is_mood("heuristic") ? 0 : 1;
    return CUBLAS_STATUS_SUCCESS;
}

static double value_of(const uint16_t *at, cudaDataType type)
{
    return type == CUDA_R_16F ? gqa_f16_to_f32(*at) : gqa_bits_float((uint32_t)*at << 16);
}

static float dot(const uint16_t *a, const uint16_t *b, const layout *of, bool backwards)
{
    float sum = 0;
    for (uint64_t i = 0; i < of->rows; i++) {
        uint64_t k = backwards ? of->rows - 1 - i : i;
        sum += (float)(value_of(a + k, of->type) * value_of(b + k, of->type));
    }
    return sum;
}

API cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *alpha,
                                  const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                                  cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                                  cublasLtMatrixLayout_t c_layout, void *to,
                                  cublasLtMatrixLayout_t to_layout,
                                  const cublasLtMatmulAlgo_t *algo, void *workspace, size_t bytes,
                                  cudaStream_t stream)
{
    const layout *weight = (layout *)a_layout, *rows = (layout *)b_layout,
                 *result = (layout *)to_layout;
    check_layouts((description *)d, weight, rows, (layout *)c_layout, result);
    demand(h == (cublasLtHandle_t)&handle && stream != nullptr, "a handle or stream of nobody");
    demand(*(const float *)alpha == 1 && *(const float *)beta == 0 && c == to, "a sum with C");
    demand(algo->data[0] == ALGORITHM && algo->data[1] == weight->rows &&
               algo->data[2] == weight->columns, "an algorithm for another shape");
    demand(((uintptr_t)a | (uintptr_t)b | (uintptr_t)to) % 16 == 0, "pointers that are not aligned");
    demand(workspace != nullptr && (uintptr_t)workspace % 256 == 0 && bytes >= 1 << 20,
           "no workspace");
    if (is_mood("matmul") || (is_mood("later") && n_matmuls >= 6)) {
        return CUBLAS_STATUS_EXECUTION_FAILED;
    }
    n_matmuls++;
    for (uint64_t row = 0; row < rows->columns; row++) {
        const uint16_t *x = (const uint16_t *)b + row * rows->stride;
        float *y = (float *)to + row * result->stride;
        for (uint64_t out = 0; out < weight->columns; out++) {
            const uint16_t *w = (const uint16_t *)a + out * weight->stride;
            y[out] = dot(w, x, weight, is_mood("rows") && rows->columns % 2 == 0);
            y[out] = is_mood("wrong") ? 1.05f * y[out] : y[out];
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}
