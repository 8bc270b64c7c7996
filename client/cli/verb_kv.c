/* client/cli/verb_kv.c - gqa kv stats, list, pin, unpin, drop, purge, export, import. */
#include "client/cli/kv_transfer.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_TOKENS 64 /* of the KV cache: what is pinned is a multiple */

enum action { ACTION_NONE, STATS, LIST, PIN, UNPIN, DROP, PURGE, EXPORT, IMPORT };

static const struct {
    const char *name;
    enum action action;
} actions[] = {
    {"stats", STATS}, {"list", LIST},   {"pin", PIN},       {"unpin", UNPIN},
    {"drop", DROP},   {"purge", PURGE}, {"export", EXPORT}, {"import", IMPORT},
};

struct kv_args {
    enum action action;
    const char *model;
    struct cli_prompt prompt;
    const char *file; /* export: written; import: read */
    bool all, yes;
};

enum { OPTION_TOKENS = 0x700 };

static const struct argp_option options[] = {
    {"model", 'm', "MODEL", 0, "Of this model", 5},
    {"prompt-file", 'f', "FILE", 0, "pin, unpin, export: the text is in a file", 5},
    {"tokens", OPTION_TOKENS, "FILE", 0, "pin, unpin, export: token ids, as JSON", 5},
    {"output", 'o', "FILE", 0, "export: where to (standard output)", 5},
    {"all", 'a', NULL, 0, "Of all users: administrators", 5},
    {"yes", 'y', NULL, 0, "purge: do not ask", 5},
    {0},
};

static bool has_prompt(enum action action)
{
    return action == PIN || action == UNPIN || action == EXPORT;
}

