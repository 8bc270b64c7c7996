#include "daemon/backend/backend_internal.h"
#include "daemon/log.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK_PROGRAM      "gqa-plugin-check"
#define DEFAULT_TIMEOUT_MS 20000

static void module_destroy(struct module *m)
{
    if (m->handle != NULL && m->stays_mapped) {
        /* The descriptor stays too: under a number used again dlopen would hand out this library.
         */
        log_warning("a plugin's threads outlive its contexts: it stays mapped");
        free(m);
        return;
    }
    if (m->handle != NULL) {
        dlclose(m->handle);
    }
    plugin_image_unload(&m->image); /* after dlclose: see image.h */
    free(m);
}

void catalogue_module_unref(struct backend_catalogue *c, struct module *m)
{
    if (m == NULL) {
        return;
    }
    pthread_mutex_lock(&c->lock);
    bool last = --m->refs == 0;
    pthread_mutex_unlock(&c->lock);
    if (last) {
        module_destroy(m);
    }
}

/* ---- scanning ---------------------------------------------------------------------------- */

/* Checks one file and makes its entry, usable or not. Takes long where a child must run. */
static void examine(struct backend_catalogue *c, const char *path, struct entry *ret)
{
    memset(ret, 0, sizeof(*ret));
    snprintf(ret->path, sizeof(ret->path), "%s", path);
    const char *file = strrchr(path, '/') + 1;
    snprintf(ret->report.name, sizeof(ret->report.name), "%.*s", (int)strcspn(file, "."), file);
    struct module *m = calloc(1, sizeof(*m));
    if (m == NULL) {
        reason_fail(&ret->reason, -ENOMEM, "no memory");
        return;
    }
    m->refs = 1;
    int rc = plugin_image_load(path, &m->image, &ret->reason);
    if (rc < 0) {
        free(m);
        return;
    }
    ret->module = m;
    rc = plugin_check_once(&c->checker, m->image.fd, "", &ret->report, &ret->reason);
    m->stays_mapped = ret->report.threads_left > 0;
    ret->usable = rc == 0 && ret->report.probe.usable != 0;
    if (rc == 0 && !ret->usable) {
        bool told = ret->report.probe.reason[0] != '\0';
        reason_fail(&ret->reason, 0, "%s",
                    told ? ret->report.probe.reason : "it says so, without a reason");
    }
}

static struct entry *find_entry(struct backend_catalogue *c, const char *name, size_t bytes)
{
    for (size_t i = 0; i < c->n_entries; i++) {
        if (strlen(c->entries[i].report.name) == bytes &&
            memcmp(c->entries[i].report.name, name, bytes) == 0) {
            return &c->entries[i];
        }
    }
    return NULL;
}

static struct entry *find_path(struct backend_catalogue *c, const char *path)
{
    for (size_t i = 0; i < c->n_entries; i++) {
        if (strcmp(c->entries[i].path, path) == 0) {
            return &c->entries[i];
        }
    }
    return NULL;
}

/* Puts what was found in its place; returns the module that it replaces. Locked by the caller. */
static struct module *publish(struct backend_catalogue *c, struct entry *known, struct entry *fresh)
{
    struct module *old = NULL;
    const struct entry *namesake = find_entry(c, fresh->report.name, strlen(fresh->report.name));
    if (namesake != NULL && namesake != known) {
        fresh->usable = false;
        reason_fail(&fresh->reason, 0, "another plugin is called '%s' too", fresh->report.name);
        /* The name belongs to the first: this one goes by its file's. */
        const char *file = strrchr(fresh->path, '/') + 1;
        snprintf(fresh->report.name, sizeof(fresh->report.name), "%.31s", file);
    }
    fresh->seen = true;
    if (known != NULL) {
        old = known->module;
        fresh->users = known->users;
        fresh->n_faults = known->n_faults;
        memcpy(fresh->last_fault, known->last_fault, sizeof(fresh->last_fault));
        *known = *fresh;
    } else {
        c->entries[c->n_entries++] = *fresh;
    }
    return old;
}

/* A file of the folder: new, replaced or unchanged since the last scan. Entries are added by scans
 * only, which exclude each other: the lock is for readers. */
