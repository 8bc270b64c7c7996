/* tests/cuda/check_program.c - a small llama-like model on two plugins: the cpu's results are the
 * truth for cuda's, and cuda's bits must not depend on chunks and company.
 *
 *   check-program CPU.so CUDA.so
 *
 * For each type of weights and of the cache: a prompt of 70 tokens beside one of 5, then tokens,
 * then a chunk, so that products of 1 to 75 rows, split and whole attention, pages that fill and
 * pages that are copied are all taken. Last, the times of ops. Exit status: 0 right, 1 wrong, 77 no
 * GPU (and it says so).
 */
#include "format/types.h"
#include "tests/cuda/check_util.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define N_EMBD    256u
#define N_FF      512u
#define N_HEADS   8u
#define N_GROUPS  2u
#define HEAD_DIM  32u
#define N_VOCAB   80u
#define N_KV      (N_GROUPS * HEAD_DIM)
#define ROWS_MAX  128u
#define PAGES_MAX 4u
#define SEQS_MAX  2u

#define ARRAY_LENGTH(a) (sizeof(a) / sizeof((a)[0]))

/* Of the logits' root mean square. Sums differ by roundings of float32; quantised: activations that
 * differ by a rounding may rarely become the next integer, which is worth some 1e-3. F32 weights
 * are F16 on cuda. */
#define TOLERANCE 5e-3f
/* A few codes of K or V that such a rounding has moved: one of Q4_0's 15, in 75 tokens, is worth
 * 3e-3. That attention is exact for the same codes, gqa-plugin-check finds. */
#define TOLERANCE_CODES 3e-2f

static uint32_t random_state;

static float random_unit(void) /* -1..1 */
{
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(random_state >> 8) / 8388608.0f - 1.0f;
}

/* ---- the model --------------------------------------------------------------------------- */

enum {
    W_EMBD,
    W_NORM1,
    W_Q,
    W_Q_BIAS,
    W_K,
    W_V,
    W_O,
    W_NORM2,
    W_GATE,
    W_UP,
    W_DOWN,
    W_NORM3,
    W_OUT,
    N_WEIGHTS
};
enum { R_X, R_H, R_Q, R_K, R_V, R_A, R_O, R_G, R_U, R_XO, R_HO, R_LOGITS, N_REGS };

static const uint32_t reg_widths[N_REGS] = {
    [R_X] = N_EMBD, [R_H] = N_EMBD,  [R_Q] = N_EMBD,  [R_K] = N_KV,
    [R_V] = N_KV,   [R_A] = N_EMBD,  [R_O] = N_EMBD,  [R_G] = N_FF,
    [R_U] = N_FF,   [R_XO] = N_EMBD, [R_HO] = N_EMBD, [R_LOGITS] = N_VOCAB,
};

struct model {
    struct gqa_weight weights[N_WEIGHTS];
    struct gqa_reg regs[N_REGS];
    struct gqa_op ops[24];
    uint32_t n_ops;
    struct gqa_attn_layer layer;
    struct gqa_rope_table rope;
    double freqs[HEAD_DIM / 2];
    float sinks[N_HEADS];
    uint64_t page_bytes;
};

static void add_weight(struct model *m, uint32_t id, uint32_t type, uint32_t k, uint32_t n)
{
    const struct fmt_type_info *info = fmt_type_info(type);
    size_t n_values = (size_t)k * (n > 0 ? n : 1);
    float *values = malloc(n_values * sizeof(*values));
    void *data = malloc(fmt_type_bytes(info, n_values));

    for (size_t i = 0; i < n_values; i++) {
        values[i] = n > 0 ? random_unit() * 1.7f / sqrtf((float)k) : 1.0f + 0.2f * random_unit();
    }
    info->quantise(values, data, n_values);
    free(values);
    m->weights[id] = (struct gqa_weight){.name = "weight",
                                         .type = type,
                                         .n_dims = n > 0 ? 2 : 1,
                                         .ne = {k, n > 0 ? n : 1, 1, 1},
                                         .data = data};
}

