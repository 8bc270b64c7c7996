/* tests/kernels/program.c - a whole small model as a program: against float64, in other batches,
 * in ranges; and what begin and run refuse. */
#include "tests/kernels/program_util.h"

#include "format/types.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    VOCABULARY = 40,
    EMBED = 256,
    HEADS = 4,
    KV_HEADS = 2,
    HEAD = 32,
    Q = HEADS * HEAD,
    KV = KV_HEADS * HEAD,
    HIDDEN = 512,
    ROWS = 21,
    KV_BYTES = GQA_KV_BLOCK_TOKENS * HEAD * sizeof(float), /* of one group's K, or V */
};

enum matrix { TABLE, WQ, WK, WV, WO, GATE, UP, DOWN, N_MATRICES };

static const uint32_t matrix_outputs[N_MATRICES] = {VOCABULARY, Q,      KV,     KV,
                                                    EMBED,      HIDDEN, HIDDEN, EMBED};
static const uint32_t matrix_inputs[N_MATRICES] = {EMBED, EMBED, EMBED, EMBED,
                                                   Q,     EMBED, EMBED, HIDDEN};

/* The weights: one layer, tied embeddings. */
struct model {
    struct test_weight matrices[N_MATRICES];
    float norm[EMBED], q_bias[Q];
    double freqs[HEAD / 2];
};

/* Random weights; mixed: a type of its own for each matrix, else all float32. */
static void model_init(struct model *m, struct test_random *r, int mixed)
{
    static const uint32_t types[N_MATRICES] = {GQA_TYPE_Q4_0, GQA_TYPE_Q4_K, GQA_TYPE_F16,
                                               GQA_TYPE_Q6_K, GQA_TYPE_Q8_0, GQA_TYPE_Q5_0,
                                               GQA_TYPE_BF16, GQA_TYPE_Q5_K};

    for (int i = 0; i < N_MATRICES; i++) {
        /* Q's 128 inputs are no multiple of 256, which Q8_0 does not mind. */
        test_weight_random(&m->matrices[i], r, mixed ? types[i] : GQA_TYPE_F32, matrix_outputs[i],
                           matrix_inputs[i]);
    }
    for (int i = 0; i < EMBED; i++) {
        m->norm[i] = 0.1f + 0.02f * test_random_normal(r);
    }
    for (int i = 0; i < Q; i++) {
        m->q_bias[i] = test_random_normal(r) * 0.1f;
    }
    for (int i = 0; i < HEAD / 2; i++) {
        m->freqs[i] = pow(10000.0, -2.0 * i / HEAD);
    }
}

static void model_finish(struct model *m)
{
    for (int i = 0; i < N_MATRICES; i++) {
        test_weight_finish(&m->matrices[i]);
    }
}

static const struct gqa_attn_layer attention_layer = {
    .struct_size = sizeof(struct gqa_attn_layer),
    .n_heads = HEADS,
    .n_kv_heads = KV_HEADS,
    .k_dim = HEAD,
    .v_dim = HEAD,
    .k_type = GQA_TYPE_F32,
    .v_type = GQA_TYPE_F32,
    .scale = 0.17677669f,
    .v_offset = KV_HEADS * KV_BYTES,
    .k_head_bytes = KV_BYTES,
    .v_head_bytes = KV_BYTES,
};

/* A program of the model, and its sequence's one page. */
struct running {
    struct test_program t;
    uint32_t logits;
    void *page;
};

static void add_linear(struct test_program *t, const struct model *m, enum matrix which,
                       uint32_t src, uint32_t dst)
{
    uint32_t weight = test_program_weight(t, &m->matrices[which].weight);
    struct gqa_op *op = test_program_op(t, GQA_OP_LINEAR);
    op->src = test_view(t, src);
    op->dst = test_view(t, dst);
    op->weight = weight;
}

static void add_norm(struct test_program *t, uint32_t weight, uint32_t src, uint32_t dst)
{
    struct gqa_op *op = test_program_op(t, GQA_OP_NORM);
    op->src = test_view(t, src);
    op->dst = test_view(t, dst);
    op->weight = weight;
    op->u.norm.dim = EMBED;
    op->u.norm.eps = 1e-5f;
}

