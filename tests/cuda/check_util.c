#include "tests/cuda/check_util.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

unsigned side_n_warnings;

static void host_log(void *data, int level, const char *message)
{
    side_n_warnings += level <= GQA_LOG_WARNING;
    fprintf(stderr, "plugin: %s\n", message);
}

static void host_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        fn(arg, i, 0);
    }
}

static void *host_allocate(void *data, size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    return memory != NULL ? memset(memory, 0, bytes) : NULL;
}

static void host_release(void *data, void *memory, size_t bytes)
{
    free(memory);
}

const struct gqa_host side_host = {
    .struct_size = sizeof(side_host),
    .n_threads = 1,
    .log = host_log,
    .parallel = host_parallel,
    .allocate = host_allocate,
    .release = host_release,
    .abi_major = GQA_PLUGIN_ABI_MAJOR,
    .abi_minor = GQA_PLUGIN_ABI_MINOR,
};

int side_open(struct side *s, const char *path, const char *options)
{
    struct gqa_probe probe = {.struct_size = sizeof(probe)};
    struct gqa_reason reason = {""};
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);

    setvbuf(stdout, NULL, _IOLBF, 0); /* what was found stays, whatever ends the process */
    s->plugin = library != NULL ? dlsym(library, GQA_PLUGIN_SYMBOL) : NULL;
    if (s->plugin == NULL) {
        fprintf(stderr, "%s: %s\n", path, dlerror());
        return 1;
    }
    s->plugin->probe(&probe);
    if (!probe.usable) {
        printf("SKIPPED: %s cannot run here: %s\n", s->plugin->name, probe.reason);
        return 77;
    }
    int r = s->plugin->open(&side_host, options, &s->context, &reason);
    if (r < 0) {
        fprintf(stderr, "%s: %s\n", path, reason.text);
        return 1;
    }
    s->program = s->plugin->get_interface(s->context, GQA_PROGRAM_0);
    printf("%s on %s (%s)\n", s->plugin->name, probe.device, probe.isa);
    return s->program == NULL;
}

int sides_check(int argc, char **argv, size_t n,
                bool (*check)(const struct side *cpu, const struct side *cuda, size_t index))
{
    struct side cpu = {0}, cuda = {0};
    int wrong = 0;

    if (argc != 3) {
        fprintf(stderr, "usage: %s CPU.so CUDA.so\n", argv[0]);
        return 1;
    }
    int r = side_open(&cpu, argv[1], "isa=c");
    r = r == 0 ? side_open(&cuda, argv[2], "") : r;
    if (r != 0) {
        return r;
    }
    for (size_t i = 0; i < n; i++) {
        wrong += !check(&cpu, &cuda, i);
    }
    cuda.plugin->close(cuda.context);
    cpu.plugin->close(cpu.context);
    printf(wrong ? "%d WRONG\n" : "all right\n", wrong);
    return wrong != 0;
}

float check_distance(const float *truth, const float *got, size_t n)
{
    float worst = 0.0f, squares = 0.0f;

    for (size_t i = 0; i < n; i++) {
        float d = fabsf(truth[i] - got[i]);
        worst = d > worst || isnan(d) ? d : worst;
        squares += truth[i] * truth[i];
    }
    return worst / sqrtf(squares / (float)n);
}
