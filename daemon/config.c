#include "daemon/config_internal.h"

#include "daemon/kv/layout.h"
#include "daemon/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define CONFIG_SYSTEM_FILE "/etc/gqad/gqad.conf"
#define ENVIRONMENT_PREFIX "GQAD_"

static const struct config_setting settings[] = {
#define S(kind, key, flag, when, min, max, fallback, doc) \
    {#key,          CONFIG_##kind, flag,                  \
     CONFIG_##when, min,           max,                   \
     fallback,      doc,           offsetof(struct config, key)},
    CONFIG_SETTINGS(S)
#undef S
};

#define N_SETTINGS (sizeof(settings) / sizeof(settings[0]))

size_t config_n_settings(void)
{
    return N_SETTINGS;
}

const struct config_setting *config_setting_at(size_t i)
{
    return i < N_SETTINGS ? &settings[i] : NULL;
}

int config_fail(struct config_error *err, int rc, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof(err->text), format, args);
    va_end(args);
    return rc;
}

static void *field(const struct config *c, const struct config_setting *s)
{
    return (char *)c + s->offset;
}

/* ---- one value --------------------------------------------------------------------------- */

static int parse_u64(const char *text, uint64_t *ret)
{
    char *end;
    if (text[0] < '0' || text[0] > '9') {
        return -EINVAL;
    }
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || *end != '\0') {
        return -EINVAL;
    }
    *ret = value;
    return 0;
}

/* "8G", "512M", "64K", "1T", in powers of 1024; also "8GiB" and "8GB", which mean the same here. */
static int parse_bytes(const char *text, uint64_t *ret)
{
    static const char *const units[] = {"", "K", "M", "G", "T"};
    char digits[32];
    size_t n = strspn(text, "0123456789");
    if (n == 0 || n >= sizeof(digits)) {
        return -EINVAL;
    }
    memcpy(digits, text, n);
    digits[n] = '\0';
    uint64_t value;
    if (parse_u64(digits, &value) < 0) {
        return -EINVAL;
    }
    const char *unit = text + n;
    for (unsigned i = 0; i < sizeof(units) / sizeof(units[0]); i++) {
        size_t len = strlen(units[i]);
        const char *tail = unit + len;
        bool tail_fits =
            *tail == '\0' || (i > 0 && strcasecmp(tail, "iB") == 0) || strcasecmp(tail, "B") == 0;
        if (strncasecmp(unit, units[i], len) == 0 && tail_fits) {
            if (value > (UINT64_MAX >> (10 * i))) {
                return -EINVAL;
            }
            *ret = value << (10 * i);
            return 0;
        }
    }
    return -EINVAL;
}

static int parse_bool(const char *text, bool *ret)
{
    static const char *const yes[] = {"true", "yes", "on", "1"};
    static const char *const no[] = {"false", "no", "off", "0"};
    for (size_t i = 0; i < sizeof(yes) / sizeof(yes[0]); i++) {
        if (strcasecmp(text, yes[i]) == 0 || strcasecmp(text, no[i]) == 0) {
            *ret = strcasecmp(text, yes[i]) == 0;
            return 0;
        }
    }
    return -EINVAL;
}

static int set_text(char **field, const char *text)
{
    char *copy = strdup(text);
    if (!copy) {
        return -ENOMEM;
    }
    free(*field);
    *field = copy;
    return 0;
}

static int list_append(struct config_list *list, const char *text)
{
    char **items = realloc(list->items, (list->count + 1) * sizeof(*items));
    if (!items) {
        return -ENOMEM;
    }
    list->items = items;
    items[list->count] = strdup(text);
    if (!items[list->count]) {
        return -ENOMEM;
    }
    list->count++;
    return 0;
}

static int set_number(struct config *c, const struct config_setting *s, const char *text,
                      const char *origin, struct config_error *err)
{
    uint64_t value;
    int rc = s->kind == CONFIG_BYTES ? parse_bytes(text, &value) : parse_u64(text, &value);
    if (rc < 0) {
        return config_fail(err, rc, "%s: %s: '%s' is not %s", origin, s->key, text,
                           s->kind == CONFIG_BYTES ? "a size like 8G" : "a whole number");
    }
    if (value < s->min || value > s->max) {
        return config_fail(err, -EINVAL, "%s: %s: %s is not between %llu and %llu", origin, s->key,
                           text, (unsigned long long)s->min, (unsigned long long)s->max);
    }
    if (s->kind == CONFIG_BYTES) {
        *(uint64_t *)field(c, s) = value;
    } else {
        *(uint32_t *)field(c, s) = (uint32_t)value;
    }
    return 0;
}

