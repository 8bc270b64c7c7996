/* tests/cuda/bench_model.c - whole steps of a model of Llama 3.1's 8 B shape, as the daemon runs
 * them: begin, all ops, end, the logits on the host. Prompts of 4,096 tokens in one step, then
 * tokens one by one.
 *
 * Weights are random, and on the device each matrix lies by itself, as a model's do. On the host
 * those of one shape are one, so that 16 GB take 1 GB, and no file. What a step cannot do without:
 * every matrix and the K and V that it sees once, or the products of its rows. */
#include "tests/cuda/bench.h"

#include "plugins/common/op_times.h"
#include "plugins/cuda/program.h"
#include "plugins/cuda/weights.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS_MAX    32u
#define EMBD_ROWS     64u /* of the table of embeddings, which stays on the host */
#define OPS_A_LAYER   14u
#define PROMPT_RUNS   3
#define TOKEN_RUNS    48
#define TIMED_RUNS    4
#define PATTERN_BYTES (1u << 20)

struct shape {
    const char *name;
    uint32_t n_layers, n_embd, n_ff, n_heads, n_groups, head_dim, n_vocab, n_prompt;
};

static const struct shape shape_8b = {"8 B", LAYERS_MAX, 4096, 14336, 32, 8, 128, 128256, 4096};
static const struct shape shape_tiny = {"tiny", 1, 256, 256, 8, 2, 32, 96, 20};

/* A matrix of each shape; a model's other ones of it have the same packed weights on the host. */
enum { M_Q, M_K, M_O, M_UP, M_DOWN, M_OUT, N_SHAPES };
enum { R_X, R_H, R_Q, R_K, R_V, R_A, R_O, R_G, R_U, R_XO, R_HO, R_LOGITS, N_REGS };
enum { W_EMBD, W_NORM, N_SHARED }; /* weights; then 7 of each layer, then the last one */

struct model {
    const struct shape *shape;
    uint32_t type; /* of the matrices */
    struct gqa_weight weights[N_SHARED + 7 * LAYERS_MAX + 1];
    uint32_t n_weights;
    struct gqa_op ops[1 + OPS_A_LAYER * LAYERS_MAX + 3];
    uint32_t n_ops;
    struct gqa_reg regs[N_REGS];
    struct gqa_attn_layer layers[LAYERS_MAX];
    double freqs[CUDA_DIM_MAX / 2];
    struct gqa_rope_table rope;
    void *packed[N_SHAPES];
    float *table, *norm;
    uint64_t page_bytes, weight_bytes; /* weight_bytes: of all matrices, packed */
    double flops_a_row;                /* of all matrices but the last */
    void **pages;
    uint64_t *versions;
    uint32_t n_pages;
    void *program;
};

static void *memory(uint64_t bytes)
{
    void *at = aligned_alloc(4096, (bytes + 4095) & ~4095ull);

    bench_check(at == NULL ? -1 : 0, "host memory");
    return at;
}

/* ---- weights ----------------------------------------------------------------------------- */

/* Blocks as kernels.h has them, of values of about `size`: halves, or scales (and minimums) in
 * front of codes. */
static void fill_blocks(enum cuda_weight_type type, float size, uint8_t *to, uint32_t n_blocks)
{
    static const float codes[CUDA_W_COUNT] = {
        [CUDA_W_Q4_0] = 8, [CUDA_W_Q8_0] = 128, [CUDA_W_Q4_K] = 8 * 128};
    bool is_halves = type == CUDA_W_F16 || type == CUDA_W_BF16;
    uint32_t bytes = cuda_block_bytes(type);
    uint32_t n_halves = is_halves ? bytes / 2 : type == CUDA_W_Q4_K ? 64 : 32;

    for (uint32_t i = 0; i < n_blocks; i++, to += bytes) {
        uint16_t *halves = (uint16_t *)to;
        for (uint32_t k = 0; k < n_halves; k++) {
            float x = is_halves ? size * bench_random() : size / codes[type];
            halves[k] =
                type == CUDA_W_BF16 ? (uint16_t)(gqa_float_bits(x) >> 16) : gqa_f32_to_f16(x);
        }
        for (uint32_t k = 2 * n_halves; k < bytes; k++) {
            to[k] = (uint8_t)(int)(127.0f * bench_random());
        }
    }
}

