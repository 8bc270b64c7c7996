#include "plugins/cuda/cublaslt.h"

#include "plugins/cuda/cublaslt_proof.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if __has_include(<cublasLt.h>)
#define HAVE_CUBLASLT
#include <cublasLt.h>
#endif

#ifdef HAVE_CUBLASLT

#define LT_FUNCTIONS(X)                \
    X(cublasLtCreate)                  \
    X(cublasLtDestroy)                 \
    X(cublasLtGetVersion)              \
    X(cublasLtGetStatusString)         \
    X(cublasLtMatmul)                  \
    X(cublasLtMatmulAlgoGetHeuristic)  \
    X(cublasLtMatmulDescCreate)        \
    X(cublasLtMatmulDescDestroy)       \
    X(cublasLtMatmulDescSetAttribute)  \
    X(cublasLtMatrixLayoutCreate)      \
    X(cublasLtMatrixLayoutDestroy)     \
    X(cublasLtMatmulPreferenceCreate)  \
    X(cublasLtMatmulPreferenceDestroy) \
    X(cublasLtMatmulPreferenceSetAttribute)

#define SHAPES_MAX 64u
/* What pointers and strides are multiples of. */
#define ALIGN_BYTES 16u

struct cuda_lt_shape {
    enum cuda_weight_type type;
    uint32_t n_inputs, n_outputs;
    bool works;
    cublasLtMatmulAlgo_t algo;
};

struct cuda_lt {
#define LT_MEMBER(name) __typeof__(name) *name##_;
    LT_FUNCTIONS(LT_MEMBER)
#undef LT_MEMBER
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    uint32_t n_shapes;
    struct cuda_lt_shape shapes[SHAPES_MAX];
};

#define LT(lt, name) ((lt)->name##_)

/* ---- the library ------------------------------------------------------------------------- */

