/* tools/convert/main.c - gqa-convert: a checkpoint with grouped-query attention out of one with
 * more KV heads, as Ainslie et al. 2023 (arXiv 2305.13245) make it. */
#include "tools/convert/convert.h"

#include <argp.h>
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sysexits.h>
#include <unistd.h>

const char *argp_program_version = "gqa-convert " GQAD_VERSION;

enum { OPTION_JSON = 256 };

struct arguments {
    struct convert_options options;
    const char *pool, *group; /* as written */
    const char *in, *out;
    bool json, quiet, has_kv_heads;
};

static const struct argp_option option_table[] = {
    {"kv-heads", 'g', "N", 0, "KV heads to be left; 1: multi-query", 0},
    {"pool", 'p', "KIND", 0, "mean (default), first or random: what stands for a group", 0},
    {"group", 'G', "KIND", 0,
     "neighbour (default) or similar: which heads become one. With similar, query heads move to "
     "where their group is",
     0},
    {"type", 't', "TYPE", 0,
     "Type of all matrices: f32, f16, bf16, and in GGUF q8_0. Without it they keep theirs, and "
     "pooled ones of other types become f16",
     0},
    {"seed", 'S', "N", 0, "Seed of --pool random (default 0)", 0},
    {"json", OPTION_JSON, NULL, 0, "Report as JSON", 0},
    {"quiet", 'q', NULL, 0, "No progress", 0},
    {0},
};

/* The index of text among names, or a usage error. */
static int choice(struct argp_state *state, const char *what, const char *text,
                  const char *const *names)
{
    for (int i = 0; names[i] != NULL; i++) {
        if (strcmp(names[i], text) == 0) {
            return i;
        }
    }
    argp_error(state, "%s: '%s' is none of those that --help lists", what, text);
    return 0;
}

static uint64_t number(struct argp_state *state, const char *what, const char *text, uint64_t max)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || value > max) {
        argp_error(state, "%s: '%s' is not a number of at most %llu", what, text,
                   (unsigned long long)max);
    }
    return value;
}

