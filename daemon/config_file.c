/* The configuration file, through libconfuse. Every option is declared as text, whatever its kind:
 * config_set parses it, inside of the validating callback, where the line is still known. */
#include "daemon/config_internal.h"

#include <confuse.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* libconfuse gives its callbacks no argument: one file is read at a time, by the main thread. */
static struct reading {
    struct config *config;
    struct config_error *err;
    bool failed;
} * reading;

static void on_error(cfg_t *cfg, const char *format, va_list args)
{
    char what[384];
    if (!reading || reading->failed) {
        return;
    }
    vsnprintf(what, sizeof(what), format, args);
    reading->failed = true;
    config_fail(reading->err, -EINVAL, "%s:%d: %s", cfg->filename ? cfg->filename : "?", cfg->line,
                what);
}

static const struct config_setting *setting_of(const cfg_opt_t *opt)
{
    for (size_t i = 0; i < config_n_settings(); i++) {
        if (strcmp(config_setting_at(i)->key, cfg_opt_name((cfg_opt_t *)opt)) == 0) {
            return config_setting_at(i);
        }
    }
    return NULL;
}

/* Called after each value, also after each of a list; returns non-zero to refuse. */
static int on_value(cfg_t *cfg, cfg_opt_t *opt)
{
    const struct config_setting *s = setting_of(opt);
    unsigned count = cfg_opt_size(opt);
    const char *text = s && count > 0 ? cfg_opt_getnstr(opt, count - 1) : NULL;
    if (!text || reading->failed) {
        return text ? -1 : 0;
    }
    char origin[300];
    snprintf(origin, sizeof(origin), "%s:%d", cfg->filename ? cfg->filename : "?", cfg->line);
    if (config_set(reading->config, s, text, origin, reading->err) < 0) {
        reading->failed = true;
        return -1;
    }
    return 0;
}

static cfg_t *make_parser(cfg_opt_t *options)
{
    size_t n = config_n_settings();
    for (size_t i = 0; i < n; i++) {
        const struct config_setting *s = config_setting_at(i);
        cfg_opt_t text = CFG_STR(s->key, NULL, CFGF_NODEFAULT);
        cfg_opt_t list = CFG_STR_LIST(s->key, NULL, CFGF_NODEFAULT);
        options[i] = s->kind == CONFIG_LIST ? list : text;
    }
    options[n] = (cfg_opt_t)CFG_FUNC("include", cfg_include);
    options[n + 1] = (cfg_opt_t)CFG_END();
    cfg_t *cfg = cfg_init(options, CFGF_NONE);
    for (size_t i = 0; cfg && i < n; i++) {
        cfg_set_validate_func(cfg, config_setting_at(i)->key, on_value);
    }
    if (cfg) {
        cfg_set_error_function(cfg, on_error);
    }
    return cfg;
}

int config_read_file(struct config *c, const char *path, struct config_error *err)
{
    if (access(path, R_OK) < 0) {
        int rc = -errno;
        return config_fail(err, rc, "%s: %s", path, strerror(-rc));
    }
    cfg_opt_t *options = calloc(config_n_settings() + 2, sizeof(*options));
    cfg_t *cfg = options ? make_parser(options) : NULL;
    if (!cfg) {
        free(options);
        return config_fail(err, -ENOMEM, "%s: no memory to read it", path);
    }
    struct reading state = {.config = c, .err = err};
    reading = &state;
    int rc = cfg_parse(cfg, path);
    reading = NULL;
    cfg_free(cfg);
    free(options);
    if (rc == CFG_SUCCESS && !state.failed) {
        return 0;
    }
    if (!state.failed) {
        config_fail(err, -EIO, "%s: cannot be read", path);
    }
    return rc == CFG_FILE_ERROR ? -EIO : -EINVAL;
}
