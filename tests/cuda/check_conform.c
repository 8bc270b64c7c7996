/* tests/cuda/check_conform.c - gqa-plugin-check's matrix with nothing but libc: the cpu plugin at
 * level c is the reference for the cuda plugin. For machines without our packages.
 *
 *   check-conform CPU.so CUDA.so [FAMILY...]
 *
 * FAMILY: only the families of attention whose names begin so.
 *
 * Exit status: 0 right, 1 wrong, 77 no GPU (and it says so). */
#include "tools/plugin-check/conform.h"
#include "tools/plugin-check/hosts.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* That of gqa-plugin-check. */
#define TOLERANCE 5e-4f

void results_family(struct results *r, const struct results_family *f, bool right)
{
    printf("%-16s %-44s %4u run, %4u not supported  %.3g of %.3g  %s\n", f->interface, f->name,
           f->n_run, f->n_skipped, (double)f->worst, (double)f->tolerance, right ? "ok" : "WRONG");
}

void results_case(struct results *r, const char *name, const char *verdict, float error)
{
    printf("%-44s %s  %.3g\n", name, verdict, (double)error);
}

static const struct gqa_plugin *load(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const struct gqa_plugin *plugin = library != NULL ? dlsym(library, GQA_PLUGIN_SYMBOL) : NULL;

    if (plugin == NULL) {
        fprintf(stderr, "%s: %s\n", path, dlerror());
    }
    return plugin;
}

/* All of it, or the families of attention that are named. */
static int run_families(struct conform *c, int n, char **families, struct gqa_reason *reason)
{
    int r = n == 0 ? conform_run(c, reason) : 0;

    for (int i = 0; r == 0 && i < n; i++) {
        c->only = families[i];
        r = conform_run(c, reason);
    }
    return r < 0 || n > 0 ? r : conform_program_run(c, reason);
}

static int run(const struct gqa_plugin *cpu, const struct gqa_plugin *cuda, int n_families,
               char **families, struct gqa_reason *reason)
{
    struct conform c = {.tolerance = TOLERANCE};
    void *reference;

    int r = cpu->open(&host_alone, "isa=c", &reference, reason);
    r = r < 0 ? r : cuda->open(&host_alone, "", &c.context, reason);
    r = r < 0 ? r : cuda->open(&host_crowd, "", &c.crowd_context, reason);
    if (r < 0) {
        return r; /* the process ends: nothing is to be closed */
    }
    c.reference = cpu->get_interface(reference, GQA_ATTENTION_0);
    c.reference_program = cpu->get_interface(reference, GQA_PROGRAM_0);
    c.reference_context = c.reference_program_context = reference;
    c.attention = cuda->get_interface(c.context, GQA_ATTENTION_0);
    c.program = cuda->get_interface(c.context, GQA_PROGRAM_0);
    r = run_families(&c, n_families, families, reason);
    cuda->close(c.crowd_context);
    cuda->close(c.context);
    cpu->close(reference);
    return r;
}

int main(int argc, char **argv)
{
    struct gqa_probe probe = {.struct_size = sizeof(probe)};
    struct gqa_reason reason = {""};

    if (argc < 3) {
        fprintf(stderr, "usage: check-conform CPU.so CUDA.so [FAMILY...]\n");
        return 1;
    }
    const struct gqa_plugin *cpu = load(argv[1]), *cuda = load(argv[2]);
    if (cpu == NULL || cuda == NULL) {
        return 1;
    }
    cuda->probe(&probe);
    if (!probe.usable) {
        printf("SKIPPED: NO GPU HERE: %s\n", probe.reason);
        return 77;
    }
    printf("device=%s\nisa=%s\n", probe.device, probe.isa);
    int r = run(cpu, cuda, argc - 3, argv + 3, &reason);
    printf("%s%s\n", r < 0 ? "WRONG: " : "all right", r < 0 ? reason.text : "");
    return r < 0;
}
