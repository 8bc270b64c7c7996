#include "plugins/common/options.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* The option of an item "key=value", or NULL; *ret_value: where its value begins. */
static const struct plugin_option *find(const struct plugin_option *known, size_t n_known,
                                        const char *item, size_t length, const char **ret_value)
{
    for (size_t i = 0; i < n_known; i++) {
        size_t n = strlen(known[i].key);
        if (length > n && memcmp(item, known[i].key, n) == 0 && item[n] == '=') {
            *ret_value = item + n + 1;
            return &known[i];
        }
    }
    return NULL;
}

static int refuse_unknown(const struct plugin_option *known, size_t n_known, const char *item,
                          size_t length, struct gqa_reason *reason)
{
    int shown = (int)(length < PLUGIN_OPTION_VALUE_MAX ? length : PLUGIN_OPTION_VALUE_MAX);
    size_t used = (size_t)snprintf(reason->text, sizeof(reason->text),
                                   "%.*s: unknown option; there is", shown, item);

    for (size_t i = 0; i < n_known && used < sizeof(reason->text); i++) {
        used += (size_t)snprintf(reason->text + used, sizeof(reason->text) - used, "%s %s=%s",
                                 i > 0 ? "," : "", known[i].key, known[i].value);
    }
    return -EINVAL;
}

int plugin_options_parse(const char *options, const struct plugin_option *known, size_t n_known,
                         void *arg, struct gqa_reason *reason)
{
    char value[PLUGIN_OPTION_VALUE_MAX + 1];
    const char *begin = NULL;

    for (const char *at = options != NULL ? options : ""; *at != '\0';) {
        size_t length = strcspn(at, ",");
        if (length > 0) {
            const struct plugin_option *o = find(known, n_known, at, length, &begin);
            if (o == NULL) {
                return refuse_unknown(known, n_known, at, length, reason);
            }
            size_t n = (size_t)(at + length - begin);
            if (n > PLUGIN_OPTION_VALUE_MAX) {
                snprintf(reason->text, sizeof(reason->text), "%s: a value of %zu characters",
                         o->key, n);
                return -EINVAL;
            }
            memcpy(value, begin, n);
            value[n] = '\0';
            int r = o->set(arg, value, reason);
            if (r < 0) {
                return r;
            }
        }
        at += length;
        at += *at == ',';
    }
    return 0;
}
