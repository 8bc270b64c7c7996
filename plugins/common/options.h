/* plugins/common/options.h - "key=value,key=value", as open() gets it. */
#ifndef PLUGINS_COMMON_OPTIONS_H
#define PLUGINS_COMMON_OPTIONS_H

#include <gqa/plugin.h>

#include <stddef.h>

#define PLUGIN_OPTION_VALUE_MAX 63u /* characters of a value */

/* One that a backend knows. set gets what follows "key=", and the arg of plugin_options_parse; 0 or
 * -errno with a reason. */
struct plugin_option {
    const char *key, *value; /* "isa", "LEVEL": for the message about unknown ones */
    int (*set)(void *arg, const char *value, struct gqa_reason *reason);
};

/* options may be NULL or "", and an item may be empty. -EINVAL with a reason for an unknown key or
 * a value that is too long, or what set returns. */
int plugin_options_parse(const char *options, const struct plugin_option *known, size_t n_known,
                         void *arg, struct gqa_reason *reason);

#endif