static void scan_file(struct backend_catalogue *c, const char *path)
{
    struct entry *known = find_path(c, path);
    if (known != NULL) {
        known->seen = true;
    }
    if (known != NULL && known->module != NULL &&
        plugin_image_is_current(&known->module->image, path)) {
        return;
    }
    if (known == NULL && c->n_entries == MAX_PLUGINS) {
        log_warning("plugin %s is left out: more than %d plugins", path, MAX_PLUGINS);
        return;
    }
    struct entry fresh;
    examine(c, path, &fresh);
    pthread_mutex_lock(&c->lock);
    struct module *old = publish(c, known, &fresh);
    pthread_mutex_unlock(&c->lock);
    if (!fresh.usable) {
        log_warning("plugin %s is not usable: %s", path, fresh.reason.text);
    }
    catalogue_module_unref(c, old);
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int is_plugin(const struct dirent *file)
{
    size_t bytes = strlen(file->d_name);
    return bytes > 3 && strcmp(file->d_name + bytes - 3, ".so") == 0;
}

static void scan_folder(struct backend_catalogue *c, const char *dir)
{
    struct dirent **files;
    int n = scandir(dir, &files, is_plugin, by_name);
    for (int k = 0; k < n; k++) {
        char path[PATH_MAX];
        int bytes = snprintf(path, sizeof(path), "%s/%s", dir, files[k]->d_name);
        if (bytes > 0 && bytes < (int)sizeof(path)) {
            scan_file(c, path);
        }
        free(files[k]);
    }
    if (n >= 0) {
        free(files);
    }
}

/* Files that are gone can be opened no more; contexts that run keep their copy. */
static void retire_gone(struct backend_catalogue *c)
{
    for (size_t i = 0; i < c->n_entries; i++) {
        struct entry *e = &c->entries[i];
        if (e->seen) {
            continue;
        }
        pthread_mutex_lock(&c->lock);
        struct module *old = e->module;
        e->module = NULL;
        e->usable = false;
        reason_fail(&e->reason, 0, "its file is gone");
        pthread_mutex_unlock(&c->lock);
        catalogue_module_unref(c, old);
    }
}

int backend_catalogue_rescan(struct backend_catalogue *c)
{
    pthread_mutex_lock(&c->scanning);
    for (size_t i = 0; i < c->n_entries; i++) {
        c->entries[i].seen = false;
    }
    for (size_t i = 0; i < c->n_dirs; i++) {
        scan_folder(c, c->dirs[i]);
    }
    retire_gone(c);
    pthread_mutex_unlock(&c->scanning);
    return 0;
}

/* ---- the catalogue ----------------------------------------------------------------------- */

/* Beside the daemon's own binary, where both are installed; or in the build's folder of tools.
 * Never looked for in the working folder. */
static void find_check_program(char *ret, size_t bytes)
{
    static const char *const places[] = {"", "../tools/", "../tools/plugin-check/"};
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash == NULL) {
        snprintf(ret, bytes, "/usr/bin/%s", CHECK_PROGRAM);
        return;
    }
    slash[1] = '\0';
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        int k = snprintf(ret, bytes, "%s%s%s", self, places[i], CHECK_PROGRAM);
        if (k > 0 && (size_t)k < bytes && access(ret, X_OK) == 0) {
            return;
        }
    }
    snprintf(ret, bytes, "%.*s%s", (int)(bytes - sizeof(CHECK_PROGRAM)), self, CHECK_PROGRAM);
}

int backend_catalogue_create(const struct backend_catalogue_options *options,
                             struct backend_catalogue **ret)
{
    struct backend_catalogue *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        return -ENOMEM;
    }
    pthread_mutex_init(&c->scanning, NULL);
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->loading, NULL);
    if (options->check_program != NULL) {
        snprintf(c->check_program, sizeof(c->check_program), "%s", options->check_program);
    } else {
        find_check_program(c->check_program, sizeof(c->check_program));
    }
    int rc = 0;
    if (options->verdicts != NULL) {
        c->verdicts = strdup(options->verdicts);
        rc = c->verdicts == NULL ? -ENOMEM : 0;
    }
    c->checker = (struct plugin_checker){
        .program = c->check_program,
        .timeout_ms =
            options->check_timeout_ms > 0 ? options->check_timeout_ms : DEFAULT_TIMEOUT_MS,
        .verdicts = c->verdicts,
    };
    c->dirs = calloc(options->n_dirs + 1, sizeof(*c->dirs));
    rc = c->dirs == NULL ? -ENOMEM : rc;
    for (size_t i = 0; rc == 0 && i < options->n_dirs; i++) {
        c->dirs[i] = strdup(options->dirs[i]);
        rc = c->dirs[i] == NULL ? -ENOMEM : 0;
        c->n_dirs += rc == 0;
    }
    rc = rc < 0 ? rc : backend_catalogue_rescan(c);
    if (rc < 0) {
        backend_catalogue_destroy(c);
        return rc;
    }
    *ret = c;
    return 0;
}

