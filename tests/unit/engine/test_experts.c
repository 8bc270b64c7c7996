/* Mixtures of experts against the independent forward pass in float64. */
#include "tests/unit/engine/arch_check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

TestSuite(experts, .init = arch_setup, .fini = arch_teardown, .timeout = 300);

Test(experts, granitemoe)
{
    struct reference_spec s = arch_granite_spec();
    s.n_experts = 6;
    s.n_used = 2;
    s.n_ff_expert = 48;
    arch_check(&s);
}

Test(experts, granitemoe_with_a_shared_expert)
{
    struct reference_spec s = arch_granite_spec();
    s.n_experts = 6;
    s.n_used = 2;
    s.n_ff_expert = 48;
    s.n_ff_shared = 64;
    arch_check(&s);
}

Test(experts, qwen2moe_with_its_shared_expert_and_gate)
{
    struct reference_spec s = arch_spec("qwen2moe");
    s.rotate_halves = s.qkv_bias = s.untied = s.raw_experts = s.shared_gate = true;
    s.n_experts = 6;
    s.n_used = 3;
    s.n_ff_expert = 48;
    s.n_ff_shared = 96;
    arch_check(&s);
}

/* As many experts as the large ones have, and a tied head. */
Test(experts, qwen3moe_with_128_experts)
{
    struct reference_spec s = arch_spec("qwen3moe");
    s.rotate_halves = true;
    s.qk_norm = REFERENCE_QK_PER_HEAD;
    s.n_experts = 128;
    s.n_used = 8;
    s.n_ff_expert = 16;
    arch_check(&s);
}

Test(experts, gate_and_up_of_experts_in_one_tensor)
{
    struct reference_spec s = arch_spec("llama");
    s.n_experts = 4;
    s.n_used = 2;
    s.n_ff_expert = 48;
    s.fused_experts = s.untied = true;
    arch_check(&s);
}

Test(experts, olmoe)
{
    struct reference_spec s = arch_spec("olmoe");
    s.rotate_halves = s.untied = s.raw_experts = true;
    s.qk_norm = REFERENCE_QK_WIDE;
    s.n_experts = 8;
    s.n_used = 3;
    s.n_ff_expert = 32;
    arch_check(&s);
}

Test(experts, gpt_oss)
{
    struct reference_spec s = arch_spec("gpt-oss");
    s.n_layers = 3;
    s.rotate_halves = s.qkv_bias = s.out_bias = s.ff_bias = s.sinks = s.untied = true;
    s.second_norm_is_post_attention = true;
    s.act = REFERENCE_SWIGLU_OAI;
    s.n_experts = 4;
    s.n_used = 2;
    s.n_ff_expert = 48;
    arch_set_windows(&s, 5, 2);
    arch_check(&s);
}

/* Parts of a split model have experts and what routes to them. */
Test(experts, of_a_model_in_several_files)
{
    struct reference_spec s = arch_spec("llama");
    struct reference r;
    char path[160], stem[128];
    s.n_layers = 3;
    s.n_experts = 4;
    s.n_used = 2;
    s.n_ff_expert = 48;
    reference_init(&r, &s);
    snprintf(stem, sizeof(stem), "%s", arch_path("parts"));
    reference_write_parts(&r, stem, 3);
    snprintf(path, sizeof(path), "%s-00001-of-00003.gguf", stem);
    arch_compare(&r, path);
    reference_finish(&r);
}

/* What a decode step reads and computes is what the chosen experts have. */
Test(experts, count_as_far_as_they_are_used)
{
    struct reference_spec s = arch_spec("llama");
    struct reference r;
    struct model_facts few, all;
    char path[128];
    snprintf(path, sizeof(path), "%s", arch_path("it.gguf"));
    s.n_experts = 8;
    s.n_ff_expert = 48;
    reference_init(&r, &s);
    for (uint32_t used = 2; used <= 8; used += 6) {
        r.spec.n_used = used;
        reference_write(&r, path);
        struct model *m = arch_load(path, NULL);
        model_facts(m, used == 2 ? &few : &all);
        model_unref(m);
    }
    uint64_t values = 2 * 6 * 3 * 48 * 48; /* of six experts in two layers */
    cr_expect(eq(u64, all.flops_per_token - few.flops_per_token, 2 * values));
    cr_expect(eq(u64, all.weight_bytes_per_token - few.weight_bytes_per_token, 4 * values));
    cr_expect(eq(u64, all.n_params, few.n_params));
    reference_finish(&r);
}

/* The file says one number of experts, and its tensors have another. */
Test(experts, whose_tensors_disagree_are_refused)
{
    static const struct {
        const char *tensor;
        uint64_t ne[3];
    } cases[] = {
        {"blk.0.ffn_gate_exps.weight", {48, 40, 5}},
        {"blk.1.ffn_up_exps.weight", {48, 41, 4}},
        {"blk.1.ffn_down_exps.weight", {40, 48, 3}},
        {"blk.0.ffn_gate_inp.weight", {48, 5, 1}},
    };
    struct reference_spec s = arch_spec("llama");
    char path[128];
    snprintf(path, sizeof(path), "%s", arch_path("it.gguf"));
    s.n_experts = 4;
    s.n_used = 2;
    s.n_ff_expert = 40;
    for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++) {
        struct reference r;
        struct model *m = NULL;
        struct fmt_error err = {""};
        reference_init(&r, &s);
        for (size_t i = 0; i < r.n_tensors; i++) {
            uint64_t *ne = r.tensors[i].ne;
            if (strcmp(r.tensors[i].name, cases[c].tensor) == 0) {
                memcpy(ne, cases[c].ne, sizeof(cases[c].ne));
                free(r.tensors[i].values);
                r.tensors[i].values = calloc(ne[0] * ne[1] * ne[2], sizeof(float));
            }
        }
        reference_write(&r, path);
        cr_expect(eq(int, arch_try_load(path, NULL, &m, &err), -EINVAL));
        cr_expect(strstr(err.text, "it.gguf") != NULL &&
                      strstr(err.text, cases[c].tensor) != NULL &&
                      strstr(err.text, "must be 4") != NULL,
                  "%s", err.text);
        reference_finish(&r);
    }
}
