#include "daemon/backend/backend.h"

#include "daemon/backend/check.h"
#include "daemon/backend/image.h"
#include "daemon/log.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_PLUGINS        64
#define HUGE_PAGE_BYTES    (2u << 20)
#define ALLOCATE_ALIGN     4096u
#define CHECK_PROGRAM      "gqa-plugin-check"
#define DEFAULT_TIMEOUT_MS 20000

/* One version of a plugin's file: mapped while a backend uses it. The catalogue holds a reference
 * to the newest; backends hold theirs. */
struct module {
    unsigned refs; /* guarded by the catalogue's lock */
    struct plugin_image image;
    void *handle; /* NULL until the first open */
    const struct gqa_plugin *plugin;
};

struct entry {
    char path[PATH_MAX];
    struct module *module; /* NULL when the file was refused */
    struct plugin_report report;
    struct gqa_reason reason; /* why it is not usable */
    bool usable;
    unsigned users;
};

struct backend_catalogue {
    pthread_mutex_t lock;
    char **dirs;
    size_t n_dirs;
    char check_program[PATH_MAX];
    unsigned check_timeout_ms;
    struct entry entries[MAX_PLUGINS];
    size_t n_entries;
};

struct backend {
    atomic_uint refs;
    struct backend_catalogue *catalogue;
    struct module *module;
    char name[32];
    char *spec;
    char isa[64];
    struct gqa_host host;
    struct pool *pool;
    void *context;
    const struct gqa_attention *attention;
    const struct gqa_program *program;
};

/* ---- modules ------------------------------------------------------------------------------------
 */

static void module_unref(struct module *m)
{
    if (m == NULL || --m->refs > 0) {
        return;
    }
    if (m->handle != NULL) {
        dlclose(m->handle);
    }
    plugin_image_unload(&m->image); /* after dlclose: see image.h */
    free(m);
}

static int module_open(struct module *m, struct gqa_reason *reason)
{
    if (m->handle != NULL) {
        return 0;
    }
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", m->image.fd);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        return reason_fail(reason, -ENOEXEC, "%s", dlerror());
    }
    const struct gqa_plugin *p = dlsym(handle, GQA_PLUGIN_SYMBOL);
    bool sane = p != NULL && p->magic == GQA_PLUGIN_MAGIC && p->abi_major == GQA_PLUGIN_ABI_MAJOR &&
                p->abi_minor == GQA_PLUGIN_ABI_MINOR && p->struct_size >= sizeof(*p) &&
                p->open != NULL && p->close != NULL && p->get_interface != NULL;
    if (!sane) {
        dlclose(handle);
        return reason_fail(reason, -ENOEXEC, "its symbol %s is not what the note promises",
                           GQA_PLUGIN_SYMBOL);
    }
    m->handle = handle;
    m->plugin = p;
    return 0;
}

/* ---- the catalogue ------------------------------------------------------------------------------
 */

