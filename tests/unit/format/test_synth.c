/* gqa-synth as its users run it: the files it writes open, have the shape asked for and values of
 * the size intended; what it refuses has the right exit code. */
#include "format/gguf.h"
#include "format/types.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <math.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <sysexits.h>
#include <unistd.h>

extern char **environ;

static char folder[] = "/tmp/gqad-synth-XXXXXX";
static char path[64];

static void make_folder(void)
{
    cr_assert_not_null(mkdtemp(folder));
    snprintf(path, sizeof(path), "%s/m.gguf", folder);
}

static void remove_folder(void)
{
    unlink(path);
    rmdir(folder);
}

TestSuite(synth, .init = make_folder, .fini = remove_folder);

static int run_synth(const char *shape, const char *type, const char *seed, const char *output)
{
    const char *const argv[] = {"gqa-synth", "--shape", shape, "--type", type,
                                "--seed",    seed,      "-o",  output,   NULL};
    posix_spawn_file_actions_t quiet;
    pid_t pid;
    int status;
    const char *program = getenv("GQAD_TEST_SYNTH");
    cr_assert_not_null(program);
    posix_spawn_file_actions_init(&quiet);
    posix_spawn_file_actions_addopen(&quiet, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&quiet, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    cr_assert_eq(posix_spawn(&pid, program, &quiet, NULL, (char *const *)argv, environ), 0);
    posix_spawn_file_actions_destroy(&quiet);
    cr_assert_eq(waitpid(pid, &status, 0), pid);
    cr_assert(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static struct gguf *synth(const char *shape, const char *type, const char *seed)
{
    struct gguf *g = NULL;
    struct fmt_error err = {""};
    cr_assert_eq(run_synth(shape, type, seed, path), EX_OK, "%s %s", shape, type);
    cr_assert_eq(gguf_open(path, &g, &err), 0, "%s", err.text);
    return g;
}

static void mean_and_deviation(const struct gguf_tensor *tensor, double *ret_mean,
                               double *ret_deviation)
{
    uint64_t n = tensor->ne[0] * tensor->ne[1];
    float *values = malloc(n * sizeof(*values));
    double sum = 0, squares = 0;
    cr_assert_not_null(values);
    fmt_type_info(tensor->type)->dequantise(tensor->data, values, n);
    for (uint64_t i = 0; i < n; i++) {
        sum += values[i];
        squares += (double)values[i] * values[i];
    }
    free(values);
    *ret_mean = sum / (double)n;
    *ret_deviation = sqrt(squares / (double)n - *ret_mean * *ret_mean);
}

Test(synth, matrices_of_every_type_are_centred_with_the_intended_deviation)
{
    static const char *const types[] = {"q4_0",   "q8_0",   "q4_k_m", "q2_k", "q3_k_s", "q6_k",
                                        "iq4_nl", "iq4_xs", "mxfp4",  "f16",  "bf16",   "f32"};
    for (size_t t = 0; t < sizeof(types) / sizeof(types[0]); t++) {
        struct gguf *g = synth("tiny,n_embd=512,n_ff=1024,n_kv_heads=8", types[t], "1");
        for (size_t i = 0; i < gguf_n_tensors(g); i++) {
            const struct gguf_tensor *tensor = gguf_tensor_at(g, i);
            double mean, deviation;
            if (tensor->n_dims != 2) {
                continue;
            }
            mean_and_deviation(tensor, &mean, &deviation);
            bool into_stream = strstr(tensor->name.data, "attn_output") != NULL ||
                               strstr(tensor->name.data, "ffn_down") != NULL;
            double intended = (into_stream ? 0.5 : 1.0) / sqrt((double)tensor->ne[0]);
            /* Four levels spread over a range deviate more than what lay evenly in it. */
            double tolerance = strcmp(types[t], "q2_k") == 0 ? 0.1 : 0.06;
            cr_expect_float_eq(deviation / intended, 1.0, tolerance, "%s %s: %g", types[t],
                               tensor->name.data, deviation / intended);
            cr_expect_float_eq(mean / deviation, 0.0, 0.03, "%s %s: %g", types[t],
                               tensor->name.data, mean / deviation);
        }
        gguf_close(g);
    }
}

static const char *type_of(const struct gguf *g, const char *name)
{
    const struct gguf_tensor *tensor = gguf_find_tensor(g, name);
    cr_assert_not_null(tensor, "%s", name);
    return fmt_type_info(tensor->type)->name;
}

Test(synth, mixtures_are_the_usual_ones)
{
    struct gguf *g = synth("tiny,n_embd=256,n_ff=512,n_layers=16", "q4_k_m", "1");
    uint32_t file_type = 0;
    /* Of 16 layers: 0 1 | 4 7 10 13 | 14 15. */
    const uint32_t finer = 1u << 0 | 1u << 1 | 1u << 4 | 1u << 7 | 1u << 10 | 1u << 13 | 3u << 14;
    for (uint32_t i = 0; i < 16; i++) {
        char name[64];
        const char *expected = (finer >> i & 1) != 0 ? "Q6_K" : "Q4_K";
        snprintf(name, sizeof(name), "blk.%u.attn_v.weight", i);
        cr_expect_str_eq(type_of(g, name), expected, "%s", name);
        snprintf(name, sizeof(name), "blk.%u.ffn_down.weight", i);
        cr_expect_str_eq(type_of(g, name), expected, "%s", name);
        snprintf(name, sizeof(name), "blk.%u.attn_output.weight", i);
        cr_expect_str_eq(type_of(g, name), "Q4_K", "%s", name);
    }
    cr_expect_str_eq(type_of(g, "output.weight"), "Q6_K");
    cr_expect_str_eq(type_of(g, "token_embd.weight"), "Q4_K");
    cr_expect_str_eq(type_of(g, "output_norm.weight"), "F32");
    cr_expect_eq(gguf_get_u32(g, "general.file_type", &file_type), 0);
    cr_expect_eq(file_type, 15);
    gguf_close(g);

    g = synth("tiny,n_embd=256,tied=1", "q4_0", "1");
    cr_expect_null(gguf_find_tensor(g, "output.weight"));
    cr_expect_str_eq(type_of(g, "token_embd.weight"), "Q6_K");
    cr_expect_str_eq(type_of(g, "blk.0.ffn_down.weight"), "Q4_0");
    gguf_close(g);
}

Test(synth, narrow_rows_fall_back_to_types_of_small_blocks)
{
    struct gguf *g = synth("tiny", "q4_k_m", "1");
    cr_expect_str_eq(type_of(g, "blk.0.attn_q.weight"), "Q5_0");
    cr_expect_str_eq(type_of(g, "output.weight"), "Q8_0");
    gguf_close(g);
    g = synth("tiny", "q2_k", "1");
    cr_expect_str_eq(type_of(g, "blk.0.attn_q.weight"), "IQ4_NL");
    gguf_close(g);
}

Test(synth, overrides_and_architectures_are_in_the_keys)
{
    uint32_t n = 0;
    struct gguf *g = synth("tiny,n_heads=4,n_kv_heads=4,arch=qwen3,n_ctx=777", "f16", "1");
    cr_expect_eq(gguf_get_u32(g, "qwen3.attention.head_count_kv", &n), 0);
    cr_expect_eq(n, 4);
    cr_expect_eq(gguf_get_u32(g, "qwen3.attention.key_length", &n), 0);
    cr_expect_eq(n, 16, "head_dim follows n_heads");
    cr_expect_eq(gguf_get_u32(g, "qwen3.context_length", &n), 0);
    cr_expect_eq(n, 777);
    const struct gguf_tensor *norm = gguf_find_tensor(g, "blk.1.attn_k_norm.weight");
    cr_assert_not_null(norm);
    cr_expect_eq(norm->ne[0], 16);
    gguf_close(g);
}

Test(synth, the_vocabulary_is_unique_and_its_words_can_be_merged)
{
    enum { N = 20000 };
    static struct gguf_string tokens[N];
    static float scores[N];
    static int32_t kinds[N];
    struct gguf *g = synth("tiny,n_vocab=20000", "q8_0", "1");
    cr_assert_eq(gguf_get_strings(g, "tokenizer.ggml.tokens", tokens, N), 0);
    cr_assert_eq(gguf_get_f32s(g, "tokenizer.ggml.scores", scores, N), 0);
    cr_assert_eq(gguf_get_i32s(g, "tokenizer.ggml.token_type", kinds, N), 0);
    cr_expect(kinds[0] == 2 && kinds[1] == 3 && kinds[2] == 3 && kinds[3] == 6 && kinds[258] == 6);
    cr_expect_eq(memcmp(tokens[258].data, "<0xFF>", 6), 0);
    for (size_t i = 259; i < N; i++) {
        cr_assert_eq(kinds[i], 1);
        cr_assert(i == 259 || scores[i] < scores[i - 1]);
        /* Some earlier piece and one of at most two letters make it up: a merge can reach it. */
        bool reachable = i < 259 + 95;
        for (size_t j = 259; j < i; j++) {
            size_t n = tokens[j].bytes;
            cr_assert(n != tokens[i].bytes || memcmp(tokens[j].data, tokens[i].data, n) != 0,
                      "tokens %zu and %zu are equal", j, i);
            reachable |= n + 2 == tokens[i].bytes && memcmp(tokens[j].data, tokens[i].data, n) == 0;
            reachable |= n == 1 && tokens[i].bytes == 2 && tokens[j].data[0] == tokens[i].data[0];
        }
        cr_assert(reachable, "token %zu: %.*s", i, (int)tokens[i].bytes, tokens[i].data);
    }
    gguf_close(g);
}

/* FNV-1a over all tensors. */
static uint64_t digest(const struct gguf *g)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(g, i);
        for (uint64_t b = 0; b < tensor->bytes; b++) {
            hash = (hash ^ ((const uint8_t *)tensor->data)[b]) * 0x100000001b3;
        }
    }
    return hash;
}

Test(synth, the_seed_alone_decides_the_weights)
{
    static const char *const seeds[] = {"7", "7", "8"};
    uint64_t hashes[3];
    for (int i = 0; i < 3; i++) {
        struct gguf *g = synth("tiny", "q4_0", seeds[i]);
        hashes[i] = digest(g);
        gguf_close(g);
    }
    cr_expect_eq(hashes[0], hashes[1]);
    cr_expect_neq(hashes[0], hashes[2]);
}

Test(synth, experts_have_a_matrix_each)
{
    struct gguf *g = synth("tiny-moe,n_embd=256,n_ff_expert=512", "q4_k_m", "1");
    const struct gguf_tensor *down = gguf_find_tensor(g, "blk.1.ffn_down_exps.weight");
    uint32_t n_used = 0;
    cr_assert_not_null(down);
    cr_expect(down->ne[0] == 512 && down->ne[1] == 256 && down->ne[2] == 8);
    cr_expect_str_eq(type_of(g, "blk.0.ffn_gate_exps.weight"), "Q4_K");
    cr_expect_str_eq(type_of(g, "blk.0.ffn_gate_inp.weight"), "F32");
    cr_expect_null(gguf_find_tensor(g, "blk.0.ffn_gate.weight"));
    cr_expect_eq(gguf_get_u32(g, "llama.expert_used_count", &n_used), 0);
    cr_expect_eq(n_used, 2);
    gguf_close(g);
}

Test(synth, refusals_have_their_exit_codes)
{
    cr_expect_eq(run_synth("huge", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny,n_heads=7,head_dim=8", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny,n_layers=-1", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny,n_layers=0", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny,n_heads=0", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny,colour=3", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny,arch=qwen2,n_experts=4", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny,arch=qwen3moe", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny-moe,n_used=9", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny-moe,n_ff_expert=0", "q4_0", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny", "q3_x", "1", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny", "q4_0", "one", path), EX_USAGE);
    cr_expect_eq(run_synth("tiny", "q4_0", "1", "/nonexistent/m.gguf"), EX_CANTCREAT);
    cr_expect_eq(access(path, F_OK), -1);
}
