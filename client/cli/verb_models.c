/* client/cli/verb_models.c - gqa list, ps, show, load, unload. */
#include "client/cli/cli.h"

#include <stdlib.h>
#include <string.h>

/* ---- list and ps ------------------------------------------------------------------------- */

static const struct argp list_argp = {.doc = "Lists the models that are loaded or could be."};
static const struct argp ps_argp = {.doc = "Lists the models that are loaded or being loaded."};

static void print_row(const json_t *m, bool running)
{
    char size[CLI_SIZE_CHARS], params[CLI_SIZE_CHARS] = "-";
    if (json_object_get(m, "params") != NULL) {
        cli_count(cli_num(m, "params", 0), params);
    }
    cli_bytes(cli_num(m, "bytes", 0), size);
    printf("%-32s %-10s %-10s %-9s %9s %11s", cli_str(m, "name", "?"), cli_str(m, "state", "?"),
           cli_str(m, "arch", "-"), cli_str(m, "type", "-"), params, size);
    if (running) {
        printf(" %8.0f %8.0f", cli_num(m, "n_ctx", 0), cli_num(m, "n_running", 0));
    }
    putchar('\n');
}

static int list(struct cli *c, bool running)
{
    json_t *result;
    int code = cli_connect(c);
    if (code == CLI_OK) {
        code = cli_call(c, "model.list", NULL, NULL, NULL, &result);
    }
    if (code != CLI_OK) {
        return code;
    }
    json_t *models = json_object_get(result, "models");
    for (size_t i = json_array_size(models); running && i-- > 0;) {
        const char *state = cli_str(json_array_get(models, i), "state", "");
        if (strcmp(state, "available") == 0) {
            json_array_remove(models, i);
        }
    }
    if (c->json) {
        return cli_print_json(result);
    }
    printf("%-32s %-10s %-10s %-9s %9s %11s%s\n", "NAME", "STATE", "ARCH", "TYPE", "PARAMS", "SIZE",
           running ? "      CTX  RUNNING" : "");
    for (size_t i = 0; i < json_array_size(models); i++) {
        print_row(json_array_get(models, i), running);
    }
    json_decref(result);
    return CLI_OK;
}

int cli_verb_list(struct cli *c, int argc, char **argv)
{
    cli_parse(c, &list_argp, argc, argv, NULL);
    return list(c, false);
}

int cli_verb_ps(struct cli *c, int argc, char **argv)
{
    cli_parse(c, &ps_argp, argc, argv, NULL);
    return list(c, true);
}

/* ---- show, load, unload: the model may be given as -m MODEL or by itself ----------------- */

static error_t parse_model(int key, char *arg, struct argp_state *state)
{
    struct cli_load *load = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = load;
        return 0;
    case ARGP_KEY_ARG:
        if (load->model != NULL) {
            cli_usage(state, "more than one model");
        }
        load->model = cli_model_name(arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option name_options[] = {
    {"model", 'm', "MODEL", 0, "Name of the model, or a path for one's own daemon", 1}, {0}};

static error_t parse_name(int key, char *arg, struct argp_state *state)
{
    struct cli_load *load = state->input;
    switch (key) {
    case 'm':
    case ARGP_KEY_ARG:
        if (load->model != NULL) {
            cli_usage(state, "more than one model");
        }
        load->model = cli_model_name(arg);
        return 0;
    case ARGP_KEY_END:
        if (load->model == NULL) {
            cli_usage(state, "no model was given");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int print_info(struct cli *c, json_t *info)
{
    if (c->json) {
        return cli_print_json(info);
    }
    cli_print_tree(info, 0);
    json_decref(info);
    return CLI_OK;
}

int cli_verb_show(struct cli *c, int argc, char **argv)
{
    static const struct argp argp = {.options = name_options,
                                     .parser = parse_name,
                                     .args_doc = "MODEL",
                                     .doc =
                                         "Tells everything about a model, loading it if needed."};
    struct cli_load load = {0};
    json_t *info;
    cli_parse(c, &argp, argc, argv, &load);
    int code = cli_connect(c);
    if (code == CLI_OK) {
        code = cli_model_info(c, &load, &info);
    }
    free(load.model);
    return code == CLI_OK ? print_info(c, info) : code;
}

int cli_verb_load(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .parser = parse_model, .args_doc = "MODEL", .doc = "Loads a model.", .children = children};
    struct cli_load load = {0};
    json_t *info;
    cli_parse(c, &argp, argc, argv, &load);
    int code = cli_connect(c);
    if (code == CLI_OK) {
        code = cli_load(c, &load, &info);
    }
    if (code == CLI_OK && c->json) {
        code = cli_print_json(info);
    } else if (code == CLI_OK) {
        printf("%s: loaded in %.0f ms\n", load.model, cli_num(info, "load_ms", 0));
        json_decref(info);
    }
    free(load.model);
    return code;
}

int cli_verb_unload(struct cli *c, int argc, char **argv)
{
    static const struct argp argp = {.options = name_options,
                                     .parser = parse_name,
                                     .args_doc = "MODEL",
                                     .doc = "Unloads a model when its requests have ended."};
    struct cli_load load = {0};
    json_t *result;
    cli_parse(c, &argp, argc, argv, &load);
    int code = cli_connect(c);
    if (code == CLI_OK) {
        code = cli_call(c, "model.unload", cli_model_params(load.model), NULL, NULL, &result);
    }
    free(load.model);
    if (code != CLI_OK) {
        return code;
    }
    if (c->json) {
        return cli_print_json(result);
    }
    json_decref(result);
    return CLI_OK;
}
