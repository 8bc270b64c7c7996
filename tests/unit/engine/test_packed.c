/* A model's packed weights: the file of an earlier load computes the same bits as packing does;
 * what becomes of a model whose files are cut while it serves; who may share them. */
#include "daemon/kv/guard.h"
#include "daemon/model/model_internal.h"
#include "daemon/model/registry.h"
#include "tests/unit/engine/parts.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct parts parts;
static struct folder store;
static struct weights_cache *cache;
static char model_path[128], digests[128];

static void setup(void)
{
    char command[512];
    parts_init(&parts, 2);
    folder_init(&store);
    cr_assert(eq(int, kv_guard_install(), 0));
    const struct weights_cache_options options = {.folder = store.path};
    cr_assert(eq(int, weights_cache_create(&options, &cache), 0));
    snprintf(model_path, sizeof(model_path), "%s", folder_path(&parts.folder, "q.gguf"));
    snprintf(digests, sizeof(digests), "%s", folder_path(&parts.folder, "digests"));
    snprintf(command, sizeof(command), "%s --shape tiny --type q4_0 -o %s >/dev/null",
             getenv("GQAD_TEST_SYNTH"), model_path);
    cr_assert(eq(int, system(command), 0));
}

static void teardown(void)
{
    weights_cache_destroy(cache);
    folder_finish(&store);
    parts_finish(&parts);
}

TestSuite(packed, .init = setup, .fini = teardown, .timeout = 120);

static struct model_options model_options(void)
{
    struct model_options o = parts_model_options();
    o.path = model_path;
    o.name = "q";
    o.weights = cache;
    o.digests = digests;
    return o;
}

static int try_load(const char *backend, struct model **ret)
{
    struct model_options o = model_options();
    struct fmt_error err = {""};
    o.backend = backend;
    return model_load(&o, parts.catalogue, parts.pool, parts.io, NULL, NULL, NULL, ret, &err);
}

static struct model *load(const char *backend)
{
    struct model *m = NULL;
    cr_assert(eq(int, try_load(backend, &m), 0));
    return m;
}

static bool came_from(const struct model *m, const char *source)
{
    struct model_facts f;
    model_facts(m, &f);
    return strcmp(f.packed_source, source) == 0;
}

/* The one file of the folder. */
static const char *packed_path(void)
{
    static char name[300];
    unsigned n = 0;
    DIR *d = opendir(store.path);
    cr_assert(d != NULL);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        if (e->d_name[0] != '.') {
            snprintf(name, sizeof(name), "%s", e->d_name);
            n++;
        }
    }
    closedir(d);
    cr_assert(eq(u32, n, 1));
    return folder_path(&store, name);
}

/* All packed bytes of the program's weights. */
static void *copy_packed(const struct model *m, uint64_t *ret_bytes)
{
    struct packed_facts f;
    packed_weights_facts(m->plan->packed, &f);
    const void *first = NULL;
    for (uint32_t i = 0; i < m->plan->program.n_weights && first == NULL; i++) {
        first = m->plan->program.weights[i].packed;
    }
    cr_assert(first != NULL && f.bytes > 0);
    void *copy = malloc(f.bytes);
    cr_assert(copy != NULL);
    memcpy(copy, first, f.bytes);
    *ret_bytes = f.bytes;
    return copy;
}

Test(packed, a_second_load_maps_what_the_first_has_packed)
{
    uint64_t bytes, again_bytes;
    struct model *m = load(NULL);
    cr_expect(came_from(m, "packed"));
    void *packed = copy_packed(m, &bytes);
    model_unref(m); /* the file is whole then */
    packed_path();
    m = load(NULL);
    cr_expect(came_from(m, "file"));
    void *again = copy_packed(m, &again_bytes);
    cr_assert(eq(u64, bytes, again_bytes));
    cr_expect(eq(int, memcmp(packed, again, bytes), 0));
    model_unref(m);
    free(packed);
    free(again);
}

Test(packed, a_copy_of_the_model_finds_them_by_what_it_holds)
{
    size_t bytes;
    model_unref(load(NULL));
    unsigned char *image = file_read(model_path, &bytes);
    folder_write(&parts.folder, "copy.gguf", image, bytes, 0600);
    snprintf(model_path, sizeof(model_path), "%s", folder_path(&parts.folder, "copy.gguf"));
    struct model *m = load(NULL);
    cr_expect(came_from(m, "file"));
    model_unref(m);
    /* Other weights, other file. */
    image[bytes - 1] ^= 1;
    folder_write(&parts.folder, "copy.gguf", image, bytes, 0600);
    m = load(NULL);
    cr_expect(came_from(m, "packed"));
    model_unref(m);
    free(image);
}

Test(packed, without_a_cache_every_load_packs)
{
    weights_cache_destroy(cache);
    cache = NULL;
    for (int i = 0; i < 2; i++) {
        struct model *m = load(NULL);
        cr_expect(came_from(m, "packed"));
        model_unref(m);
    }
}

Test(packed, levels_of_a_backend_share_them)
{
    struct model *m = load("cpu:isa=c"), *other = load(NULL);
    cr_expect(not(came_from(other, "none")));
    struct packed_weights *same =
        packed_weights_share(m->plan->packed, other->plan->backend, &other->plan->program);
    cr_expect(same == m->plan->packed);
    for (uint32_t i = 0; i < m->plan->program.n_weights; i++) {
        cr_expect(other->plan->program.weights[i].packed == m->plan->program.weights[i].packed);
    }
    packed_weights_unref(same);
    model_unref(other);
    model_unref(m);
}

static void cut(const char *path)
{
    cr_assert(eq(int, truncate(path, 4096), 0));
}

/* Reads all that a step would. */
static void touch(const struct model *m)
{
    uint64_t bytes;
    free(copy_packed(m, &bytes));
}

Test(packed, a_file_that_is_cut_damages_its_model_and_the_next_packs_again)
{
    model_unref(load(NULL));
    struct model *m = load(NULL);
    cr_expect(not(model_is_damaged(m)));
    cut(packed_path());
    touch(m);
    cr_expect(model_is_damaged(m));
    model_unref(m);
    m = load(NULL);
    cr_expect(came_from(m, "packed"));
    cr_expect(not(model_is_damaged(m)));
    model_unref(m);
}

Test(packed, a_damaged_model_leaves_the_registry)
{
    const char *dirs[] = {parts.folder.path};
    struct registry *registry;
    struct registry_options o = {
        .dirs = dirs,
        .n_dirs = 1,
        .catalogue = parts.catalogue,
        .pool = parts.pool,
        .io = parts.io,
        .defaults = model_options(),
    };
    model_unref(load(NULL));
    cr_assert(eq(int, registry_create(&o, &registry), 0));
    struct model *m = parts_registry_load(registry, "q");
    struct model *same = registry_get(registry, "q");
    cr_expect(same == m);
    model_unref(same);
    cut(packed_path());
    touch(m);
    cr_expect(registry_get(registry, "q") == NULL);
    model_unref(m);
    m = parts_registry_load(registry, "q");
    cr_expect(not(model_is_damaged(m)));
    model_unref(m);
    registry_destroy(registry);
}