static void add_add(struct test_program *t, uint32_t dst, uint32_t src)
{
    struct gqa_op *op = test_program_op(t, GQA_OP_ADD);
    op->src = op->dst = test_view(t, dst);
    op->src2 = test_view(t, src);
}

static void add_rope(struct test_program *t, uint32_t reg)
{
    struct gqa_op *op = test_program_op(t, GQA_OP_ROPE);
    op->src = op->dst = test_view(t, reg);
    op->u.rope.kind = GQA_ROPE_HALF;
    op->u.rope.head_dim = op->u.rope.n_rot = HEAD;
}

static void running_init(struct running *run, const struct model *m, enum cpu_isa isa,
                         uint32_t n_threads)
{
    struct test_program *t = &run->t;

    test_program_init(t, isa, n_threads, ROWS);
    t->ropes[0] = (struct gqa_rope_table){HEAD / 2, m->freqs, 1.0f};
    t->desc.n_rope_tables = 1;
    t->desc.attn_layers = &attention_layer;
    t->desc.n_attn_layers = 1;
    uint32_t x = test_program_reg(t, EMBED, 0), y = test_program_reg(t, EMBED, 0);
    uint32_t q = test_program_reg(t, Q, 0), k = test_program_reg(t, KV, 0);
    uint32_t v = test_program_reg(t, KV, 0), mix = test_program_reg(t, Q, 0);
    uint32_t gate = test_program_reg(t, HIDDEN, 0), up = test_program_reg(t, HIDDEN, 0);
    uint32_t last = test_program_reg(t, EMBED, GQA_REG_OUT);
    run->logits = test_program_reg(t, VOCABULARY, GQA_REG_OUT);
    uint32_t norm = test_program_floats(t, m->norm, EMBED, 0);
    uint32_t q_bias = test_program_floats(t, m->q_bias, Q, 0);

    struct gqa_op *op = test_program_op(t, GQA_OP_EMBED);
    op->dst = test_view(t, x);
    op->weight = test_program_weight(t, &m->matrices[TABLE].weight);
    add_norm(t, norm, x, y);
    add_linear(t, m, WQ, y, q);
    t->ops[t->desc.n_ops - 1].bias = q_bias;
    add_linear(t, m, WK, y, k);
    add_linear(t, m, WV, y, v);
    add_rope(t, q);
    add_rope(t, k);
    op = test_program_op(t, GQA_OP_ATTENTION);
    op->layer = 0;
    op->src = test_view(t, q);
    op->src2 = test_view(t, k);
    op->src3 = test_view(t, v);
    op->dst = test_view(t, mix);
    add_linear(t, m, WO, mix, y);
    add_add(t, x, y);
    add_norm(t, norm, x, y);
    add_linear(t, m, GATE, y, gate);
    add_linear(t, m, UP, y, up);
    op = test_program_op(t, GQA_OP_GLU);
    op->src = op->dst = test_view(t, gate);
    op->src2 = test_view(t, up);
    op->u.glu.kind = GQA_ACT_SILU;
    add_linear(t, m, DOWN, gate, y);
    add_add(t, x, y);
    op = test_program_op(t, GQA_OP_GATHER);
    op->src = test_view(t, x);
    op->dst = test_view(t, last);
    add_norm(t, norm, last, last);
    add_linear(t, m, TABLE, last, run->logits);
    cr_assert_eq(test_program_prepare(t), 0, "%s", t->reason.text);
    run->page = aligned_alloc(64, 4 * KV_BYTES);
    cr_assert_not_null(run->page);
    memset(run->page, 0, 4 * KV_BYTES);
}

static void running_finish(struct running *run)
{
    test_program_finish(&run->t);
    free(run->page);
}

