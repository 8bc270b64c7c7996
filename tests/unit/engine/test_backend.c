/* The loader of plugins: what it refuses and in which words, what it opens, and when code runs. */
#include "daemon/backend/backend.h"
#include "daemon/backend/image.h"
#include "tests/unit/engine/folder.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <elf.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LONG_MS  60000u
#define SHORT_MS 300u

static struct folder folder;
static struct pool *pool;

static void setup(void)
{
    folder_init(&folder);
    cr_assert(eq(int, pool_create(1, 0, &pool), 0));
    setenv("GQAD_TEST_WITNESS", folder_path(&folder, "witness"), 1);
}

static void teardown(void)
{
    pool_destroy(pool);
    folder_finish(&folder);
}

static unsigned char *plugin_bytes(const char *name, size_t *ret_bytes)
{
    char path[512];
    const char *dir = getenv("GQAD_TEST_PLUGINS");
    cr_assert(dir != NULL);
    snprintf(path, sizeof(path), "%s/%s.so", dir, name);
    return file_read(path, ret_bytes);
}

static void install(const char *fixture, const char *name, mode_t mode)
{
    size_t bytes;
    unsigned char *data = plugin_bytes(fixture, &bytes);
    folder_write(&folder, name, data, bytes, mode);
    free(data);
}

static struct backend_catalogue *scan(unsigned timeout_ms)
{
    const char *dirs[] = {folder.path};
    struct backend_catalogue_options options = {
        .dirs = dirs,
        .n_dirs = 1,
        .check_program = getenv("GQAD_TEST_CHECK"),
        .check_timeout_ms = timeout_ms,
    };
    struct backend_catalogue *c;
    cr_assert(eq(int, backend_catalogue_create(&options, &c), 0));
    return c;
}

/* Lists the one plugin of the folder. */
static struct backend_info only_entry(struct backend_catalogue *c)
{
    struct backend_info info[4];
    cr_assert(eq(sz, backend_catalogue_list(c, info, 4), 1));
    return info[0];
}

static void check_refused(struct backend_catalogue *c, const char *sentence)
{
    struct backend_info info = only_entry(c);
    cr_expect(not(info.usable));
    cr_expect(strstr(info.reason, sentence) != NULL, "'%s' lacks '%s'", info.reason, sentence);
    struct backend *b = NULL;
    struct gqa_reason reason = {""};
    cr_expect(eq(int, backend_open(c, info.name, pool, &b, &reason), -ENOTSUP));
    cr_expect(strstr(reason.text, sentence) != NULL, "'%s' lacks '%s'", reason.text, sentence);
    cr_expect(b == NULL);
}

/* Installs a fixture and expects the sentence. */
static void refused(const char *fixture, unsigned timeout_ms, const char *sentence)
{
    install(fixture, "it.so", 0755);
    struct backend_catalogue *c = scan(timeout_ms);
    check_refused(c, sentence);
    backend_catalogue_destroy(c);
}

static bool witness_exists(void)
{
    return access(folder_path(&folder, "witness"), F_OK) == 0;
}

TestSuite(backend, .init = setup, .fini = teardown, .timeout = 120);

