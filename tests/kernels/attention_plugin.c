/* tests/kernels/attention_plugin.c - examples/minimal_plugin.c as a host loads it: its symbol, its
 * interface, and its results against float64. */
#include "tests/kernels/attention_problem.h"

#include <criterion/criterion.h>
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct gqa_plugin *load(void **ret_library)
{
    const char *path = getenv("GQAD_TEST_MINIMAL_PLUGIN");

    cr_assert(path != NULL, "GQAD_TEST_MINIMAL_PLUGIN names no file");
    *ret_library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    cr_assert(*ret_library != NULL, "%s", dlerror());
    const struct gqa_plugin *plugin = dlsym(*ret_library, GQA_PLUGIN_SYMBOL);
    cr_assert(plugin != NULL, "%s", dlerror());
    return plugin;
}

static void check_spec(const struct gqa_attention *attention, void *context,
                       const struct attn_spec *spec)
{
    struct attn_problem p;
    struct gqa_reason reason = {""};

    attn_problem_init(&p, spec);
    size_t n = (size_t)p.n_rows * spec->n_heads * spec->v_dim;
    double *truth = calloc(n, sizeof(*truth)), *bound = calloc(n, sizeof(*bound));
    float *out = calloc(n, sizeof(*out));
    cr_assert(truth && bound && out);
    cr_assert_eq(attention->supports(context, &p.layer, &reason), 0, "%s", reason.text);
    attn_problem_truth(&p, truth, bound);
    struct attn_backend backend = {context, attention->append, attention->attend};
    cr_assert_eq(attn_problem_run(&p, &backend, 7, out), 0);
    for (size_t i = 0; i < n; i++) {
        /* Its one running sum over all tokens rounds more often than sums of segments. */
        cr_assert(fabs(out[i] - truth[i]) <= 4 * bound[i] + 1e-6 * fabs(truth[i]),
                  "value %zu is %.9g, not %.9g", i, (double)out[i], truth[i]);
    }
    free(truth);
    free(bound);
    free(out);
    attn_problem_finish(&p);
}

Test(attention_plugin, minimal_plugin_is_complete)
{
    void *library, *context = NULL;
    const struct gqa_plugin *plugin = load(&library);
    struct gqa_probe probe = {.struct_size = sizeof(probe)};
    struct gqa_reason reason = {""};
    struct gqa_host host;

    cr_assert_eq(plugin->magic, GQA_PLUGIN_MAGIC);
    cr_assert_eq(plugin->abi_major, GQA_PLUGIN_ABI_MAJOR);
    cr_assert_eq(plugin->abi_minor, GQA_PLUGIN_ABI_MINOR);
    cr_assert_eq(plugin->struct_size, sizeof(*plugin));
    cr_assert_str_eq(plugin->name, "minimal");
    cr_assert_eq(plugin->probe(&probe), 0);
    cr_assert_eq(probe.usable, 1);
    attn_host_init(&host, ATTN_HOST_THREADS, 2);
    cr_assert_eq(plugin->open(&host, "isa=avx9", &context, &reason), -EINVAL);
    cr_assert_null(context);
    cr_assert(strstr(reason.text, "isa=avx9") != NULL, "%s", reason.text);
    cr_assert_eq(plugin->open(&host, "", &context, &reason), 0);
    cr_assert_null(plugin->get_interface(context, GQA_PROGRAM_0));
    const struct gqa_attention *attention = plugin->get_interface(context, GQA_ATTENTION_0);
    cr_assert_not_null(attention);
    cr_assert_eq(attention->struct_size, sizeof(*attention));

    for (uint32_t i = 0; i < 8; i++) {
        struct attn_spec spec = {
            .n_heads = 6,
            .n_kv_heads = i % 3 + 1,
            .k_dim = 24,
            .v_dim = 20,
            .k_type = i & 1 ? GQA_TYPE_F16 : GQA_TYPE_F32,
            .v_type = i & 2 ? GQA_TYPE_F16 : GQA_TYPE_F32,
            .window = i & 4 ? 40 : 0,
            .softcap = i % 3 == 1 ? 2.0f : 0.0f,
            .sinks = i % 2,
            .magnitude = 1.0f,
            .n_seqs = 3,
            .seqs = {{300, 1}, {0, 12}, {64, 9}},
            .seed = 100 + i,
        };
        spec.n_heads = 6 / spec.n_kv_heads * spec.n_kv_heads;
        check_spec(attention, context, &spec);
    }
    struct gqa_attn_layer layer = {.struct_size = sizeof(layer), .k_type = GQA_TYPE_BF16};
    cr_assert_eq(attention->supports(context, &layer, &reason), -ENOTSUP);
    static const uint32_t quants[] = {GQA_TYPE_Q8_0, GQA_TYPE_Q4_0};
    for (size_t i = 0; i < 2; i++) { /* reading these as F32 would be a crash or nonsense */
        layer.k_type = quants[i];
        cr_assert_eq(attention->supports(context, &layer, &reason), -ENOTSUP);
        layer.k_type = GQA_TYPE_F32;
        layer.v_type = quants[i];
        cr_assert_eq(attention->supports(context, &layer, &reason), -ENOTSUP);
        cr_assert(strstr(reason.text, "F16") != NULL, "%s", reason.text);
    }
    plugin->close(context);
    dlclose(library);
}

/* Loading must not put anything else of a plugin's into the host's name space. */
Test(attention_plugin, minimal_plugin_exports_one_name)
{
    void *library;

    load(&library);
    cr_assert_null(dlsym(library, "attend_head"));
    cr_assert_null(dlsym(library, "append"));
    cr_assert_null(dlsym(library, "gqa_plugin_note"));
    dlclose(library);
}
