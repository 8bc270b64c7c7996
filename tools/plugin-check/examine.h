/* tools/plugin-check/examine.h - loads a plugin and does with it what was asked for. */
#ifndef TOOLS_PLUGIN_CHECK_EXAMINE_H
#define TOOLS_PLUGIN_CHECK_EXAMINE_H

#include "tools/plugin-check/results.h"

#include <stdbool.h>

struct examination {
    const char *path;        /* of the file */
    const char *options;     /* for the plugin */
    bool matrix;             /* after the self-test everything that the ABI promises */
    bool bench;              /* instead of both: how fast it is */
    uint32_t n_threads;      /* of the bench */
    struct results *results; /* whose `at` is somewhere */
    const char **phase;      /* what runs now, for whoever finds this process dead */
};

/* 0: passed; 1: not usable here, and the results have the plugin's reason; or -errno with a reason:
 * wrong or broken. */
int examine(const struct examination *e, struct gqa_reason *reason);

#endif