/* Checks one file and makes its entry, usable or not. Takes long: a child runs. */
static void examine(struct backend_catalogue *c, const char *path, struct entry *ret)
{
    memset(ret, 0, sizeof(*ret));
    snprintf(ret->path, sizeof(ret->path), "%s", path);
    const char *slash = strrchr(path, '/');
    snprintf(ret->report.name, sizeof(ret->report.name), "%.*s", (int)strcspn(slash + 1, "."),
             slash + 1);
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
    rc = plugin_check(c->check_program, m->image.fd, c->check_timeout_ms, &ret->report,
                      &ret->reason);
    ret->usable = rc == 0 && ret->report.probe.usable != 0;
    if (rc == 0 && !ret->usable) {
        reason_fail(&ret->reason, 0, "%s", ret->report.probe.reason);
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

/* A file of the folder: new, replaced or unchanged since the last scan. */
static void scan_file(struct backend_catalogue *c, const char *path)
{
    struct entry *known = find_path(c, path);
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
    if (!fresh.usable) {
        log_warning("plugin %s is not usable: %s", path, fresh.reason.text);
    }
    if (known != NULL) {
        fresh.users = known->users;
        module_unref(known->module);
        *known = fresh;
    } else if (find_entry(c, fresh.report.name, strlen(fresh.report.name)) == NULL) {
        c->entries[c->n_entries++] = fresh;
    } else {
        log_warning("plugin %s is left out: another one is called '%s'", path, fresh.report.name);
        module_unref(fresh.module);
    }
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

int backend_catalogue_rescan(struct backend_catalogue *c)
{
    pthread_mutex_lock(&c->lock);
    for (size_t i = 0; i < c->n_dirs; i++) {
        struct dirent **files;
        int n = scandir(c->dirs[i], &files, is_plugin, by_name);
        for (int k = 0; k < n; k++) {
            char path[PATH_MAX];
            int bytes = snprintf(path, sizeof(path), "%s/%s", c->dirs[i], files[k]->d_name);
            if (bytes > 0 && bytes < (int)sizeof(path)) {
                scan_file(c, path);
            }
            free(files[k]);
        }
        if (n >= 0) {
            free(files);
        }
    }
    pthread_mutex_unlock(&c->lock);
    return 0;
}

/* Beside the daemon's own binary, where both are installed; or in the build's folder of tools. */
static void find_check_program(char *ret, size_t bytes)
{
    static const char *const places[] = {"", "../tools/", "../tools/plugin-check/"};
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (n <= 0) {
        snprintf(ret, bytes, "%s", CHECK_PROGRAM);
        return;
    }
    self[n] = '\0';
    *(strrchr(self, '/') + 1) = '\0';
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        int k = snprintf(ret, bytes, "%s%s%s", self, places[i], CHECK_PROGRAM);
        if (k > 0 && (size_t)k < bytes && access(ret, X_OK) == 0) {
            return;
        }
    }
    snprintf(ret, bytes, "%s", CHECK_PROGRAM);
}

int backend_catalogue_create(const struct backend_catalogue_options *options,
                             struct backend_catalogue **ret)
{
    struct backend_catalogue *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        return -ENOMEM;
    }
    pthread_mutex_init(&c->lock, NULL);
    c->check_timeout_ms =
        options->check_timeout_ms > 0 ? options->check_timeout_ms : DEFAULT_TIMEOUT_MS;
    if (options->check_program != NULL) {
        snprintf(c->check_program, sizeof(c->check_program), "%s", options->check_program);
    } else {
        find_check_program(c->check_program, sizeof(c->check_program));
    }
    c->dirs = calloc(options->n_dirs + 1, sizeof(*c->dirs));
    int rc = c->dirs == NULL ? -ENOMEM : 0;
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
        module_unref(c->entries[i].module);
    }
    for (size_t i = 0; i < c->n_dirs; i++) {
        free(c->dirs[i]);
    }
    free(c->dirs);
    pthread_mutex_destroy(&c->lock);
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
        info->users = e->users;
        info->score = e->report.probe.score;
    }
    size_t n = c->n_entries;
    pthread_mutex_unlock(&c->lock);
    return n;
}

/* ---- host services ------------------------------------------------------------------------------
 */

static void host_log(void *data, int level, const char *message)
{
    const struct backend *b = data;
    log_write((enum log_level)level, "backend %s: %s", b->spec, message);
}

static void host_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    const struct backend *b = data;
    pool_parallel(b->pool, fn, arg, n_tasks);
}

static size_t allocation_bytes(size_t bytes)
{
    return (bytes + ALLOCATE_ALIGN - 1) & ~(size_t)(ALLOCATE_ALIGN - 1);
}

static void *host_allocate(void *data, size_t bytes)
{
    if (bytes == 0 || bytes > SIZE_MAX - ALLOCATE_ALIGN) {
        return NULL;
    }
    size_t rounded = allocation_bytes(bytes);
    void *memory = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    if (rounded >= HUGE_PAGE_BYTES) {
        madvise(memory, rounded, MADV_HUGEPAGE);
    }
    madvise(memory, rounded, MADV_DONTDUMP); /* activations are prompts in another shape */
    return memory;
}

static void host_release(void *data, void *memory, size_t bytes)
{
    if (memory != NULL) {
        munmap(memory, allocation_bytes(bytes));
    }
}

/* ---- backends -----------------------------------------------------------------------------------
 */

/* "isa=avx2" among "key=value,..." wins over what probe found best. */
static void note_isa(struct backend *b, const char *options, const char *best)
{
    snprintf(b->isa, sizeof(b->isa), "%s", best);
    for (const char *at = options; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, "isa=", 4) == 0) {
            snprintf(b->isa, sizeof(b->isa), "%.*s", (int)strcspn(at + 4, ","), at + 4);
        }
    }
}

