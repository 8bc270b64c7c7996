/* Models that are refused, each with the file's path and what is wrong with it; and one that loads.
 */
#include "tests/unit/engine/parts.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static struct parts parts;
static struct tiny tiny;

static void setup(void)
{
    parts_init(&parts, 1);
    tiny = tiny_default();
}

static void teardown(void)
{
    parts_finish(&parts);
}

TestSuite(model, .init = setup, .fini = teardown, .timeout = 120);

/* The load fails with that code; the sentence has the path and every given part. */
static void refused(int code, const char *part, const char *another)
{
    struct model *m = NULL;
    struct fmt_error err = {""};
    cr_expect(eq(int, parts_try_load(&parts, &tiny, &m, &err), code), "%s", err.text);
    cr_expect(m == NULL);
    const char *wanted[] = {"try.gguf", part, another};
    for (size_t i = 0; i < 3; i++) {
        cr_expect(wanted[i] == NULL || strstr(err.text, wanted[i]) != NULL, "'%s' lacks '%s'",
                  err.text, wanted[i]);
    }
    struct backend_info info[1];
    cr_expect(eq(sz, backend_catalogue_list(parts.catalogue, info, 1), 1));
    cr_expect(eq(u32, info[0].users, 0)); /* no context is left behind */
}

Test(model, loads_and_tells_its_facts)
{
    struct model *m = parts_load(&parts, &tiny, "it");
    struct model_facts f;
    model_facts(m, &f);
    uint64_t matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 32 * TINY_VOCAB;
    uint64_t n_params = matrices + 32 * TINY_VOCAB + 5 * 32;
    cr_expect(eq(u64, f.n_params, n_params));
    cr_expect(eq(u64, f.flops_per_token, 2 * matrices));
    cr_expect(ge(u64, f.weight_bytes_per_token, 4 * matrices));
    cr_expect(eq(u32, f.n_ctx, 512));
    cr_expect(eq(u32, model_n_ctx(m), 512));
    cr_expect(eq(int, strcmp(f.type_name, "F32"), 0));
    cr_expect(eq(int, strcmp(f.program_backend, "cpu"), 0));
    cr_expect(eq(int, strcmp(model_name(m), "it"), 0));
    cr_expect(eq(u32, model_kv_layout(m)->n_classes, 1));
    model_unref(m);
}

static void add_unknown_key(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "llama.attention.temperature_length", 3);
}

static void add_experts(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "llama.expert_count", 8);
}

static void add_too_many_used(struct gguf_writer *w)
{
    add_experts(w);
    gguf_writer_add_u32(w, "llama.expert_used_count", 9);
}

static void add_too_many_experts(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "llama.expert_count", 1u << 20);
}

static void add_other_gating(struct gguf_writer *w)
{
    add_experts(w);
    gguf_writer_add_u32(w, "llama.expert_used_count", 2);
    gguf_writer_add_u32(w, "llama.expert_gating_func", 2);
}

static void add_experts_of_another(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "qwen2.expert_count", 8);
}

static void add_window_of_another(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "qwen2.attention.sliding_window", 64);
}

static void add_short_pattern(struct gguf_writer *w)
{
    const int32_t windowed[] = {1};
    gguf_writer_add_u32(w, "llama.attention.sliding_window", 64);
    gguf_writer_add_i32s(w, "llama.attention.sliding_window_pattern", windowed, 1);
}

static void add_scale_of_another(struct gguf_writer *w)
{
    gguf_writer_add_f32(w, "llama.embedding_scale", 2);
}

static void add_odd_rot(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "llama.rope.dimension_count", 5);
}

static void add_long_rot(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "llama.rope.dimension_count", 10);
}

static void add_not_causal(struct gguf_writer *w)
{
    gguf_writer_add_bool(w, "llama.attention.causal", false);
}

static void add_scaling(struct gguf_writer *w)
{
    gguf_writer_add_string(w, "llama.rope.scaling.type", "spiral");
}