static error_t parse_option(int key, char *arg, struct argp_state *state)
{
    static const char *const pools[] = {"mean", "first", "random", NULL};
    static const char *const groups[] = {"neighbour", "similar", NULL};
    struct arguments *a = state->input;
    switch (key) {
    case 'g':
        a->options.n_kv_heads = (uint32_t)number(state, "kv-heads", arg, CK_MAX_HEADS);
        a->has_kv_heads = true;
        return 0;
    case 'p':
        a->options.pool = (enum pool_kind)choice(state, "pool", arg, pools);
        a->pool = arg;
        return 0;
    case 'G':
        a->options.group = (enum group_kind)choice(state, "group", arg, groups);
        a->group = arg;
        return 0;
    case 't':
        a->options.type = fmt_type_by_name(arg);
        if (a->options.type == NULL) {
            argp_error(state, "type: '%s' is none of those that --help lists", arg);
        }
        return 0;
    case 'S':
        a->options.seed = number(state, "seed", arg, UINT64_MAX);
        return 0;
    case OPTION_JSON:
        a->json = true;
        return 0;
    case 'q':
        a->quiet = true;
        return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 1) {
            argp_error(state, "unexpected argument '%s'", arg);
        }
        *(state->arg_num == 0 ? &a->in : &a->out) = arg;
        return 0;
    case ARGP_KEY_END:
        if (!a->has_kv_heads || a->out == NULL) {
            argp_error(state, "--kv-heads, IN and OUT are needed");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp argp = {
    option_table,
    parse_option,
    "IN OUT",
    "Make a model with fewer KV heads: multi-head or grouped to grouped or multi-query.\v"
    "IN is a GGUF file, or a folder of Hugging Face with config.json and safetensors; OUT becomes "
    "the same kind. The converted model needs uptraining: about 5 % of its original training.",
    NULL,
    NULL,
    NULL};

/* ---- reports ----------------------------------------------------------------------------- */

static void show_progress(void *arg, uint64_t done, uint64_t total)
{
    int *shown = arg;
    int percent = total > 0 ? (int)(100.0 * (double)done / (double)total) : 100;
    if (percent != *shown) {
        *shown = percent;
        fprintf(stderr, "\rconverting %3d %%%s", percent, done == total ? "\n" : "");
    }
}

static void report_json(const struct arguments *a, const struct ck_shape *s,
                        const struct convert_layer *layers)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < s->n_layers; i++) {
        json_array_append_new(list, json_pack("{s:f, s:f}", "k_lost", pool_loss_share(&layers[i].k),
                                              "v_lost", pool_loss_share(&layers[i].v)));
    }
    json_t *j = json_pack(
        "{s:s, s:s, s:i, s:i, s:i, s:s, s:s, s:b, s:o}", "output", a->out, "architecture",
        s->architecture, "n_heads", (int)s->n_heads, "kv_heads_before", (int)s->n_kv_heads,
        "kv_heads", (int)a->options.n_kv_heads, "pool", a->pool, "group", a->group,
        "needs_uptraining", s->n_kv_heads != a->options.n_kv_heads, "layers", list);
    json_dumpf(j, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(j);
}

static void report_text(const struct arguments *a, const struct ck_shape *s,
                        const struct convert_layer *layers)
{
    struct convert_layer all = {{0, 0}, {0, 0}};
    printf("%s: %s, %u layers, %u query heads, %u KV heads made %u (%s of %s heads)\n", a->out,
           s->architecture, s->n_layers, s->n_heads, s->n_kv_heads, a->options.n_kv_heads, a->pool,
           a->group);
    printf("share of the projections' variance that is lost:\n  layer       K       V\n");
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const struct convert_layer *l = &layers[i];
        printf("  %5u  %5.1f %%  %5.1f %%\n", i, 100 * pool_loss_share(&l->k),
               100 * pool_loss_share(&l->v));
        all.k.total += l->k.total;
        all.k.lost += l->k.lost;
        all.v.total += l->v.total;
        all.v.lost += l->v.lost;
    }
    printf("    all  %5.1f %%  %5.1f %%\n", 100 * pool_loss_share(&all.k),
           100 * pool_loss_share(&all.v));
    if (s->n_kv_heads != a->options.n_kv_heads) {
        printf("This model needs uptraining before it is of use: go on with the original training "
               "for about 5 %% of its steps.\n");
    }
}

static int exit_code(int rc)
{
    switch (-rc) {
    case 0:
        return EX_OK;
    case ENOENT:
        return EX_NOINPUT;
    case EEXIST:
        return EX_CANTCREAT;
    default:
        return 1;
    }
}

int main(int argc, char **argv)
{
    struct arguments a = {.pool = "mean", .group = "neighbour"};
    struct fmt_error err = {""};
    struct checkpoint *c = NULL;
    int shown = -1;

    argp_err_exit_status = EX_USAGE;
    argp_parse(&argp, argc, argv, 0, NULL, &a);
    if (!a.quiet && isatty(STDERR_FILENO)) {
        a.options.progress = show_progress;
        a.options.progress_arg = &shown;
    }
    int rc = checkpoint_open(a.in, &c, &err);
    struct convert_layer *layers = rc == 0 ? calloc(c->shape.n_layers, sizeof(*layers)) : NULL;
    if (rc == 0 && layers == NULL) {
        rc = fmt_fail(&err, -ENOMEM, "out of memory");
    }
    rc = rc < 0 ? rc : convert_checkpoint(c, a.out, &a.options, layers, &err);
    if (rc < 0) {
        fprintf(stderr, "gqa-convert: %s\n", err.text);
    } else if (a.json) {
        report_json(&a, &c->shape, layers);
    } else {
        report_text(&a, &c->shape, layers);
    }
    free(layers);
    checkpoint_close(c);
    return exit_code(rc);
}