static int find_symbols(struct cuda_lt *lt, void *library, const char *file,
                        struct gqa_reason *reason)
{
#define LT_FIND(name)                                                                  \
    {                                                                                  \
        void *symbol = dlsym(library, #name);                                          \
        if (symbol == NULL) {                                                          \
            snprintf(reason->text, sizeof(reason->text), "%s has no %s", file, #name); \
            return -ENODEV;                                                            \
        }                                                                              \
        memcpy(&lt->name##_, &symbol, sizeof(symbol));                                 \
    }
    LT_FUNCTIONS(LT_FIND)
#undef LT_FIND
    return 0;
}

/* It keeps threads and handlers of its own, as the driver does: it stays. */
static int load(struct cuda_lt *lt, struct gqa_reason *reason)
{
    static const char *const files[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        void *library = dlopen(files[i], RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
        if (library != NULL) {
            return find_symbols(lt, library, files[i], reason);
        }
    }
    snprintf(reason->text, sizeof(reason->text), "cublaslt=on: %s", dlerror());
    return -ENODEV;
}

static const char *status_text(const struct cuda_lt *lt, cublasStatus_t status)
{
    const char *text = LT(lt, cublasLtGetStatusString)(status);
    return text != NULL ? text : "an error that it has no words for";
}

int cuda_lt_create(struct cuda_context *c, struct cuda_lt **ret, struct gqa_reason *reason)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    struct cuda_lt *lt = calloc(1, sizeof(*lt));

    if (lt == NULL) {
        snprintf(reason->text, sizeof(reason->text), "no memory");
        return -ENOMEM;
    }
    int r = load(lt, reason);
    if (r < 0) {
        free(lt);
        return r;
    }
    cublasStatus_t status = LT(lt, cublasLtCreate)(&lt->handle);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = LT(lt, cublasLtMatmulDescCreate)(&lt->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = LT(lt, cublasLtMatmulDescSetAttribute)(lt->desc, CUBLASLT_MATMUL_DESC_TRANSA,
                                                        &transposed, sizeof(transposed));
    }
    if (status != CUBLAS_STATUS_SUCCESS) {
        snprintf(reason->text, sizeof(reason->text), "cublaslt=on: the library says: %s",
                 status_text(lt, status));
        cuda_lt_destroy(lt);
        return -ENODEV;
    }
    *ret = lt;
    return 0;
}

void cuda_lt_destroy(struct cuda_lt *lt)
{
    if (lt == NULL) {
        return;
    }
    if (lt->desc != NULL) {
        LT(lt, cublasLtMatmulDescDestroy)(lt->desc);
    }
    if (lt->handle != NULL) {
        LT(lt, cublasLtDestroy)(lt->handle);
    }
    free(lt);
}

uint32_t cuda_lt_version(const struct cuda_lt *lt)
{
    return (uint32_t)LT(lt, cublasLtGetVersion)();
}

/* Once for a shape, which goes another way from now on. */
static void refuse(struct cuda_context *c, struct cuda_lt_shape *s, const char *why)
{
    char line[256];

    s->works = false;
    snprintf(line, sizeof(line), "cuda: %u x %u of %s are not multiplied by cuBLASLt: %.120s",
             s->n_outputs, s->n_inputs, s->type == CUDA_W_BF16 ? "BF16" : "F16", why);
    c->host->log(c->host->data, GQA_LOG_WARNING, line);
}

/* ---- one product ------------------------------------------------------------------------- */

/* The three matrices as the library counts, by columns: weight (n_inputs, n_outputs), transposed;
 * rows (n_inputs, n_rows); results (n_outputs, n_rows). */
struct layouts {
    cublasLtMatrixLayout_t weight, rows, results;
};

static void layouts_finish(const struct cuda_lt *lt, struct layouts *l)
{
    const cublasLtMatrixLayout_t all[] = {l->weight, l->rows, l->results};

    for (size_t i = 0; i < 3; i++) {
        if (all[i] != NULL) {
            LT(lt, cublasLtMatrixLayoutDestroy)(all[i]);
        }
    }
}

/* To be finished in both cases. */
static cublasStatus_t layouts_init(const struct cuda_lt *lt, const struct cuda_lt_shape *s,
                                   uint32_t n_rows, uint64_t dst_stride, struct layouts *ret)
{
    cudaDataType_t half = s->type == CUDA_W_BF16 ? CUDA_R_16BF : CUDA_R_16F;

    *ret = (struct layouts){0};
    cublasStatus_t status = LT(lt, cublasLtMatrixLayoutCreate)(&ret->weight, half, s->n_inputs,
                                                               s->n_outputs, s->n_inputs);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status =
            LT(lt, cublasLtMatrixLayoutCreate)(&ret->rows, half, s->n_inputs, n_rows, s->n_inputs);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = LT(lt, cublasLtMatrixLayoutCreate)(&ret->results, CUDA_R_32F, s->n_outputs, n_rows,
                                                    (int64_t)dst_stride);
    }
    return status;
}

/* dst = the rounded rows x the unpacked weight, by the shape's algorithm. */
static cublasStatus_t matmul(struct cuda_context *c, const struct cuda_lt_room *room,
                             const struct cuda_lt_shape *s, uint32_t n_rows, float *dst,
                             uint64_t dst_stride)
{
    const struct cuda_lt *lt = c->lt;
    const float one = 1.0f, zero = 0.0f;
    struct layouts l;

    cublasStatus_t status = layouts_init(lt, s, n_rows, dst_stride, &l);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = LT(lt, cublasLtMatmul)(
            lt->handle, lt->desc, &one, cuda_pointer(room->weight.at), l.weight,
            cuda_pointer(room->rows.at), l.rows, &zero, dst, l.results, dst, l.results, &s->algo,
            cuda_pointer(room->workspace.at), CUDA_LT_WORKSPACE_BYTES, (cudaStream_t)c->stream);
    }
    layouts_finish(lt, &l);
    return status;
}

static int unpack(struct cuda_context *c, const struct cuda_lt_room *room,
                  const struct cuda_matrix *m)
{
    struct cuda_unpack_args args = {
        .weight = cuda_pointer(m->weight),
        .dst = cuda_pointer(room->weight.at),
        .n_outs = m->n_outputs,
        .k = m->n_inputs,
        .n_blocks = (m->n_inputs + CUDA_BLOCK - 1) / CUDA_BLOCK,
    };
    uint32_t n_strips = (m->n_outputs + CUDA_STRIP - 1) / CUDA_STRIP;

    return cuda_launch(c, c->kernels[CUDA_KERNEL_unpack],
                       (struct cuda_grid){(args.n_blocks + 7) / 8, n_strips, 256, 0}, &args);
}

/* ---- choosing an algorithm --------------------------------------------------------------- */

static cublasStatus_t set_preferences(const struct cuda_lt *lt, cublasLtMatmulPreference_t pref)
{
    const uint64_t workspace = CUDA_LT_WORKSPACE_BYTES;
    const uint32_t whole_sums = CUBLASLT_REDUCTION_SCHEME_NONE, align = ALIGN_BYTES;
    const struct {
        cublasLtMatmulPreferenceAttributes_t what;
        const void *value;
        size_t bytes;
    } all[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace)},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &whole_sums, sizeof(whole_sums)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align, sizeof(align)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align, sizeof(align)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align, sizeof(align)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align, sizeof(align)},
    };
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;

    for (size_t i = 0; status == CUBLAS_STATUS_SUCCESS && i < sizeof(all) / sizeof(all[0]); i++) {
        status = LT(lt, cublasLtMatmulPreferenceSetAttribute)(pref, all[i].what, all[i].value,
                                                              all[i].bytes);
    }
    return status;
}

