/* plugins/cpu/context.h - what open() makes: one device's worth of the cpu backend. */
#ifndef PLUGINS_CPU_CONTEXT_H
#define PLUGINS_CPU_CONTEXT_H

#include "plugins/cpu/attention.h"
#include "plugins/cpu/isa.h"

#include <gqa/plugin.h>

struct cpu_context {
    const struct gqa_host *host; /* outlives the context */
    enum cpu_isa isa;
    struct cpu_attention *attention;
};

#endif
