#include "plugins/cuda/context.h"

#include "plugins/common/options.h"
#include "plugins/cuda/attention.h"
#include "plugins/cuda/cublaslt.h"
#include "plugins/cuda/pages.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int cuda_check(struct cuda_context *c, CUresult result, const char *what)
{
    char line[256];

    if (result == CUDA_SUCCESS) {
        return 0;
    }
    c->last = result;
    snprintf(line, sizeof(line), "cuda: %s: %s", what, cuda_error_text(&c->driver, result));
    c->host->log(c->host->data, GQA_LOG_ERROR, line);
    return cuda_errno(result);
}

int cuda_enter(struct cuda_context *c)
{
    return cuda_check(c, CUDA(&c->driver, cuCtxPushCurrent)(c->primary), "making it current");
}

void cuda_leave(struct cuda_context *c)
{
    CUcontext was;

    CUDA(&c->driver, cuCtxPopCurrent)(&was);
}

/* ---- memory ------------------------------------------------------------------------------ */

int cuda_buffer_reserve(struct cuda_context *c, struct cuda_buffer *b, uint64_t bytes)
{
    const struct cuda_driver *d = &c->driver;
    CUdeviceptr at = 0;

    if (bytes <= b->bytes) {
        return 0;
    }
    bytes = (bytes + 255) & ~(uint64_t)255;
    /* What runs on the stream may still read the old one: cuMemFree waits for it. */
    cuda_buffer_finish(c, b);
    int r = cuda_check(c, CUDA(d, cuMemAlloc)(&at, bytes), "device memory");
    if (r < 0) {
        return r;
    }
    b->at = at;
    b->bytes = bytes;
    return cuda_check(c, CUDA(d, cuMemsetD8Async)(at, 0, bytes, c->stream), "clearing memory");
}

void cuda_buffer_finish(struct cuda_context *c, struct cuda_buffer *b)
{
    if (b->at != 0) {
        CUDA(&c->driver, cuMemFree)(b->at);
    }
    *b = (struct cuda_buffer){0};
}

int cuda_upload(struct cuda_context *c, CUdeviceptr to, const void *from, uint64_t bytes)
{
    if (bytes == 0) {
        return 0;
    }
    return cuda_check(c, CUDA(&c->driver, cuMemcpyHtoDAsync)(to, from, bytes, c->stream),
                      "copying to the device");
}

int cuda_download(struct cuda_context *c, void *to, CUdeviceptr from, uint64_t bytes)
{
    if (bytes == 0) {
        return 0;
    }
    return cuda_check(c, CUDA(&c->driver, cuMemcpyDtoHAsync)(to, from, bytes, c->stream),
                      "copying from the device");
}

int cuda_synchronise(struct cuda_context *c)
{
    return cuda_check(c, CUDA(&c->driver, cuStreamSynchronize)(c->stream), "waiting for a step");
}

int cuda_launch(struct cuda_context *c, CUfunction f, struct cuda_grid grid, void *args)
{
    void *params[] = {args};

    if (grid.x == 0 || grid.y == 0) {
        return 0;
    }
    return cuda_check(c,
                      CUDA(&c->driver, cuLaunchKernel)(f, grid.x, grid.y, 1, grid.threads, 1, 1,
                                                       grid.shared_bytes, c->stream, params, NULL),
                      "starting a kernel");
}

uint32_t cuda_product_split(const struct cuda_context *c, uint32_t n_strips, uint32_t n_segments,
                            uint32_t log_tiles, uint32_t columns)
{
    uint32_t wanted = (uint32_t)c->device.n_multiprocessors, split = 1;

    while (log_tiles < 3 && split < CUDA_WARPS && 2 * split <= n_segments &&
           (n_strips + CUDA_WARPS / split - 1) / (CUDA_WARPS / split) * columns < 2 * wanted) {
        split *= 2;
    }
    return split;
}

