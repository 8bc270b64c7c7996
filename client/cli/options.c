/* client/cli/options.c - the options that every verb has, and spellings that getopt lacks. */
#include "client/cli/cli.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum {
    KEY_SOCKET = 0x100,
    KEY_USAGE,
    KEY_SPAWN,
    KEY_CACHE_DIR,
    KEY_MODELS_DIR,
    KEY_JSON,
    KEY_TIMEOUT
};

static const struct argp_option common_options[] = {
    {"socket", KEY_SOCKET, "PATH", 0, "The daemon's socket (else GQA_SOCKET, then the usual ones)",
     90},
    {"spawn", KEY_SPAWN, NULL, 0, "Start a private daemon for this one command", 90},
    {"cache-dir", KEY_CACHE_DIR, "DIR", 0, "With --spawn: keep the cache there", 90},
    {"models-dir", KEY_MODELS_DIR, "DIR", 0, "With --spawn: where models are", 90},
    {"threads", 't', "N", 0, "With --spawn: threads of the daemon", 90},
    {"timeout", KEY_TIMEOUT, "SECONDS", 0, "Give up after so long a silence", 90},
    {"json", KEY_JSON, NULL, 0, "Print JSON", 90},
    {"help", '?', NULL, 0, "Print this list", -1},
    {"usage", KEY_USAGE, NULL, 0, "Print a short list", -1},
    {"version", 'V', NULL, 0, "Print the version", -1},
    {0},
};

/* Help names the verb as it is called. */
static void help(struct argp_state *state, unsigned flags)
{
    char name[32];
    const char *verb = strchr(state->name, ' ');
    snprintf(name, sizeof(name), "gqa%s", verb != NULL ? verb : "");
    state->name = name;
    argp_state_help(state, stdout, flags);
    exit(EX_OK);
}

