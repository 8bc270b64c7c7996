/* The ops of gqa.program.0 against the reference, and bits where the ABI promises them. */
#include "tools/plugin-check/conform.h"

#include "format/types.h"
#include "tools/plugin-check/trial.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS  37u /* of a trial, unless it says otherwise: no multiple of anything */
#define WIDTH 256u

/* Relative to the root mean square of the reference's values. Plain float32 differs by 1e-6; room
 * for tensor cores, weights that become F16 and fast functions, far below any mistake. */
#define NEAR 5e-3f
/* Where weights are quantised the reference quantises activations, too, to 8 bits for each 32
 * values; a backend that does the same is as near as above. One that does not may be off from what
 * the weights mean, as float32, by NEAR and by so many times what the reference is off from it.
 * That is measured for each problem: 0.3 to 0.4 % of one product's values and four or five times
 * that for the worst of them; two products that a glu multiplies are off by both, most where both
 * are large: 7 % of the mean at worst. */
#define NOISE 1.25f

static const uint32_t types[] = {GQA_TYPE_F32,  GQA_TYPE_F16,    GQA_TYPE_BF16,   GQA_TYPE_Q4_0,
                                 GQA_TYPE_Q4_1, GQA_TYPE_Q5_0,   GQA_TYPE_Q5_1,   GQA_TYPE_Q8_0,
                                 GQA_TYPE_Q2_K, GQA_TYPE_Q3_K,   GQA_TYPE_Q4_K,   GQA_TYPE_Q5_K,
                                 GQA_TYPE_Q6_K, GQA_TYPE_IQ4_NL, GQA_TYPE_IQ4_XS, GQA_TYPE_MXFP4};
#define COUNT(a) ((uint32_t)(sizeof(a) / sizeof((a)[0])))

static const char *type_name(uint32_t type)
{
    return fmt_type_info(type)->name;
}

static bool is_quantised(uint32_t type)
{
    return fmt_type_info(type)->n_block > 1;
}

/* ---- the problems: each makes the i-th of its family, or says that there is none --------------
 */

static bool make_norm(uint32_t i, struct trial *t)
{
    if (i >= 12) {
        return false;
    }
    bool layer = i & 1, weight = (i & 2) != 0;
    uint32_t dim = i / 4 == 0 ? WIDTH : i / 4 == 1 ? 64 : 16;
    trial_init(t, ROWS, WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "%s norm over groups of %u%s", layer ? "layer" : "rms", dim,
             weight ? ", weight and bias" : "");
    uint32_t dst = trial_reg(t, WIDTH, 0);
    struct gqa_op *op = trial_op(t, GQA_OP_NORM);
    op->src = trial_view(0, 0, WIDTH);
    op->dst = trial_view(dst, 0, WIDTH);
    op->u.norm.kind = layer ? GQA_NORM_LAYER : GQA_NORM_RMS;
    op->u.norm.dim = dim;
    op->u.norm.eps = 1e-5f;
    if (weight) {
        op->weight = trial_weight(t, GQA_TYPE_F32, dim, 0, 0, 1);
        op->bias = trial_weight(t, GQA_TYPE_F32, dim, 0, 0, 1);
    }
    trial_gather(t, dst);
    return true;
}

/* src columns [0, WIDTH) of register 0 through a new matrix. */
static struct gqa_op *add_linear(struct trial *t, uint32_t type, uint32_t src, uint32_t dst,
                                 bool bias)
{
    uint32_t n_in = t->regs[src].width, n_out = t->regs[dst].width;
    struct gqa_op *op = trial_op(t, GQA_OP_LINEAR);
    op->src = trial_view(src, 0, n_in);
    op->dst = trial_view(dst, 0, n_out);
    op->weight = trial_weight(t, type, n_in, n_out, 0, 0.1f);
    op->bias = bias ? trial_weight(t, GQA_TYPE_F32, n_out, 0, 0, 1) : GQA_NONE;
    return op;
}

static bool make_linear(uint32_t i, struct trial *t)
{
    static const uint32_t rows[] = {1, ROWS, 130}, outputs[] = {96, 100, 16};
    if (i >= COUNT(types) * 3) {
        return false;
    }
    uint32_t type = types[i / 3], k = i % 3;
    trial_init(t, rows[k], 512, true, i + 1);
    snprintf(t->name, sizeof(t->name), "linear, %s, 512 to %u, rows %u%s", type_name(type),
             outputs[k], rows[k], k == 1 ? ", bias" : "");
    uint32_t dst = trial_reg(t, outputs[k], 0);
    add_linear(t, type, 0, dst, k == 1);
    trial_gather(t, dst);
    return true;
}