/* Random for the first megabyte, and that again and again. */
static void *pack(const struct gqa_weight *w)
{
    enum cuda_weight_type type = cuda_weight_type_of(w->type);
    uint64_t bytes = cuda_weights_packed_bytes(w);
    uint32_t n_blocks = PATTERN_BYTES / cuda_block_bytes(type);
    uint64_t pattern = (uint64_t)n_blocks * cuda_block_bytes(type);
    uint8_t *to = memory(bytes > pattern ? bytes : pattern);

    fill_blocks(type, 1.7f / sqrtf((float)w->ne[0]), to, n_blocks);
    for (uint64_t at = pattern; at < bytes; at += pattern) {
        memcpy(to + at, to, bytes - at < pattern ? bytes - at : pattern);
    }
    return to;
}

static uint32_t add_matrix(struct model *m, uint32_t of, uint32_t n_in, uint32_t n_out)
{
    struct gqa_weight *w = &m->weights[m->n_weights];

    *w = (struct gqa_weight){
        .name = "matrix", .type = m->type, .n_dims = 2, .ne = {n_in, n_out, 1, 1}};
    m->packed[of] = m->packed[of] != NULL ? m->packed[of] : pack(w);
    w->packed = m->packed[of];
    w->packed_bytes = cuda_weights_packed_bytes(w);
    m->weight_bytes += w->packed_bytes;
    m->flops_a_row += of != M_OUT ? 2.0 * n_in * n_out : 0;
    return m->n_weights++;
}

static void add_shared(struct model *m)
{
    uint32_t n = m->shape->n_embd;

    m->table = memory((uint64_t)EMBD_ROWS * n * sizeof(float));
    m->norm = memory(n * sizeof(float));
    for (uint32_t i = 0; i < EMBD_ROWS * n; i++) {
        m->table[i] = bench_random();
    }
    for (uint32_t i = 0; i < n; i++) {
        m->norm[i] = 1.0f;
    }
    m->weights[W_EMBD] = (struct gqa_weight){.name = "embeddings",
                                             .type = GQA_TYPE_F32,
                                             .n_dims = 2,
                                             .ne = {n, EMBD_ROWS, 1, 1},
                                             .data = m->table};
    m->weights[W_NORM] = (struct gqa_weight){
        .name = "norm", .type = GQA_TYPE_F32, .n_dims = 1, .ne = {n, 1, 1, 1}, .data = m->norm};
    m->n_weights = N_SHARED;
}

/* ---- ops --------------------------------------------------------------------------------- */

static struct gqa_view view(const struct model *m, uint32_t reg)
{
    return (struct gqa_view){reg, 0, m->regs[reg].width};
}

static struct gqa_op *add_op(struct model *m, uint32_t kind, uint32_t src, uint32_t dst,
                             uint32_t weight)
{
    const struct gqa_view none = {GQA_NONE, 0, 0};
    struct gqa_op *op = &m->ops[m->n_ops++];

    *op = (struct gqa_op){.kind = kind,
                          .layer = GQA_NONE,
                          .src = src != GQA_NONE ? view(m, src) : none,
                          .src2 = none,
                          .src3 = none,
                          .dst = view(m, dst),
                          .weight = weight,
                          .bias = GQA_NONE,
                          .scale = 1.0f};
    return op;
}

static void add_norm(struct model *m, uint32_t src, uint32_t dst)
{
    struct gqa_op *op = add_op(m, GQA_OP_NORM, src, dst, W_NORM);

    op->u.norm.dim = m->shape->n_embd;
    op->u.norm.eps = 1e-5f;
}

static void add_rope(struct model *m, uint32_t reg)
{
    struct gqa_op *op = add_op(m, GQA_OP_ROPE, reg, reg, GQA_NONE);

    op->u.rope.kind = GQA_ROPE_NEIGHBOUR;
    op->u.rope.head_dim = op->u.rope.n_rot = m->shape->head_dim;
}

