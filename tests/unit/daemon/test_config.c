/* Settings from file, environment and flags. */
#include "daemon/config.h"
#include "daemon/log.h"

#include <gqa/plugin.h>

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char path[] = "/tmp/gqad-config-XXXXXX";

static void write_file(const char *text)
{
    static bool made;
    if (!made) {
        int fd = mkstemp(path);
        cr_assert_geq(fd, 0);
        close(fd);
        made = true;
    }
    FILE *f = fopen(path, "w");
    cr_assert_not_null(f);
    fputs(text, f);
    fclose(f);
}

static const struct config_setting *setting(const char *key)
{
    for (size_t i = 0; i < config_n_settings(); i++) {
        if (strcmp(config_setting_at(i)->key, key) == 0) {
            return config_setting_at(i);
        }
    }
    cr_assert_fail("no setting %s", key);
    return NULL;
}

static struct config *make(const char *text, const struct config_flag *flags, size_t n_flags)
{
    struct config_error err = {""};
    struct config *c = NULL;
    write_file(text);
    const struct config_source source = {
        .user_mode = true, .wants_socket = false, .file = path, .flags = flags, .n_flags = n_flags};
    cr_assert_eq(config_create(&source, &c, &err), 0, "%s", err.text);
    return c;
}

/* The sentence that a file is refused with. */
static const char *refusal(const char *text)
{
    static struct config_error err;
    struct config *c = NULL;
    write_file(text);
    const struct config_source source = {.user_mode = true, .file = path};
    cr_assert_eq(config_create(&source, &c, &err), -EINVAL, "%s was taken", text);
    cr_assert_null(c);
    return err.text;
}

static void remove_file(void)
{
    unlink(path);
}

TestSuite(config, .fini = remove_file);

Test(config, defaults_are_the_tables)
{
    struct config *c = make("", NULL, 0);
    cr_assert_eq(c->batch_size, 512);
    cr_assert_eq(c->cache_type_k, GQA_TYPE_F16);
    cr_assert_eq(c->log_level, LOG_LEVEL_INFO);
    cr_assert(c->io_uring);
    cr_assert_gt(c->threads, 0);
    cr_assert_gt(c->kv_bytes, 0);
    cr_assert_eq(c->models_dir.count, 1);
    config_destroy(c);
}

Test(config, every_kind_is_read_from_a_file)
{
    struct config *c = make("# a comment with 'a quote\n"
                            "ctx_size = 4096 // and another\n"
                            "/* over\n   lines */ kv_bytes = 3GiB\n"
                            "io_uring = off\n"
                            "cache_type_v = bf16\n"
                            "log_level = \"debug\"\n"
                            "backend = 'cpu:isa=c#1'\n"
                            "models_dir = {\"/a b\", /c}\n",
                            NULL, 0);
    cr_assert_eq(c->ctx_size, 4096);
    cr_assert_eq(c->kv_bytes, 3ull << 30);
    cr_assert_not(c->io_uring);
    cr_assert_eq(c->cache_type_v, GQA_TYPE_BF16);
    cr_assert_eq(c->log_level, LOG_LEVEL_DEBUG);
    cr_assert_str_eq(c->backend, "cpu:isa=c#1");
    cr_assert_eq(c->models_dir.count, 2);
    cr_assert_str_eq(c->models_dir.items[0], "/a b");
    cr_assert_str_eq(c->models_dir.items[1], "/c");
    config_destroy(c);
}

Test(config, flags_beat_environment_beats_file)
{
    const struct config_flag flags[] = {{setting("ctx_size"), "3"},
                                        {setting("models_dir"), "/flag"},
                                        {setting("models_dir"), "/flag2"}};
    setenv("GQAD_CTX_SIZE", "2", 1);
    setenv("GQAD_BATCH_SIZE", "22", 1);
    setenv("GQAD_PLUGIN_DIR", "/x::/y", 1);
    struct config *c = make("ctx_size = 1\nbatch_size = 11\nqueue_size = 111\n"
                            "models_dir = {\"/file\"}\nplugin_dir = {\"/file\"}\n",
                            flags, 3);
    cr_assert_eq(c->ctx_size, 3);
    cr_assert_eq(c->batch_size, 22);
    cr_assert_eq(c->queue_size, 111);
    cr_assert_eq(c->models_dir.count, 2);
    cr_assert_str_eq(c->models_dir.items[1], "/flag2");
    cr_assert_eq(c->plugin_dir.count, 2);
    cr_assert_str_eq(c->plugin_dir.items[0], "/x");
    config_destroy(c);
}