void backend_catalogue_destroy(struct backend_catalogue *c)
{
    if (c == NULL) {
        return;
    }
    for (size_t i = 0; i < c->n_entries; i++) {
        catalogue_module_unref(c, c->entries[i].module);
    }
    for (size_t i = 0; i < c->n_dirs; i++) {
        free(c->dirs[i]);
    }
    free(c->dirs);
    free(c->verdicts);
    pthread_mutex_destroy(&c->scanning);
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->loading);
    free(c);
}

static bool has_program(const struct entry *e)
{
    return strstr(e->report.interfaces, GQA_PROGRAM_0) != NULL;
}

static struct entry *best_entry(struct backend_catalogue *c)
{
    struct entry *best = NULL;
    for (size_t i = 0; i < c->n_entries; i++) {
        struct entry *e = &c->entries[i];
        if (e->usable && has_program(e) &&
            (best == NULL || e->report.probe.score > best->report.probe.score)) {
            best = e;
        }
    }
    return best;
}

bool backend_is_default(struct backend_catalogue *c, const char *name)
{
    pthread_mutex_lock(&c->lock);
    const struct entry *best = best_entry(c);
    bool same = best != NULL && strcmp(best->report.name, name) == 0;
    pthread_mutex_unlock(&c->lock);
    return same;
}

int catalogue_choose(struct backend_catalogue *c, const char *spec, struct entry **ret,
                     struct gqa_reason *reason)
{
    struct entry *e = spec == NULL ? best_entry(c) : find_entry(c, spec, strcspn(spec, ":"));
    if (e == NULL && spec == NULL) {
        return reason_fail(reason, -ENOENT, "no usable plugin with a program interface in %s",
                           c->n_dirs > 0 ? "the plugin folders" : "any folder: none is configured");
    }
    if (e == NULL) {
        return reason_fail(reason, -ENOENT, "no plugin is called '%.*s'", (int)strcspn(spec, ":"),
                           spec);
    }
    if (!e->usable) {
        return reason_fail(reason, -ENOTSUP, "not usable here: %s",
                           e->reason.text[0] != '\0' ? e->reason.text : "no reason given");
    }
    *ret = e;
    return 0;
}

size_t backend_catalogue_list(struct backend_catalogue *c, struct backend_info *ret, size_t max)
{
    pthread_mutex_lock(&c->lock);
    const struct entry *best = best_entry(c);
    for (size_t i = 0; i < c->n_entries && i < max; i++) {
        const struct entry *e = &c->entries[i];
        struct backend_info *info = &ret[i];
        memset(info, 0, sizeof(*info));
        snprintf(info->name, sizeof(info->name), "%s", e->report.name);
        snprintf(info->version, sizeof(info->version), "%s", e->report.version);
        snprintf(info->build, sizeof(info->build), "%s", e->report.build);
        snprintf(info->path, sizeof(info->path), "%.*s", (int)sizeof(info->path) - 1, e->path);
        snprintf(info->isa, sizeof(info->isa), "%s", e->report.probe.isa);
        snprintf(info->isas, sizeof(info->isas), "%s", e->report.probe.isas);
        snprintf(info->device, sizeof(info->device), "%s", e->report.probe.device);
        snprintf(info->reason, sizeof(info->reason), "%s", e->reason.text);
        snprintf(info->interfaces, sizeof(info->interfaces), "%s", e->report.interfaces);
        info->abi_major = e->module != NULL ? e->module->image.note.abi_major : 0;
        info->abi_minor = e->module != NULL ? e->module->image.note.abi_minor : 0;
        info->usable = e->usable;
        info->is_default = e == best;
        info->remembered = e->report.remembered;
        info->users = e->users;
        info->score = e->report.probe.score;
        info->n_devices = e->report.probe.n_devices;
        info->caps = e->report.caps;
        info->n_faults = e->n_faults;
        snprintf(info->last_fault, sizeof(info->last_fault), "%s", e->last_fault);
    }
    size_t n = c->n_entries;
    pthread_mutex_unlock(&c->lock);
    return n;
}
