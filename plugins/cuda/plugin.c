/* plugins/cuda/plugin.c - the cuda backend's entry: probe, open, and the tables of its interfaces.
 */
#include "plugins/common/entry.h"
#include "plugins/cuda/attention.h"
#include "plugins/cuda/context.h"
#include "plugins/cuda/cublaslt.h"
#include "plugins/cuda/program.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* Above the cpu's. */
#define CUDA_SCORE 200u

static int cuda_probe(struct gqa_probe *ret)
{
    struct cuda_driver driver;
    struct cuda_device device;

    ret->usable = 0;
    ret->n_devices = 0;
    int r = cuda_driver_load(&driver, ret->reason, sizeof(ret->reason));
    r = r < 0 ? r : cuda_device_find(&driver, 0, &device, ret->reason, sizeof(ret->reason));
    if (r < 0) {
        return 0;
    }
    int n_devices = 1;
    CUDA(&driver, cuDeviceGetCount)(&n_devices);
    ret->usable = 1;
    ret->score = CUDA_SCORE;
    ret->n_devices = (uint32_t)n_devices;
    ret->reason[0] = '\0';
    snprintf(ret->isa, sizeof(ret->isa), "sm_%d%d", device.major, device.minor);
    snprintf(ret->isas, sizeof(ret->isas), "%s", ret->isa);
    snprintf(ret->device, sizeof(ret->device), "%s", device.name);
    return 0;
}

static int cuda_open(const struct gqa_host *host, const char *options, void **ret_context,
                     struct gqa_reason *reason)
{
    struct cuda_context *c;

    int r = cuda_context_create(host, options, &c, reason);
    if (r == 0) {
        *ret_context = c;
    }
    return r;
}

static void cuda_close(void *context)
{
    cuda_context_destroy(context);
}

static int attention_supports(void *context, const struct gqa_attn_layer *layer,
                              struct gqa_reason *reason)
{
    return cuda_attention_supports(layer, reason);
}

static int attention_append(void *context, const struct gqa_attn_layer *layer,
                            const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    return cuda_attention_append(context, layer, batch, io);
}

static int attention_attend(void *context, const struct gqa_attn_layer *layer,
                            const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    return cuda_attention_attend(context, layer, batch, io);
}

static int attention_observe(void *context, const struct gqa_attn_layer *layer,
                             const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                             uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes)
{
    return cuda_attention_observe(context, layer, batch, io, seq, n_observed, n_votes, votes);
}

static const struct gqa_attention attention_table = {
    .struct_size = sizeof(struct gqa_attention),
    .caps = CUDA_ATTENTION_CAPS,
    .numerics = CUDA_ATTENTION_NUMERICS,
    .supports = attention_supports,
    .append = attention_append,
    .attend = attention_attend,
    .observe = attention_observe,
};

static uint64_t program_pack_bytes(void *context, const struct gqa_weight *weight)
{
    return cuda_weights_packed_bytes(weight);
}

static int program_pack(void *context, const struct gqa_weight *weight, uint64_t first_row,
                        uint64_t n_rows, void *dst)
{
    return cuda_weights_pack(weight, first_row, n_rows, dst);
}

static int program_prepare(void *context, const struct gqa_program_desc *desc, void **ret_program,
                           struct gqa_reason *reason)
{
    struct cuda_program *p;

    int r = cuda_program_prepare(context, desc, &p, reason);
    if (r == 0) {
        *ret_program = p;
    }
    return r;
}

static void program_release(void *context, void *program)
{
    cuda_program_release(program);
}

static int program_begin(void *context, void *program, const struct gqa_batch *batch)
{
    return cuda_program_begin(program, batch);
}

static int program_run(void *context, void *program, uint32_t first_op, uint32_t last_op)
{
    return cuda_program_run(program, first_op, last_op);
}

static int program_end(void *context, void *program)
{
    return cuda_program_end(program);
}

static float *program_data(void *context, void *program, uint32_t reg)
{
    return cuda_program_data(program, reg);
}

static uint32_t program_op_times(void *context, void *program, struct gqa_op_time *ret,
                                 uint32_t max)
{
    return cuda_times_read(program, ret, max);
}

static int program_observe(void *context, void *program, uint32_t op, uint32_t seq,
                           uint32_t n_observed, uint32_t n_votes, float *votes)
{
    return cuda_program_observe(program, op, seq, n_observed, n_votes, votes);
}

static const struct gqa_program program_table = {
    .struct_size = sizeof(struct gqa_program),
    .numerics = CUDA_PROGRAM_NUMERICS,
    .pack_id = CUDA_PACK_ID,
    .pack_bytes = program_pack_bytes,
    .pack_rows = CUDA_STRIP,
    .pack = program_pack,
    .prepare = program_prepare,
    .release = program_release,
    .begin = program_begin,
    .run = program_run,
    .end = program_end,
    .data = program_data,
    .op_times = program_op_times,
    .observe = program_observe,
};

/* Rows of prompts by cuBLASLt have other bits, and those of its version. */
static const void *cuda_get_interface(void *context, const char *name)
{
    struct cuda_context *c = context;

    if (c->lt == NULL) {
        return plugin_interface(name, &attention_table, &program_table);
    }
    c->lt_table = program_table;
    c->lt_table.numerics += CUDA_LT_NUMERICS * cuda_lt_version(c->lt);
    return plugin_interface(name, &attention_table, &c->lt_table);
}

GQA_PLUGIN_NOTE;

extern const struct gqa_plugin gqa_plugin;

GQA_PLUGIN_EXPORT const struct gqa_plugin gqa_plugin = {
    GQA_PLUGIN_HEADER,
    .name = "cuda",
    .version = "0.1.0",
    .build = PLUGIN_COMPILER ", nvcc",
    .probe = cuda_probe,
    .open = cuda_open,
    .get_interface = cuda_get_interface,
    .close = cuda_close,
};
