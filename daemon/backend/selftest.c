/* daemon/backend/selftest.c - self-tests on demand, and what is known of a plugin's failures. */
#include "daemon/backend/backend_internal.h"

#include <stdio.h>
#include <string.h>

static const char *options_of(const char *spec)
{
    const char *colon = strchr(spec, ':');
    return colon != NULL ? colon + 1 : "";
}

/* Takes the module of spec's plugin. */
static int hold_module(struct backend_catalogue *c, const char *spec, struct module **ret,
                       struct gqa_reason *reason)
{
    struct entry *e;
    pthread_mutex_lock(&c->lock);
    int rc = catalogue_choose(c, spec, &e, reason);
    if (rc == 0) {
        *ret = e->module;
        e->module->refs++;
    }
    pthread_mutex_unlock(&c->lock);
    return rc;
}

int backend_selftest(struct backend_catalogue *c, const char *spec, struct plugin_report *ret,
                     struct gqa_reason *reason)
{
    struct module *m = NULL;
    int rc = hold_module(c, spec, &m, reason);
    if (rc < 0) {
        return rc;
    }
    rc = plugin_check(&c->checker, m->image.fd, options_of(spec), ret, reason);
    catalogue_module_unref(c, m);
    return rc;
}

static bool was_tested(const struct module *m, const char *options)
{
    for (uint32_t i = 0; i < m->n_tested; i++) {
        if (strcmp(m->tested[i], options) == 0) {
            return true;
        }
    }
    return false;
}

int backend_ensure_tested(struct backend_catalogue *c, const char *spec, struct gqa_reason *reason)
{
    const char *options = options_of(spec);
    struct module *m = NULL;
    int rc = hold_module(c, spec, &m, reason);
    if (rc < 0 || options[0] == '\0') { /* the scan has tested it so */
        catalogue_module_unref(c, rc < 0 ? NULL : m);
        return rc;
    }
    pthread_mutex_lock(&c->lock);
    bool known = was_tested(m, options);
    pthread_mutex_unlock(&c->lock);
    struct plugin_report report;
    rc = known ? 0 : plugin_check_once(&c->checker, m->image.fd, options, &report, reason);
    pthread_mutex_lock(&c->lock);
    if (rc == 0 && !known && m->n_tested < MODULE_TESTED_MAX &&
        strlen(options) < sizeof(m->tested[0])) {
        snprintf(m->tested[m->n_tested++], sizeof(m->tested[0]), "%s", options);
    }
    pthread_mutex_unlock(&c->lock);
    catalogue_module_unref(c, m);
    return rc;
}