static error_t parse_common(int key, char *arg, struct argp_state *state)
{
    struct cli *c = state->input;
    switch (key) {
    case KEY_SOCKET:
        c->socket = arg;
        return 0;
    case KEY_SPAWN:
        c->spawn = true;
        return 0;
    case KEY_CACHE_DIR:
        c->cache_dir = arg;
        return 0;
    case KEY_MODELS_DIR:
        c->models_dir = arg;
        return 0;
    case KEY_JSON:
        c->json = true;
        return 0;
    case 't':
        cli_number(state, "threads", arg, 1, 4096);
        c->threads = arg;
        return 0;
    case '?':
        help(state, ARGP_HELP_STD_HELP);
        return 0;
    case KEY_USAGE:
        help(state, ARGP_HELP_USAGE | ARGP_HELP_EXIT_OK);
        return 0;
    case 'V':
        puts("gqa " GQA_VERSION);
        exit(EX_OK);
    case KEY_TIMEOUT:
        c->timeout_ms = 1000u * (uint32_t)cli_number(state, "timeout", arg, 1, 1u << 20);
        return 0;
    case ARGP_KEY_ARGS: /* no parser of the verb has taken them */
        cli_usage(state, "'%s' is one argument too many", state->argv[state->next]);
        return 0;
    case ARGP_KEY_SUCCESS:
        if (c->spawn && c->socket != NULL) {
            cli_usage(state, "--spawn: not together with --socket");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp common_argp = {.options = common_options, .parser = parse_common};

/* argp's own errors are two lines, the second an advice; ours are one. Without its stream argp
 * stays silent and returns EINVAL, after getopt has said what is wrong in one line that begins with
 * argv[0], which is "gqa: VERB". */
static void speak_in_one_line(struct argp_state *state)
{
    state->err_stream = NULL;
}

static void finish_parse(error_t r)
{
    if (r == EINVAL) {
        exit(EX_USAGE);
    }
    if (r != 0) {
        exit(cli_error(EX_OSERR, "arguments: %s", strerror(r)));
    }
}

void cli_usage(const struct argp_state *state, const char *format, ...)
{
    va_list args;
    fprintf(stderr, "%s: ", state->name);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(EX_USAGE);
}

/* The verb's parser and the common one, side by side: each gets its own input. */
struct both {
    void *input;
    struct cli *c;
};

static error_t parse_both(int key, char *arg, struct argp_state *state)
{
    struct both *b = state->input;
    if (key == ARGP_KEY_INIT) {
        state->child_inputs[0] = b->input;
        state->child_inputs[1] = b->c;
        speak_in_one_line(state);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

void cli_parse(struct cli *c, const struct argp *argp, int argc, char **argv, void *input)
{
    const struct argp_child children[] = {{argp, 0, NULL, 0}, {&common_argp, 0, NULL, 0}, {0}};
    struct argp both = {.parser = parse_both, .children = children};
    struct both b = {.input = input, .c = c};
    finish_parse(argp_parse(&both, argc, argv, ARGP_NO_HELP, NULL, &b));
}

struct up_to_verb {
    struct cli *c;
    int index;
};

static error_t parse_up_to_verb(int key, char *arg, struct argp_state *state)
{
    struct up_to_verb *u = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = u->c;
        speak_in_one_line(state);
        return 0;
    case ARGP_KEY_ARG:
        u->index = state->next - 1;
        state->next = state->argc; /* the rest is the verb's */
        return 0;
    case ARGP_KEY_NO_ARGS:
        cli_usage(state, "verb: none was given; gqa --help lists them");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int cli_parse_common(struct cli *c, const char *doc, int argc, char **argv)
{
    const struct argp_child children[] = {{&common_argp, 0, NULL, 0}, {0}};
    struct argp argp = {
        .parser = parse_up_to_verb, .args_doc = "VERB ...", .doc = doc, .children = children};
    struct up_to_verb u = {.c = c};
    finish_parse(argp_parse(&argp, argc, argv, ARGP_IN_ORDER | ARGP_NO_HELP, NULL, &u));
    return u.index;
}

void cli_normalise(int argc, char **argv)
{
    static const char *const spellings[][2] = {
        {"-npl", "--npl"},          {"-np", "--parallel"},      {"-ctk", "--cache-type-k"},
        {"-ctv", "--cache-type-v"}, {"-temp", "--temperature"},
    };
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        for (size_t s = 0; s < sizeof(spellings) / sizeof(spellings[0]); s++) {
            if (strcmp(argv[i], spellings[s][0]) == 0) {
                argv[i] = (char *)spellings[s][1]; /* argp does not write to its arguments */
            }
        }
        if (strncmp(argv[i], "--", 2) != 0 || strchr(argv[i], ' ') != NULL) {
            continue;
        }
        size_t name_bytes = strcspn(argv[i], "=");
        if (memchr(argv[i], '_', name_bytes) == NULL) {
            continue;
        }
        for (size_t k = 0; k < name_bytes; k++) {
            argv[i][k] = argv[i][k] == '_' ? '-' : argv[i][k];
        }
    }
}

uint64_t cli_number(const struct argp_state *state, const char *option, const char *text,
                    uint64_t min, uint64_t max)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || strchr(text, '-') != NULL || n < min ||
        n > max) {
        cli_usage(state, "%s%s: '%s' is no whole number from %llu to %llu",
                  isupper(option[0]) ? "" : "--", option, text, (unsigned long long)min,
                  (unsigned long long)max);
    }
    return n;
}

size_t cli_numbers(const struct argp_state *state, const char *option, const char *text,
                   uint64_t max, uint32_t *ret, size_t room)
{
    size_t n = 0;
    const char *at = text;
    for (;;) {
        char number[24];
        size_t chars = strcspn(at, ",");
        snprintf(number, sizeof(number), "%.*s", (int)chars, at);
        if (n == room) {
            cli_usage(state, "--%s: more than %zu numbers", option, room);
        }
        ret[n++] = (uint32_t)cli_number(state, option, number, 0, max);
        if (at[chars] == '\0') {
            return n;
        }
        at += chars + 1;
    }
}