/* One step over rows [n_past, n_past + n_rows) of the prompt; its logits, all rows', to ret. */
static void running_step(struct running *run, const int32_t *prompt, uint32_t n_past,
                         uint32_t n_rows, int op_by_op, float *ret)
{
    struct gqa_page_table table = {.n_pages = 1, .pages = &run->page};
    struct gqa_attn_seq seq = {.n_rows = n_rows, .n_past = n_past, .tables = &table};
    uint32_t positions[ROWS], out_rows[ROWS];
    uint8_t classes[ROWS] = {0};
    struct gqa_attn_batch attention = {.struct_size = sizeof(attention),
                                       .n_rows = n_rows,
                                       .n_seqs = 1,
                                       .commit = 1,
                                       .seqs = &seq,
                                       .row_class = classes};
    struct gqa_batch batch = {.struct_size = sizeof(batch),
                              .n_rows = n_rows,
                              .n_out = n_rows,
                              .tokens = prompt + n_past,
                              .positions = positions,
                              .out_rows = out_rows,
                              .attention = &attention};
    void *context = &run->t.context, *program = run->t.program;

    for (uint32_t i = 0; i < n_rows; i++) {
        positions[i] = n_past + i;
        out_rows[i] = i;
    }
    cr_assert_eq(cpu_program_begin(context, program, &batch), 0);
    for (uint32_t op = 0; op < run->t.desc.n_ops; op++) {
        uint32_t last = op_by_op ? op + 1 : run->t.desc.n_ops;
        cr_assert_eq(cpu_program_run(context, program, op, last), 0);
        op = last - 1;
    }
    cr_assert_eq(cpu_program_end(context, program), 0);
    memcpy(ret, test_program_data(&run->t, run->logits),
           (size_t)n_rows * VOCABULARY * sizeof(*ret));
}

static void make_prompt(struct test_random *r, int32_t *prompt)
{
    for (int i = 0; i < ROWS; i++) {
        prompt[i] = (int32_t)(test_random_u64(r) % VOCABULARY);
    }
}

/* ---- the model in float64 ---------------------------------------------------------------- */

static void true_linear(const struct model *m, enum matrix which, const double *x, double *y)
{
    uint32_t k = matrix_inputs[which];
    float row[HIDDEN];

    for (uint32_t o = 0; o < matrix_outputs[which]; o++) {
        test_weight_row(&m->matrices[which], o, row);
        y[o] = 0.0;
        for (uint32_t i = 0; i < k; i++) {
            y[o] += (double)row[i] * x[i];
        }
    }
}

static void true_norm(const struct model *m, const double *x, double *y)
{
    double sum = 0.0;
    for (int i = 0; i < EMBED; i++) {
        sum += x[i] * x[i];
    }
    for (int i = 0; i < EMBED; i++) {
        y[i] = x[i] / sqrt(sum / EMBED + (double)1e-5f) * (double)m->norm[i];
    }
}

static void true_rope(const struct model *m, double *x, int n_heads, int position)
{
    for (int h = 0; h < n_heads; h++, x += HEAD) {
        for (int i = 0; i < HEAD / 2; i++) {
            double c = cos(position * m->freqs[i]), s = sin(position * m->freqs[i]);
            double a = x[i], b = x[i + HEAD / 2];
            x[i] = a * c - b * s;
            x[i + HEAD / 2] = a * s + b * c;
        }
    }
}

/* Row n's attention over rows 0..n. */
static void true_attention(const double *q, const double (*k)[KV], const double (*v)[KV], int n,
                           double *out)
{
    for (int h = 0; h < HEADS; h++) {
        int group = h / (HEADS / KV_HEADS);
        double scores[ROWS], sum = 0.0;
        for (int t = 0; t <= n; t++) {
            double score = 0.0;
            for (int i = 0; i < HEAD; i++) {
                score += q[h * HEAD + i] * k[t][group * HEAD + i];
            }
            scores[t] = exp(score * (double)attention_layer.scale);
            sum += scores[t];
        }
        for (int i = 0; i < HEAD; i++) {
            out[h * HEAD + i] = 0.0;
            for (int t = 0; t <= n; t++) {
                out[h * HEAD + i] += scores[t] / sum * v[t][group * HEAD + i];
            }
        }
    }
}