static void add_layer(struct model *m, uint32_t layer)
{
    const struct shape *s = m->shape;
    uint32_t n_q = s->n_heads * s->head_dim, n_kv = s->n_groups * s->head_dim;

    add_norm(m, R_X, R_H);
    add_op(m, GQA_OP_LINEAR, R_H, R_Q, add_matrix(m, M_Q, s->n_embd, n_q));
    add_op(m, GQA_OP_LINEAR, R_H, R_K, add_matrix(m, M_K, s->n_embd, n_kv));
    add_op(m, GQA_OP_LINEAR, R_H, R_V, add_matrix(m, M_K, s->n_embd, n_kv));
    add_rope(m, R_Q);
    add_rope(m, R_K);
    struct gqa_op *attention = add_op(m, GQA_OP_ATTENTION, R_Q, R_A, GQA_NONE);
    attention->layer = layer;
    attention->src2 = view(m, R_K);
    attention->src3 = view(m, R_V);
    add_op(m, GQA_OP_LINEAR, R_A, R_O, add_matrix(m, M_O, n_q, s->n_embd));
    add_op(m, GQA_OP_ADD, R_X, R_X, GQA_NONE)->src2 = view(m, R_O);
    add_norm(m, R_X, R_H);
    add_op(m, GQA_OP_LINEAR, R_H, R_G, add_matrix(m, M_UP, s->n_embd, s->n_ff));
    add_op(m, GQA_OP_LINEAR, R_H, R_U, add_matrix(m, M_UP, s->n_embd, s->n_ff));
    add_op(m, GQA_OP_GLU, R_G, R_G, GQA_NONE)->src2 = view(m, R_U);
    add_op(m, GQA_OP_LINEAR, R_G, R_O, add_matrix(m, M_DOWN, s->n_ff, s->n_embd));
    add_op(m, GQA_OP_ADD, R_X, R_X, GQA_NONE)->src2 = view(m, R_O);
}

static void set_attention(struct model *m, uint32_t layer)
{
    const struct shape *s = m->shape;
    uint64_t bytes = gqa_kv_head_bytes(GQA_TYPE_BF16, s->head_dim);

    m->layers[layer] = (struct gqa_attn_layer){.struct_size = sizeof(m->layers[0]),
                                               .layer = layer,
                                               .n_heads = s->n_heads,
                                               .n_kv_heads = s->n_groups,
                                               .k_dim = s->head_dim,
                                               .v_dim = s->head_dim,
                                               .k_type = GQA_TYPE_BF16,
                                               .v_type = GQA_TYPE_BF16,
                                               .scale = 1.0f / sqrtf((float)s->head_dim),
                                               .k_offset = 2 * layer * s->n_groups * bytes,
                                               .v_offset = (2 * layer + 1) * s->n_groups * bytes,
                                               .k_head_bytes = bytes,
                                               .v_head_bytes = bytes};
    m->page_bytes = 2ull * (layer + 1) * s->n_groups * bytes;
}

static void set_registers(struct model *m)
{
    const struct shape *s = m->shape;
    uint32_t n_q = s->n_heads * s->head_dim, n_kv = s->n_groups * s->head_dim;
    const uint32_t widths[N_REGS] = {
        [R_X] = s->n_embd, [R_H] = s->n_embd,  [R_Q] = n_q,        [R_K] = n_kv,
        [R_V] = n_kv,      [R_A] = n_q,        [R_O] = s->n_embd,  [R_G] = s->n_ff,
        [R_U] = s->n_ff,   [R_XO] = s->n_embd, [R_HO] = s->n_embd, [R_LOGITS] = s->n_vocab,
    };

    for (uint32_t i = 0; i < N_REGS; i++) {
        m->regs[i] = (struct gqa_reg){widths[i], i >= R_XO ? GQA_REG_OUT : 0};
    }
}

/* ---- pages and steps --------------------------------------------------------------------- */

/* Room for the prompt and a page more. */
static void make_pages(struct model *m)
{
    m->n_pages = m->shape->n_prompt / CUDA_PAGE + 2;
    m->pages = memory(m->n_pages * sizeof(*m->pages));
    m->versions = memory(m->n_pages * sizeof(*m->versions));
    for (uint32_t i = 0; i < m->n_pages; i++) {
        m->pages[i] = memory(m->page_bytes);
        memset(m->pages[i], 0, m->page_bytes);
        m->versions[i] = 1 + i;
    }
}

