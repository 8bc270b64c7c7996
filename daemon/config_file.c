/* The configuration file, through libconfuse. Every option is declared as text, whatever its kind:
 * config_set parses it, inside of the validating callback, where the line is still known.
 *
 * libconfuse 3.3 counts the lines of comments more than once. The file is therefore read here, its
 * comments are replaced with spaces, and libconfuse gets the rest: then its lines are right. */
#include "daemon/config_internal.h"

#include <confuse.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONFIG_FILE_BYTES_MAX (1u << 20)

/* libconfuse gives its callbacks no argument: one file is read at a time, by the main thread. */
static struct reading {
    struct config *config;
    const char *path; /* libconfuse calls the text "[buf]" */
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
    config_fail(reading->err, -EINVAL, "%s:%d: %s", reading->path, cfg->line, what);
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

/* Called when an option has its value, or a list all of its; returns non-zero to refuse. A list
 * that is given again, or added to, is taken over as it then is. */
static int on_value(cfg_t *cfg, cfg_opt_t *opt)
{
    const struct config_setting *s = setting_of(opt);
    if (!s || reading->failed) {
        return -1;
    }
    char origin[300];
    snprintf(origin, sizeof(origin), "%s:%d", reading->path, cfg->line);
    config_clear_list(reading->config, s);
    for (unsigned i = 0; i < cfg_opt_size(opt); i++) {
        if (config_set(reading->config, s, cfg_opt_getnstr(opt, i), origin, reading->err) < 0) {
            reading->failed = true;
            return -1;
        }
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
    options[n] = (cfg_opt_t)CFG_END();
    cfg_t *cfg = cfg_init(options, CFGF_NONE);
    for (size_t i = 0; cfg && i < n; i++) {
        cfg_set_validate_func(cfg, config_setting_at(i)->key, on_value);
    }
    if (cfg) {
        cfg_set_error_function(cfg, on_error);
    }
    return cfg;
}

/* ---- the text ---------------------------------------------------------------------------- */

/* Blanks from text to end, but keeps line breaks. */
static char *blank_until(char *text, const char *end)
{
    for (; text < end; text++) {
        *text = *text == '\n' ? '\n' : ' ';
    }
    return text;
}

static void blank_comments(char *text)
{
    char quote = '\0';
    while (*text) {
        if (quote) {
            bool escaped = *text == '\\' && text[1];
            quote = *text == quote ? '\0' : quote;
            text += escaped ? 2 : 1;
        } else if (*text == '#' || (text[0] == '/' && text[1] == '/')) {
            text = blank_until(text, text + strcspn(text, "\n"));
        } else if (text[0] == '/' && text[1] == '*') {
            const char *end = strstr(text + 2, "*/");
            text = blank_until(text, end ? end + 2 : text + strlen(text));
        } else {
            quote = *text == '"' || *text == '\'' ? *text : '\0';
            text++;
        }
    }
}

/* The file's text, terminated; malloc'ed. */
static int read_text(const char *path, char **ret, struct config_error *err)
{
    FILE *f = fopen(path, "re");
    if (!f) {
        int rc = -errno;
        return config_fail(err, rc, "%s: %s", path, strerror(-rc));
    }
    char *text = malloc(CONFIG_FILE_BYTES_MAX + 1);
    if (!text) {
        fclose(f);
        return config_fail(err, -ENOMEM, "%s: no memory to read it", path);
    }
    errno = 0;
    size_t bytes = fread(text, 1, CONFIG_FILE_BYTES_MAX + 1, f);
    int rc = ferror(f) ? (errno ? -errno : -EIO) : 0;
    fclose(f);
    if (rc < 0) {
        config_fail(err, rc, "%s: %s", path, strerror(-rc));
    } else if (bytes > CONFIG_FILE_BYTES_MAX) {
        rc = config_fail(err, -EFBIG, "%s: is longer than %u bytes", path, CONFIG_FILE_BYTES_MAX);
    } else if (memchr(text, '\0', bytes)) {
        rc = config_fail(err, -EINVAL, "%s: contains a NUL byte", path);
    }
    if (rc < 0) {
        free(text);
        return rc;
    }
    text[bytes] = '\0';
    *ret = text;
    return 0;
}

static int parse_text(struct config *c, const char *path, char *text, struct config_error *err)
{
    cfg_opt_t *options = calloc(config_n_settings() + 1, sizeof(*options));
    cfg_t *cfg = options ? make_parser(options) : NULL;
    if (!cfg) {
        free(options);
        return config_fail(err, -ENOMEM, "%s: no memory to read it", path);
    }
    struct reading state = {.config = c, .path = path, .err = err};
    reading = &state;
    int rc = cfg_parse_buf(cfg, text);
    reading = NULL;
    cfg_free(cfg);
    free(options);
    if (rc == CFG_SUCCESS && !state.failed) {
        return 0;
    }
    return state.failed ? -EINVAL : config_fail(err, -EINVAL, "%s: cannot be parsed", path);
}

int config_read_file(struct config *c, const char *path, struct config_error *err)
{
    char *text = NULL;
    int rc = read_text(path, &text, err);
    if (rc < 0) {
        return rc;
    }
    blank_comments(text);
    rc = parse_text(c, path, text, err);
    free(text);
    return rc;
}
