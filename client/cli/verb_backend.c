/* client/cli/verb_backend.c - gqa backend: which plugins there are, which one computes. */
#include "client/cli/cli.h"

#include <string.h>

/* The self-test runs in a child of the daemon's, and other weights may have to be packed. */
#define USE_TIMEOUT_MS 600000u

enum { OPTION_ISA = 256, OPTION_ATTENTION_ONLY, OPTION_REQUIRE, OPTION_SHADOW, OPTION_EVERY };

struct backend {
    const char *action, *name, *model, *isa;
    bool attention_only, require, shadow;
    uint32_t every; /* 0: not given */
};

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
        cli_usage(state, "say what to do: list, use NAME or selftest NAME");
        return 0;
    case ARGP_KEY_END:
        if (b->action != NULL && strcmp(b->action, "list") != 0 && strcmp(b->action, "use") != 0 &&
            strcmp(b->action, "selftest") != 0) {
            cli_usage(state, "'%s' is not known here; list, use and selftest are", b->action);
        }
        if (b->action != NULL && (strcmp(b->action, "list") == 0) == (b->name != NULL)) {
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

int cli_verb_backend(struct cli *c, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"model", 'm', "MODEL", 0, "use: of this model; else of the only one that is loaded", 5},
        {"isa", OPTION_ISA, "LEVEL", 0, "use, selftest: this level of the backend", 5},
        {"attention-only", OPTION_ATTENTION_ONLY, NULL, 0, "use: the program stays where it is", 5},
        {"require", OPTION_REQUIRE, NULL, 0, "use: a step that it fails is an error", 5},
        {"shadow", OPTION_SHADOW, NULL, 0, "use: only compares; NAME off ends it", 5},
        {"every", OPTION_EVERY, "N", 0, "use --shadow: every N-th step (16)", 5},
        {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse_backend,
                                     .args_doc = "list|use NAME|selftest NAME",
                                     .doc = "Lists backends, puts one in use while requests run, "
                                            "or compares one with the reference."};
    struct backend b = {0};
    json_t *result;
    cli_parse(c, &argp, argc, argv, &b);
    int code = cli_connect(c);
    if (code != CLI_OK) {
        return code;
    }
    if (strcmp(b.action, "list") == 0) {
        code = cli_call(c, "backend.list", NULL, NULL, NULL, &result);
    } else {
        bool use = strcmp(b.action, "use") == 0;
        c->timeout_ms = USE_TIMEOUT_MS;
        code = cli_call(c, use ? "backend.use" : "backend.selftest", make_params(&b, use), NULL,
                        NULL, &result);
    }
    if (code != CLI_OK) {
        return code;
    }
    if (c->json) {
        return cli_print_json(result);
    }
    cli_print_tree(result, 0);
    json_decref(result);
    return CLI_OK;
}