static cublasStatus_t choose(const struct cuda_lt *lt, struct cuda_lt_shape *s, uint64_t dst_stride)
{
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t best = {0};
    struct layouts l;
    int n = 0;

    cublasStatus_t status = layouts_init(lt, s, CUDA_LT_ROWS_TYPICAL, dst_stride, &l);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = LT(lt, cublasLtMatmulPreferenceCreate)(&pref);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = set_preferences(lt, pref);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = LT(lt, cublasLtMatmulAlgoGetHeuristic)(lt->handle, lt->desc, l.weight, l.rows,
                                                        l.results, l.results, pref, 1, &best, &n);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = n > 0 ? best.state : CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (pref != NULL) {
        LT(lt, cublasLtMatmulPreferenceDestroy)(pref);
    }
    layouts_finish(lt, &l);
    s->algo = best.algo;
    return status;
}

/* ---- shapes ------------------------------------------------------------------------------ */

static bool is_for_library(const struct cuda_matrix *m, uint64_t dst_stride)
{
    return (m->type == CUDA_W_F16 || m->type == CUDA_W_BF16) && m->n_inputs % 8 == 0 &&
           m->n_outputs % 4 == 0 && dst_stride % 4 == 0;
}

int cuda_lt_reserve(struct cuda_context *c, struct cuda_lt_room *room, const struct cuda_matrix *m,
                    uint32_t max_rows)
{
    if (!is_for_library(m, 4)) {
        return 0;
    }
    uint32_t rows = max_rows > CUDA_LT_PROOF_ROWS ? max_rows : CUDA_LT_PROOF_ROWS;
    int r = cuda_buffer_reserve(c, &room->weight, 2ull * m->n_outputs * m->n_inputs);
    r = r < 0 ? r : cuda_buffer_reserve(c, &room->rows, 2ull * rows * m->n_inputs);
    r = r < 0 ? r : cuda_buffer_reserve(c, &room->scales, rows * sizeof(float));
    return r < 0 ? r : cuda_buffer_reserve(c, &room->workspace, CUDA_LT_WORKSPACE_BYTES);
}

void cuda_lt_room_finish(struct cuda_context *c, struct cuda_lt_room *room)
{
    cuda_buffer_finish(c, &room->weight);
    cuda_buffer_finish(c, &room->rows);
    cuda_buffer_finish(c, &room->scales);
    cuda_buffer_finish(c, &room->workspace);
}

static struct cuda_lt_shape *known(struct cuda_lt *lt, const struct cuda_matrix *m)
{
    for (uint32_t i = 0; i < lt->n_shapes; i++) {
        struct cuda_lt_shape *s = &lt->shapes[i];
        if (s->type == m->type && s->n_inputs == m->n_inputs && s->n_outputs == m->n_outputs) {
            return s;
        }
    }
    return NULL;
}

/* A shape that is new. */
static int add(struct cuda_context *c, const struct cuda_lt_room *room,
               const struct cuda_inputs *inputs, const struct cuda_matrix *m,
               struct cuda_lt_shape **ret)
{
    struct cuda_lt_shape *s = &c->lt->shapes[c->lt->n_shapes++];
    struct gqa_reason why = {""};
    int r = 0;

    *s = (struct cuda_lt_shape){
        .type = m->type, .n_inputs = m->n_inputs, .n_outputs = m->n_outputs, .works = true};
    cublasStatus_t status = choose(c->lt, s, m->n_outputs);
    if (status != CUBLAS_STATUS_SUCCESS) {
        refuse(c, s, status_text(c->lt, status));
    } else {
        r = cuda_lt_prove(c, room, inputs, s, m, &why);
    }
    if (r == 1 && s->works) {
        refuse(c, s, why.text);
    }
    if (r < 0) {
        c->lt->n_shapes--;
        return r;
    }
    *ret = s;
    return 0;
}