static bool make_logits(uint32_t i, struct trial *t)
{
    if (i >= COUNT(types)) {
        return false;
    }
    trial_init(t, ROWS, WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "logits of some rows, %s", type_name(types[i]));
    for (uint32_t row = 0; !t->no_memory && row < ROWS; row++) {
        t->out_rows[row] = row < 5 ? 7 * row : ROWS;
    }
    t->n_out = 5;
    trial_gather(t, 0);
    uint32_t gathered = t->result;
    t->result = trial_reg(t, 512, GQA_REG_OUT);
    add_linear(t, types[i], gathered, t->result, false);
    return true;
}

static bool make_rope(uint32_t i, struct trial *t)
{
    if (i >= 8) {
        return false;
    }
    uint32_t n_rot = i & 2 ? 32 : 64;
    trial_init(t, ROWS, WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "rope, %s, %u of 64 rotated%s",
             i & 1 ? "halves" : "neighbours", n_rot, i & 4 ? ", magnitude 1.3" : "");
    t->n_ropes = 1;
    t->rope = (struct gqa_rope_table){n_rot / 2, t->freqs, i & 4 ? 1.3f : 1.0f};
    for (uint32_t f = 0; f < n_rot / 2; f++) {
        t->freqs[f] = pow(10000, -2.0 * f / n_rot);
    }
    struct gqa_op *op = trial_op(t, GQA_OP_ROPE);
    op->src = op->dst = trial_view(0, 0, WIDTH);
    op->u.rope.kind = i & 1 ? GQA_ROPE_HALF : GQA_ROPE_NEIGHBOUR;
    op->u.rope.head_dim = 64;
    op->u.rope.n_rot = n_rot;
    op->u.rope.table = 0;
    trial_gather(t, 0);
    return true;
}

static bool make_glu(uint32_t i, struct trial *t)
{
    static const char *const names[] = {"silu", "gelu tanh", "gelu", "swiglu oai", "relu"};
    if (i >= 9) {
        return false;
    }
    uint32_t kind = i < 5 ? i : i - 5 < 3 ? i - 5 : GQA_ACT_RELU;
    bool gated = i < 5; /* swiglu oai always is */
    trial_init(t, ROWS, 2 * WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "glu, %s%s", names[kind], gated ? ", gated" : "");
    uint32_t dst = trial_reg(t, WIDTH, 0);
    struct gqa_op *op = trial_op(t, GQA_OP_GLU);
    op->src = trial_view(0, 0, WIDTH);
    op->src2 = gated ? trial_view(0, WIDTH, WIDTH) : op->src2;
    op->dst = trial_view(dst, 0, WIDTH);
    op->u.glu.kind = kind;
    op->u.glu.alpha = 1.702f;
    op->u.glu.limit = 0.7f; /* within the values, so that it shows */
    trial_gather(t, dst);
    return true;
}

static bool make_arithmetic(uint32_t i, struct trial *t)
{
    static const uint32_t kinds[] = {GQA_OP_ADD, GQA_OP_SCALE, GQA_OP_SOFTCAP};
    static const char *const names[] = {"add", "scale", "softcap"};
    if (i >= 6) {
        return false;
    }
    trial_init(t, ROWS, 2 * WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "%s%s", names[i / 2], i & 1 ? ", in place" : "");
    uint32_t dst = i & 1 ? 0 : trial_reg(t, WIDTH, 0);
    struct gqa_op *op = trial_op(t, kinds[i / 2]);
    op->src = trial_view(0, 0, WIDTH);
    op->src2 = kinds[i / 2] == GQA_OP_ADD ? trial_view(0, WIDTH, WIDTH) : op->src2;
    op->dst = trial_view(dst, 0, WIDTH);
    op->scale = 0.37f;
    trial_gather(t, dst);
    return true;
}