int config_set(struct config *c, const struct config_setting *s, const char *text,
               const char *origin, struct config_error *err)
{
    enum log_level level;
    int rc = 0;
    switch (s->kind) {
    case CONFIG_U32:
    case CONFIG_BYTES:
        return set_number(c, s, text, origin, err);
    case CONFIG_BOOL:
        rc = parse_bool(text, field(c, s));
        return rc < 0 ? config_fail(err, rc, "%s: %s: '%s' is neither true nor false", origin,
                                    s->key, text)
                      : 0;
    case CONFIG_LEVEL:
        rc = log_level_by_name(text, &level);
        if (rc < 0) {
            return config_fail(err, rc, "%s: %s: '%s' is not one of error, warning, info, debug",
                               origin, s->key, text);
        }
        *(uint32_t *)field(c, s) = level;
        return 0;
    case CONFIG_CACHE:
        rc = kv_type_by_name(text, field(c, s));
        return rc < 0 ? config_fail(
                            err, rc,
                            "%s: %s: '%s' is not a type of the cache (f16, f32, bf16, q8_0, q4_0)",
                            origin, s->key, text)
                      : 0;
    case CONFIG_STRING:
    case CONFIG_LIST:
        if (strlen(text) < s->min || strlen(text) > s->max) {
            return config_fail(err, -EINVAL, "%s: %s: has %zu bytes, must have %llu to %llu",
                               origin, s->key, strlen(text), (unsigned long long)s->min,
                               (unsigned long long)s->max);
        }
        rc = config_check_name(s, text, origin, err);
        if (rc < 0) {
            return rc;
        }
        rc =
            s->kind == CONFIG_STRING ? set_text(field(c, s), text) : list_append(field(c, s), text);
        return rc < 0 ? config_fail(err, rc, "%s: %s: no memory", origin, s->key) : 0;
    }
    return -EINVAL;
}

static void list_finish(struct config_list *list)
{
    for (size_t i = 0; i < list->count; i++) {
        free(list->items[i]);
    }
    free(list->items);
    *list = (struct config_list){0};
}

void config_clear_list(struct config *c, const struct config_setting *s)
{
    if (s->kind == CONFIG_LIST) {
        list_finish(field(c, s));
    }
}

/* ---- the sources ------------------------------------------------------------------------- */