static struct gqa_view view(uint32_t reg)
{
    return (struct gqa_view){reg, 0, reg_widths[reg]};
}

static struct gqa_op *add_op(struct model *m, uint32_t kind, uint32_t src, uint32_t dst,
                             uint32_t weight)
{
    struct gqa_op *op = &m->ops[m->n_ops++];

    *op = (struct gqa_op){
        .kind = kind, .layer = GQA_NONE, .weight = weight, .bias = GQA_NONE, .scale = 1.0f};
    op->src = src != GQA_NONE ? view(src) : (struct gqa_view){GQA_NONE, 0, 0};
    op->src2 = op->src3 = (struct gqa_view){GQA_NONE, 0, 0};
    op->dst = view(dst);
    return op;
}

static void add_norm(struct model *m, uint32_t src, uint32_t dst, uint32_t weight)
{
    struct gqa_op *op = add_op(m, GQA_OP_NORM, src, dst, weight);
    op->u.norm.kind = GQA_NORM_RMS;
    op->u.norm.dim = N_EMBD;
    op->u.norm.eps = 1e-5f;
}

static void add_rope(struct model *m, uint32_t reg)
{
    struct gqa_op *op = add_op(m, GQA_OP_ROPE, reg, reg, GQA_NONE);
    op->u.rope.kind = GQA_ROPE_HALF;
    op->u.rope.head_dim = HEAD_DIM;
    op->u.rope.n_rot = HEAD_DIM;
}

static void build_ops(struct model *m)
{
    add_op(m, GQA_OP_EMBED, GQA_NONE, R_X, W_EMBD)->scale = 2.0f;
    add_norm(m, R_X, R_H, W_NORM1);
    add_op(m, GQA_OP_LINEAR, R_H, R_Q, W_Q)->bias = W_Q_BIAS;
    add_op(m, GQA_OP_LINEAR, R_H, R_K, W_K);
    add_op(m, GQA_OP_LINEAR, R_H, R_V, W_V);
    add_rope(m, R_Q);
    add_rope(m, R_K);
    struct gqa_op *attention = add_op(m, GQA_OP_ATTENTION, R_Q, R_A, GQA_NONE);
    attention->layer = 0;
    attention->src2 = view(R_K);
    attention->src3 = view(R_V);
    add_op(m, GQA_OP_LINEAR, R_A, R_O, W_O);
    add_op(m, GQA_OP_ADD, R_X, R_X, GQA_NONE)->src2 = view(R_O);
    add_norm(m, R_X, R_H, W_NORM2);
    add_op(m, GQA_OP_LINEAR, R_H, R_G, W_GATE);
    add_op(m, GQA_OP_LINEAR, R_H, R_U, W_UP);
    add_op(m, GQA_OP_GLU, R_G, R_G, GQA_NONE)->src2 = view(R_U);
    add_op(m, GQA_OP_LINEAR, R_G, R_O, W_DOWN);
    add_op(m, GQA_OP_ADD, R_X, R_X, GQA_NONE)->src2 = view(R_O);
    add_op(m, GQA_OP_GATHER, R_X, R_XO, GQA_NONE);
    add_norm(m, R_XO, R_HO, W_NORM3);
    add_op(m, GQA_OP_LINEAR, R_HO, R_LOGITS, W_OUT);
}

struct trial {
    uint32_t type;           /* of the weights */
    uint32_t k_type, v_type; /* of the cache */
    uint32_t window;
    float tolerance;
};

