/* client/cli/loading.c - models: the options that load one, and its progress. */
#include "client/cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_NAME = 0x400, KEY_TYPE_K, KEY_TYPE_V, KEY_BACKEND, KEY_ATTENTION };

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "Model:", 1},
    {"model", 'm', "MODEL", 0, "Name of the model, or a path for one's own daemon", 1},
    {"ctx-size", 'c', "N", 0, "Context length (perplexity: of a chunk)", 1},
    {"name", KEY_NAME, "NAME", 0, "Serve it under that name", 1},
    {"cache-type-k", KEY_TYPE_K, "TYPE", 0,
     "Type of K in the cache (also -ctk): f16, f32, bf16, q8_0, q4_0", 1},
    {"cache-type-v", KEY_TYPE_V, "TYPE", 0, "Type of V in the cache (also -ctv)", 1},
    {"backend", KEY_BACKEND, "NAME[:OPTIONS]", 0, "Backend of the whole model", 1},
    {"attention", KEY_ATTENTION, "NAME[:OPTIONS]", 0, "Backend of attention alone", 1},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct cli_load *load = state->input;
    switch (key) {
    case 'm':
        free(load->model);
        load->model = cli_model_name(arg);
        return 0;
    case 'c':
        load->n_ctx = (uint32_t)cli_number(state, "ctx-size", arg, 1, 1u << 24);
        return 0;
    case KEY_NAME:
        load->name = arg;
        return 0;
    case KEY_TYPE_K:
        load->cache_type_k = arg;
        return 0;
    case KEY_TYPE_V:
        load->cache_type_v = arg;
        return 0;
    case KEY_BACKEND:
        load->backend = arg;
        return 0;
    case KEY_ATTENTION:
        load->attention = arg;
        return 0;
    case ARGP_KEY_END:
        if (load->model == NULL && !load->model_is_argument) {
            cli_usage(state, "no model was given (-m MODEL)");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

const struct argp cli_load_argp = {.options = options, .parser = parse};

struct bar {
    bool shown;
    char stage[32];
};

#define BAR_CHARS 30

/* "packing  [######      ]  43 %", redrawn in place. */
static void draw(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct bar *bar = arg;
    const char *stage = "";
    size_t bytes = 0;
    uint64_t done = 0, total = 0;
    gqa_value_bytes(gqa_value_get(event, "stage"), &stage, &bytes);
    gqa_value_u64(gqa_value_get(event, "done"), &done);
    gqa_value_u64(gqa_value_get(event, "total"), &total);
    snprintf(bar->stage, sizeof(bar->stage), "%.*s", (int)(bytes < 24 ? bytes : 24), stage);
    int filled = total > 0 && done <= total ? (int)(done * BAR_CHARS / total) : 0;
    fprintf(stderr, "\r\033[K%-10s [", bar->stage);
    for (int i = 0; i < BAR_CHARS; i++) {
        fputc(i < filled ? '#' : ' ', stderr);
    }
    fprintf(stderr, "] %3d %%", filled * 100 / BAR_CHARS);
    bar->shown = true;
}

static struct gqa_params *load_params(const struct cli_load *load)
{
    struct gqa_params *p = cli_model_params(load->model);
    const struct {
        const char *key, *value;
    } texts[] = {
        {"name", load->name},
        {"cache_type_k", load->cache_type_k},
        {"cache_type_v", load->cache_type_v},
        {"backend", load->backend},
        {"attention", load->attention},
    };
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        if (texts[i].value != NULL) {
            gqa_params_str(p, texts[i].key, texts[i].value);
        }
    }
    if (load->n_ctx > 0) {
        gqa_params_u64(p, "n_ctx", load->n_ctx);
    }
    return p;
}

int cli_load(struct cli *c, struct cli_load *load, json_t **ret)
{
    struct bar bar = {0};
    struct cli_call call = {.event = cli_fancy(stderr) ? draw : NULL, .arg = &bar};
    cli_start(c, &call, "model.load", load_params(load));
    cli_finish(c, &call, 1);
    if (bar.shown) {
        fputs("\r\033[K", stderr);
    }
    int code = cli_report(&call);
    if (code == CLI_OK) {
        char *name = strdup(cli_str(call.result, "name", load->model));
        if (name == NULL) {
            code = cli_error(EX_OSERR, "model: no memory");
        } else {
            free(load->model);
            load->model = name;
        }
    }
    if (code == CLI_OK && ret != NULL) {
        *ret = call.result;
    } else {
        json_decref(call.result);
    }
    return code;
}

int cli_load_if_asked(struct cli *c, struct cli_load *load)
{
    bool asked = load->name != NULL || load->n_ctx > 0 || load->cache_type_k != NULL ||
                 load->cache_type_v != NULL || load->backend != NULL || load->attention != NULL;
    return asked ? cli_load(c, load, NULL) : CLI_OK;
}

int cli_model_info(struct cli *c, struct cli_load *load, json_t **ret)
{
    struct cli_call call = {0};
    cli_start(c, &call, "model.info", cli_model_params(load->model));
    cli_finish(c, &call, 1);
    if (call.status == 0) {
        *ret = call.result;
        return CLI_OK;
    }
    return call.status == -ENOENT ? cli_load(c, load, ret) : cli_report(&call);
}

double cli_kv_bytes(const json_t *info, double n_context)
{
    const json_t *cache = json_object_get(info, "cache");
    const json_t *classes = json_object_get(cache, "classes");
    double per_token = cli_num(cache, "bytes_per_token", 0);
    double layers = 0, seen = 0;
    for (size_t i = 0; i < json_array_size(classes); i++) {
        const json_t *class = json_array_get(classes, i);
        double n = cli_num(class, "n_layers", 0), window = cli_num(class, "window", 0);
        layers += n;
        seen += n * (window > 0 && window < n_context ? window : n_context);
    }
    return per_token * (layers > 0 ? seen / layers : n_context);
}