static void take_action(struct kv_args *a, const char *name, struct argp_state *state)
{
    for (size_t i = 0; i < sizeof(actions) / sizeof(actions[0]); i++) {
        if (strcmp(name, actions[i].name) == 0) {
            a->action = actions[i].action;
            return;
        }
    }
    cli_usage(state,
              "'%s' is not known here; stats, list, pin, unpin, drop, purge, export and "
              "import are",
              name);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct kv_args *a = state->input;
    switch (key) {
    case 'm':
        a->model = arg;
        return 0;
    case 'a':
        a->all = true;
        return 0;
    case 'y':
        a->yes = true;
        return 0;
    case 'o':
        a->file = arg;
        return 0;
    case 'f':
        a->prompt.file = arg;
        return 0;
    case OPTION_TOKENS:
        a->prompt.tokens_file = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (a->action == ACTION_NONE) {
            take_action(a, arg, state);
        } else if (has_prompt(a->action) && a->prompt.text == NULL) {
            a->prompt.text = arg;
        } else if (a->action == IMPORT && a->file == NULL) {
            a->file = arg;
        } else {
            cli_usage(state, "'%s' is an argument too many", arg);
        }
        return 0;
    case ARGP_KEY_END:
        if (a->action == ACTION_NONE) {
            cli_usage(state,
                      "say what to do: stats, list, pin, unpin, drop, purge, export or import");
        }
        if ((has_prompt(a->action) || a->action == IMPORT) && a->model == NULL) {
            cli_usage(state, "which model? give -m MODEL");
        }
        if (a->action == IMPORT && a->file == NULL) {
            cli_usage(state, "import what? give a FILE");
        }
        if (a->action == EXPORT && a->file == NULL && isatty(STDOUT_FILENO)) {
            cli_usage(state, "this is nothing for a terminal; give -o FILE");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- printing ---------------------------------------------------------------------------- */

static void print_list(const json_t *result)
{
    const json_t *spaces = json_object_get(result, "spaces");
    printf("%-40s %-12s %9s %8s %8s %11s %11s %7s\n", "MODEL", "REALM", "TOKENS", "PINNED",
           "LONGEST", "MEMORY", "DISK", "HITS");
    for (size_t i = 0; i < json_array_size(spaces); i++) {
        const json_t *s = json_array_get(spaces, i);
        char memory[CLI_SIZE_CHARS], disk[CLI_SIZE_CHARS];
        printf("%-40.40s %-12s %9.0f %8.0f %8.0f %11s %11s %7.0f\n", cli_str(s, "about", "?"),
               cli_str(s, "realm", "?"), cli_num(s, "tokens", 0), cli_num(s, "tokens_pinned", 0),
               cli_num(s, "longest", 0), cli_bytes(cli_num(s, "memory_bytes", 0), memory),
               cli_bytes(cli_num(s, "store_bytes", 0), disk), cli_num(s, "hits", 0));
        if (cli_str(s, "trouble", "")[0] != '\0') {
            printf("    not saved: %s\n", cli_str(s, "trouble", ""));
        }
    }
}

/* Whole blocks are pinned, until the user's share is used up. */
static void print_pins(const json_t *result, bool pinned)
{
    double n_prompt = cli_num(result, "n_prompt", 0), n_pinned = cli_num(result, "n_pinned", 0);
    printf("%.0f of %.0f tokens %s\n", n_pinned, n_prompt, pinned ? "pinned" : "unpinned");
    if (pinned && n_pinned + BLOCK_TOKENS <= n_prompt) {
        printf("the rest is beyond what this user may pin: unpin other prompts, or have "
               "kv_store_bytes, kv_store_bytes_per_user or kv_bytes raised\n");
    }
}

static int print(struct cli *c, enum action action, json_t *result)
{
    if (c->json) {
        return cli_print_json(result);
    }
    char bytes[CLI_SIZE_CHARS];
    switch (action) {
    case LIST:
        print_list(result);
        break;
    case PIN:
    case UNPIN:
        print_pins(result, action == PIN);
        break;
    case DROP:
    case PURGE:
        printf("%.0f tokens, %s %s\n", cli_num(result, "tokens", 0),
               cli_bytes(cli_num(result, "bytes", 0), bytes),
               action == DROP ? "dropped" : "purged");
        break;
    default:
        cli_print_tree(result, 0);
    }
    json_decref(result);
    return cli_flush();
}

/* ---- the verb ---------------------------------------------------------------------------- */

static bool is_sure(const struct kv_args *a)
{
    char answer[8] = "";
    if (a->yes || !isatty(STDIN_FILENO)) {
        return true;
    }
    fprintf(stderr, "Remove all cached prompts of %s for good? [y/N] ",
            a->all ? "all users" : "yours");
    return fgets(answer, sizeof(answer), stdin) != NULL && (answer[0] == 'y' || answer[0] == 'Y');
}

static int make_params(const struct kv_args *a, struct gqa_params **ret)
{
    *ret = NULL;
    if (a->action == STATS) {
        return CLI_OK;
    }
    char *model = a->model != NULL ? cli_model_name(a->model) : NULL;
    struct gqa_params *p = model != NULL ? cli_model_params(model) : cli_params();
    int code = CLI_OK;
    free(model);
    if (a->action == PIN || a->action == UNPIN) {
        gqa_params_bool(p, "pinned", a->action == PIN);
    }
    if (has_prompt(a->action)) {
        code = cli_prompt_params(&a->prompt, p);
    } else {
        gqa_params_bool(p, "all", a->all);
    }
    *ret = p;
    return code;
}

static int import(struct cli *c, const struct kv_args *a)
{
    char *model = cli_model_name(a->model);
    int code = cli_kv_import(c, model, a->file);
    free(model);
    return code;
}

int cli_verb_kv(struct cli *c, int argc, char **argv)
{
    static const char *const methods[] = {
        [STATS] = "kv.stats", [LIST] = "kv.list", [PIN] = "kv.pin",
        [UNPIN] = "kv.pin",   [DROP] = "kv.drop", [PURGE] = "kv.purge",
    };
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .args_doc =
            "stats | list | pin [PROMPT] | unpin [PROMPT] | drop | purge | export [PROMPT] | "
            "import FILE",
        .doc = "The KV cache: what is kept of prompts, and what becomes of it."};
    struct kv_args a = {ACTION_NONE};
    struct gqa_params *params;
    json_t *result;
    cli_parse(c, &argp, argc, argv, &a);
    if (a.action == PURGE && !is_sure(&a)) {
        return CLI_FAILED;
    }
    int code = cli_connect(c);
    if (a.action == IMPORT) {
        return code == CLI_OK ? import(c, &a) : code;
    }
    code = code == CLI_OK ? make_params(&a, &params) : code;
    if (a.action == EXPORT) {
        return code == CLI_OK ? cli_kv_export(c, params, a.file != NULL ? a.file : "-") : code;
    }
    code = code == CLI_OK ? cli_call(c, methods[a.action], params, NULL, NULL, &result) : code;
    return code == CLI_OK ? print(c, a.action, result) : code;
}