static void model_build(struct model *m, const struct trial *t)
{
    uint64_t k_bytes = gqa_kv_head_bytes(t->k_type, HEAD_DIM);
    uint64_t v_bytes = gqa_kv_head_bytes(t->v_type, HEAD_DIM);
    uint32_t type = t->type, window = t->window;

    memset(m, 0, sizeof(*m));
    random_state = 12345 + type * 100 + t->k_type;
    add_weight(m, W_EMBD, type, N_EMBD, N_VOCAB);
    add_weight(m, W_NORM1, GQA_TYPE_F32, N_EMBD, 0);
    add_weight(m, W_Q, type, N_EMBD, N_EMBD);
    add_weight(m, W_Q_BIAS, GQA_TYPE_F32, N_EMBD, 0);
    add_weight(m, W_K, type, N_EMBD, N_KV);
    add_weight(m, W_V, type, N_EMBD, N_KV);
    add_weight(m, W_O, type, N_EMBD, N_EMBD);
    add_weight(m, W_NORM2, GQA_TYPE_F32, N_EMBD, 0);
    add_weight(m, W_GATE, type, N_EMBD, N_FF);
    add_weight(m, W_UP, type, N_EMBD, N_FF);
    add_weight(m, W_DOWN, type, N_FF, N_EMBD);
    add_weight(m, W_NORM3, GQA_TYPE_F32, N_EMBD, 0);
    add_weight(m, W_OUT, type, N_EMBD, N_VOCAB);
    for (uint32_t i = 0; i < N_REGS; i++) {
        m->regs[i] = (struct gqa_reg){reg_widths[i], i >= R_XO ? GQA_REG_OUT : 0};
    }
    build_ops(m);
    for (uint32_t i = 0; i < HEAD_DIM / 2; i++) {
        m->freqs[i] = pow(10000.0, -2.0 * i / HEAD_DIM);
    }
    m->rope = (struct gqa_rope_table){HEAD_DIM / 2, m->freqs, 1.0f};
    for (uint32_t i = 0; i < N_HEADS; i++) {
        m->sinks[i] = random_unit();
    }
    m->layer = (struct gqa_attn_layer){
        .struct_size = sizeof(m->layer),
        .n_heads = N_HEADS,
        .n_kv_heads = N_GROUPS,
        .k_dim = HEAD_DIM,
        .v_dim = HEAD_DIM,
        .k_type = t->k_type,
        .v_type = t->v_type,
        .window = window,
        .scale = 1.0f / sqrtf(HEAD_DIM),
        .sinks = window != 0 ? m->sinks : NULL,
        .k_offset = 0,
        .v_offset = N_GROUPS * k_bytes,
        .k_head_bytes = k_bytes,
        .v_head_bytes = v_bytes,
    };
    m->page_bytes = N_GROUPS * (k_bytes + v_bytes);
}

static void model_finish(struct model *m)
{
    for (uint32_t i = 0; i < N_WEIGHTS; i++) {
        free((void *)(uintptr_t)m->weights[i].data);
    }
}

/* ---- a run ------------------------------------------------------------------------------- */

/* Tokens of the sequences in each step. */
struct schedule {
    const char *name;
    uint32_t n_steps;
    uint32_t rows[10][SEQS_MAX];
};

struct run {
    struct gqa_weight weights[N_WEIGHTS];
    void *program;
    void *pages[SEQS_MAX][PAGES_MAX];
    uint64_t versions[SEQS_MAX][PAGES_MAX];
    struct gqa_page_table tables[SEQS_MAX];
    uint32_t n_past[SEQS_MAX];
    float logits[SEQS_MAX][N_VOCAB]; /* of each sequence's last token */
};

static int pack_weights(const struct side *s, const struct model *m, struct run *run)
{
    memcpy(run->weights, m->weights, sizeof(run->weights));
    for (uint32_t i = 0; i < N_WEIGHTS; i++) {
        struct gqa_weight *w = &run->weights[i];
        w->packed_bytes = w->n_dims == 2 && i != W_EMBD ? s->program->pack_bytes(s->context, w) : 0;
        if (w->packed_bytes == 0) {
            continue;
        }
        void *packed = malloc(w->packed_bytes);
        int r = packed == NULL ? -ENOMEM : s->program->pack(s->context, w, 0, w->ne[1], packed);
        if (r < 0) {
            return r;
        }
        w->packed = packed;
    }
    return 0;
}