void cuda_product_shape(const struct cuda_context *c, uint32_t n_strips, uint32_t n_segments,
                        uint32_t n_tiles, uint32_t *ret_log_tiles, uint32_t *ret_split)
{
    uint32_t wanted = (uint32_t)c->device.n_multiprocessors, log_tiles = 0;

    while (log_tiles < 3 && 1u << log_tiles < n_tiles) {
        log_tiles++;
    }
    if (log_tiles == 3 && n_strips / CUDA_WARPS * ((n_tiles + 7) / 8) < wanted) {
        log_tiles = 2; /* 8 tiles have no room to split */
    }
    *ret_log_tiles = log_tiles;
    *ret_split = cuda_product_split(c, n_strips, n_segments, log_tiles,
                                    (n_tiles + (1u << log_tiles) - 1) >> log_tiles);
}

/* ---- opening ----------------------------------------------------------------------------- */

struct wanted {
    uint32_t device;
    enum cuda_lt_wish lt;
};

static int option_device(void *arg, const char *value, struct gqa_reason *reason)
{
    struct wanted *ret = arg;
    char *end;

    errno = 0;
    unsigned long n = strtoul(value, &end, 10);
    if (value[0] < '0' || value[0] > '9' || *end != '\0' || errno != 0 || n > UINT32_MAX) {
        snprintf(reason->text, sizeof(reason->text), "device=%s: no number of a device", value);
        return -EINVAL;
    }
    ret->device = (uint32_t)n;
    return 0;
}

static int option_cublaslt(void *arg, const char *value, struct gqa_reason *reason)
{
    static const char *const words[] = {
        [CUDA_LT_AUTO] = "auto", [CUDA_LT_OFF] = "off", [CUDA_LT_ON] = "on"};
    struct wanted *ret = arg;

    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        if (strcmp(value, words[i]) == 0) {
            ret->lt = (enum cuda_lt_wish)i;
            return 0;
        }
    }
    snprintf(reason->text, sizeof(reason->text), "cublaslt=%s: not on, off or auto", value);
    return -EINVAL;
}

static CUresult find_kernels(struct cuda_context *c)
{
    static const char *const names[] = {
#define CUDA_NAME(name) "gqa_" #name,
        CUDA_KERNELS(CUDA_NAME)
#undef CUDA_NAME
    };
    static const char *const types[CUDA_W_COUNT] = {
        [CUDA_W_Q4_0] = "q4_0", [CUDA_W_Q8_0] = "q8_0",   [CUDA_W_Q4_K] = "q4_k",
        [CUDA_W_Q6_K] = "q6_k", [CUDA_W_MXFP4] = "mxfp4", [CUDA_W_F16] = "f16",
        [CUDA_W_BF16] = "bf16",
    };
    const struct cuda_driver *d = &c->driver;
    CUresult result = CUDA_SUCCESS;

    for (uint32_t i = 0; result == CUDA_SUCCESS && i < CUDA_KERNEL_COUNT; i++) {
        result = CUDA(d, cuModuleGetFunction)(&c->kernels[i], c->module, names[i]);
    }
    for (uint32_t i = 0; result == CUDA_SUCCESS && i < CUDA_W_COUNT * CUDA_PRODUCT_TILES; i++) {
        char name[64];
        uint32_t type = i / CUDA_PRODUCT_TILES, tiles = i % CUDA_PRODUCT_TILES;
        snprintf(name, sizeof(name), "gqa_product_%s_%u", types[type], 1u << tiles);
        result = CUDA(d, cuModuleGetFunction)(&c->products[type][tiles], c->module, name);
    }
    if (result == CUDA_SUCCESS) {
        result = CUDA(d, cuFuncSetAttribute)(c->kernels[CUDA_KERNEL_attend],
                                             CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                             CUDA_ATTEND_SHARED_BYTES);
    }
    return result;
}

