/* Every dense architecture that has no golden model, against an independent forward pass in
 * float64, on every level of the cpu backend; and proof that the comparison would notice what it is
 * there for. */
#include "tests/unit/engine/arch_check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

TestSuite(arch, .init = arch_setup, .fini = arch_teardown, .timeout = 300);

/* ---- llama and its kin --------------------------------------------------------------------- */

Test(arch, llama_with_a_window_in_every_layer)
{
    struct reference_spec s = arch_spec("llama");
    arch_set_windows(&s, 7, 1);
    s.untied = true;
    arch_check(&s);
}

Test(arch, llama_with_biases_that_only_some_files_have)
{
    struct reference_spec s = arch_spec("llama");
    s.qkv_bias = s.out_bias = s.ff_bias = true;
    arch_check(&s);
}

Test(arch, llama_with_q_k_and_v_in_one_tensor)
{
    struct reference_spec s = arch_spec("llama");
    s.fused_qkv = true;
    arch_check(&s);
}

static void add_mistral3(struct gguf_writer *w)
{
    gguf_writer_add_string(w, "mistral3.rope.scaling.type", "yarn");
    gguf_writer_add_f32(w, "mistral3.rope.scaling.factor", 16);
    gguf_writer_add_u32(w, "mistral3.rope.scaling.original_context_length", 128);
    gguf_writer_add_f32(w, "mistral3.rope.scaling.yarn_log_multiplier", 1);
    gguf_writer_add_f32(w, "mistral3.attention.temperature_scale", 0.1f);
}

Test(arch, mistral3_within_its_original_context)
{
    struct reference_spec s = arch_spec("mistral3");
    s.yarn_factor = 16;
    s.yarn_log_mul = 1;
    s.n_ctx_orig = 128;
    s.add_keys = add_mistral3;
    arch_check(&s);
}

/* Beyond it, scores are scaled by position. */
Test(arch, mistral3_beyond_its_original_context_is_refused)
{
    struct reference_spec s = arch_spec("mistral3");
    struct reference r;
    s.add_keys = add_mistral3;
    reference_init(&r, &s);
    char path[128];
    snprintf(path, sizeof(path), "%s", arch_path("it.gguf"));
    reference_write(&r, path);
    struct model *m = arch_load(path, NULL);
    cr_expect(eq(u32, model_n_ctx(m), 128)); /* of 512 that it was trained for */
    model_unref(m);
    struct model_options o = parts_model_options();
    struct fmt_error err = {""};
    o.path = path;
    o.name = "it";
    o.n_ctx = 129;
    cr_expect(eq(int,
                 model_load(&o, arch_parts.catalogue, arch_parts.pool, arch_parts.io, NULL, NULL,
                            NULL, &m, &err),
                 -ENOTSUP));
    cr_expect(strstr(err.text, "beyond 128 tokens") != NULL, "%s", err.text);
    reference_finish(&r);
}

Test(arch, smollm3_has_layers_without_rotation)
{
    struct reference_spec s = arch_spec("smollm3");
    s.n_layers = 5;
    s.nope_step = 4;
    arch_check(&s);
}

static void add_granite_without_rotation(struct gguf_writer *w)
{
    arch_add_granite_keys(w);
    gguf_writer_add_bool(w, "granitemoe.rope.scaling.finetuned", false);
}

/* No experts, and the switch that turns rotation off. */
Test(arch, granitemoe_may_be_dense_and_without_rotation)
{
    struct reference_spec s = arch_granite_spec();
    struct reference r;
    s.nope_step = 1;
    s.add_keys = add_granite_without_rotation;
    reference_init(&r, &s);
    char path[128];
    snprintf(path, sizeof(path), "%s", arch_path("it.gguf"));
    reference_write(&r, path);
    arch_compare(&r, path);
    struct reference_spec rotating = s;
    rotating.nope_step = 0;
    arch_notices(&r, &rotating, "rotation");
    reference_finish(&r);
}

/* ---- norms elsewhere ----------------------------------------------------------------------- */

static struct reference_spec olmo_spec(void)
{
    struct reference_spec s = arch_spec("olmo2");
    s.rotate_halves = s.untied = s.no_pre_norms = s.post_norms = true;
    s.qk_norm = REFERENCE_QK_WIDE;
    return s;
}

Test(arch, olmo2)
{
    struct reference_spec s = olmo_spec();
    arch_check(&s);
}

static void add_olmo3(struct gguf_writer *w)
{
    const int32_t pattern[] = {1, 1, 0, 1, 1};
    gguf_writer_add_i32s(w, "olmo2.attention.sliding_window_pattern", pattern, 5);
    gguf_writer_add_string(w, "olmo2.rope.scaling.type", "yarn");
    gguf_writer_add_f32(w, "olmo2.rope.scaling.factor", 8);
    gguf_writer_add_u32(w, "olmo2.rope.scaling.original_context_length", 64);
}

/* Windows by the file's own pattern, and scaled rotation in the other layers only. */
Test(arch, olmo2_with_windows)
{
    struct reference_spec s = olmo_spec();
    s.n_layers = 5;
    s.window = 9;
    s.windowed[0] = s.windowed[1] = s.windowed[3] = s.windowed[4] = true;
    s.local_base = s.base;
    s.yarn_factor = 8;
    s.n_ctx_orig = 64;
    s.add_keys = add_olmo3;
    arch_check(&s);
}

/* ---- others -------------------------------------------------------------------------------- */

Test(arch, gemma)
{
    struct reference_spec s = arch_spec("gemma");
    s.rotate_halves = true;
    s.act = REFERENCE_GELU_TANH;
    s.embed_scale = sqrt(48);
    arch_check(&s);
}

Test(arch, starcoder2)
{
    struct reference_spec s = arch_spec("starcoder2");
    s.rotate_halves = s.layer_norm = s.norm_bias = true;
    s.qkv_bias = s.out_bias = s.ff_bias = s.ungated = true;
    s.act = REFERENCE_GELU_TANH;
    arch_check(&s);
}

Test(arch, phi2_has_one_norm_for_both_branches)
{
    struct reference_spec s = arch_spec("phi2");
    s.rotate_halves = s.layer_norm = s.norm_bias = s.parallel = true;
    s.qkv_bias = s.out_bias = s.ff_bias = s.head_bias = s.ungated = s.fused_qkv = s.untied = true;
    s.act = REFERENCE_GELU_TANH;
    s.n_rot = 8;
    arch_check(&s);
}

Test(arch, stablelm_rotates_a_part_of_every_head)
{
    struct reference_spec s = arch_spec("stablelm");
    s.rotate_halves = s.layer_norm = s.norm_bias = s.untied = true;
    s.n_rot = 4;
    arch_check(&s);
}
