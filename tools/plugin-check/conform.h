/* tools/plugin-check/conform.h - the whole matrix: shapes against the reference, and bits against
 * the plugin itself where the ABI promises that nothing else counts. */
#ifndef TOOLS_PLUGIN_CHECK_CONFORM_H
#define TOOLS_PLUGIN_CHECK_CONFORM_H

#include <gqa/plugin.h>
#include <stdio.h>

struct conform {
    const struct gqa_attention *attention, *reference;
    void *context, *reference_context;
    void *crowd_context; /* the plugin again, on a host that hands out work in another order */
    float tolerance;
    FILE *out; /* a line per family */
};

/* 0, or -EBADMSG with the first case that is wrong. */
int conform_run(const struct conform *c, struct gqa_reason *reason);

#endif