static int start_device(struct cuda_context *c, struct gqa_reason *reason)
{
    const struct cuda_driver *d = &c->driver;
    const char *what = "the device's context";
    CUresult result = CUDA(d, cuDevicePrimaryCtxRetain)(&c->primary, c->device.device);

    if (result == CUDA_SUCCESS) {
        what = "making it current";
        result = CUDA(d, cuCtxPushCurrent)(c->primary);
    }
    if (result != CUDA_SUCCESS) {
        snprintf(reason->text, sizeof(reason->text), "%s: %s", what, cuda_error_text(d, result));
        return cuda_errno(result);
    }
    what = "the kernels";
    result = CUDA(d, cuModuleLoadData)(&c->module, cuda_fatbin);
    if (result == CUDA_SUCCESS) {
        result = find_kernels(c);
    }
    if (result == CUDA_SUCCESS) {
        what = "a stream";
        result = CUDA(d, cuStreamCreate)(&c->stream, CU_STREAM_NON_BLOCKING);
    }
    cuda_leave(c);
    if (result != CUDA_SUCCESS) {
        snprintf(reason->text, sizeof(reason->text), "%s: %s", what, cuda_error_text(d, result));
    }
    return cuda_errno(result);
}

static int start_library(struct cuda_context *c, struct gqa_reason *reason)
{
    char line[96];

    int r = cuda_enter(c);
    if (r < 0) {
        snprintf(reason->text, sizeof(reason->text), "cublaslt=on: %s", strerror(-r));
        return r;
    }
    r = cuda_lt_create(c, &c->lt, reason);
    cuda_leave(c);
    if (r == 0) {
        uint32_t v = cuda_lt_version(c->lt);
        snprintf(line, sizeof(line), "cuda: rows of prompts are multiplied by cuBLASLt %u.%u.%u",
                 v / 10000, v / 100 % 100, v % 100);
        c->host->log(c->host->data, GQA_LOG_INFO, line);
    }
    return r;
}

int cuda_context_create(const struct gqa_host *host, const char *options, struct cuda_context **ret,
                        struct gqa_reason *reason)
{
    static const struct plugin_option known[] = {{"device", "NUMBER", option_device},
                                                 {"cublaslt", "on|off|auto", option_cublaslt}};
    struct wanted wanted = {0, CUDA_LT_AUTO};

    int r = plugin_options_parse(options, known, sizeof(known) / sizeof(known[0]), &wanted, reason);
    if (r < 0) {
        return r;
    }
    struct cuda_context *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        snprintf(reason->text, sizeof(reason->text), "no memory");
        return -ENOMEM;
    }
    c->host = host;
    r = cuda_driver_load(&c->driver, reason->text, sizeof(reason->text));
    if (r < 0) {
        free(c);
        return r;
    }
    r = cuda_device_find(&c->driver, wanted.device, &c->device, reason->text, sizeof(reason->text));
    r = r < 0 ? r : start_device(c, reason);
    if (r == 0) {
        r = cuda_pages_create(c, &c->pages);
        r = r < 0 ? r : cuda_attention_create(c, &c->attention);
        if (r < 0) {
            snprintf(reason->text, sizeof(reason->text), "%s", strerror(-r));
        }
    }
    if (r == 0 && wanted.lt == CUDA_LT_ON) {
        r = start_library(c, reason);
    }
    if (r < 0) {
        cuda_context_destroy(c);
        return r;
    }
    *ret = c;
    return 0;
}

void cuda_context_destroy(struct cuda_context *c)
{
    if (c == NULL) {
        return;
    }
    const struct cuda_driver *d = &c->driver;
    if (c->primary != NULL && cuda_enter(c) == 0) {
        cuda_attention_destroy(c->attention);
        cuda_pages_destroy(c->pages);
        if (c->stream != NULL) {
            CUDA(d, cuStreamSynchronize)(c->stream);
            cuda_lt_destroy(c->lt);
            CUDA(d, cuStreamDestroy)(c->stream);
        }
        if (c->module != NULL) {
            CUDA(d, cuModuleUnload)(c->module);
        }
        cuda_leave(c);
    }
    if (c->primary != NULL) {
        CUDA(d, cuDevicePrimaryCtxRelease)(c->device.device);
    }
    free(c);
}