static void start(struct cuda_context *c, struct model *m, const struct shape *s, uint32_t type)
{
    struct gqa_reason reason = {""};

    m->shape = s;
    m->type = type;
    set_registers(m);
    add_shared(m);
    add_op(m, GQA_OP_EMBED, GQA_NONE, R_X, W_EMBD);
    for (uint32_t i = 0; i < s->n_layers; i++) {
        add_layer(m, i);
        set_attention(m, i);
    }
    add_op(m, GQA_OP_GATHER, R_X, R_XO, GQA_NONE);
    add_norm(m, R_XO, R_HO);
    add_op(m, GQA_OP_LINEAR, R_HO, R_LOGITS, add_matrix(m, M_OUT, s->n_embd, s->n_vocab));
    for (uint32_t i = 0; i < s->head_dim / 2; i++) {
        m->freqs[i] = pow(500000, -2.0 * i / s->head_dim);
    }
    m->rope =
        (struct gqa_rope_table){.n_freqs = s->head_dim / 2, .freqs = m->freqs, .magnitude = 1};
    make_pages(m);
    const struct gqa_program_desc desc = {.struct_size = sizeof(desc),
                                          .max_rows = s->n_prompt,
                                          .max_out_rows = 1,
                                          .n_ops = m->n_ops,
                                          .n_regs = N_REGS,
                                          .n_weights = m->n_weights,
                                          .n_attn_layers = s->n_layers,
                                          .n_rope_tables = 1,
                                          .ops = m->ops,
                                          .regs = m->regs,
                                          .weights = m->weights,
                                          .attn_layers = m->layers,
                                          .rope_tables = &m->rope};
    struct cuda_program *program;
    int r = cuda_program_prepare(c, &desc, &program, &reason);
    bench_check(r, reason.text);
    m->program = program;
}

static void finish(struct model *m)
{
    cuda_program_release(m->program);
    for (uint32_t i = 0; i < N_SHAPES; i++) {
        free(m->packed[i]);
    }
    for (uint32_t i = 0; i < m->n_pages; i++) {
        free(m->pages[i]);
    }
    free(m->pages);
    free(m->versions);
    free(m->table);
    free(m->norm);
}

/* Seconds of a step of n_rows of one sequence behind n_past tokens. */
static double step(struct model *m, uint32_t n_past, uint32_t n_rows, uint8_t row_class)
{
    int32_t *tokens = memory(n_rows * sizeof(*tokens));
    uint32_t *positions = memory(n_rows * sizeof(*positions)), out_row = n_rows - 1;
    uint8_t *classes = memory(n_rows);

    for (uint32_t i = 0; i < n_rows; i++) {
        positions[i] = n_past + i;
        tokens[i] = (int32_t)(positions[i] * 31 % EMBD_ROWS);
        classes[i] = row_class;
    }
    const struct gqa_page_table table = {
        .n_pages = m->n_pages, .pages = m->pages, .versions = m->versions};
    const struct gqa_attn_seq seq = {.n_rows = n_rows, .n_past = n_past, .tables = &table};
    const struct gqa_attn_batch attention = {.struct_size = sizeof(attention),
                                             .n_rows = n_rows,
                                             .n_seqs = 1,
                                             .commit = 1,
                                             .seqs = &seq,
                                             .row_class = classes};
    const struct gqa_batch batch = {.struct_size = sizeof(batch),
                                    .n_rows = n_rows,
                                    .n_out = 1,
                                    .tokens = tokens,
                                    .positions = positions,
                                    .out_rows = &out_row,
                                    .attention = &attention};
    uint64_t begin = plugin_now_ns();
    bench_check(cuda_program_begin(m->program, &batch), "begin");
    bench_check(cuda_program_run(m->program, 0, m->n_ops), "run");
    bench_check(cuda_program_end(m->program), "end");
    const float *logits = cuda_program_data(m->program, R_LOGITS);
    double s = (double)(plugin_now_ns() - begin) / 1e9;
    bench_check(logits == NULL || !isfinite(logits[0]) ? -1 : 0, "logits that are numbers");
    free(tokens);
    free(positions);
    free(classes);
    return s;
}

/* ---- what is measured -------------------------------------------------------------------- */

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median of n steps, after two more: the second is captured as a graph. */
static double median(struct model *m, uint32_t n_past, uint32_t n_rows, uint8_t row_class, int n)
{
    double s[TOKEN_RUNS];

    for (int i = -2; i < n; i++) {
        double one = step(m, n_past, n_rows, row_class);
        s[i < 0 ? 0 : i] = one;
    }
    qsort(s, (size_t)n, sizeof(*s), by_size);
    return s[n / 2];
}

/* Where the device's time goes, by kind of op. */
static void tell_times(const struct bench *b, struct model *m, uint32_t n_past, uint32_t n_rows,
                       uint8_t row_class)
{
    static const char *const names[] = {
        [GQA_OP_EMBED] = "embed", [GQA_OP_NORM] = "norm",           [GQA_OP_LINEAR] = "linear",
        [GQA_OP_ROPE] = "rope",   [GQA_OP_ATTENTION] = "attention", [GQA_OP_GLU] = "glu",
        [GQA_OP_ADD] = "add",     [GQA_OP_GATHER] = "gather"};
    struct gqa_op_time before[16], after[16];
    uint32_t n_before = cuda_times_read(m->program, before, 16), n_after;
    int n_runs = b->tiny ? 1 : TIMED_RUNS;

    for (int i = 0; i < n_runs; i++) {
        step(m, n_past, n_rows, row_class);
    }
    n_after = cuda_times_read(m->program, after, 16);
    printf("    on the device, us:");
    for (uint32_t i = 0; i < n_after; i++) {
        uint64_t ns = after[i].ns;
        for (uint32_t k = 0; k < n_before; k++) {
            ns -= before[k].kind == after[i].kind ? before[k].ns : 0;
        }
        printf(" %s %.1f", names[after[i].kind], (double)ns / 1e3 / n_runs);
    }
    printf("\n");
}