static void true_logits(const struct model *m, const int32_t *prompt, double *ret)
{
    static double k[ROWS][KV], v[ROWS][KV];
    double x[EMBED], y[EMBED], q[Q], mix[Q], gate[HIDDEN], up[HIDDEN];
    float row[EMBED];

    for (int n = 0; n < ROWS; n++) {
        test_weight_row(&m->matrices[TABLE], (uint32_t)prompt[n], row);
        for (int i = 0; i < EMBED; i++) {
            x[i] = (double)row[i];
        }
        true_norm(m, x, y);
        true_linear(m, WQ, y, q);
        true_linear(m, WK, y, k[n]);
        true_linear(m, WV, y, v[n]);
        for (int i = 0; i < Q; i++) {
            q[i] += (double)m->q_bias[i];
        }
        true_rope(m, q, HEADS, n);
        true_rope(m, k[n], KV_HEADS, n);
        true_attention(q, (const double(*)[KV])k, (const double(*)[KV])v, n, mix);
        true_linear(m, WO, mix, y);
        for (int i = 0; i < EMBED; i++) {
            x[i] += y[i];
        }
        true_norm(m, x, y);
        true_linear(m, GATE, y, gate);
        true_linear(m, UP, y, up);
        for (int i = 0; i < HIDDEN; i++) {
            gate[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i];
        }
        true_linear(m, DOWN, gate, y);
        for (int i = 0; i < EMBED; i++) {
            x[i] += y[i];
        }
        true_norm(m, x, y);
        true_linear(m, TABLE, y, ret + n * VOCABULARY);
    }
}

/* ---- tests ------------------------------------------------------------------------------- */

/* float32 through some twenty ops: every sum's error is a few 2^-24 of its terms. */
Test(program, a_float_model_is_float64_s)
{
    struct test_random r = {test_seed("float model")};
    static struct model m;
    static double truth[ROWS * VOCABULARY];
    static float logits[ROWS * VOCABULARY];
    int32_t prompt[ROWS];

    model_init(&m, &r, 0);
    make_prompt(&r, prompt);
    true_logits(&m, prompt, truth);
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_usable(isa)) {
            continue;
        }
        struct running run;
        double worst = 0.0, largest = 0.0;
        running_init(&run, &m, isa, 3);
        running_step(&run, prompt, 0, ROWS, 0, logits);
        for (int i = 0; i < ROWS * VOCABULARY; i++) {
            worst = fmax(worst, fabs((double)logits[i] - truth[i]));
            largest = fmax(largest, fabs(truth[i]));
        }
        fprintf(stderr, "%s: off by %.2e of %.2e\n", cpu_isa_name(isa), worst, largest);
        cr_assert(worst <= 1e-5 * largest, "%s: off by %g of %g", cpu_isa_name(isa), worst,
                  largest);
        running_finish(&run);
    }
    model_finish(&m);
}

/* Chunks of any size, any number of workers, whole or op by op: the same bits. */
Test(program, rows_do_not_depend_on_the_batch)
{
    static const uint32_t chunks[][ROWS] = {{ROWS}, {1, 20}, {8, 13}, {7, 7, 7}, {16, 2, 3}};
    struct test_random r = {test_seed("chunks")};
    static struct model m;
    static float first[ROWS * VOCABULARY], logits[ROWS * VOCABULARY];
    int32_t prompt[ROWS];

    model_init(&m, &r, 1);
    make_prompt(&r, prompt);
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_usable(isa)) {
            continue;
        }
        for (uint32_t c = 0; c < sizeof(chunks) / sizeof(chunks[0]); c++) {
            struct running run;
            running_init(&run, &m, isa, c % 3 + 1);
            for (uint32_t at = 0, i = 0; at < ROWS; at += chunks[c][i++]) {
                running_step(&run, prompt, at, chunks[c][i], c % 2 == 1, logits + at * VOCABULARY);
            }
            if (c == 0) {
                memcpy(first, logits, sizeof(first));
            }
            cr_assert_arr_eq(logits, first, sizeof(first), "%s, chunks %u", cpu_isa_name(isa), c);
            running_finish(&run);
        }
    }
    model_finish(&m);
}

/* Seven products, two norms and a last one, by kind; times only grow, and bytes are the matrices'.
 */