static int run_start(const struct side *s, const struct model *m, bool versions, struct run *run)
{
    struct gqa_reason reason = {""};

    memset(run, 0, sizeof(*run));
    for (uint32_t i = 0; i < SEQS_MAX; i++) {
        for (uint32_t k = 0; k < PAGES_MAX; k++) {
            run->pages[i][k] = aligned_alloc(4096, (m->page_bytes + 4095) & ~(uint64_t)4095);
            memset(run->pages[i][k], 0xff,
                   m->page_bytes); /* NaN: what is not written is not seen */
            run->versions[i][k] = 1 + i * PAGES_MAX + k;
        }
        run->tables[i] = (struct gqa_page_table){.n_pages = PAGES_MAX,
                                                 .pages = run->pages[i],
                                                 .versions = versions ? run->versions[i] : NULL};
    }
    int r = pack_weights(s, m, run);
    const struct gqa_program_desc desc = {
        .struct_size = sizeof(desc),
        .max_rows = ROWS_MAX,
        .max_out_rows = SEQS_MAX,
        .n_ops = m->n_ops,
        .n_regs = N_REGS,
        .n_weights = N_WEIGHTS,
        .n_attn_layers = 1,
        .n_rope_tables = 1,
        .ops = m->ops,
        .regs = m->regs,
        .weights = run->weights,
        .attn_layers = &m->layer,
        .rope_tables = &m->rope,
    };
    r = r < 0 ? r : s->program->prepare(s->context, &desc, &run->program, &reason);
    if (r < 0) {
        printf("%s: prepare: %s (%s)\n", s->plugin->name, reason.text, strerror(-r));
    }
    return r;
}

static void run_finish(const struct side *s, struct run *run)
{
    if (run->program != NULL) {
        s->program->release(s->context, run->program);
    }
    for (uint32_t i = 0; i < N_WEIGHTS; i++) {
        free((void *)(uintptr_t)run->weights[i].packed);
    }
    for (uint32_t i = 0; i < SEQS_MAX; i++) {
        for (uint32_t k = 0; k < PAGES_MAX; k++) {
            free(run->pages[i][k]);
        }
    }
}

static int32_t token_at(uint32_t seq, uint32_t position)
{
    return (int32_t)((position * 31 + seq * 17 + position * position) % N_VOCAB);
}

static int run_step(const struct side *s, const struct model *m, struct run *run,
                    const uint32_t *rows)
{
    int32_t tokens[ROWS_MAX];
    uint32_t positions[ROWS_MAX], out_rows[SEQS_MAX], of_out[SEQS_MAX], n = 0, n_out = 0;
    uint8_t classes[ROWS_MAX] = {0};
    struct gqa_attn_seq seqs[SEQS_MAX];

    for (uint32_t i = 0; i < SEQS_MAX; i++) {
        if (rows[i] == 0) {
            continue;
        }
        seqs[n_out] = (struct gqa_attn_seq){
            .first_row = n, .n_rows = rows[i], .n_past = run->n_past[i], .tables = &run->tables[i]};
        for (uint32_t k = 0; k < rows[i]; k++, n++) {
            positions[n] = run->n_past[i] + k;
            tokens[n] = token_at(i, positions[n]);
        }
        of_out[n_out] = i;
        out_rows[n_out++] = n - 1;
        run->n_past[i] += rows[i];
    }
    const struct gqa_attn_batch attention = {.struct_size = sizeof(attention),
                                             .n_rows = n,
                                             .n_seqs = n_out,
                                             .commit = 1,
                                             .seqs = seqs,
                                             .row_class = classes};
    const struct gqa_batch batch = {.struct_size = sizeof(batch),
                                    .n_rows = n,
                                    .n_out = n_out,
                                    .tokens = tokens,
                                    .positions = positions,
                                    .out_rows = out_rows,
                                    .attention = &attention};
    int r = s->program->begin(s->context, run->program, &batch);
    if (r < 0) {
        return r;
    }
    r = s->program->run(s->context, run->program, 0, m->n_ops);
    int end = s->program->end(s->context, run->program);
    if (r < 0 || end < 0) {
        return r < 0 ? r : end;
    }
    const float *logits = s->program->data(s->context, run->program, R_LOGITS);
    for (uint32_t i = 0; logits != NULL && i < n_out; i++) {
        memcpy(run->logits[of_out[i]], logits + i * N_VOCAB, sizeof(run->logits[0]));
    }
    return logits == NULL ? -EIO : 0;
}