/* What is asked of a type, and whether cuBLASLt takes part. */
struct wish {
    uint32_t type;
    const char *name, *options;
    double decode, prompt;
};

static double kv_bytes(const struct shape *s, double n_tokens)
{
    return 4.0 * n_tokens * s->n_layers * s->n_groups * s->head_dim;
}

static void measure_token(struct bench *b, struct model *m, const struct wish *w, uint32_t n_past)
{
    char name[96];
    const struct bench_line l = {.seconds =
                                     median(m, n_past, 1, GQA_ROW_D, b->tiny ? 1 : TOKEN_RUNS),
                                 .bytes = (double)m->weight_bytes + kv_bytes(m->shape, n_past),
                                 .flops = m->flops_a_row,
                                 .peak = b->half_flops_per_s,
                                 .wanted = w->decode};

    snprintf(name, sizeof(name), "%s %s, a token at %u", m->shape->name, w->name, n_past + 1);
    bench_report(b, name, &l);
    tell_times(b, m, n_past, 1, GQA_ROW_D);
}

static void measure_prompt(struct bench *b, struct model *m, const struct wish *w)
{
    const struct shape *s = m->shape;
    double n = s->n_prompt;
    char name[96];
    const struct bench_line l = {
        .seconds = median(m, 0, s->n_prompt, GQA_ROW_P, b->tiny ? 1 : PROMPT_RUNS),
        .bytes = (double)m->weight_bytes + kv_bytes(s, n),
        .flops = n * m->flops_a_row + 2.0 * n * n * s->n_layers * s->n_heads * s->head_dim,
        .peak = b->half_flops_per_s, /* of bf16, whatever the type */
        .wanted = w->prompt};

    snprintf(name, sizeof(name), "%s %s, a prompt of %u", s->name, w->name, s->n_prompt);
    bench_report(b, name, &l);
    tell_times(b, m, 0, s->n_prompt, GQA_ROW_P);
}

static void measure(struct bench *b, const struct wish *w)
{
    const struct shape *s = b->tiny ? &shape_tiny : &shape_8b;
    struct gqa_reason reason = {""};
    struct cuda_context *c;
    struct model *m = memory(sizeof(*m));

    int r = cuda_context_create(b->host, w->options, &c, &reason);
    if (r < 0) {
        printf("%s %s: NOT MEASURED: %s\n", s->name, w->name, reason.text);
        free(m);
        return;
    }
    memset(m, 0, sizeof(*m));
    start(c, m, s, w->type);
    measure_prompt(b, m, w);
    if (w->options[0] == '\0') { /* options are about prompts */
        measure_token(b, m, w, s->n_prompt / 32);
        measure_token(b, m, w, s->n_prompt);
    }
    finish(m);
    free(m);
    cuda_context_destroy(c);
}

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

void bench_model_floors(struct bench *b)
{
    static const struct wish wishes[] = {
        {GQA_TYPE_BF16, "BF16", "", 0.75, 0.5},
        {GQA_TYPE_BF16, "BF16, cuBLASLt", "cublaslt=on", 0, 0.5},
        {GQA_TYPE_Q4_0, "Q4_0", "", 0.6, 0.5},
    };

    for (size_t i = 0; i < COUNT(wishes); i++) {
        measure(b, &wishes[i]);
    }
}

void bench_models(struct bench *b)
{
    static const struct wish more[] = {
        {GQA_TYPE_F16, "F16", "", 0, 0},
        {GQA_TYPE_F16, "F16, cuBLASLt", "cublaslt=on", 0, 0.5},
        {GQA_TYPE_Q8_0, "Q8_0", "", 0, 0},
        {GQA_TYPE_Q4_K, "Q4_K", "", 0, 0},
    };

    bench_model_floors(b);
    for (size_t i = 0; i < COUNT(more); i++) {
        measure(b, &more[i]);
    }
}
