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

enum { OPTION_JSON = 256, OPTION_CALIBRATION, OPTION_ALIGN, OPTION_KEEP_HEADS };

struct arguments {
    struct convert_options options;
    const char *pool, *group; /* as written */
    const char *in, *out, *calibration;
    bool json, quiet, has_kv_heads, aligned;
};

static const struct argp_option option_table[] = {
    {"kv-heads", 'g', "N", 0, "KV heads to be left; 1: multi-query", 0},
    {"pool", 'p', "KIND", 0,
     "mean (default), first, random, or aligned: what stands for a group; aligned is the mean of "
     "heads that are turned towards each other first",
     0},
    {"calibration", OPTION_CALIBRATION, "FILE", 0,
     "For aligned: what `gqa kv export` wrote of a text, from a cache of float32", 0},
    {"align", OPTION_ALIGN, "PARTS", 0, "For aligned: kv (default), k or v", 0},
    {"keep-heads", OPTION_KEEP_HEADS, NULL, 0,
     "For aligned: only turn the heads, pool nothing: the model computes what it did", 0},
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
    static const char *const pools[] = {"mean", "first", "random", "aligned", NULL};
    static const char *const parts[] = {"", "k", "v", "kv", NULL}; /* by enum align_parts */
    static const char *const groups[] = {"neighbour", "similar", NULL};
    struct arguments *a = state->input;
    switch (key) {
    case 'g':
        a->options.n_kv_heads = (uint32_t)number(state, "kv-heads", arg, CK_MAX_HEADS);
        a->has_kv_heads = true;
        return 0;
    case 'p':
        a->aligned = strcmp(arg, "aligned") == 0;
        a->options.pool =
            a->aligned ? POOL_MEAN : (enum pool_kind)choice(state, "pool", arg, pools);
        a->pool = arg;
        return 0;
    case OPTION_CALIBRATION:
        a->calibration = arg;
        return 0;
    case OPTION_ALIGN:
        a->options.align = (unsigned)choice(state, "align", arg, parts);
        if (a->options.align == 0) {
            argp_error(state, "align: kv, k or v");
        }
        return 0;
    case OPTION_KEEP_HEADS:
        a->options.keep_heads = true;
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
        if (a->aligned != (a->calibration != NULL) || (a->options.keep_heads && !a->aligned)) {
            argp_error(state, "--pool aligned and --calibration go together, --keep-heads with "
                              "them");
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

static bool needs_uptraining(const struct arguments *a, const struct ck_shape *s)
{
    return s->n_kv_heads != a->options.n_kv_heads && !a->options.keep_heads;
}

static void report_json(const struct arguments *a, const struct ck_shape *s,
                        const struct convert_layer *layers)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const struct convert_layer *l = &layers[i];
        json_t *layer = json_pack("{s:f, s:f}", "k_lost", pool_loss_share(&l->k), "v_lost",
                                  pool_loss_share(&l->v));
        if (a->aligned) {
            json_object_set_new(layer, "k_lost_unaligned",
                                json_real(pool_loss_share(&l->k_before)));
            json_object_set_new(layer, "v_lost_unaligned",
                                json_real(pool_loss_share(&l->v_before)));
        }
        json_array_append_new(list, layer);
    }
    json_t *j =
        json_pack("{s:s, s:s, s:i, s:i, s:i, s:s, s:s, s:b, s:o}", "output", a->out, "architecture",
                  s->architecture, "n_heads", (int)s->n_heads, "kv_heads_before",
                  (int)s->n_kv_heads, "kv_heads", (int)a->options.n_kv_heads, "pool", a->pool,
                  "group", a->group, "needs_uptraining", needs_uptraining(a, s), "layers", list);
    json_dumpf(j, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(j);
}

static void add_loss(struct pool_loss *sum, const struct pool_loss *l)
{
    sum->total += l->total;
    sum->lost += l->lost;
}

static void print_layer(const struct arguments *a, const char *name, const struct convert_layer *l)
{
    printf("  %5s  %5.1f %%  %5.1f %%", name, 100 * pool_loss_share(&l->k),
           100 * pool_loss_share(&l->v));
    if (a->aligned) {
        printf("    (unaligned %5.1f %%  %5.1f %%)", 100 * pool_loss_share(&l->k_before),
               100 * pool_loss_share(&l->v_before));
    }
    putchar('\n');
}

static void report_text(const struct arguments *a, const struct ck_shape *s,
                        const struct convert_layer *layers)
{
    struct convert_layer all = {{0, 0}, {0, 0}, {0, 0}, {0, 0}};
    printf("%s: %s, %u layers, %u query heads, %u KV heads made %u (%s of %s heads)\n", a->out,
           s->architecture, s->n_layers, s->n_heads, s->n_kv_heads, a->options.n_kv_heads, a->pool,
           a->group);
    printf("share of the %s variance that %s:\n  layer       K       V\n",
           a->aligned ? "text's K and V" : "projections'",
           a->options.keep_heads ? "pooling would lose" : "is lost");
    for (uint32_t i = 0; i < s->n_layers; i++) {
        char name[16];
        snprintf(name, sizeof(name), "%u", i);
        print_layer(a, name, &layers[i]);
        add_loss(&all.k, &layers[i].k);
        add_loss(&all.v, &layers[i].v);
        add_loss(&all.k_before, &layers[i].k_before);
        add_loss(&all.v_before, &layers[i].v_before);
    }
    print_layer(a, "all", &all);
    if (needs_uptraining(a, s)) {
        printf("This model needs uptraining before it is of use: go on with the original training "
               "for about 5 %% of its steps.\n");
    }
}

/* Opens what is to be read, and converts. *ret_layers is the caller's. */
static int run(struct arguments *a, struct checkpoint **c, struct convert_layer **ret_layers,
               struct fmt_error *err)
{
    struct calibration *calibration = NULL;
    int rc = checkpoint_open(a->in, c, err);
    if (rc == 0) {
        *ret_layers = calloc((*c)->shape.n_layers, sizeof(**ret_layers));
        rc = *ret_layers == NULL ? fmt_fail(err, -ENOMEM, "out of memory") : 0;
    }
    if (rc == 0 && a->calibration != NULL) {
        rc = calibration_open(a->calibration, &(*c)->shape, &calibration, err);
        a->options.calibration = calibration;
    }
    rc = rc < 0 ? rc : convert_checkpoint(*c, a->out, &a->options, *ret_layers, err);
    calibration_close(calibration);
    return rc;
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
    struct arguments a = {.pool = "mean", .group = "neighbour", .options.align = ALIGN_K | ALIGN_V};
    struct fmt_error err = {""};
    struct checkpoint *c = NULL;
    struct convert_layer *layers = NULL;
    int shown = -1;

    argp_err_exit_status = EX_USAGE;
    /* Assigned, not defined: a definition of ours would be hidden from libc. */
    argp_program_version = "gqa-convert " GQAD_VERSION;
    argp_parse(&argp, argc, argv, 0, NULL, &a);
    if (!a.quiet && isatty(STDERR_FILENO)) {
        a.options.progress = show_progress;
        a.options.progress_arg = &shown;
    }
    int rc = run(&a, &c, &layers, &err);
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