static void add_scaling_number(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "llama.rope.scaling.type", 1);
}

static void add_base(struct gguf_writer *w)
{
    gguf_writer_add_f32(w, "llama.rope.freq_base", NAN);
}

static void add_vocab_size(struct gguf_writer *w)
{
    gguf_writer_add_u32(w, "llama.vocab_size", TINY_VOCAB + 1);
}

static void add_uneven_layers(struct gguf_writer *w)
{
    const int32_t heads[] = {2, 4};
    gguf_writer_add_i32s(w, "llama.attention.head_count_kv", heads, 2);
}

static void add_few_layers(struct gguf_writer *w)
{
    const int32_t heads[] = {2};
    gguf_writer_add_i32s(w, "llama.attention.head_count_kv", heads, 1);
}

Test(model, an_unknown_architecture_is_named_with_those_that_are_known)
{
    tiny.arch = "mammoth";
    refused(-ENOTSUP, "'mammoth'",
            "known are llama, mistral3, smollm3, granite, granitemoe, qwen2, qwen2moe, qwen3, "
            "qwen3moe, olmo2, olmoe, gemma, gemma2, gemma3, phi2, phi3, stablelm, starcoder2, "
            "gpt-oss, bert, nomic-bert");
}

Test(model, a_key_that_could_change_results)
{
    tiny.add_keys = add_unknown_key;
    refused(-ENOTSUP, "llama.attention.temperature_length", "not understood");
}

Test(model, keys_that_are_missing)
{
    static const char *const required[] = {"context_length", "embedding_length", "block_count",
                                           "feed_forward_length", "attention.head_count"};
    for (size_t i = 0; i < sizeof(required) / sizeof(required[0]); i++) {
        tiny.without_key = required[i];
        refused(-EINVAL, required[i], "is missing");
    }
}

Test(model, numbers_out_of_range)
{
    tiny.n_ctx = 0;
    refused(-EINVAL, "llama.context_length is 0", "must lie in 1..");
    tiny = tiny_default();
    tiny.n_kv_heads = 3;
    refused(-EINVAL, "4 heads", "3 KV heads");
}

Test(model, experts)
{
    tiny.add_keys = add_experts;
    refused(-EINVAL, "llama.expert_used_count", "is missing");
    tiny.add_keys = add_too_many_used;
    refused(-EINVAL, "llama.expert_used_count is 9", "1..8");
    tiny.add_keys = add_too_many_experts;
    refused(-EINVAL, "llama.expert_count is 1048576", "0..4096");
    tiny.add_keys = add_other_gating;
    refused(-ENOTSUP, "llama.expert_gating_func is 2", NULL);
    tiny.arch = "qwen3moe";
    tiny.add_keys = NULL;
    refused(-EINVAL, "qwen3moe.expert_count", "is missing");
    tiny.arch = "qwen2";
    tiny.add_keys = add_experts_of_another;
    refused(-ENOTSUP, "qwen2.expert_count is 8", "experts are not supported");
}

Test(model, windows)
{
    tiny.add_keys = add_short_pattern;
    refused(-EINVAL, "llama.attention.sliding_window_pattern", "array of 2");
    tiny.arch = "qwen2";
    tiny.add_keys = add_window_of_another;
    refused(-ENOTSUP, "qwen2.attention.sliding_window is 64", "which layers");
}

/* Understood for some architectures, and for this one it would be ignored. */
Test(model, a_key_of_other_architectures)
{
    tiny.add_keys = add_scale_of_another;
    refused(-ENOTSUP, "llama.embedding_scale", "not understood");
}

Test(model, biases_that_the_architecture_needs)
{
    tiny.arch = "qwen2";
    refused(-EINVAL, "blk.0.attn_q.bias", "is missing");
}

Test(model, rotary_dimensions)
{
    tiny.add_keys = add_odd_rot;
    refused(-EINVAL, "llama.rope.dimension_count is 5", "must be even");
    tiny.add_keys = add_long_rot;
    refused(-EINVAL, "llama.rope.dimension_count is 10", "2..8");
    tiny.add_keys = add_base;
    refused(-EINVAL, "llama.rope.freq_base is nan", NULL);
}

