/* tools/synth/main.c - gqa-synth: a GGUF model with random weights of a known shape.
 *
 * For benchmarks and tests: speed and memory depend on a model's shape and types, not on what it
 * learned. The same shape, type and seed give the same file on every machine. */
#include "tools/synth/fill.h"
#include "tools/synth/plan.h"
#include "tools/synth/shape.h"
#include "tools/synth/vocab.h"

#include "format/gguf_write.h"
#include "format/types.h"

#include <argp.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sysexits.h>

#define PIECE_BYTES (1u << 20) /* written at a time */

struct options {
    const char *shape_text;
    const struct synth_mixture *mixture;
    const char *output;
    uint64_t seed;
    struct synth_shape shape;
};

static const struct argp_option option_table[] = {
    {"shape", 's', "NAME|KEY=N,...", 0, "Shape of the model, optionally with changes", 0},
    {"type", 't', "TYPE", 0, "One of those listed below (default q4_0)", 0},
    {"seed", 'S', "N", 0, "Seed of the random weights (default 0)", 0},
    {"output", 'o', "FILE", 0, "File to write", 0},
    {0},
};

static int parse_seed(const char *text, uint64_t *ret)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 0);
    if (*text < '0' || *text > '9' || *end != '\0' || errno != 0) {
        return -EINVAL;
    }
    *ret = value;
    return 0;
}

