/* tests/cuda/check_conform.c - gqa-plugin-check's matrix with nothing but libc: the cpu plugin at
 * level c is the reference for the cuda plugin. For machines without our packages.
 *
 *   check-conform CPU.so CUDA.so [FAMILY...]
 *
 * FAMILY: only the families whose names begin so; one that no family has is wrong.
 *
 * Exit status: 0 right, 1 wrong, 77 no GPU (and it says so). */
#include "tools/plugin-check/conform.h"
#include "tools/plugin-check/hosts.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* That of gqa-plugin-check. */
#define TOLERANCE 5e-4f

static unsigned n_told; /* families */

void results_family(struct results *r, const struct results_family *f, bool right)
{
    n_told++;
    printf("%-16s %-44s %4u run, %4u not supported  %.3g of %.3g  %s\n", f->interface, f->name,
           f->n_run, f->n_skipped, (double)f->worst, (double)f->tolerance, right ? "ok" : "WRONG");
}

void results_skip(struct results_family *f, struct gqa_reason *reason)
{
    f->n_skipped++;
    reason->text[0] = '\0';
}

void results_case(struct results *r, const char *name, const char *verdict, float error,
                  const char *why)
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

/* All of it, or the families that are named. */
static int run_families(struct conform *c, int n, char **families, struct gqa_reason *reason)
{
    int r = 0;

    for (int i = 0; r == 0 && (i < n || i == 0); i++) {
        unsigned before = n_told;
        c->only = n > 0 ? families[i] : NULL;
        r = conform_run(c, reason);
        r = r < 0 ? r : conform_program_run(c, reason);
        if (r == 0 && n_told == before) {
            snprintf(reason->text, sizeof(reason->text), "%.100s: no family begins so",
                     families[i]);
            r = -EINVAL;
        }
    }
    return r;
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

    setvbuf(stdout, NULL, _IOLBF, 0); /* what was found stays, whatever ends the process */
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
