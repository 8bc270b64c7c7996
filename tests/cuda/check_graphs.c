/* tests/cuda/check_graphs.c - steps as graphs while somebody votes: a program of many layers, whose
 * tokens are replayed, and between them a prompt's last rows, whose votes are asked for layer by
 * layer. The tokens' graph must still be there behind it, and all bits be those of a program that
 * nobody asks.
 *
 *   check-graphs CUDA.so
 *
 * On the emulated driver launches and copies are counted; on another one results alone are checked.
 * Exit status: 0 right, 1 wrong, 77 no GPU (and it says so). */
#include "tests/cuda/check_util.h"
#include "tests/cuda/emulate/counts.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_LAYERS 20u /* more than graphs are kept */
#define N_HEADS  4u
#define N_GROUPS 2u
#define HEAD_DIM 16u
#define WIDTH    (N_HEADS * HEAD_DIM)
#define N_KV     (N_GROUPS * HEAD_DIM)
#define N_PAST   40u
#define VOTERS   5u
#define ROWS_MAX (N_PAST + VOTERS)

/* x, then attention's outputs, layer by layer: each layer looks at what the last one gave. */
enum { R_X, R_Y, R_OUT, N_REGS };

struct program {
    struct gqa_op ops[N_LAYERS + 2];
    struct gqa_attn_layer layers[N_LAYERS];
    void *page, *prepared;
    float *inputs;
    float votes[N_LAYERS][N_GROUPS * N_PAST];
};

static struct gqa_view view(uint32_t reg, uint32_t width)
{
    return (struct gqa_view){reg, 0, width};
}

static void set_ops(struct program *p)
{
    uint64_t bytes = gqa_kv_head_bytes(GQA_TYPE_F16, HEAD_DIM);

    for (uint32_t i = 0; i < N_LAYERS + 2; i++) {
        uint32_t src = i % 2 == 1 ? R_X : R_Y, dst = i % 2 == 1 ? R_Y : R_X;
        struct gqa_op *op = &p->ops[i];
        *op = (struct gqa_op){.layer = i - 1,
                              .weight = i == 0 ? 0 : GQA_NONE,
                              .bias = GQA_NONE,
                              .scale = 1.0f,
                              .src = view(i == 0 ? GQA_NONE : src, WIDTH),
                              .src2 = view(i == 0 || i > N_LAYERS ? GQA_NONE : src, N_KV),
                              .src3 = view(i == 0 || i > N_LAYERS ? GQA_NONE : src, N_KV),
                              .dst = view(i > N_LAYERS ? R_OUT : dst, WIDTH)};
        op->kind = i == 0 ? GQA_OP_EMBED : i > N_LAYERS ? GQA_OP_GATHER : GQA_OP_ATTENTION;
    }
    p->ops[N_LAYERS + 1].src = view(N_LAYERS % 2 == 1 ? R_Y : R_X, WIDTH);
    for (uint32_t i = 0; i < N_LAYERS; i++) {
        p->layers[i] = (struct gqa_attn_layer){.struct_size = sizeof(p->layers[0]),
                                               .layer = i,
                                               .n_heads = N_HEADS,
                                               .n_kv_heads = N_GROUPS,
                                               .k_dim = HEAD_DIM,
                                               .v_dim = HEAD_DIM,
                                               .k_type = GQA_TYPE_F16,
                                               .v_type = GQA_TYPE_F16,
                                               .scale = 2.0f,
                                               .k_offset = 2 * i * N_GROUPS * bytes,
                                               .v_offset = (2 * i + 1) * N_GROUPS * bytes,
                                               .k_head_bytes = bytes,
                                               .v_head_bytes = bytes};
    }
    p->page = calloc(2 * N_LAYERS * N_GROUPS, bytes);
}

static bool start(const struct side *s, struct program *p)
{
    static const struct gqa_reg regs[N_REGS] = {{WIDTH, 0}, {WIDTH, 0}, {WIDTH, GQA_REG_OUT}};
    struct gqa_reason reason = {""};
    uint32_t random = 1;

    memset(p, 0, sizeof(*p));
    set_ops(p);
    p->inputs = calloc((size_t)ROWS_MAX * WIDTH, sizeof(*p->inputs));
    for (uint32_t i = 0; i < ROWS_MAX * WIDTH; i++) {
        random = random * 1664525u + 1013904223u;
        p->inputs[i] = (float)(random >> 8) / 8388608.0f - 1.0f;
    }
    const struct gqa_weight table = {.name = "embeddings",
                                     .type = GQA_TYPE_F32,
                                     .n_dims = 2,
                                     .ne = {WIDTH, ROWS_MAX, 1, 1},
                                     .data = p->inputs};
    const struct gqa_program_desc desc = {.struct_size = sizeof(desc),
                                          .max_rows = ROWS_MAX,
                                          .max_out_rows = 1,
                                          .n_ops = N_LAYERS + 2,
                                          .n_regs = N_REGS,
                                          .n_weights = 1,
                                          .n_attn_layers = N_LAYERS,
                                          .ops = p->ops,
                                          .regs = regs,
                                          .weights = &table,
                                          .attn_layers = p->layers};
    int r = s->program->prepare(s->context, &desc, &p->prepared, &reason);
    if (r < 0) {
        printf("prepare: %s\n", reason.text);
    }
    return r == 0;
}

static void finish(const struct side *s, struct program *p)
{
    s->program->release(s->context, p->prepared);
    free(p->page);
    free(p->inputs);
}