int cuda_lt_find(struct cuda_context *c, const struct cuda_lt_room *room,
                 const struct cuda_inputs *inputs, const struct cuda_matrix *m, uint64_t dst_stride,
                 struct cuda_lt_shape **ret)
{
    struct cuda_lt *lt = c->lt;

    if (lt == NULL || !is_for_library(m, dst_stride)) {
        *ret = NULL;
        return 0;
    }
    struct cuda_lt_shape *s = known(lt, m);
    if (s == NULL && lt->n_shapes < SHAPES_MAX) {
        int r = add(c, room, inputs, m, &s);
        if (r < 0) {
            return r;
        }
    }
    *ret = s != NULL && s->works ? s : NULL;
    return 0;
}

bool cuda_lt_works(const struct cuda_lt_shape *shape)
{
    return shape->works;
}

/* ---- running ----------------------------------------------------------------------------- */

int cuda_lt_round(struct cuda_context *c, const struct cuda_lt_room *room,
                  enum cuda_input_kind kind, uint32_t n_inputs, const struct cuda_lt_rows *rows)
{
    struct cuda_round_args args = {
        .src = rows->src,
        .stride = rows->src_stride,
        .k = n_inputs,
        .bf16 = kind == CUDA_INPUT_BF16,
        .dst = cuda_pointer(room->rows.at),
        .scales = cuda_pointer(room->scales.at),
    };

    return cuda_launch(c, c->kernels[CUDA_KERNEL_round_rows],
                       (struct cuda_grid){rows->n_rows, 1, 256, 0}, &args);
}

/* Rows that were divided to fit into F16 are multiplied again; biases. */
static int end(struct cuda_context *c, const struct cuda_lt_room *room, const struct cuda_matrix *m,
               uint32_t n_rows, float *dst, uint64_t dst_stride)
{
    struct cuda_scale_rows_args args = {
        .dst = dst,
        .stride = dst_stride,
        .width = m->n_outputs,
        .scales = cuda_pointer(room->scales.at),
        .bias = cuda_pointer(m->bias),
    };

    if (m->type == CUDA_W_BF16 && m->bias == 0) {
        return 0;
    }
    return cuda_launch(c, c->kernels[CUDA_KERNEL_scale_rows],
                       (struct cuda_grid){(m->n_outputs + 255) / 256, n_rows, 256, 0}, &args);
}

int cuda_lt_multiply(struct cuda_context *c, const struct cuda_lt_room *room,
                     struct cuda_lt_shape *shape, const struct cuda_matrix *m, uint32_t n_rows,
                     float *dst, uint64_t dst_stride)
{
    int r = unpack(c, room, m);

    if (r < 0) {
        return r;
    }
    cublasStatus_t status = matmul(c, room, shape, n_rows, dst, dst_stride);
    if (status != CUBLAS_STATUS_SUCCESS) {
        refuse(c, shape, status_text(c->lt, status));
        return 1;
    }
    return end(c, room, m, n_rows, dst, dst_stride);
}

#else /* without the library's header */

int cuda_lt_create(struct cuda_context *c, struct cuda_lt **ret, struct gqa_reason *reason)
{
    snprintf(reason->text, sizeof(reason->text), "cublaslt=on: built without cublasLt.h");
    return -ENOTSUP;
}

void cuda_lt_destroy(struct cuda_lt *lt)
{
}

uint32_t cuda_lt_version(const struct cuda_lt *lt)
{
    return 0;
}

int cuda_lt_reserve(struct cuda_context *c, struct cuda_lt_room *room, const struct cuda_matrix *m,
                    uint32_t max_rows)
{
    return 0;
}

void cuda_lt_room_finish(struct cuda_context *c, struct cuda_lt_room *room)
{
}

int cuda_lt_find(struct cuda_context *c, const struct cuda_lt_room *room,
                 const struct cuda_inputs *inputs, const struct cuda_matrix *m, uint64_t dst_stride,
                 struct cuda_lt_shape **ret)
{
    *ret = NULL;
    return 0;
}

int cuda_lt_round(struct cuda_context *c, const struct cuda_lt_room *room,
                  enum cuda_input_kind kind, uint32_t n_inputs, const struct cuda_lt_rows *rows)
{
    return -ENOTSUP;
}

int cuda_lt_multiply(struct cuda_context *c, const struct cuda_lt_room *room,
                     struct cuda_lt_shape *shape, const struct cuda_matrix *m, uint32_t n_rows,
                     float *dst, uint64_t dst_stride)
{
    return -ENOTSUP;
}

bool cuda_lt_works(const struct cuda_lt_shape *shape)
{
    return false;
}

#endif