Test(program, times_of_ops_are_counted_by_kind)
{
    struct test_random r = {test_seed("times")};
    static struct model m;
    static float logits[ROWS * VOCABULARY];
    struct gqa_op_time times[16], again[16];
    int32_t prompt[ROWS];
    struct running run;
    uint64_t matrices = 0;

    model_init(&m, &r, 0);
    make_prompt(&r, prompt);
    running_init(&run, &m, CPU_ISA_C, 1);
    cr_assert_eq(cpu_program_op_times(&run.t.context, run.t.program, times, 16), 0);
    running_step(&run, prompt, 0, 20, 0, logits);
    uint32_t n = cpu_program_op_times(&run.t.context, run.t.program, times, 16);
    running_step(&run, prompt, 20, 1, 0, logits);
    cr_assert_eq(cpu_program_op_times(&run.t.context, run.t.program, again, 16), n);
    cr_assert_eq(cpu_program_op_times(&run.t.context, run.t.program, again, 2), n);
    cr_assert_eq(cpu_program_op_times(&run.t.context, run.t.program, again, 16), n);
    for (int i = 0; i < N_MATRICES; i++) {
        matrices += (uint64_t)matrix_outputs[i] * matrix_inputs[i] * sizeof(float);
    }
    for (uint32_t i = 0; i < n; i++) {
        cr_expect_eq(again[i].kind, times[i].kind);
        cr_expect_eq(again[i].calls, 2 * times[i].calls);
        cr_expect(again[i].ns >= times[i].ns);
        if (times[i].kind == GQA_OP_LINEAR) {
            cr_expect_eq(times[i].calls, 8);
            cr_expect_eq(times[i].bytes, matrices);
            cr_expect_eq(again[i].bytes, 2 * matrices);
        } else if (times[i].kind == GQA_OP_ATTENTION) {
            uint64_t token = 2 * KV_HEADS * HEAD * sizeof(float);
            cr_expect_eq(times[i].calls, 1);
            cr_expect_eq(times[i].rows, 20);
            cr_expect_eq(again[i].rows, 21);
            cr_expect_eq(times[i].bytes, 20 * token);
            cr_expect_eq(again[i].bytes, 41 * token);
        }
    }
    running_finish(&run);
    model_finish(&m);
}

Test(program, begin_refuses_a_wrong_batch)
{
    struct test_random r = {test_seed("wrong batch")};
    static struct model m;
    struct running run;
    int32_t tokens[2] = {0, VOCABULARY};
    uint32_t zeros[2] = {0, 0}, far[2] = {0, 2}, adapters[2] = {GQA_NONE, 3};
    struct gqa_attn_batch attention = {.struct_size = sizeof(attention), .n_rows = 2};
    const struct gqa_batch good = {.struct_size = sizeof(good),
                                   .n_rows = 2,
                                   .n_out = 1,
                                   .tokens = (int32_t[]){1, 2},
                                   .positions = zeros,
                                   .out_rows = zeros,
                                   .attention = &attention};

    model_init(&m, &r, 0);
    running_init(&run, &m, CPU_ISA_C, 1);
    void *c = &run.t.context, *p = run.t.program;
    struct gqa_batch b = good;
    cr_assert_eq(cpu_program_run(c, p, 0, 1), -EINVAL, "run before begin");
    cr_assert_eq(cpu_program_end(c, p), -EINVAL, "end before begin");
    b.tokens = tokens;
    cr_assert_eq(cpu_program_begin(c, p, &b), -EINVAL, "token past the table");
    tokens[1] = -1;
    cr_assert_eq(cpu_program_begin(c, p, &b), -EINVAL, "negative token");
    b = good;
    b.n_rows = ROWS + 1;
    cr_assert_eq(cpu_program_begin(c, p, &b), -EINVAL, "too many rows");
    b.n_rows = 0;
    cr_assert_eq(cpu_program_begin(c, p, &b), -EINVAL, "no rows");
    b = good;
    b.out_rows = far;
    b.n_out = 2;
    cr_assert_eq(cpu_program_begin(c, p, &b), -EINVAL, "output row past the batch");
    b = good;
    b.adapters = adapters;
    cr_assert_eq(cpu_program_begin(c, p, &b), -EINVAL, "an adapter that the program lacks");
    b = good;
    b.attention = NULL;
    cr_assert_eq(cpu_program_begin(c, p, &b), -EINVAL, "no attention");
    cr_assert_eq(cpu_program_begin(c, p, &good), 0);
    cr_assert_eq(cpu_program_run(c, p, 0, run.t.desc.n_ops + 1), -EINVAL, "ops past the end");
    cr_assert_eq(cpu_program_end(c, p), 0);
    cr_assert_null(cpu_program_data(c, p, run.t.desc.n_regs));
    running_finish(&run);
    model_finish(&m);
}