/* All ops; with votes in a range for each layer, behind which they are counted. */
static int run_ops(const struct side *s, struct program *p, bool votes, uint32_t n_past)
{
    uint32_t first = 0;
    int r = 0;

    for (uint32_t i = 1; votes && r == 0 && i <= N_LAYERS; i++) {
        r = s->program->run(s->context, p->prepared, first, i + 1);
        r = r < 0 ? r
                  : s->program->observe(s->context, p->prepared, i, 0, VOTERS, n_past,
                                        p->votes[i - 1]);
        first = i + 1;
    }
    return r < 0 ? r : s->program->run(s->context, p->prepared, first, N_LAYERS + 2);
}

/* The last of n_rows rows behind n_past tokens goes to ret. */
static bool step(const struct side *s, struct program *p, uint32_t n_past, uint32_t n_rows,
                 bool votes, float ret[WIDTH])
{
    static const uint64_t version = 1;
    int32_t tokens[ROWS_MAX];
    uint32_t positions[ROWS_MAX], out_row = n_rows - 1;
    uint8_t classes[ROWS_MAX] = {0};
    const struct gqa_page_table table = {.n_pages = 1, .pages = &p->page, .versions = &version};
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

    for (uint32_t i = 0; i < n_rows; i++) {
        positions[i] = n_past + i;
        tokens[i] = (int32_t)positions[i];
    }
    int r = s->program->begin(s->context, p->prepared, &batch);
    if (r == 0) {
        r = run_ops(s, p, votes, n_past);
        int end = s->program->end(s->context, p->prepared);
        r = r < 0 ? r : end;
    }
    const float *data = r == 0 ? s->program->data(s->context, p->prepared, R_OUT) : NULL;
    if (data != NULL) {
        memcpy(ret, data, WIDTH * sizeof(*ret));
    }
    return data != NULL;
}

/* Counts of a step, since *before. */
static struct emulated_counts since(emulated_counts_fn *counts, struct emulated_counts *before)
{
    struct emulated_counts now = {0};

    if (counts != NULL) {
        now = *counts();
    }
    struct emulated_counts n = {now.launches - before->launches,   now.captured - before->captured,
                                now.graphs - before->graphs,       now.uploads - before->uploads,
                                now.downloads - before->downloads, now.waits - before->waits};
    *before = now;
    return n;
}

static void tell(const char *what, const struct emulated_counts *n)
{
    printf("%-28s %4u kernels by themselves, %3u captured, %u graphs, %3u uploads, %3u downloads, "
           "%3u waits\n",
           what, n->launches, n->captured, n->graphs, n->uploads, n->downloads, n->waits);
}

/* What each step must have been: 1 launched, 2 captured, 3 replayed; with votes launched. Besides a
 * step's own three uploads, votes that were counted before. */
static bool check(const struct side *s, emulated_counts_fn *counts)
{
    static const struct {
        const char *name;
        uint32_t n_rows;
        bool votes;
        int kind;
        unsigned n_uploads;
    } steps[] = {{"a token, first", 1, false, 1, 3},
                 {"a token, captured", 1, false, 2, 3},
                 {"a token, replayed", 1, false, 3, 3},
                 {"rows that vote", VOTERS, true, 1, 3},
                 {"rows that vote on", VOTERS, true, 1, 3 + N_LAYERS},
                 {"a token, replayed", 1, false, 3, 3}};
    static struct program voting, plain;
    struct emulated_counts before = {0};
    float a[WIDTH], b[WIDTH];

    bool right = start(s, &voting) && start(s, &plain) && step(s, &voting, 0, N_PAST, false, a) &&
                 step(s, &plain, 0, N_PAST, false, b);
    for (size_t i = 0; right && i < sizeof(steps) / sizeof(steps[0]); i++) {
        since(counts, &before);
        right = step(s, &voting, N_PAST, steps[i].n_rows, steps[i].votes, a);
        struct emulated_counts n = since(counts, &before);
        right = right && step(s, &plain, N_PAST, steps[i].n_rows, false, b) &&
                memcmp(a, b, sizeof(a)) == 0;
        if (counts != NULL) {
            tell(steps[i].name, &n);
            right = right && n.graphs == (steps[i].kind > 1) &&
                    (n.captured > 0) == (steps[i].kind == 2) &&
                    (n.launches > 0) == (steps[i].kind == 1) && n.uploads == steps[i].n_uploads;
        }
        printf("%s: %s\n", steps[i].name, right ? "ok" : "WRONG");
    }
    for (uint32_t i = 0; right && i < N_LAYERS;
         i++) { /* of two steps, each row's weights sum to 1 */
        float sum = 0;
        for (uint32_t k = 0; k < N_GROUPS * N_PAST; k++) {
            sum += voting.votes[i][k];
        }
        right = sum > 0 && sum <= 2.0f * VOTERS * N_HEADS;
    }
    finish(s, &voting);
    finish(s, &plain);
    return right;
}

int main(int argc, char **argv)
{
    struct side cuda = {0};
    emulated_counts_fn *counts = NULL;

    if (argc != 2) {
        fprintf(stderr, "usage: check-graphs CUDA.so\n");
        return 1;
    }
    int r = side_open(&cuda, argv[1], "");
    if (r != 0) {
        return r;
    }
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *symbol = driver != NULL ? dlsym(driver, "emulated_cuda_counts") : NULL;
    memcpy(&counts, &symbol, sizeof(symbol));
    bool right = check(&cuda, counts);
    cuda.plugin->close(cuda.context);
    printf(right ? "all right\n" : "WRONG\n");
    return !right;
}
