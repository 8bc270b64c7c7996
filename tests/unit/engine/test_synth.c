/* Every shape that gqa-synth names, made small, loads and gives logits that are numbers. */
#include "tests/unit/engine/arch_check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <fcntl.h>
#include <math.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

#define N_TOKENS 80 /* beyond a window of 64 */
#define N_VOCAB  320

TestSuite(synth, .init = arch_setup, .fini = arch_teardown, .timeout = 300);

static void run_synth(const char *shape, const char *type, const char *path)
{
    const char *const argv[] = {"gqa-synth", "-s", shape, "-t", type, "-o", path, NULL};
    posix_spawn_file_actions_t quiet;
    int status;
    pid_t pid;
    posix_spawn_file_actions_init(&quiet);
    posix_spawn_file_actions_addopen(&quiet, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    cr_assert(
        eq(int,
           posix_spawn(&pid, getenv("GQAD_TEST_SYNTH"), &quiet, NULL, (char *const *)argv, environ),
           0));
    posix_spawn_file_actions_destroy(&quiet);
    cr_assert(eq(int, waitpid(pid, &status, 0), pid));
    cr_assert(eq(int, status, 0), "gqa-synth -s %s -t %s", shape, type);
}

static void check_shape(const char *name, const char *changes, const char *type)
{
    char shape[256], path[128];
    int32_t tokens[N_TOKENS];
    float *logits = calloc(N_TOKENS * N_VOCAB, sizeof(*logits));
    snprintf(path, sizeof(path), "%s", arch_path("synth.gguf"));
    snprintf(shape, sizeof(shape),
             "%s,n_layers=3,n_embd=64,n_heads=4,n_kv_heads=2,head_dim=32,n_ff=96,n_vocab=%u%s",
             name, N_VOCAB, changes);
    run_synth(shape, type, path);
    struct model *m = arch_load(path, NULL);
    for (size_t i = 0; i < N_TOKENS; i++) {
        tokens[i] = (int32_t)(i * 37 % N_VOCAB);
    }
    cr_assert(eq(int, feed_all(m, tokens, N_TOKENS, 32, logits), 0));
    for (size_t i = 0; i < N_TOKENS * N_VOCAB; i++) {
        cr_assert(eq(int, isfinite(logits[i]) != 0, 1), "%s: logit %zu is %g", name, i,
                  (double)logits[i]);
    }
    model_unref(m);
    free(logits);
}

Test(synth, dense_shapes_load)
{
    static const char *const names[] = {"tinyllama-1.1b", "llama-3.2-1b", "llama-3.2-3b",
                                        "llama-3.1-8b",   "qwen2.5-0.5b", "qwen3-0.6b",
                                        "smollm3-3b",     "olmo2-1b",     "tiny"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        check_shape(names[i], "", "q4_0");
        check_shape(names[i], "", "f16");
    }
    check_shape("gemma-2-2b", ",window=64", "q4_0");
}

Test(synth, shapes_with_experts_load)
{
    static const char *const names[] = {"mixtral-8x7b", "qwen3-30b-a3b", "granite-3.0-1b-a400m",
                                        "gpt-oss-20b", "tiny-moe"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        check_shape(names[i], ",n_experts=6,n_used=2,n_ff_expert=32", "q4_0");
        check_shape(names[i], ",n_experts=6,n_used=2,n_ff_expert=32", "bf16");
    }
}