static int open_context(struct backend *b, const char *options, struct gqa_reason *reason)
{
    const struct gqa_plugin *p = b->module->plugin;
    int rc = p->open(&b->host, options, &b->context, reason);
    if (rc < 0) {
        b->context = NULL;
        if (reason->text[0] == '\0') {
            reason_fail(reason, rc, "open failed: %s", strerror(-rc));
        }
        return rc;
    }
    b->attention = p->get_interface(b->context, GQA_ATTENTION_0);
    b->program = p->get_interface(b->context, GQA_PROGRAM_0);
    if (b->attention == NULL || b->attention->struct_size < sizeof(*b->attention)) {
        return reason_fail(reason, -ENOEXEC, "it has no interface %s", GQA_ATTENTION_0);
    }
    if (b->program != NULL && b->program->struct_size < sizeof(*b->program)) {
        return reason_fail(reason, -ENOEXEC, "its interface %s has %u bytes, must have %zu",
                           GQA_PROGRAM_0, b->program->struct_size, sizeof(*b->program));
    }
    return 0;
}

static int choose_entry(struct backend_catalogue *c, const char *spec, struct entry **ret,
                        struct gqa_reason *reason)
{
    struct entry *e = spec == NULL ? best_entry(c) : find_entry(c, spec, strcspn(spec, ":"));
    if (e == NULL && spec == NULL) {
        return reason_fail(reason, -ENOENT, "no usable plugin with a program interface in %s",
                           c->n_dirs > 0 ? c->dirs[0] : "any folder: none is configured");
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

int backend_open(struct backend_catalogue *c, const char *spec, struct pool *pool,
                 struct backend **ret, struct gqa_reason *reason)
{
    struct backend *b = calloc(1, sizeof(*b));
    if (b == NULL) {
        return reason_fail(reason, -ENOMEM, "no memory");
    }
    atomic_init(&b->refs, 1);
    b->catalogue = c;
    b->pool = pool;
    b->host = (struct gqa_host){
        .struct_size = sizeof(b->host),
        .n_threads = pool_n_threads(pool),
        .data = b,
        .log = host_log,
        .parallel = host_parallel,
        .allocate = host_allocate,
        .release = host_release,
    };
    pthread_mutex_lock(&c->lock);
    struct entry *e = NULL;
    int rc = choose_entry(c, spec, &e, reason);
    rc = rc < 0 ? rc : module_open(e->module, reason);
    if (rc == 0) {
        const char *colon = spec != NULL ? strchr(spec, ':') : NULL;
        const char *options = colon != NULL ? colon + 1 : "";
        snprintf(b->name, sizeof(b->name), "%s", e->report.name);
        note_isa(b, options, e->report.probe.isa);
        b->module = e->module;
        b->module->refs++;
        e->users++;
        b->spec = strdup(spec != NULL ? spec : e->report.name);
        rc = b->spec == NULL ? reason_fail(reason, -ENOMEM, "no memory")
                             : open_context(b, options, reason);
    }
    pthread_mutex_unlock(&c->lock);
    if (rc < 0) {
        backend_unref(b);
        return rc;
    }
    *ret = b;
    return 0;
}

struct backend *backend_ref(struct backend *b)
{
    atomic_fetch_add_explicit(&b->refs, 1, memory_order_relaxed);
    return b;
}

void backend_unref(struct backend *b)
{
    if (b == NULL || atomic_fetch_sub_explicit(&b->refs, 1, memory_order_acq_rel) > 1) {
        return;
    }
    if (b->context != NULL) {
        b->module->plugin->close(b->context);
    }
    if (b->module != NULL) {
        struct backend_catalogue *c = b->catalogue;
        pthread_mutex_lock(&c->lock);
        struct entry *e = find_entry(c, b->name, strlen(b->name));
        if (e != NULL) {
            e->users--;
        }
        module_unref(b->module);
        pthread_mutex_unlock(&c->lock);
    }
    free(b->spec);
    free(b);
}

const char *backend_name(const struct backend *b)
{
    return b->name;
}

const char *backend_spec(const struct backend *b)
{
    return b->spec;
}

const char *backend_isa(const struct backend *b)
{
    return b->isa;
}

void *backend_context(const struct backend *b)
{
    return b->context;
}

const struct gqa_attention *backend_attention(const struct backend *b)
{
    return b->attention;
}

const struct gqa_program *backend_program(const struct backend *b)
{
    return b->program;
}
