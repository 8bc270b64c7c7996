/* plugins/cpu/plugin.c - the cpu backend's entry: probe, open, and the tables of its interfaces.
 *
 * It needs nothing but a processor, so probe always says usable; levels differ in speed only. */
#include "plugins/common/entry.h"
#include "plugins/common/options.h"
#include "plugins/cpu/attention.h"
#include "plugins/cpu/context.h"
#include "plugins/cpu/isa.h"
#include "plugins/cpu/program.h"
#include "plugins/cpu/weights.h"

#include <gqa/plugin.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Any accelerator scores higher. */
#define CPU_SCORE 100u

/* The processor's own name, where it tells one. */
static void processor_name(char *ret, size_t bytes)
{
#if defined(__x86_64__)
    uint32_t words[12 + 1] = {0};
    int found = 1;

    for (uint32_t i = 0; i < 3 && found; i++) {
        uint32_t *w = words + 4 * i;
        found = __get_cpuid(0x80000002 + i, &w[0], &w[1], &w[2], &w[3]);
    }
    const char *name = (const char *)words;
    while (found && *name == ' ') {
        name++;
    }
    snprintf(ret, bytes, "%s", found && *name != '\0' ? name : "x86-64 processor");
#else
    snprintf(ret, bytes, "processor");
#endif
}

static int cpu_probe(struct gqa_probe *ret)
{
    size_t used = 0;

    ret->usable = 1;
    ret->score = CPU_SCORE;
    ret->n_devices = 0;
    ret->reason[0] = '\0';
    ret->isas[0] = '\0';
    snprintf(ret->isa, sizeof(ret->isa), "%s", cpu_isa_name(cpu_isa_best()));
    for (int i = CPU_ISA_COUNT - 1; i >= 0; i--) {
        if (cpu_isa_usable((enum cpu_isa)i)) {
            used += (size_t)snprintf(ret->isas + used, sizeof(ret->isas) - used, "%s%s",
                                     used > 0 ? "," : "", cpu_isa_name((enum cpu_isa)i));
        }
    }
    processor_name(ret->device, sizeof(ret->device));
    return 0;
}

static int option_isa(void *arg, const char *value, struct gqa_reason *reason)
{
    enum cpu_isa *ret = arg, isa;

    if (cpu_isa_by_name(value, &isa) < 0) {
        snprintf(reason->text, sizeof(reason->text), "isa=%s: unknown level", value);
        return -EINVAL;
    }
    if (!cpu_isa_usable(isa)) {
        snprintf(reason->text, sizeof(reason->text), "isa=%s: this machine cannot run it", value);
        return -ENOTSUP;
    }
    *ret = isa;
    return 0;
}

static int cpu_open(const struct gqa_host *host, const char *options, void **ret_context,
                    struct gqa_reason *reason)
{
    static const struct plugin_option known[] = {{"isa", "LEVEL", option_isa}};
    enum cpu_isa isa = cpu_isa_best();

    int r = plugin_options_parse(options, known, sizeof(known) / sizeof(known[0]), &isa, reason);
    if (r < 0) {
        return r;
    }
    struct cpu_context *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        r = -ENOMEM;
        goto err_reason;
    }
    c->host = host;
    c->isa = isa;
    r = cpu_attention_create(host, isa, &c->attention);
    if (r < 0) {
        goto err_free;
    }
    *ret_context = c;
    return 0;

err_free:
    free(c);
err_reason:
    snprintf(reason->text, sizeof(reason->text), "%s", strerror(-r));
    return r;
}

static void cpu_close(void *context)
{
    struct cpu_context *c = context;

    if (c != NULL) {
        cpu_attention_destroy(c->attention);
        free(c);
    }
}

static int attention_supports(void *context, const struct gqa_attn_layer *layer,
                              struct gqa_reason *reason)
{
    return cpu_attention_supports(layer, reason);
}

static int attention_append(void *context, const struct gqa_attn_layer *layer,
                            const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    struct cpu_context *c = context;
    return cpu_attention_append(c->attention, layer, batch, io);
}

static int attention_attend(void *context, const struct gqa_attn_layer *layer,
                            const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    struct cpu_context *c = context;
    return cpu_attention_attend(c->attention, layer, batch, io);
}

static int attention_observe(void *context, const struct gqa_attn_layer *layer,
                             const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                             uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes)
{
    struct cpu_context *c = context;
    return cpu_attention_observe(c->attention, layer, batch, io, seq, n_observed, n_votes, votes);
}

static uint64_t program_pack_bytes(void *context, const struct gqa_weight *weight)
{
    return cpu_weights_packed_bytes(weight);
}

static int program_pack(void *context, const struct gqa_weight *weight, uint64_t first_row,
                        uint64_t n_rows, void *dst)
{
    return cpu_weights_pack(weight, first_row, n_rows, dst);
}

static const struct gqa_attention attention_table = {
    .struct_size = sizeof(struct gqa_attention),
    .caps = CPU_ATTENTION_CAPS,
    .numerics = CPU_ATTENTION_NUMERICS,
    .supports = attention_supports,
    .append = attention_append,
    .attend = attention_attend,
    .observe = attention_observe,
};

static const struct gqa_program program_table = {
    .struct_size = sizeof(struct gqa_program),
    .numerics = CPU_PROGRAM_NUMERICS,
    .pack_id = CPU_PACK_ID,
    .pack_bytes = program_pack_bytes,
    .pack_rows = CPU_STRIP_ROWS,
    .pack = program_pack,
    .prepare = cpu_program_prepare,
    .release = cpu_program_release,
    .begin = cpu_program_begin,
    .run = cpu_program_run,
    .end = cpu_program_end,
    .data = cpu_program_data,
    .op_times = cpu_program_op_times,
};

static const void *cpu_get_interface(void *context, const char *name)
{
    return plugin_interface(name, &attention_table, &program_table);
}

GQA_PLUGIN_NOTE;

extern const struct gqa_plugin gqa_plugin;

GQA_PLUGIN_EXPORT const struct gqa_plugin gqa_plugin = {
    GQA_PLUGIN_HEADER,
    .name = "cpu",
    .version = "0.1.0",
    .build = PLUGIN_COMPILER,
    .probe = cpu_probe,
    .open = cpu_open,
    .get_interface = cpu_get_interface,
    .close = cpu_close,
};