static error_t parse_option(int key, char *arg, struct argp_state *state)
{
    struct options *options = state->input;
    struct synth_error err;
    switch (key) {
    case 's':
        options->shape_text = arg;
        if (synth_shape_parse(arg, &options->shape, &err) < 0) {
            argp_error(state, "shape: %s", err.text);
        }
        return 0;
    case 't':
        options->mixture = synth_mixture_by_name(arg);
        if (options->mixture == NULL) {
            argp_error(state, "type: '%s' is none of those that --help lists", arg);
        }
        return 0;
    case 'S':
        if (parse_seed(arg, &options->seed) < 0) {
            argp_error(state, "seed: '%s' is not a number", arg);
        }
        return 0;
    case 'o':
        options->output = arg;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", arg);
        return EINVAL;
    case ARGP_KEY_END:
        if (options->shape_text == NULL || options->output == NULL) {
            argp_error(state, "both --shape and --output are needed");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* Adds the table of shapes to --help. */
static char *filter_help(int key, const char *text, void *input)
{
    char *list = NULL;
    size_t bytes;
    if (key != ARGP_KEY_HELP_POST_DOC) {
        return (char *)text;
    }
    FILE *stream = open_memstream(&list, &bytes);
    if (stream == NULL) {
        return (char *)text;
    }
    fprintf(stream, "Shapes:\n");
    for (size_t i = 0; synth_shape_at(i) != NULL; i++) {
        const struct synth_shape *s = synth_shape_at(i);
        fprintf(stream, "  %-21s %s, %u layers, %u wide, %u heads, %u KV heads", s->name,
                s->arch->name, s->n_layers, s->n_embd, s->n_heads, s->n_kv_heads);
        if (s->n_experts > 0) {
            fprintf(stream, ", %u of %u experts", s->n_used, s->n_experts);
        }
        fprintf(stream, "\n");
    }
    fprintf(stream,
            "Keys: n_layers n_embd n_heads n_kv_heads head_dim n_ff n_vocab n_ctx rope_base "
            "tied n_experts n_used n_ff_expert window arch (");
    for (size_t i = 0; synth_arch_at(i) != NULL; i++) {
        fprintf(stream, "%s%s", i > 0 ? ", " : "", synth_arch_at(i)->name);
    }
    fprintf(stream, "). Keys without a name change 'tiny'.\n");
    fprintf(stream, "\nTypes:");
    for (size_t i = 0; synth_mixture_at(i) != NULL; i++) {
        fprintf(stream, " %s", synth_mixture_at(i)->name);
    }
    fprintf(stream, "\n");
    if (fclose(stream) != 0) {
        free(list);
        return (char *)text;
    }
    return list;
}

static const struct argp argp = {
    .options = option_table,
    .parser = parse_option,
    .doc = "Writes a GGUF model with random weights of a known shape, for benchmarks.\v",
    .help_filter = filter_help,
};

static int add_u32(struct gguf_writer *w, const struct synth_shape *s, const char *key,
                   uint32_t value)
{
    char name[96];
    snprintf(name, sizeof(name), "%s.%s", s->arch->name, key);
    return gguf_writer_add_u32(w, name, value);
}

static int add_f32(struct gguf_writer *w, const struct synth_shape *s, const char *key, float value)
{
    char name[96];
    snprintf(name, sizeof(name), "%s.%s", s->arch->name, key);
    return gguf_writer_add_f32(w, name, value);
}

/* Numbers that the published models have. */
static void add_special_keys(struct gguf_writer *w, const struct synth_shape *s)
{
    if (s->n_experts > 0) {
        add_u32(w, s, "expert_count", s->n_experts);
        add_u32(w, s, "expert_used_count", s->n_used);
        add_u32(w, s, "expert_feed_forward_length", s->n_ff_expert);
    }
    if (s->window > 0) {
        add_u32(w, s, "attention.sliding_window", s->window);
    }
    if (s->arch->flags & SYNTH_SOFTCAPS) {
        add_f32(w, s, "attn_logit_softcapping", 50.0f);
        add_f32(w, s, "final_logit_softcapping", 30.0f);
    }
    if (s->arch->flags & SYNTH_SCALES) {
        add_f32(w, s, "embedding_scale", 12.0f);
        add_f32(w, s, "residual_scale", 0.22f);
        add_f32(w, s, "attention.scale", 0.015625f);
        add_f32(w, s, "logit_scale", 6.0f);
    }
    if (s->arch->flags & SYNTH_YARN) {
        char key[96];
        snprintf(key, sizeof(key), "%s.rope.scaling.type", s->arch->name);
        gguf_writer_add_string(w, key, "yarn");
        add_f32(w, s, "rope.scaling.factor", 32.0f);
        add_u32(w, s, "rope.scaling.original_context_length", 4096);
    }
}

/* The writer's first error sticks, so that the last call reports it. */
static int add_keys(struct gguf_writer *w, const struct options *options)
{
    const struct synth_shape *s = &options->shape;
    gguf_writer_add_string(w, "general.architecture", s->arch->name);
    gguf_writer_add_string(w, "general.name", options->shape_text);
    gguf_writer_add_u32(w, "general.file_type", options->mixture->file_type);
    gguf_writer_add_u32(w, "general.quantization_version", 2);
    add_u32(w, s, "vocab_size", s->n_vocab);
    add_u32(w, s, "context_length", s->n_ctx);
    add_u32(w, s, "embedding_length", s->n_embd);
    add_u32(w, s, "block_count", s->n_layers);
    add_u32(w, s, "feed_forward_length", s->n_ff);
    add_u32(w, s, "attention.head_count", s->n_heads);
    add_u32(w, s, "attention.head_count_kv", s->n_kv_heads);
    add_u32(w, s, "attention.key_length", s->head_dim);
    add_u32(w, s, "attention.value_length", s->head_dim);
    add_u32(w, s, "rope.dimension_count", s->head_dim);
    add_f32(w, s, "rope.freq_base", (float)s->rope_base);
    add_f32(w, s, "attention.layer_norm_rms_epsilon",
            s->arch->flags & SYNTH_ROUGH_EPS ? 1e-5f : 1e-6f);
    add_special_keys(w, s);
    return synth_vocab_add(w, s->n_vocab);
}

static int write_tensor(struct gguf_writer *w, const struct synth_tensor *tensor,
                        struct synth_random random, uint8_t *piece)
{
    const struct fmt_type_info *type = fmt_type_info(tensor->type);
    const uint64_t n_rows = tensor->ne[1] * tensor->ne[2];
    uint64_t n_left = tensor->ne[0] / type->n_block * n_rows;
    while (n_left > 0) {
        uint64_t n = PIECE_BYTES / type->block_bytes;
        n = n < n_left ? n : n_left;
        synth_fill(tensor->type, tensor->mean, tensor->deviation, &random, piece, (size_t)n);
        int rc = gguf_writer_write(w, piece, (size_t)n * type->block_bytes);
        if (rc < 0) {
            return rc;
        }
        n_left -= n;
    }
    return 0;
}

static int write_model(struct gguf_writer *w, const struct options *options,
                       const struct synth_plan *plan)
{
    int rc = add_keys(w, options);
    for (size_t i = 0; i < plan->n_tensors && rc == 0; i++) {
        const struct synth_tensor *t = &plan->tensors[i];
        rc = gguf_writer_add_tensor(w, t->name, t->type, t->n_dims, t->ne);
    }
    if (rc == 0) {
        rc = gguf_writer_begin_data(w);
    }
    uint8_t *piece = malloc(PIECE_BYTES);
    if (piece == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < plan->n_tensors && rc == 0; i++) {
        rc = write_tensor(w, &plan->tensors[i], synth_random_of(options->seed, i), piece);
    }
    free(piece);
    return rc < 0 ? rc : gguf_writer_finish(w);
}

static int exit_code(int rc)
{
    switch (-rc) {
    case 0:
        return EX_OK;
    case ENOMEM:
        return EX_OSERR;
    case ENOENT:
    case ENOTDIR:
    case EACCES:
    case EPERM:
    case EROFS:
    case EISDIR:
        return EX_CANTCREAT;
    default:
        return EX_IOERR;
    }
}

int main(int argc, char **argv)
{
    struct options options = {.mixture = synth_mixture_by_name("q4_0")};
    struct synth_plan plan = {0};
    struct gguf_writer *w = NULL;

    argp_err_exit_status = EX_USAGE;
    /* Assigned, not defined: a definition of ours would be hidden from libc. */
    argp_program_version = "gqa-synth " GQAD_VERSION;
    argp_parse(&argp, argc, argv, 0, NULL, &options);
    int rc = synth_plan_init(&options.shape, options.mixture, &plan);
    if (rc == 0) {
        rc = gguf_writer_create(options.output, &w);
    }
    if (rc == 0) {
        rc = write_model(w, &options, &plan);
    }
    if (rc == 0) {
        printf("%s: %s %s, %" PRIu64 " parameters in %zu tensors\n", options.output,
               options.shape_text, options.mixture->name, plan.n_parameters, plan.n_tensors);
    } else {
        fprintf(stderr, "gqa-synth: %s: %s\n", options.output, strerror(-rc));
    }
    gguf_writer_destroy(w);
    synth_plan_finish(&plan);
    return exit_code(rc);
}