static int apply_defaults(struct config *c, struct config_error *err)
{
    for (size_t i = 0; i < N_SETTINGS; i++) {
        const struct config_setting *s = &settings[i];
        int rc = s->kind == CONFIG_LIST ? 0 : config_set(c, s, s->fallback, "default", err);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* A list in the environment is separated by colons, like PATH. */
static int apply_list(struct config *c, const struct config_setting *s, const char *text,
                      const char *origin, struct config_error *err)
{
    char *copy = strdup(text);
    int rc = copy ? 0 : config_fail(err, -ENOMEM, "%s: no memory", origin);
    char *rest = copy;
    char *item;
    config_clear_list(c, s);
    while (rc == 0 && (item = strsep(&rest, ":")) != NULL) {
        rc = *item ? config_set(c, s, item, origin, err) : 0;
    }
    free(copy);
    return rc;
}

static int apply_environment(struct config *c, struct config_error *err)
{
    for (size_t i = 0; i < N_SETTINGS; i++) {
        const struct config_setting *s = &settings[i];
        char name[64] = ENVIRONMENT_PREFIX;
        size_t used = strlen(name);
        for (const char *k = s->key; *k && used + 1 < sizeof(name); k++) {
            name[used++] = (char)(*k >= 'a' && *k <= 'z' ? *k - 'a' + 'A' : *k);
        }
        name[used] = '\0';
        const char *text = getenv(name);
        if (text) {
            int rc = s->kind == CONFIG_LIST ? apply_list(c, s, text, name, err)
                                            : config_set(c, s, text, name, err);
            if (rc < 0) {
                return rc;
            }
        }
    }
    return 0;
}

static int apply_flags(struct config *c, const struct config_source *source,
                       struct config_error *err)
{
    bool seen[N_SETTINGS] = {false};
    for (size_t i = 0; i < source->n_flags; i++) {
        const struct config_flag *flag = &source->flags[i];
        size_t index = (size_t)(flag->setting - settings);
        char origin[64];
        snprintf(origin, sizeof(origin), "command line");
        if (!seen[index]) {
            config_clear_list(c, flag->setting);
            seen[index] = true;
        }
        int rc = config_set(c, flag->setting, flag->value, origin, err);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

static int apply_file(struct config *c, const struct config_source *source,
                      struct config_error *err)
{
    if (source->file) {
        c->file = strdup(source->file);
    } else if (source->user_mode) {
        c->file = config_user_dir("XDG_CONFIG_HOME", ".config", "gqad/gqad.conf");
    } else {
        c->file = strdup(CONFIG_SYSTEM_FILE);
    }
    if (!c->file) {
        return config_fail(err, -ENOMEM, "no memory for the configuration");
    }
    int rc = config_read_file(c, c->file, err);
    if (rc == -ENOENT && !source->file) {
        free(c->file);
        c->file = NULL;
        return 0;
    }
    return rc;
}

int config_create(const struct config_source *source, struct config **ret, struct config_error *err)
{
    struct config *c = calloc(1, sizeof(*c));
    if (!c) {
        return config_fail(err, -ENOMEM, "no memory for the configuration");
    }
    c->user_mode = source->user_mode;
    int rc = apply_defaults(c, err);
    if (rc == 0) {
        rc = apply_file(c, source, err);
    }
    if (rc == 0) {
        rc = apply_environment(c, err);
    }
    if (rc == 0) {
        rc = apply_flags(c, source, err);
    }
    if (rc == 0) {
        rc = config_decide_places(c, source->wants_socket, err);
    }
    if (rc == 0 && config_decide_machine(c) < 0) {
        rc = config_fail(err, -EIO, "the machine's cores and memory cannot be read");
    }
    if (rc < 0) {
        config_destroy(c);
        return rc;
    }
    *ret = c;
    return 0;
}

void config_destroy(struct config *c)
{
    if (!c) {
        return;
    }
    for (size_t i = 0; i < N_SETTINGS; i++) {
        const struct config_setting *s = &settings[i];
        if (s->kind == CONFIG_STRING) {
            free(*(char **)field(c, s));
        }
        config_clear_list(c, s);
    }
    free(c->file);
    free(c);
}

/* ---- reloading --------------------------------------------------------------------------- */

static bool equal(const struct config *a, const struct config *b, const struct config_setting *s)
{
    const void *x = field(a, s);
    const void *y = field(b, s);
    switch (s->kind) {
    case CONFIG_STRING:
        return strcmp(*(char *const *)x, *(char *const *)y) == 0;
    case CONFIG_LIST: {
        const struct config_list *l = x;
        const struct config_list *m = y;
        bool same = l->count == m->count;
        for (size_t i = 0; same && i < l->count; i++) {
            same = strcmp(l->items[i], m->items[i]) == 0;
        }
        return same;
    }
    case CONFIG_BYTES:
        return *(const uint64_t *)x == *(const uint64_t *)y;
    case CONFIG_BOOL:
        return *(const bool *)x == *(const bool *)y;
    case CONFIG_U32:
    case CONFIG_LEVEL:
    case CONFIG_CACHE:
        return *(const uint32_t *)x == *(const uint32_t *)y;
    }
    return false;
}

void config_compare(const struct config *before, const struct config *after,
                    void (*changed)(void *arg, const struct config_setting *setting), void *arg)
{
    for (size_t i = 0; i < N_SETTINGS; i++) {
        if (!equal(before, after, &settings[i])) {
            changed(arg, &settings[i]);
        }
    }
}

/* Exchanges the two, so that each still owns what it holds. */
void config_move(struct config *to, struct config *from, const struct config_setting *s)
{
    static const size_t sizes[] = {
        [CONFIG_STRING] = sizeof(char *),  [CONFIG_LIST] = sizeof(struct config_list),
        [CONFIG_U32] = sizeof(uint32_t),   [CONFIG_BYTES] = sizeof(uint64_t),
        [CONFIG_BOOL] = sizeof(bool),      [CONFIG_LEVEL] = sizeof(uint32_t),
        [CONFIG_CACHE] = sizeof(uint32_t),
    };
    char saved[sizeof(struct config_list)];
    memcpy(saved, field(to, s), sizes[s->kind]);
    memcpy(field(to, s), field(from, s), sizes[s->kind]);
    memcpy(field(from, s), saved, sizes[s->kind]);
}