static bool make_embed(uint32_t i, struct trial *t)
{
    static const char *const rows[] = {"token", "position", "first"};
    if (i >= COUNT(types) + 2) {
        return false;
    }
    uint32_t type = i < COUNT(types) ? types[i] : GQA_TYPE_F16;
    uint32_t row = i < COUNT(types) ? GQA_EMBED_TOKEN : i - COUNT(types) + 1;
    trial_init(t, ROWS, WIDTH, false, i + 1);
    snprintf(t->name, sizeof(t->name), "embed, %s, by %s", type_name(type), rows[row]);
    for (uint32_t k = 0; !t->no_memory && k < ROWS; k++) {
        t->positions[k] %= 8;
    }
    struct gqa_op *op = trial_op(t, GQA_OP_EMBED);
    op->weight = trial_weight(t, type, WIDTH, 8, 0, 1);
    op->dst = trial_view(0, 0, WIDTH);
    op->scale = row == GQA_EMBED_TOKEN ? 2.5f : 1;
    op->u.embed.row = row;
    trial_gather(t, 0);
    return true;
}

/* {gating, renormalise, selection bias, biases, fused or 2: no gate, activation, weight scale} */
static const struct mixture {
    uint32_t gating, renormalise, selection, biases, fused, act;
    float weight_scale;
} mixtures[] = {
    {GQA_GATING_SOFTMAX, 1, 0, 0, 0, GQA_ACT_SILU, 1},
    {GQA_GATING_SOFTMAX, 0, 0, 0, 1, GQA_ACT_GELU_TANH, 1},
    {GQA_GATING_SIGMOID, 1, 1, 0, 0, GQA_ACT_SILU, 2.5f},
    {GQA_GATING_SOFTMAX_CHOSEN, 0, 0, 1, 0, GQA_ACT_SWIGLU_OAI, 1},
    {GQA_GATING_SOFTMAX, 1, 0, 1, 2, GQA_ACT_RELU, 1},
};

static void add_biases(struct trial *t, struct gqa_op_experts *e, uint32_t n_ff)
{
    e->router_bias = trial_weight(t, GQA_TYPE_F32, e->n_experts, 0, 0, 1);
    e->up_bias = trial_weight(t, GQA_TYPE_F32, e->fused ? 2 * n_ff : n_ff, e->n_experts, 0, 1);
    e->down_bias = trial_weight(t, GQA_TYPE_F32, WIDTH, e->n_experts, 0, 1);
    if (e->gate != GQA_NONE) {
        e->gate_bias = trial_weight(t, GQA_TYPE_F32, n_ff, e->n_experts, 0, 1);
    }
}

static bool make_experts(uint32_t i, struct trial *t)
{
    static const uint32_t of[] = {GQA_TYPE_F32,  GQA_TYPE_F16,  GQA_TYPE_Q4_0,
                                  GQA_TYPE_Q8_0, GQA_TYPE_Q4_K, GQA_TYPE_MXFP4};
    enum { N_FF = 256 };
    if (i >= COUNT(of) * COUNT(mixtures)) {
        return false;
    }
    const struct mixture *m = &mixtures[i % COUNT(mixtures)];
    uint32_t type = of[i / COUNT(mixtures)];
    trial_init(t, ROWS, WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "experts, %s, mixture %u", type_name(type),
             i % COUNT(mixtures));
    uint32_t dst = trial_reg(t, WIDTH, 0);
    struct gqa_op *op = trial_op(t, GQA_OP_EXPERTS);
    op->src = trial_view(0, 0, WIDTH);
    op->dst = trial_view(dst, 0, WIDTH);
    struct gqa_op_experts *e = &op->u.experts;
    *e = (struct gqa_op_experts){
        .n_experts = 8,
        .n_used = 3,
        .gating = m->gating,
        .renormalise = m->renormalise,
        .weight_scale = m->weight_scale,
        .router_bias = GQA_NONE,
        .selection_bias = GQA_NONE,
        .act = m->act,
        .alpha = 1.702f,
        .limit = 7,
        .gate = GQA_NONE,
        .gate_bias = GQA_NONE,
        .up_bias = GQA_NONE,
        .down_bias = GQA_NONE,
        .fused = m->fused == 1,
    };
    e->router = trial_weight(t, GQA_TYPE_F32, WIDTH, 8, 0, 0.5f);
    e->up = trial_weight(t, type, WIDTH, m->fused == 1 ? 2 * N_FF : N_FF, 8, 0.1f);
    e->down = trial_weight(t, type, N_FF, WIDTH, 8, 0.1f);
    e->gate = m->fused == 0 ? trial_weight(t, type, WIDTH, N_FF, 8, 0.1f) : GQA_NONE;
    e->selection_bias = m->selection ? trial_weight(t, GQA_TYPE_F32, 8, 0, 0, 1) : GQA_NONE;
    if (m->biases) {
        add_biases(t, e, N_FF);
    }
    trial_gather(t, dst);
    return true;
}

