/* plugins/common/entry.h - what the entries of our plugins have in common. */
#ifndef PLUGINS_COMMON_ENTRY_H
#define PLUGINS_COMMON_ENTRY_H

#include <gqa/plugin.h>

#include <string.h>

#if defined(__clang__)
#define PLUGIN_COMPILER "clang " __clang_version__
#else
#define PLUGIN_COMPILER "gcc " __VERSION__
#endif

/* get_interface() of a plugin with these tables; either may be NULL. */
static inline const void *plugin_interface(const char *name, const struct gqa_attention *attention,
                                           const struct gqa_program *program)
{
    if (strcmp(name, GQA_ATTENTION_0) == 0) {
        return attention;
    }
    return strcmp(name, GQA_PROGRAM_0) == 0 ? program : NULL;
}

#endif