Test(config, a_fault_is_placed_and_named)
{
    static const struct {
        const char *text, *where, *what;
    } faults[] = {
        {"ctx_size = x", ":1: ", "ctx_size"},
        {"\n\n# c\n/* c\n c */\nctx_size = -1", ":6: ", "ctx_size"},
        {"ctx_size = 16777217", ":1: ", "16777216"},
        {"ctx_size = 99999999999999999999999", ":1: ", "ctx_size"},
        {"kv_bytes = 8Q", ":1: ", "8Q"},
        {"kv_bytes = 99999999999T", ":1: ", "kv_bytes"},
        {"kv_bytes = G", ":1: ", "kv_bytes"},
        {"models_dir = {\"/a\",\n\"\"}", ":2: ", "models_dir"},
        {"nothing = 1", ":1: ", "nothing"},
        {"ctx_size = ", ":1: ", ""},
        {"models_dir = {\"a", ":1: ", ""},
        {"include(\"/etc/passwd\")", ":1: ", "include"},
    };
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
        const char *text = refusal(faults[i].text);
        cr_expect(strncmp(text, path, strlen(path)) == 0, "%s: %s", faults[i].text, text);
        cr_expect(strncmp(text + strlen(path), faults[i].where, strlen(faults[i].where)) == 0,
                  "%s: %s", faults[i].text, text);
        cr_expect_not_null(strstr(text, faults[i].what), "%s: %s", faults[i].text, text);
    }
}

Test(config, a_text_that_is_too_long_is_refused)
{
    char text[5000];
    memset(text, 'x', sizeof(text));
    memcpy(text, "socket = ", 9);
    text[sizeof(text) - 1] = '\0';
    cr_assert_not_null(strstr(refusal(text), "4095"));
}

static void collect(void *arg, const struct config_setting *s)
{
    char *names = arg;
    strcat(names, s->key);
    strcat(names, s->when == CONFIG_LIVE ? "+ " : "- ");
}

Test(config, a_comparison_finds_what_changed_and_a_move_takes_it)
{
    char names[512] = "";
    struct config *a = make("ctx_size = 1\nallow_models = {a}\nmax_connections = 5", NULL, 0);
    struct config *b = make("ctx_size = 2\nallow_models = {a, b}\nmax_connections = 5", NULL, 0);
    config_compare(a, b, collect, names);
    cr_assert_str_eq(names, "allow_models+ ctx_size- ");
    config_move(a, b, setting("allow_models"));
    cr_assert_eq(a->allow_models.count, 2);
    cr_assert_eq(b->allow_models.count, 1);
    names[0] = '\0';
    config_compare(a, a, collect, names);
    cr_assert_str_eq(names, "");
    config_destroy(a);
    config_destroy(b);
}

Test(config, weights_name_users_and_are_checked)
{
    struct config_error err = {""};
    struct config *c = make("user_weight = {\"root=3\", \"1234=1000\"}\n", NULL, 0);
    struct config_weight *weights = NULL;
    cr_assert_eq(config_weights(c, &weights, &err), 0, "%s", err.text);
    cr_expect_eq(weights[0].uid, 0);
    cr_expect_eq(weights[0].weight, 3);
    cr_expect_eq(weights[1].uid, 1234);
    cr_expect_eq(weights[1].weight, 1000);
    free(weights);
    config_destroy(c);
    static const char *const bad[] = {
        "root=0",       "root=1001", "root3", "=33", "root=3x", "root=-1", "nobody-of-that-name=2",
        "99999999999=1"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        char text[80];
        snprintf(text, sizeof(text), "user_weight = {\"%s\"}\n", bad[i]);
        const char *told = refusal(text);
        cr_expect_not_null(strstr(told, bad[i]), "%s", told);
    }
}
