#include "tests/cuda/check_util.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void host_log(void *data, int level, const char *message)
{
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

static const struct gqa_host host = {sizeof(host),  1,           NULL, host_log, host_parallel,
                                     host_allocate, host_release};

int side_open(struct side *s, const char *path, const char *options)
{
    struct gqa_probe probe = {.struct_size = sizeof(probe)};
    struct gqa_reason reason = {""};
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);

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
    int r = s->plugin->open(&host, options, &s->context, &reason);
    if (r < 0) {
        fprintf(stderr, "%s: %s\n", path, reason.text);
        return 1;
    }
    s->program = s->plugin->get_interface(s->context, GQA_PROGRAM_0);
    printf("%s on %s (%s)\n", s->plugin->name, probe.device, probe.isa);
    return s->program == NULL;
}