/* Runs all steps; *ret has the last logits and the pages. */
static int run_all(const struct side *s, const struct model *m, const struct schedule *schedule,
                   bool versions, struct run *ret)
{
    int r = run_start(s, m, versions, ret);

    for (uint32_t i = 0; r == 0 && i < schedule->n_steps; i++) {
        r = run_step(s, m, ret, schedule->rows[i]);
    }
    if (r < 0) {
        printf("%s: %s: %s\n", s->plugin->name, schedule->name, strerror(-r));
    }
    return r;
}

static const struct schedule together = {
    "together", 9, {{66, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {0, 70}, {9, 1}}};
static const struct schedule apart = {
    "in chunks and apart", 5, {{33, 0}, {39, 0}, {0, 76}, {9, 0}, {0, 2}}};
/* The same numbers of tokens: 81 and 78. */

static bool same_pages(const struct model *m, const struct run *a, const struct run *b)
{
    for (uint32_t i = 0; i < SEQS_MAX; i++) {
        for (uint32_t k = 0; k < PAGES_MAX; k++) {
            if (memcmp(a->pages[i][k], b->pages[i][k], m->page_bytes) != 0) {
                return false;
            }
        }
    }
    return true;
}

/* Bytes of K and V that a rounding has made others: a code, a scale, the last bit of a half. */
static size_t differing_bytes(const struct model *m, const struct run *a, const struct run *b)
{
    size_t n = 0;

    for (uint32_t i = 0; i < SEQS_MAX * PAGES_MAX; i++) {
        const uint8_t *x = a->pages[i / PAGES_MAX][i % PAGES_MAX];
        const uint8_t *y = b->pages[i / PAGES_MAX][i % PAGES_MAX];
        for (uint64_t k = 0; k < m->page_bytes; k++) {
            n += x[k] != y[k];
        }
    }
    return n;
}

static bool check_model(const struct side *cpu, const struct side *cuda, const struct trial *t)
{
    static struct run truth, got, other;
    struct model m;

    model_build(&m, t);
    int r = run_all(cpu, &m, &together, false, &truth);
    r = r < 0 ? r : run_all(cuda, &m, &together, true, &got);
    int r2 = r < 0 ? r : run_all(cuda, &m, &apart, false, &other);
    bool wrong = r2 < 0;
    if (!wrong) {
        float error = check_distance(truth.logits[0], got.logits[0], SEQS_MAX * N_VOCAB);
        bool bits = memcmp(got.logits, other.logits, sizeof(got.logits)) == 0 &&
                    same_pages(&m, &got, &other);
        wrong = !(error <= t->tolerance) || !bits;
        printf("%-6s K %-5s V %-5s window %3u: %s %.3g of %.3g, %zu bytes of K and V are others, "
               "%s\n",
               fmt_type_info(t->type)->name, fmt_type_info(t->k_type)->name,
               fmt_type_info(t->v_type)->name, t->window, error <= t->tolerance ? "ok" : "WRONG",
               (double)error, (double)t->tolerance, differing_bytes(&m, &truth, &got),
               bits ? "same bits in chunks and apart" : "OTHER BITS in chunks and apart");
    }
    run_finish(cpu, &truth);
    run_finish(cuda, &got);
    run_finish(cuda, &other);
    model_finish(&m);
    return !wrong;
}

/* ---- times of ops ------------------------------------------------------------------------ */

/* Steps that are launched, captured and replayed. */
static const struct schedule timed = {"timed", 5, {{70, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}};
#define TIMED_ROWS (71u + 4u * 2u)

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Whether the times of a kind are those of all its ops in all steps; adds up what they took. */
static bool is_right_time(const struct model *m, const struct gqa_op_time *t, double *ns)
{
    uint64_t calls = 0, rows = 0;

    for (uint32_t i = 0; i < m->n_ops; i++) {
        bool is_out = m->regs[m->ops[i].dst.reg].flags & GQA_REG_OUT;
        calls += m->ops[i].kind == t->kind ? timed.n_steps : 0;
        rows += m->ops[i].kind != t->kind ? 0 : is_out ? 2 * timed.n_steps : TIMED_ROWS;
    }
    bool reads = t->kind == GQA_OP_LINEAR || t->kind == GQA_OP_ATTENTION;
    *ns += (double)t->ns;
    return t->calls == calls && t->rows == rows && t->ns > 0 && (t->bytes > 0) == reads;
}

/* Runs the schedule without a reading, then with one before and one behind it. */
static bool check_times(const struct side *cuda)
{
    static const struct trial trial = {GQA_TYPE_Q4_0, GQA_TYPE_F16, GQA_TYPE_F16, 0, TOLERANCE};
    static struct run plain, read;
    struct gqa_op_time times[16];
    struct model m;
    double ns = 0;

    model_build(&m, &trial);
    int r = run_all(cuda, &m, &timed, true, &plain);
    r = r < 0 ? r : run_start(cuda, &m, true, &read);
    bool right = r == 0 && cuda->program->op_times(cuda->context, read.program, times, 16) == 0;
    double start = now();
    for (uint32_t i = 0; right && i < timed.n_steps; i++) {
        right = run_step(cuda, &m, &read, timed.rows[i]) == 0;
    }
    double wall = now() - start;
    uint32_t n = right ? cuda->program->op_times(cuda->context, read.program, times, 16) : 0;
    for (uint32_t i = 0; i < n; i++) {
        right = is_right_time(&m, &times[i], &ns) && right;
    }
    right = right && n == 8 && ns <= wall * 1e9 &&
            memcmp(plain.logits, read.logits, sizeof(plain.logits)) == 0 &&
            cuda->program->op_times(cuda->context, plain.program, times, 16) == 0;
    printf("times of ops: %s, %u kinds, %.3g s of %.3g s\n", right ? "ok" : "WRONG", n, ns / 1e9,
           wall);
    run_finish(cuda, &plain);
    run_finish(cuda, &read);
    model_finish(&m);
    return right;
}

/* ---- all of it --------------------------------------------------------------------------- */

/* Quantised caches meet F16 weights, for which activations have no codes of their own. */
static const struct trial trials[] = {
    {GQA_TYPE_Q4_0, GQA_TYPE_F16, GQA_TYPE_F16, 0, TOLERANCE},
    {GQA_TYPE_Q8_0, GQA_TYPE_BF16, GQA_TYPE_BF16, 40, TOLERANCE},
    {GQA_TYPE_Q4_K, GQA_TYPE_F16, GQA_TYPE_BF16, 0, TOLERANCE},
    {GQA_TYPE_Q6_K, GQA_TYPE_BF16, GQA_TYPE_F16, 0, TOLERANCE},
    {GQA_TYPE_MXFP4, GQA_TYPE_F16, GQA_TYPE_F16, 0, TOLERANCE},
    {GQA_TYPE_F16, GQA_TYPE_F16, GQA_TYPE_F16, 0, TOLERANCE},
    {GQA_TYPE_BF16, GQA_TYPE_BF16, GQA_TYPE_BF16, 0, TOLERANCE},
    {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_F16, 0, TOLERANCE},
    {GQA_TYPE_F16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0, 40, TOLERANCE_CODES},
    {GQA_TYPE_F16, GQA_TYPE_Q4_0, GQA_TYPE_Q8_0, 0, TOLERANCE_CODES},
};

/* The models, then the times. */
static bool check(const struct side *cpu, const struct side *cuda, size_t index)
{
    return index < ARRAY_LENGTH(trials) ? check_model(cpu, cuda, &trials[index])
                                        : check_times(cuda);
}

int main(int argc, char **argv)
{
    return sides_check(argc, argv, ARRAY_LENGTH(trials) + 1, check);
}