static bool make_adapters(uint32_t i, struct trial *t)
{
    static const uint32_t of[] = {GQA_TYPE_F32, GQA_TYPE_Q4_0, GQA_TYPE_Q8_0};
    static const uint32_t factors[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16};
    if (i >= 9) {
        return false;
    }
    trial_init(t, ROWS, WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "adapters of %s on %s", type_name(factors[i % 3]),
             type_name(of[i / 3]));
    uint32_t dst = trial_reg(t, 96, 0);
    struct gqa_op *op = add_linear(t, of[i / 3], 0, dst, false);
    op->u.linear.adapters = 1;
    trial_adapters(t, op->weight, factors[i % 3], 8);
    trial_gather(t, dst);
    return true;
}

/* What a layer's second half is made of: norm, linear, glu, linear. */
static bool make_chain(uint32_t i, struct trial *t)
{
    if (i >= COUNT(types)) {
        return false;
    }
    trial_init(t, ROWS, WIDTH, true, i + 1);
    snprintf(t->name, sizeof(t->name), "norm, linear, glu, %s", type_name(types[i]));
    uint32_t normed = trial_reg(t, WIDTH, 0), both = trial_reg(t, 512, 0),
             dst = trial_reg(t, WIDTH, 0);
    struct gqa_op *op = trial_op(t, GQA_OP_NORM);
    op->src = trial_view(0, 0, WIDTH);
    op->dst = trial_view(normed, 0, WIDTH);
    op->u.norm.dim = WIDTH;
    op->u.norm.eps = 1e-5f;
    add_linear(t, types[i], normed, both, false);
    op = trial_op(t, GQA_OP_GLU);
    op->src = trial_view(both, 0, WIDTH);
    op->src2 = trial_view(both, WIDTH, WIDTH);
    op->dst = trial_view(dst, 0, WIDTH);
    trial_gather(t, dst);
    return true;
}

/* ---- comparing --------------------------------------------------------------------------- */

static int fail(struct gqa_reason *reason, const struct trial *t, int rc, const char *what)
{
    snprintf(reason->text, sizeof(reason->text), "%s: %.150s", t->name, what);
    return rc;
}

/* The largest difference over the root mean square of the truth; infinite where there is no number.
 */
static float distance(const float *truth, const float *got, size_t n)
{
    double squares = 0, worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)truth[i] - (double)got[i]);
        if (!isfinite(d)) {
            return INFINITY;
        }
        worst = d > worst ? d : worst;
        squares += (double)truth[i] * (double)truth[i];
    }
    return (float)(worst / (sqrt(squares / (double)n) + 1e-30));
}

struct comparison {
    const struct gqa_program *a, *b;
    void *a_context, *b_context;
    uint32_t b_chunk;
    bool bits; /* both must give the same ones */
};

static bool has_quantised(const struct trial *t)
{
    for (uint32_t i = 0; i < t->n_weights; i++) {
        if (is_quantised(t->weights[i].type) && t->ops[0].weight != i) {
            return true;
        }
    }
    return false;
}

/* Judges by the float32 values that quantised weights stand for, which the trial has from now on.
 * truth: the reference's results with the quantised ones. */
static int measure_exactly(const struct comparison *c, struct trial *t, const float *truth,
                           const float *got, size_t n, float *ret_error, float *ret_tolerance,
                           struct gqa_reason *why)
{
    float *exact = NULL;
    trial_widen(t);
    int rc = trial_run(t, c->a, c->a_context, 0, &exact, why);
    if (rc == 0) {
        *ret_tolerance = NEAR + NOISE * distance(exact, truth, n);
        *ret_error = distance(exact, got, n);
    }
    free(exact);
    return rc;
}

static int judge(const struct comparison *c, struct trial *t, const float *truth, const float *got,
                 struct results_family *f, struct gqa_reason *why)
{
    size_t n = (size_t)t->n_out * t->regs[t->result].width;
    float error = distance(truth, got, n), tolerance = c->bits ? 0 : NEAR;
    if (!c->bits && !(error <= tolerance) && has_quantised(t)) {
        int rc = measure_exactly(c, t, truth, got, n, &error, &tolerance, why);
        if (rc < 0) {
            return rc;
        }
    }
    f->n_run++;
    f->worst = error > f->worst ? error : f->worst;
    f->tolerance = tolerance > f->tolerance ? tolerance : f->tolerance;
    if (c->bits && memcmp(truth, got, n * sizeof(*got)) != 0) {
        snprintf(why->text, sizeof(why->text), "other bits than the same rows gave together");
        return -EBADMSG;
    }
    snprintf(why->text, sizeof(why->text), "wrong by %g of the values, tolerance %g", (double)error,
             (double)tolerance);
    return c->bits || error <= tolerance ? 0 : -EBADMSG;
}