Test(backend, a_good_plugin_is_listed_and_opened)
{
    install("good", "good.so", 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend_info info = only_entry(c);
    cr_expect(info.usable, "%s", info.reason);
    cr_expect(eq(str, info.name, (char *)"good"));
    cr_expect(eq(str, info.version, (char *)"1"));
    cr_expect(eq(str, info.interfaces, (char *)"gqa.attention.0"));
    cr_expect(eq(str, info.isa, (char *)"plain"));
    cr_expect(eq(u32, info.score, 1));
    cr_expect(eq(u32, info.abi_minor, GQA_PLUGIN_ABI_MINOR));
    cr_expect(not(info.is_default)); /* it has no program */
    struct backend *b;
    struct gqa_reason reason = {""};
    cr_assert(eq(int, backend_open(c, "good:isa=other", pool, &b, &reason), 0), "%s", reason.text);
    cr_expect(eq(str, (char *)backend_name(b), (char *)"good"));
    cr_expect(eq(str, (char *)backend_spec(b), (char *)"good:isa=other"));
    cr_expect(eq(str, (char *)backend_isa(b), (char *)"other"));
    cr_expect(backend_attention(b) != NULL);
    cr_expect(backend_program(b) == NULL);
    cr_expect(eq(u32, only_entry(c).users, 1));
    backend_unref(backend_ref(b));
    cr_expect(eq(u32, only_entry(c).users, 1));
    backend_unref(b);
    cr_expect(eq(u32, only_entry(c).users, 0));
    backend_catalogue_destroy(c);
}

Test(backend, the_default_needs_a_program)
{
    install("good", "good.so", 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend *b;
    struct gqa_reason reason = {""};
    cr_expect(eq(int, backend_open(c, NULL, pool, &b, &reason), -ENOENT));
    cr_expect(strstr(reason.text, "a program interface in the plugin folders") != NULL, "%s",
              reason.text);
    cr_expect(eq(int, backend_open(c, "other:isa=c", pool, &b, &reason), -ENOENT));
    cr_expect(strstr(reason.text, "'other'") != NULL, "%s", reason.text);
    backend_catalogue_destroy(c);
}

/* ---- other minor versions ---------------------------------------------------------------- */

static void opens(const char *plugin, const char *spec, uint32_t minor)
{
    install(plugin, "it.so", 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend_info info = only_entry(c);
    struct gqa_reason reason = {""};
    struct backend *b;
    cr_assert(info.usable, "%s: %s", plugin, info.reason);
    cr_expect(eq(u32, info.abi_minor, minor));
    cr_assert(eq(int, backend_open(c, spec, pool, &b, &reason), 0), "%s", reason.text);
    /* As long as this host knows the table, whatever the plugin does. */
    cr_expect(le(u32, backend_attention(b)->struct_size, sizeof(struct gqa_attention)));
    cr_expect(backend_attention(b)->observe == NULL);
    backend_unref(b);
    backend_catalogue_destroy(c);
}

Test(backend, a_plugin_of_a_later_minor_version)
{
    opens("newer_minor", "newer_minor", GQA_PLUGIN_ABI_MINOR + 7);
    struct backend_catalogue *c = scan(LONG_MS);
    struct gqa_reason reason = {""};
    struct backend *b;
    cr_expect(eq(int, backend_open(c, "newer_minor:needs=newer", pool, &b, &reason), -ENOTSUP));
    cr_expect(strstr(reason.text, "needs a host of ABI 1.7, this one has 1.0") != NULL, "%s",
              reason.text);
    backend_catalogue_destroy(c);
}

Test(backend, a_plugin_of_the_first_version)
{
    opens("frozen_1_0", "minimal", 0);
}

Test(backend, what_only_one_side_knows)
{
    struct {
        struct gqa_attn_layer was;
        uint64_t more;
    } longer = {{.struct_size = sizeof(longer), .layer = 5, .window = 7}, 9};
    struct gqa_attn_layer same;
    gqa_take(&same, sizeof(same), &longer);
    cr_expect(eq(u32, same.struct_size, sizeof(same)));
    cr_expect(eq(u32, same.window, 7));
    const struct gqa_attn_layer shorter = {
        .struct_size = GQA_SIZE_TO(struct gqa_attn_layer, layer), .layer = 5, .window = 7};
    gqa_take(&same, sizeof(same), &shorter);
    cr_expect(eq(u32, same.layer, 5));
    cr_expect(eq(u32, same.window, 0));
    bool has_layer = GQA_HAS(&same, layer), has_window = GQA_HAS(&same, window);
    cr_expect(has_layer);
    cr_expect(not(has_window));
}

/* ---- refused before any of its code runs ------------------------------------------------- */

Test(backend, another_magic)
{
    refused("bad_magic", LONG_MS, "the note's magic is 0x12345678");
    cr_expect(not(witness_exists()));
}

Test(backend, another_major_version)
{
    refused("older_major", LONG_MS,
            "built for ABI 0.6, this daemon has 1.0: the first number must be the same");
    refused("newer_major", LONG_MS,
            "built for ABI 2.6, this daemon has 1.0: the first number must be the same");
    cr_expect(not(witness_exists()));
}

Test(backend, a_short_struct)
{
    refused("short_struct", LONG_MS, "its gqa_plugin has 16 bytes");
    cr_expect(not(witness_exists()));
}

Test(backend, a_short_table)
{
    refused("short_table", LONG_MS, "its gqa.attention.0 has 40 bytes, must have 48");
}

Test(backend, a_symbol_that_is_not_what_the_note_says)
{
    install("two_minors", "it.so", 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend *b;
    struct gqa_reason reason = {""};
    cr_expect(eq(int, backend_open(c, "two_minors", pool, &b, &reason), -ENOEXEC));
    cr_expect(strstr(reason.text, "its symbol gqa_plugin is not what the note promises") != NULL,
              "%s", reason.text);
    backend_catalogue_destroy(c);
}

Test(backend, no_note)
{
    refused("no_note", LONG_MS, "no ELF note of a gqa plugin");
    cr_expect(not(witness_exists()));
}

Test(backend, a_witness_would_be_seen)
{
    size_t bytes;
    unsigned char *data = plugin_bytes("bad_magic", &bytes);
    const uint32_t wrong = 0x12345678, right = GQA_PLUGIN_MAGIC;
    unsigned char *at = memmem(data, bytes, &wrong, sizeof(wrong));
    cr_assert(at != NULL);
    memcpy(at, &right, sizeof(right));
    folder_write(&folder, "it.so", data, bytes, 0755);
    free(data);
    struct backend_catalogue *c = scan(LONG_MS);
    cr_expect(only_entry(c).usable, "%s", only_entry(c).reason);
    cr_expect(witness_exists());
    backend_catalogue_destroy(c);
}

Test(backend, writable_by_others)
{
    install("good", "good.so", 0775);
    struct backend_catalogue *c = scan(LONG_MS);
    check_refused(c, "mode 0775 lets others write to it");
    backend_catalogue_destroy(c);
}

Test(backend, a_foreign_owner)
{
    if (geteuid() != 0) {
        cr_skip_test("only root can give a file away");
    }
    install("good", "good.so", 0755);
    cr_assert(eq(int, chown(folder_path(&folder, "good.so"), 12345, 12345), 0));
    struct backend_catalogue *c = scan(LONG_MS);
    check_refused(c, "owned by uid 12345");
    backend_catalogue_destroy(c);
}

Test(backend, not_a_library)
{
    folder_write(&folder, "it.so", "#!/bin/sh\nexit 0\n", 17, 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    check_refused(c, "not a 64-bit shared object");
    backend_catalogue_destroy(c);
}

Test(backend, a_folder_and_a_dangling_link_are_refused)
{
    cr_assert(eq(int, mkdir(folder_path(&folder, "dir.so"), 0755), 0));
    cr_assert(eq(int, symlink("/nonexistent/x.so", folder_path(&folder, "link.so")), 0));
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend_info info[2];
    cr_assert(eq(sz, backend_catalogue_list(c, info, 2), 2));
    cr_expect(strstr(info[0].reason, "not a regular file") != NULL, "%s", info[0].reason);
    cr_expect(strstr(info[1].reason, "cannot be opened") != NULL, "%s", info[1].reason);
    backend_catalogue_destroy(c);
    rmdir(folder_path(&folder, "dir.so"));
}

/* A file cut anywhere is refused by its note, or by the child; never more. */
Test(backend, a_truncated_file)
{
    size_t bytes;
    unsigned char *data = plugin_bytes("good", &bytes);
    for (size_t cut = 0; cut < bytes; cut = cut < 1024 ? cut + 61 : cut + 1777) {
        struct plugin_image image;
        struct gqa_reason reason = {""};
        folder_write(&folder, "it.so", data, cut, 0755);
        int rc = plugin_image_load(folder_path(&folder, "it.so"), &image, &reason);
        if (rc == 0) {
            plugin_image_unload(&image);
        } else {
            cr_expect(eq(int, rc, -ENOEXEC));
            cr_expect(reason.text[0] != '\0');
        }
    }
    folder_write(&folder, "it.so", data, 4200, 0755); /* the note is whole, the code is not */
    struct backend_catalogue *c = scan(LONG_MS);
    cr_expect(not(only_entry(c).usable));
    cr_expect(only_entry(c).reason[0] != '\0');
    backend_catalogue_destroy(c);
    free(data);
}

/* Every field of the headers that leads to the note, set to values that lead elsewhere. */
Test(backend, notes_that_point_outside)
{
    static const uint64_t values[] = {UINT64_MAX, UINT64_MAX - 11, 1ull << 63, 1ull << 32};
    size_t bytes;
    unsigned char *data = plugin_bytes("good", &bytes);
    unsigned char *copy = malloc(bytes);
    Elf64_Ehdr elf;
    memcpy(&elf, data, sizeof(elf));
    unsigned n_notes = 0;
    for (unsigned i = 0; i < elf.e_phnum; i++) {
        size_t at = elf.e_phoff + i * sizeof(Elf64_Phdr);
        Elf64_Phdr segment;
        memcpy(&segment, data + at, sizeof(segment));
        if (segment.p_type != PT_NOTE) {
            continue;
        }
        n_notes++;
        for (size_t v = 0; v < sizeof(values) / sizeof(values[0]); v++) {
            struct plugin_image image;
            struct gqa_reason reason = {""};
            memcpy(copy, data, bytes);
            for (unsigned k = 0; k < elf.e_phnum; k++) {
                Elf64_Phdr other;
                size_t place = elf.e_phoff + k * sizeof(other);
                memcpy(&other, copy + place, sizeof(other));
                other.p_offset = other.p_type == PT_NOTE ? values[v] : other.p_offset;
                memcpy(copy + place, &other, sizeof(other));
            }
            folder_write(&folder, "it.so", copy, bytes, 0755);
            int rc = plugin_image_load(folder_path(&folder, "it.so"), &image, &reason);
            cr_expect(eq(int, rc, -ENOEXEC));
            cr_expect(strstr(reason.text, "no ELF note") != NULL, "%s", reason.text);
        }
    }
    cr_expect(lt(uint, 0, n_notes));
    elf.e_phoff = bytes - 8;
    memcpy(data, &elf, sizeof(elf));
    folder_write(&folder, "it.so", data, bytes, 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    check_refused(c, "program header 0 lies outside the file");
    backend_catalogue_destroy(c);
    free(copy);
    free(data);
}

/* Sizes inside the note itself that wrap or never end. */
Test(backend, notes_of_absurd_sizes)
{
    static const uint32_t sizes[] = {0, 1, 5, 0x7fffffff, UINT32_MAX - 2, UINT32_MAX};
    size_t bytes;
    unsigned char *data = plugin_bytes("good", &bytes);
    const uint32_t magic = GQA_PLUGIN_MAGIC;
    const struct {
        uint32_t name_bytes, desc_bytes, type;
        char name[4];
    } head = {sizeof(GQA_NOTE_NAME), sizeof(struct gqa_note_desc), GQA_NOTE_TYPE, GQA_NOTE_NAME};
    unsigned char *at = memmem(data, bytes, &head, sizeof(head));
    cr_assert(at != NULL && memcmp(at + sizeof(head), &magic, sizeof(magic)) == 0);
    for (unsigned field = 0; field < 2; field++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            struct plugin_image image;
            struct gqa_reason reason = {""};
            memcpy(at, &head, sizeof(head));
            memcpy(at + 4 * field, &sizes[i], sizeof(sizes[i]));
            folder_write(&folder, "it.so", data, bytes, 0755);
            cr_expect(eq(int, plugin_image_load(folder_path(&folder, "it.so"), &image, &reason),
                         -ENOEXEC));
        }
    }
    free(data);
}

/* ---- refused in the child ---------------------------------------------------------------- */

Test(backend, no_symbol)
{
    refused("no_symbol", LONG_MS, "no symbol gqa_plugin of ABI 1");
}

Test(backend, a_constructor_that_crashes)
{
    refused("crash_constructor", LONG_MS, "crashed with signal 11");
}

Test(backend, a_probe_that_crashes)
{
    refused("crash_probe", LONG_MS, "crashed with signal 11");
}

Test(backend, a_probe_that_hangs)
{
    refused("hang_probe", SHORT_MS, "did not end within 300 ms");
}

Test(backend, a_probe_that_hangs_without_output)
{
    refused("hang_silent", SHORT_MS, "did not end within 300 ms");
}

Test(backend, a_probe_that_says_no)
{
    refused("unusable", LONG_MS, "needs a machine of the year 2040");
}

Test(backend, wrong_results)
{
    refused("wrong", LONG_MS, "wrong by 0.0");
}

Test(backend, results_that_are_not_numbers)
{
    refused("nan", LONG_MS, "wrong by inf");
}

Test(backend, a_program_that_computes_nothing)
{
    refused("idle_program", LONG_MS, "norm, linear, glu, F32: wrong by");
}

Test(backend, a_plugin_that_quits)
{
    refused("quits", LONG_MS, "its check ended early, with status 0");
}

Test(backend, a_name_that_is_none)
{
    refused("bad_name", LONG_MS, "its name is not made of");
}

Test(backend, an_interface_without_functions)
{
    refused("incomplete", LONG_MS, "it has no complete gqa.attention.0");
}

Test(backend, no_check_program)
{
    install("good", "good.so", 0755);
    const char *dirs[] = {folder.path};
    struct backend_catalogue_options options = {
        .dirs = dirs, .n_dirs = 1, .check_program = "/nonexistent/check"};
    struct backend_catalogue *c;
    cr_assert(eq(int, backend_catalogue_create(&options, &c), 0));
    check_refused(c, "/nonexistent/check");
    backend_catalogue_destroy(c);
}

/* ---- files that change ------------------------------------------------------------------- */

Test(backend, a_replaced_file_serves_new_contexts_and_the_old_one_its_own)
{
    install("good", "good.so", 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend *first, *second;
    struct gqa_reason reason = {""};
    cr_assert(eq(int, backend_open(c, "good", pool, &first, &reason), 0), "%s", reason.text);
    const struct gqa_attention *old_table = backend_attention(first);

    install("good_2", "good.so", 0755);
    cr_expect(eq(str, only_entry(c).version, (char *)"1"));
    cr_assert(eq(int, backend_catalogue_rescan(c), 0));
    cr_expect(eq(str, only_entry(c).version, (char *)"2"));
    cr_expect(eq(u32, only_entry(c).users, 1));
    cr_assert(eq(int, backend_open(c, "good", pool, &second, &reason), 0), "%s", reason.text);
    cr_expect(backend_attention(second) != old_table);
    cr_expect(eq(u32, only_entry(c).users, 2));

    const struct gqa_attn_layer layer = {.k_type = GQA_TYPE_F16};
    cr_expect(eq(int, old_table->supports(backend_context(first), &layer, &reason), -ENOTSUP));
    backend_unref(first);
    cr_expect(eq(u32, only_entry(c).users, 1));
    backend_unref(second);
    cr_expect(eq(u32, only_entry(c).users, 0));
    backend_catalogue_destroy(c);
}

Test(backend, a_file_that_turns_bad_or_goes_leaves_open_contexts)
{
    install("good", "good.so", 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend *b;
    struct gqa_reason reason = {""};
    cr_assert(eq(int, backend_open(c, "good", pool, &b, &reason), 0), "%s", reason.text);
    install("bad_magic", "good.so", 0755);
    cr_assert(eq(int, backend_catalogue_rescan(c), 0));
    check_refused(c, "magic");
    cr_expect(eq(u32, only_entry(c).users, 1));
    unlink(folder_path(&folder, "good.so"));
    cr_assert(eq(int, backend_catalogue_rescan(c), 0));
    check_refused(c, "its file is gone");
    const struct gqa_attn_layer layer = {.k_type = GQA_TYPE_F32, .v_type = GQA_TYPE_F32};
    cr_expect(eq(int, backend_attention(b)->supports(backend_context(b), &layer, &reason), 0));
    backend_unref(b);
    cr_expect(eq(u32, only_entry(c).users, 0));
    install("good_2", "good.so", 0755);
    cr_assert(eq(int, backend_catalogue_rescan(c), 0));
    cr_expect(only_entry(c).usable);
    backend_catalogue_destroy(c);
}

Test(backend, of_two_plugins_with_one_name_the_first_counts)
{
    install("good", "a.so", 0755);
    install("good_2", "b.so", 0755);
    struct backend_catalogue *c = scan(LONG_MS);
    struct backend_info info[2];
    cr_assert(eq(sz, backend_catalogue_list(c, info, 2), 2));
    cr_expect(info[0].usable && strcmp(info[0].version, "1") == 0);
    cr_expect(not(info[1].usable));
    cr_expect(strstr(info[1].reason, "is called 'good' too") != NULL, "%s", info[1].reason);
    backend_catalogue_destroy(c);
}

/* ---- threads ----------------------------------------------------------------------------- */

static atomic_bool rescan_ended;

static void *rescan_main(void *arg)
{
    backend_catalogue_rescan(arg);
    atomic_store(&rescan_ended, true);
    return NULL;
}

/* A child that hangs for the whole timeout holds up nobody who lists or opens. */
Test(backend, a_long_scan_does_not_block_list_and_open)
{
    install("good", "good.so", 0755);
    struct backend_catalogue *c = scan(2000);
    install("hang_probe", "hang.so", 0755);
    pthread_t thread;
    cr_assert(eq(int, pthread_create(&thread, NULL, rescan_main, c), 0));
    unsigned opened = 0;
    while (!atomic_load(&rescan_ended)) {
        struct backend *b;
        struct gqa_reason reason = {""};
        cr_assert(eq(int, backend_open(c, "good", pool, &b, &reason), 0), "%s", reason.text);
        backend_unref(b);
        opened++;
        usleep(1000);
    }
    pthread_join(thread, NULL);
    cr_expect(lt(uint, 1, opened));
    struct backend_info info[2];
    cr_expect(eq(sz, backend_catalogue_list(c, info, 2), 2));
    backend_catalogue_destroy(c);
}
