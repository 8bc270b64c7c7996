/* client/cli/verb_backend.c - gqa backend: which plugins there are, which one computes, how fast.
 *
 * The bench runs gqa-plugin-check, and nothing in the daemon: a process with the plugin alone
 * measures the plugin, and not the requests beside it; a plugin that crashes or never ends costs
 * that process; and the limits that its rates are shares of are measured by the same threads in the
 * same run. */
#include "client/cli/cli.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK_PROGRAM "gqa-plugin-check"

/* The self-test runs in a child of the daemon's, and other weights may have to be packed. */
#define USE_TIMEOUT_MS 600000u

enum { OPTION_ISA = 256, OPTION_ATTENTION_ONLY, OPTION_REQUIRE, OPTION_SHADOW, OPTION_EVERY };

struct backend {
    const char *action, *name, *model, *isa;
    bool attention_only, require, shadow;
    uint32_t every; /* 0: not given */
};

static bool is(const struct backend *b, const char *action)
{
    return strcmp(b->action, action) == 0;
}

static error_t parse_backend(int key, char *arg, struct argp_state *state)
{
    struct backend *b = state->input;
    switch (key) {
    case 'm':
        b->model = arg;
        return 0;
    case OPTION_ISA:
        b->isa = arg;
        return 0;
    case OPTION_ATTENTION_ONLY:
        b->attention_only = true;
        return 0;
    case OPTION_REQUIRE:
        b->require = true;
        return 0;
    case OPTION_SHADOW:
        b->shadow = true;
        return 0;
    case OPTION_EVERY:
        b->every = (uint32_t)cli_number(state, "every", arg, 1, 1u << 20);
        return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 1) {
            cli_usage(state, "'%s' is one argument too many", arg);
        }
        *(state->arg_num == 0 ? &b->action : &b->name) = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        cli_usage(state, "say what to do: list, use NAME, selftest NAME or bench [NAME]");
        return 0;
    case ARGP_KEY_END:
        if (b->action != NULL && !is(b, "list") && !is(b, "use") && !is(b, "selftest") &&
            !is(b, "bench")) {
            cli_usage(state, "'%s' is not known here; list, use, selftest and bench are",
                      b->action);
        }
        if (b->action != NULL && !is(b, "bench") && is(b, "list") == (b->name != NULL)) {
            cli_usage(state, b->name != NULL ? "list takes no name" : "which backend?");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static struct gqa_params *make_params(const struct backend *b, bool use)
{
    struct gqa_params *p = cli_params();
    gqa_params_str(p, "backend", b->name);
    if (b->isa != NULL) {
        gqa_params_str(p, "isa", b->isa);
    }
    if (use && b->model != NULL) {
        gqa_params_str(p, "model", b->model);
    }
    if (use) {
        gqa_params_bool(p, "attention_only", b->attention_only);
        gqa_params_bool(p, "require", b->require);
        gqa_params_bool(p, "shadow", b->shadow);
    }
    if (use && b->every > 0) {
        gqa_params_u64(p, "every", b->every);
    }
    return p;
}

/* ---- list -------------------------------------------------------------------------------- */

/* The texts of an array, with blanks between them. */
static void print_words(const json_t *array, const char *before)
{
    for (size_t i = 0; i < json_array_size(array); i++) {
        printf("%s%s", i == 0 ? before : " ", json_string_value(json_array_get(array, i)));
    }
}

static void print_entry(const json_t *e)
{
    const bool usable = json_is_true(json_object_get(e, "usable"));
    printf("%-14s %-10s %-4s %-8s %5.0f %6.0f  %s%s\n", cli_str(e, "name", ""),
           cli_str(e, "version", ""), cli_str(e, "abi", ""), cli_str(e, "isa", "-"),
           cli_num(e, "users", 0), cli_num(e, "faults", 0),
           !usable                                          ? "not usable"
           : json_is_true(json_object_get(e, "remembered")) ? "usable, remembered"
                                                            : "usable, tested",
           json_is_true(json_object_get(e, "default")) ? ", default" : "");
    if (json_object_get(e, "path") != NULL) { /* told to administrators only */
        printf("    %s\n", cli_str(e, "path", ""));
    }
    if (!usable) {
        printf("    %s\n", cli_str(e, "reason", ""));
        return;
    }
    printf("    %s", cli_str(e, "device", ""));
    if (cli_num(e, "devices", 0) > 0) {
        printf(" (%.0f devices)", cli_num(e, "devices", 0));
    }
    print_words(json_object_get(e, "isas"), "; levels ");
    print_words(json_object_get(e, "interfaces"), "; ");
    print_words(json_object_get(e, "attention"), "; attention can ");
    printf("\n");
    if (cli_num(e, "faults", 0) > 0) {
        printf("    last fault: %s\n", cli_str(e, "last_fault", ""));
    }
}

static int print_list(json_t *result)
{
    const json_t *backends = json_object_get(result, "backends");
    json_t *shadows = json_object_get(result, "shadows");
    printf("%-14s %-10s %-4s %-8s %5s %6s  %s\n", "NAME", "VERSION", "ABI", "LEVEL", "USERS",
           "FAULTS", "STATE");
    for (size_t i = 0; i < json_array_size(backends); i++) {
        print_entry(json_array_get(backends, i));
    }
    for (size_t i = 0; i < json_array_size(shadows); i++) {
        printf("shadow\n");
        cli_print_tree(json_array_get(shadows, i), 4);
    }
    json_decref(result);
    return cli_flush();
}

/* ---- bench ------------------------------------------------------------------------------- */

/* The plugin's file: as it was given, or as the daemon knows the name; NULL: of the default.
 * Malloc'ed; NULL and *ret_code where there is none. */
static char *find_file(struct cli *c, const char *name, int *ret_code)
{
    json_t *result;
    char *file = NULL;
    if (name != NULL && strchr(name, '/') != NULL) {
        return strdup(name);
    }
    *ret_code = cli_connect(c);
    *ret_code =
        *ret_code == CLI_OK ? cli_call(c, "backend.list", NULL, NULL, NULL, &result) : *ret_code;
    if (*ret_code != CLI_OK) {
        return NULL;
    }
    const json_t *backends = json_object_get(result, "backends");
    bool found = false;
    for (size_t i = 0; !found && i < json_array_size(backends); i++) {
        const json_t *e = json_array_get(backends, i);
        found = name != NULL ? strcmp(cli_str(e, "name", ""), name) == 0
                             : json_is_true(json_object_get(e, "default"));
        if (found && json_object_get(e, "path") != NULL) {
            file = strdup(cli_str(e, "path", ""));
        }
    }
    json_decref(result);
    if (found && file == NULL) {
        *ret_code = cli_error(CLI_FAILED, "backend: where a plugin lies is told to administrators "
                                          "only: name its file");
    } else if (!found) {
        *ret_code = name != NULL ? cli_error(CLI_FAILED, "backend: none is called '%s'", name)
                                 : cli_error(CLI_FAILED, "backend: there is no default");
    }
    return file;
}

/* Beside this program, or in the build's folder of tools; else what PATH has. */
static void find_check(char ret[PATH_MAX])
{
    static const char *const beside[] = {"", "../tools/plugin-check/"};
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    for (size_t i = 0; slash != NULL && i < sizeof(beside) / sizeof(beside[0]); i++) {
        slash[1] = '\0';
        if (snprintf(ret, PATH_MAX, "%s%s%s", self, beside[i], CHECK_PROGRAM) < PATH_MAX &&
            access(ret, X_OK) == 0) {
            return;
        }
    }
    snprintf(ret, PATH_MAX, "%s", CHECK_PROGRAM);
}

/* Becomes gqa-plugin-check. */
static int run_bench(struct cli *c, const struct backend *b)
{
    int code = EX_OSERR;
    char program[PATH_MAX], options[64];
    char *file = find_file(c, b->name, &code);
    if (file == NULL) {
        return code;
    }
    const char *argv[10] = {CHECK_PROGRAM, "--bench"};
    size_t n = 2;
    if (c->json) {
        argv[n++] = "--json";
    }
    if (c->threads != NULL) {
        argv[n++] = "--threads";
        argv[n++] = c->threads;
    }
    if (b->isa != NULL) {
        snprintf(options, sizeof(options), "isa=%s", b->isa);
        argv[n++] = "--options";
        argv[n++] = options;
    }
    argv[n++] = "--";
    argv[n++] = file;
    gqa_close(c->g);
    c->g = NULL;
    find_check(program);
    execvp(program, (char *const *)argv);
    code = cli_error(EX_UNAVAILABLE, "backend: %s cannot be run: %s", program, strerror(errno));
    free(file);
    return code;
}

/* ---- the verb ---------------------------------------------------------------------------- */

static int run_call(struct cli *c, const struct backend *b)
{
    json_t *result;
    int code = cli_connect(c);
    if (code != CLI_OK) {
        return code;
    }
    if (is(b, "list")) {
        code = cli_call(c, "backend.list", NULL, NULL, NULL, &result);
    } else {
        bool use = is(b, "use");
        c->timeout_ms = USE_TIMEOUT_MS;
        code = cli_call(c, use ? "backend.use" : "backend.selftest", make_params(b, use), NULL,
                        NULL, &result);
    }
    if (code != CLI_OK) {
        return code;
    }
    if (c->json) {
        return cli_print_json(result);
    }
    if (is(b, "list")) {
        return print_list(result);
    }
    cli_print_tree(result, 0);
    json_decref(result);
    return CLI_OK;
}

int cli_verb_backend(struct cli *c, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"model", 'm', "MODEL", 0, "use: of this model; else of the only one that is loaded", 5},
        {"isa", OPTION_ISA, "LEVEL", 0, "use, selftest, bench: this level of the backend", 5},
        {"attention-only", OPTION_ATTENTION_ONLY, NULL, 0, "use: the program stays where it is", 5},
        {"require", OPTION_REQUIRE, NULL, 0, "use: a step that it fails is an error", 5},
        {"shadow", OPTION_SHADOW, NULL, 0, "use: only compares; NAME off ends it", 5},
        {"every", OPTION_EVERY, "N", 0, "use --shadow: every N-th step (16)", 5},
        {0}};
    static const struct argp argp = {
        .options = options,
        .parser = parse_backend,
        .args_doc = "list|use NAME|selftest NAME|bench [NAME|FILE]",
        .doc = "Lists backends, puts one in use while requests run, compares one with the "
               "reference, or measures one in a process of its own."};
    struct backend b = {0};
    cli_parse(c, &argp, argc, argv, &b);
    return is(&b, "bench") ? run_bench(c, &b) : run_call(c, &b);
}
