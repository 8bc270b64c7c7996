#include "daemon/backend/backend_internal.h"
#include "daemon/log.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_PAGE_BYTES (2u << 20)
#define ALLOCATE_ALIGN  4096u

struct backend {
    atomic_uint refs;
    struct backend_catalogue *catalogue;
    struct entry *entry; /* where this context counts as a user */
    struct module *module;
    char name[32];
    char *spec;
    char isa[64];
    struct gqa_host host;
    struct pool *pool;
    void *context;
    /* The plugin's tables as far as both sides know them: what only this side knows is NULL. */
    struct gqa_attention attention;
    struct gqa_program program;
    bool has_program;
};

/* ---- host services ----------------------------------------------------------------------- */

static void host_log(void *data, int level, const char *message)
{
    const struct backend *b = data;
    log_write((enum log_level)level, "backend %s: %s", b->spec, message);
}

static void host_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    backend_parallel(data, fn, arg, n_tasks);
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

/* ---- opening ----------------------------------------------------------------------------- */

/* Loads the library unless it is loaded. Under the catalogue's loading lock. */
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
    const struct gqa_note_desc *note = &m->image.note; /* which was checked */
    bool sane = p != NULL && p->magic == note->magic && p->abi_major == note->abi_major &&
                p->abi_minor == note->abi_minor && p->struct_size == note->plugin_struct_size &&
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

static int check_attention(const struct gqa_attention *a, struct gqa_reason *reason)
{
    if (a == NULL) {
        return reason_fail(reason, -ENOEXEC, "it has no interface %s", GQA_ATTENTION_0);
    }
    if (a->struct_size < GQA_SIZE_TO(struct gqa_attention, observe)) {
        return reason_fail(reason, -ENOEXEC, "its interface %s has %u bytes, must have %zu",
                           GQA_ATTENTION_0, a->struct_size,
                           GQA_SIZE_TO(struct gqa_attention, observe));
    }
    if (a->supports == NULL || a->append == NULL || a->attend == NULL) {
        return reason_fail(reason, -ENOEXEC, "its interface %s is not complete", GQA_ATTENTION_0);
    }
    return 0;
}

static int check_program(const struct gqa_program *p, struct gqa_reason *reason)
{
    if (p != NULL && p->struct_size < GQA_SIZE_TO(struct gqa_program, observe)) {
        return reason_fail(reason, -ENOEXEC, "its interface %s has %u bytes, must have %zu",
                           GQA_PROGRAM_0, p->struct_size, GQA_SIZE_TO(struct gqa_program, observe));
    }
    if (p != NULL &&
        (p->pack_bytes == NULL || p->pack == NULL || p->prepare == NULL || p->release == NULL ||
         p->begin == NULL || p->run == NULL || p->end == NULL || p->data == NULL)) {
        return reason_fail(reason, -ENOEXEC, "its interface %s is not complete", GQA_PROGRAM_0);
    }
    return 0;
}

static int open_context(struct backend *b, const char *options, struct gqa_reason *reason)
{
    const struct gqa_plugin *p = b->module->plugin;
    reason->text[0] = '\0';
    int rc = p->open(&b->host, options, &b->context, reason);
    if (rc < 0) {
        b->context = NULL;
        return reason->text[0] != '\0' ? rc
                                       : reason_fail(reason, rc, "open failed: %s", strerror(-rc));
    }
    const struct gqa_attention *attention = p->get_interface(b->context, GQA_ATTENTION_0);
    const struct gqa_program *program = p->get_interface(b->context, GQA_PROGRAM_0);
    rc = check_attention(attention, reason);
    rc = rc < 0 ? rc : check_program(program, reason);
    if (rc < 0) {
        return rc;
    }
    gqa_take(&b->attention, sizeof(b->attention), attention);
    b->has_program = program != NULL;
    if (b->has_program) {
        gqa_take(&b->program, sizeof(b->program), program);
    }
    return 0;
}

/* Counts the backend as a user of the entry that spec names. */
static int take_module(struct backend *b, const char *spec, struct gqa_reason *reason)
{
    struct backend_catalogue *c = b->catalogue;
    const char *colon = spec != NULL ? strchr(spec, ':') : NULL;
    pthread_mutex_lock(&c->lock);
    int rc = catalogue_choose(c, spec, &b->entry, reason);
    if (rc == 0) {
        b->module = b->entry->module;
        b->module->refs++;
        b->entry->users++;
        snprintf(b->name, sizeof(b->name), "%s", b->entry->report.name);
        note_isa(b, colon != NULL ? colon + 1 : "", b->entry->report.probe.isa);
    }
    pthread_mutex_unlock(&c->lock);
    if (rc < 0) {
        return rc;
    }
    b->spec = strdup(spec != NULL ? spec : b->name);
    if (b->spec == NULL) {
        return reason_fail(reason, -ENOMEM, "no memory");
    }
    pthread_mutex_lock(&c->loading);
    rc = module_open(b->module, reason);
    pthread_mutex_unlock(&c->loading);
    return rc;
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
        .abi_major = GQA_PLUGIN_ABI_MAJOR,
        .abi_minor = GQA_PLUGIN_ABI_MINOR,
    };
    const char *colon = spec != NULL ? strchr(spec, ':') : NULL;
    int rc = take_module(b, spec, reason);
    rc = rc < 0 ? rc : open_context(b, colon != NULL ? colon + 1 : "", reason);
    if (rc < 0) {
        backend_unref(b);
        return rc;
    }
    *ret = b;
    return 0;
}

void backend_note_fault(struct backend *b, const char *what)
{
    pthread_mutex_lock(&b->catalogue->lock);
    b->entry->n_faults++;
    snprintf(b->entry->last_fault, sizeof(b->entry->last_fault), "%s", what);
    pthread_mutex_unlock(&b->catalogue->lock);
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
        pthread_mutex_lock(&b->catalogue->lock);
        b->entry->users--;
        pthread_mutex_unlock(&b->catalogue->lock);
        catalogue_module_unref(b->catalogue, b->module);
    }
    free(b->spec);
    free(b);
}

void backend_parallel(const struct backend *b, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    pool_parallel(b->pool, fn, arg, n_tasks);
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
    return &b->attention;
}

const struct gqa_program *backend_program(const struct backend *b)
{
    return b->has_program ? &b->program : NULL;
}
