#include "daemon/options.h"

#include <argp.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sysexits.h>

/* Keys of long options without a letter: settings first, then their negations, then the rest. */
enum {
    KEY_SETTING = 1000,
    KEY_NO_SETTING = 2000,
    KEY_USER = 3000,
    KEY_CONFIG,
    KEY_CHECK_CONFIG,
    KEY_SERVE_FD,
    KEY_LIFETIME_FD,
};

#define OPTIONS_MAX    128
#define NAME_BYTES_MAX 48

static char names[OPTIONS_MAX][NAME_BYTES_MAX];
static struct argp_option table[OPTIONS_MAX];

/* llama.cpp's two-letter options, which getopt would read as bundles of one-letter ones. */
static const struct {
    const char *from, *to;
} spellings[] = {
    {"-np", "--parallel"},       {"-ctk", "--cache-type-k"},  {"-ctv", "--cache-type-v"},
    {"--ctk", "--cache-type-k"}, {"--ctv", "--cache-type-v"},
};

static const char *argument_name(const struct config_setting *s)
{
    switch (s->kind) {
    case CONFIG_U32:
        return "N";
    case CONFIG_BYTES:
        return "BYTES";
    case CONFIG_LEVEL:
        return "LEVEL";
    case CONFIG_CACHE:
        return "TYPE";
    case CONFIG_BOOL:
        return "BOOL";
    case CONFIG_STRING:
    case CONFIG_LIST:
        break;
    }
    return strstr(s->key, "dir") ? "DIR" : "NAME";
}

static const char *dashed(size_t i, const char *prefix, const char *key)
{
    snprintf(names[i], NAME_BYTES_MAX, "%s%s", prefix, key);
    for (char *c = names[i]; *c; c++) {
        *c = *c == '_' ? '-' : *c;
    }
    return names[i];
}

static void build_table(void)
{
    static const struct argp_option own[] = {
        {"user", KEY_USER, NULL, 0, "a private daemon of the calling user", 0},
        {"config", KEY_CONFIG, "FILE", 0, "configuration file", 0},
        {"check-config", KEY_CHECK_CONFIG, NULL, 0, "read the configuration and end", 0},
        {"serve-fd", KEY_SERVE_FD, "FD", 0, "an open connection to serve; listen only if --socket",
         0},
        {"lifetime-fd", KEY_LIFETIME_FD, "FD", 0, "end when this pipe reads end-of-file", 0},
    };
    size_t n = 0;
    for (size_t i = 0; i < sizeof(own) / sizeof(own[0]); i++) {
        table[n++] = own[i];
    }
    for (size_t i = 0; i < config_n_settings() && n + 2 < OPTIONS_MAX; i++) {
        const struct config_setting *s = config_setting_at(i);
        int key = s->flag ? s->flag : KEY_SETTING + (int)i;
        table[n] = (struct argp_option){dashed(n, "", s->key),
                                        key,
                                        argument_name(s),
                                        s->kind == CONFIG_BOOL ? OPTION_ARG_OPTIONAL : 0,
                                        s->doc,
                                        0};
        n++;
        if (s->kind == CONFIG_BOOL) {
            table[n] = (struct argp_option){
                dashed(n, "no-", s->key), KEY_NO_SETTING + (int)i, NULL, OPTION_HIDDEN, NULL, 0};
            n++;
        }
    }
    table[n] = (struct argp_option){0};
}

static const struct config_setting *setting_of_key(int key, bool *ret_negated)
{
    *ret_negated = key >= KEY_NO_SETTING && key < KEY_USER;
    if (*ret_negated) {
        return config_setting_at((size_t)(key - KEY_NO_SETTING));
    }
    if (key >= KEY_SETTING && key < KEY_NO_SETTING) {
        return config_setting_at((size_t)(key - KEY_SETTING));
    }
    for (size_t i = 0; i < config_n_settings(); i++) {
        if (config_setting_at(i)->flag && config_setting_at(i)->flag == key) {
            return config_setting_at(i);
        }
    }
    return NULL;
}

static int parse_fd(const char *text, struct argp_state *state, const char *option)
{
    char *end;
    errno = 0;
    long fd = strtol(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || fd < 0 || fd > INT_MAX) {
        argp_error(state, "--%s: '%s' is not a file descriptor", option, text);
    }
    return (int)fd;
}

static error_t add_flag(struct options *o, const struct config_setting *s, const char *value)
{
    struct config_flag *flags = (struct config_flag *)o->source.flags;
    flags[o->source.n_flags++] = (struct config_flag){s, value};
    o->socket_given |= strcmp(s->key, "socket") == 0;
    o->cache_given |= strcmp(s->key, "cache_dir") == 0;
    return 0;
}

static error_t parse_option(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    bool negated;
    switch (key) {
    case KEY_USER:
        o->source.user_mode = true;
        return 0;
    case KEY_CONFIG:
        o->source.file = arg;
        return 0;
    case KEY_CHECK_CONFIG:
        o->check_config = true;
        return 0;
    case KEY_SERVE_FD:
        o->serve_fd = parse_fd(arg, state, "serve-fd");
        return 0;
    case KEY_LIFETIME_FD:
        o->lifetime_fd = parse_fd(arg, state, "lifetime-fd");
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "'%s': gqad takes options only", arg);
        return EINVAL;
    default:
        break;
    }
    const struct config_setting *s = setting_of_key(key, &negated);
    if (!s) {
        return ARGP_ERR_UNKNOWN;
    }
    return add_flag(o, s, negated ? "false" : (arg ? arg : "true"));
}

static void respell(char **argv, int argc)
{
    for (int i = 1; i < argc; i++) {
        for (size_t k = 0; k < sizeof(spellings) / sizeof(spellings[0]); k++) {
            if (strcmp(argv[i], spellings[k].from) == 0) {
                argv[i] = (char *)spellings[k].to;
                break;
            }
        }
    }
}

int options_parse(int argc, char **argv, struct options *ret)
{
    static const char doc[] =
        "gqad serves language models to local programs over a Unix socket."
        "\vEvery long option with a value is also a key of the configuration file (with _ for -) "
        "and, with GQAD_ in front, a variable of the environment. See gqad(8) and gqad.conf(5).";
    const struct argp argp = {.options = table, .parser = parse_option, .doc = doc};
    struct options o = {.serve_fd = -1, .lifetime_fd = -1};

    o.argv = calloc((size_t)argc + 1, sizeof(*o.argv));
    o.source.flags = calloc((size_t)argc + 1, sizeof(*o.source.flags));
    if (!o.argv || !o.source.flags) {
        options_finish(&o);
        return -ENOMEM;
    }
    memcpy(o.argv, argv, (size_t)argc * sizeof(*argv));
    respell(o.argv, argc);
    build_table();
    argp_err_exit_status = EX_USAGE;
    /* Assigned, not defined: a definition of ours would be hidden from libc. */
    argp_program_version = "gqad " GQAD_VERSION;
    int rc = argp_parse(&argp, argc, o.argv, 0, NULL, &o);
    if (rc != 0) {
        options_finish(&o);
        return -rc;
    }
    o.source.wants_socket = o.serve_fd < 0 || o.socket_given;
    *ret = o;
    return 0;
}

void options_finish(struct options *o)
{
    free((void *)o->source.flags);
    free(o->argv);
    *o = (struct options){.serve_fd = -1, .lifetime_fd = -1};
}