Test(model, rotary_scaling)
{
    tiny.add_keys = add_scaling;
    refused(-ENOTSUP, "llama.rope.scaling.type is 'spiral'", "none, linear, yarn, longrope");
    tiny.add_keys = add_scaling_number;
    refused(-EINVAL, "llama.rope.scaling.type", "not a string");
}

Test(model, attention_in_both_directions)
{
    tiny.add_keys = add_not_causal;
    refused(-ENOTSUP, "llama.attention.causal", "both directions");
}

Test(model, layers_that_differ)
{
    tiny.without_key = "attention.head_count_kv";
    tiny.add_keys = add_uneven_layers;
    refused(-ENOTSUP, "llama.attention.head_count_kv", "layer 1 the value 4");
    tiny.add_keys = add_few_layers;
    refused(-EINVAL, "llama.attention.head_count_kv", "2 integers");
}

Test(model, tensors_that_are_missing)
{
    static const char *const names[] = {"token_embd.weight", "blk.1.attn_k.weight",
                                        "blk.0.ffn_norm.weight", "output_norm.weight"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        tiny.without_tensor = names[i];
        refused(-EINVAL, names[i], "is missing");
    }
}

Test(model, tensors_of_a_wrong_shape)
{
    tiny.wide_tensor = "blk.1.attn_v.weight";
    refused(-EINVAL, "blk.1.attn_v.weight is 32 x 17", "must be 32 x 16");
    tiny.wide_tensor = "blk.0.attn_norm.weight";
    refused(-EINVAL, "blk.0.attn_norm.weight is 33", "must be 32");
}

Test(model, a_tensor_that_could_change_results)
{
    tiny.extra_tensor = "blk.0.attn_sinks.weight";
    refused(-ENOTSUP, "blk.0.attn_sinks.weight", "architecture llama");
}

Test(model, vocabularies_and_embeddings)
{
    tiny.n_embd_rows = TINY_VOCAB - 1;
    refused(-EINVAL, "300 tokens in the vocabulary", "299 embeddings");
    tiny = tiny_default();
    tiny.add_keys = add_vocab_size;
    refused(-EINVAL, "llama.vocab_size is 301", "300 rows");
}

/* The head may be the embedding itself. */
Test(model, a_tied_head_loads)
{
    struct model *m = NULL;
    struct fmt_error err = {""};
    tiny.without_tensor = "output.weight";
    cr_assert(eq(int, parts_try_load(&parts, &tiny, &m, &err), 0), "%s", err.text);
    model_unref(m);
}

Test(model, a_backend_that_is_missing_and_a_cancelled_load)
{
    struct model *m = NULL;
    struct fmt_error err = {""};
    char path[128];
    snprintf(path, sizeof(path), "%s", folder_path(&parts.folder, "it.gguf"));
    tiny_write(&tiny, path);
    struct model_options o = parts_model_options();
    o.path = path;
    o.name = "it";
    o.backend = "abacus";
    cr_expect(eq(int,
                 model_load(&o, parts.catalogue, parts.pool, parts.io, NULL, NULL, NULL, &m, &err),
                 -ENOENT));
    cr_expect(strstr(err.text, "abacus") != NULL, "%s", err.text);
    o.backend = "cpu:isa=slow";
    cr_expect(eq(int,
                 model_load(&o, parts.catalogue, parts.pool, parts.io, NULL, NULL, NULL, &m, &err),
                 -EINVAL));
    cr_expect(strstr(err.text, "isa=slow") != NULL, "%s", err.text);
    o.backend = NULL;
    const atomic_bool cancel = true;
    cr_expect(eq(
        int, model_load(&o, parts.catalogue, parts.pool, parts.io, &cancel, NULL, NULL, &m, &err),
        -ECANCELED));
    cr_expect(m == NULL);
}
