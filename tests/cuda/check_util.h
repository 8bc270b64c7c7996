/* tests/cuda/check_util.h - the two plugins that the checks compare, on a host of one thread. */
#ifndef TESTS_CUDA_CHECK_UTIL_H
#define TESTS_CUDA_CHECK_UTIL_H

#include <gqa/plugin.h>
#include <stdbool.h>

struct side {
    const struct gqa_plugin *plugin;
    const struct gqa_program *program;
    void *context;
};

/* Of one thread; counts what plugins say, but for news (GQA_LOG_INFO). */
extern const struct gqa_host side_host;
extern unsigned side_n_warnings;

/* Loads and opens a plugin, and says on which device. 0; 77 where it cannot run, and it says why; 1
 * else. */
int side_open(struct side *s, const char *path, const char *options);

/* main() of a check of n cases: CPU.so at its reference against CUDA.so, the two arguments. check
 * compares one case, prints a line and returns whether all was right. */
int sides_check(int argc, char **argv, size_t n,
                bool (*check)(const struct side *cpu, const struct side *cuda, size_t index));

/* The largest difference over the root mean square of the truth; not a number where one is none. */
float check_distance(const float *truth, const float *got, size_t n);

#endif