static int compare(const struct comparison *c, struct trial *t, struct results_family *f,
                   struct gqa_reason *reason)
{
    float *truth = NULL, *got = NULL;
    struct gqa_reason why = {""};
    int rc = trial_run(t, c->a, c->a_context, 0, &truth, &why);
    rc = rc < 0 ? rc : trial_run(t, c->b, c->b_context, c->b_chunk, &got, &why);
    if (rc == -ENOTSUP) {
        results_skip(f, &why);
        rc = 0;
    } else {
        rc = rc < 0 ? rc : judge(c, t, truth, got, f, &why);
        rc = rc < 0 ? fail(reason, t, rc, why.text[0] != '\0' ? why.text : strerror(-rc)) : 0;
    }
    free(truth);
    free(got);
    return rc;
}

typedef bool (*make_fn)(uint32_t i, struct trial *t);

static int run_family(const struct conform *c, const char *name, make_fn make,
                      const struct comparison *way, struct gqa_reason *reason)
{
    struct results_family f = {.interface = GQA_PROGRAM_0, .name = name};
    struct trial t;
    int rc = 0;
    if (!conform_wants(c, name)) {
        return 0;
    }
    if (c->results != NULL && c->results->at != NULL) {
        *c->results->at = name;
    }
    for (uint32_t i = 0; rc == 0 && make(i, &t); i++) {
        rc = compare(way, &t, &f, reason);
        trial_finish(&t);
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

int conform_program_selftest(const struct conform *c, struct gqa_reason *reason)
{
    /* Types by their places in the table: F32, Q4_0, Q8_0, Q4_K. */
    static const struct {
        make_fn make;
        uint32_t index;
    } problems[] = {{make_chain, 0}, {make_chain, 3},  {make_chain, 7},   {make_chain, 10},
                    {make_rope, 1},  {make_logits, 3}, {make_experts, 10}};
    const struct comparison truth = {.a = c->reference_program,
                                     .a_context = c->reference_program_context,
                                     .b = c->program,
                                     .b_context = c->context};
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < COUNT(problems); i++) {
        struct results_family f = {.name = "self-test"};
        struct trial t;
        problems[i].make(problems[i].index, &t);
        rc = compare(&truth, &t, &f, reason);
        results_case(c->results, t.name,
                     rc < 0            ? "wrong"
                     : f.n_skipped > 0 ? "not supported"
                                       : "ok",
                     f.worst, f.why);
        trial_finish(&t);
    }
    return rc;
}

int conform_program_run(const struct conform *c, struct gqa_reason *reason)
{
    static const struct {
        const char *name;
        make_fn make;
    } families[] = {
        {"norm", make_norm},
        {"linear, every type", make_linear},
        {"logits of some rows", make_logits},
        {"rope", make_rope},
        {"glu", make_glu},
        {"add, scale, softcap", make_arithmetic},
        {"embed, every type", make_embed},
        {"experts", make_experts},
        {"adapters", make_adapters},
        {"a chain of ops", make_chain},
    };
    const struct comparison truth = {.a = c->reference_program,
                                     .a_context = c->reference_program_context,
                                     .b = c->program,
                                     .b_context = c->context};
    const struct comparison one = {.a = c->program,
                                   .a_context = c->context,
                                   .b = c->program,
                                   .b_context = c->context,
                                   .b_chunk = 1,
                                   .bits = true};
    struct comparison some = one, crowd = one;
    some.b_chunk = 13;
    crowd.b_chunk = 0;
    crowd.b_context = c->crowd_context;
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < COUNT(families); i++) {
        rc = run_family(c, families[i].name, families[i].make, &truth, reason);
    }
    rc = rc < 0 ? rc : run_family(c, "ops: same bits, row by row", make_chain, &one, reason);
    rc = rc < 0 ? rc : run_family(c, "ops: same bits, in chunks of 13", make_chain, &some, reason);
    rc = rc < 0 ? rc : run_family(c, "experts: same bits, row by row", make_experts, &one, reason);
    rc =
        rc < 0 ? rc : run_family(c, "adapters: same bits, row by row", make_adapters, &one, reason);
    return rc < 0 ? rc
                  : run_family(c, "ops: same bits, by other workers", make_chain, &crowd, reason);
}
