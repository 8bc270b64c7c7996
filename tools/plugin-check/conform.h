/* tools/plugin-check/conform.h - the whole matrix: shapes and ops against the reference, and bits
 * against the plugin itself where the ABI promises that nothing else counts. */
#ifndef TOOLS_PLUGIN_CHECK_CONFORM_H
#define TOOLS_PLUGIN_CHECK_CONFORM_H

#include "tools/plugin-check/results.h"

#include <gqa/plugin.h>
#include <stdbool.h>
#include <string.h>

struct conform {
    const struct gqa_attention *attention, *reference;
    const struct gqa_program *program, *reference_program; /* program may be NULL */
    void *context, *reference_context, *reference_program_context;
    void *crowd_context;     /* the plugin again, on a host that hands out work in another order */
    float tolerance;         /* of attention */
    const char *only;        /* families whose names begin so, or NULL: all */
    struct results *results; /* a line per family */
};

static inline bool conform_wants(const struct conform *c, const char *family)
{
    return c->only == NULL || strncmp(family, c->only, strlen(c->only)) == 0;
}

/* Attention; then the ops of a program. 0, or -EBADMSG (or an op's own error) with the first case
 * that is wrong. */
int conform_run(const struct conform *c, struct gqa_reason *reason);
int conform_program_selftest(const struct conform *c, struct gqa_reason *reason); /* a few ops */
int conform_program_run(const struct conform *c, struct gqa_reason *reason);

#endif
