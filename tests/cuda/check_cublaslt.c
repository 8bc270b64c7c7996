/* tests/cuda/check_cublaslt.c - rows of class P by cuBLASLt: within its tolerance of what they are
 * without it, the same bits in chunks, and rows of class D untouched. A library that fails or whose
 * bits depend on the batch changes nothing but speed.
 *
 *   check-cublaslt CPU.so CUDA.so
 *
 * Exit status: 0 right, 1 wrong, 77 no GPU or no library (and it says so). */
#include "format/types.h"
#include "plugins/cuda/cublaslt.h"
#include "tests/cuda/check_trial.h"

#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROWS         150u
#define WIDTH        256u
#define FIRST        128u /* outputs of the first matrix; then those of the second */
#define SECOND       96u
#define OUT          (FIRST + SECOND)
#define ROW_HUGE     3u   /* of class P: F16 has no such values */
#define ROW_NO_VALUE 100u /* of class P */

/* Rows of the two classes in turns; the first run alone is longer than a block. */
static const struct {
    uint32_t end;
    uint8_t row_class;
} runs[] = {{64, GQA_ROW_P}, {70, GQA_ROW_D}, {134, GQA_ROW_P}, {ROWS, GQA_ROW_D}};

#define ARRAY_LENGTH(a) (sizeof(a) / sizeof((a)[0]))

static uint8_t classes[ROWS];

static void make(struct trial *t, uint32_t type)
{
    trial_init(t, ROWS, WIDTH, true, type + 1);
    snprintf(t->name, sizeof(t->name), "two matrices of %s", fmt_type_info(type)->name);
    uint32_t dst = trial_reg(t, OUT, 0);
    const uint32_t firsts[] = {0, FIRST}, widths[] = {FIRST, SECOND};
    for (uint32_t i = 0; i < 2; i++) {
        struct gqa_op *op = trial_op(t, GQA_OP_LINEAR);
        op->src = trial_view(0, 0, WIDTH);
        op->dst = trial_view(dst, firsts[i], widths[i]);
        op->weight = trial_weight(t, type, WIDTH, widths[i], 0, 0.1f);
        op->bias = i > 0 ? trial_weight(t, GQA_TYPE_F32, widths[i], 0, 0, 1) : GQA_NONE;
    }
    trial_gather(t, dst);
    t->row_classes = classes;
    for (uint32_t k = 0; !t->no_memory && k < WIDTH; k++) {
        t->inputs[ROW_HUGE * WIDTH + k] *= 1e6f;
    }
    if (!t->no_memory) {
        t->inputs[ROW_NO_VALUE * WIDTH + 5] = NAN;
    }
}

/* ---- comparing --------------------------------------------------------------------------- */

static bool same_rows(const float *a, const float *b, uint8_t row_class)
{
    bool same = true;

    for (uint32_t row = 0; row < ROWS; row++) {
        same = same && (classes[row] != row_class ||
                        memcmp(a + row * OUT, b + row * OUT, OUT * sizeof(*a)) == 0);
    }
    return same;
}

/* The largest distance of a row of class P; the one without values must have none. */
static float distance(const float *truth, const float *got)
{
    float worst = 0;

    for (uint32_t row = 0; row < ROWS; row++) {
        const float *x = truth + row * OUT, *y = got + row * OUT;
        if (classes[row] == GQA_ROW_P && row != ROW_NO_VALUE) {
            float d = check_distance(x, y, OUT);
            worst = d > worst || isnan(d) ? d : worst;
        }
    }
    for (uint32_t i = 0; i < OUT; i++) {
        worst = isnan(got[ROW_NO_VALUE * OUT + i]) ? worst : NAN;
    }
    return worst;
}

/* ---- what is checked --------------------------------------------------------------------- */

static struct side cpu, off;
static const char *path;

/* Opens the plugin with cublaslt=on. */
static int open_on(struct side *ret)
{
    return side_open(ret, path, "cublaslt=on");
}

/* Types that the library multiplies, and one that it does not. */
static bool check_type(uint32_t type, float tolerance)
{
    struct trial t;
    struct side on;

    if (open_on(&on) != 0) {
        return false;
    }
    make(&t, type);
    float *truth = trial_results(&t, &cpu, 0), *plain = trial_results(&t, &off, 0);
    float *all = trial_results(&t, &on, 0), *some = trial_results(&t, &on, 13);
    float *one = trial_results(&t, &on, 1);
    bool right = truth != NULL && plain != NULL && all != NULL && some != NULL && one != NULL;
    if (right) {
        bool is_used = !same_rows(plain, all, GQA_ROW_P);
        bool kept = same_rows(plain, all, GQA_ROW_D);
        bool bits = memcmp(all, some, ROWS * OUT * sizeof(*all)) == 0 &&
                    memcmp(all, one, ROWS * OUT * sizeof(*all)) == 0;
        float error = distance(truth, all);
        bool numbered = tolerance > 0 ? on.program->numerics != off.program->numerics : true;
        right = is_used == (tolerance > 0) && kept && bits && numbered &&
                (tolerance == 0 || error <= tolerance);
        printf("%-5s %s: %.3g of %.3g, %s, class D %s, %s\n", fmt_type_info(type)->name,
               right ? "ok" : "WRONG", (double)error, (double)tolerance,
               is_used ? "by the library" : "not by the library", kept ? "the same" : "OTHER BITS",
               bits ? "same bits in chunks" : "OTHER BITS in chunks");
    }
    free(truth);
    free(plain);
    free(all);
    free(some);
    free(one);
    trial_finish(&t);
    on.plugin->close(on.context);
    return right;
}

/* A library that does not do what it should: nothing is told but by the log, and all is as without.
 */
static bool check_mood(const char *mood, unsigned n_lines)
{
    struct trial t;
    struct side on;

    setenv("EMULATED_CUBLASLT", mood, 1);
    int r = open_on(&on);
    if (r != 0) {
        unsetenv("EMULATED_CUBLASLT");
        return false;
    }
    make(&t, GQA_TYPE_BF16);
    unsigned before = side_n_warnings;
    float *plain = trial_results(&t, &off, 0), *got = trial_results(&t, &on, 0);
    float *again = trial_results(&t, &on, 0);
    bool right = plain != NULL && got != NULL && again != NULL &&
                 memcmp(plain, got, ROWS * OUT * sizeof(*got)) == 0 &&
                 memcmp(plain, again, ROWS * OUT * sizeof(*got)) == 0;
    unsigned lines = side_n_warnings - before;
    right = right && lines == n_lines;
    printf("a library of mood \"%s\": %s, %u lines in the log\n", mood, right ? "ok" : "WRONG",
           lines);
    free(plain);
    free(got);
    free(again);
    trial_finish(&t);
    on.plugin->close(on.context);
    unsetenv("EMULATED_CUBLASLT");
    return right;
}

/* A product that fails in a step: its rows are multiplied all the same. */
static bool check_later(unsigned (*n_matmuls)(void))
{
    struct trial t;
    struct side on;

    n_matmuls();
    if (open_on(&on) != 0) {
        return false;
    }
    make(&t, GQA_TYPE_BF16);
    setenv("EMULATED_CUBLASLT", "later",
           1); /* the first shape's proof takes five, the second's fails */
    unsigned before = side_n_warnings;
    float *plain = trial_results(&t, &off, 0), *got = trial_results(&t, &on, 0);
    unsetenv("EMULATED_CUBLASLT");
    bool right = plain != NULL && got != NULL && same_rows(plain, got, GQA_ROW_D) &&
                 distance(plain, got) <= CUDA_LT_TOLERANCE_BF16;
    unsigned lines = side_n_warnings - before;
    right = right && lines == 2 && n_matmuls() == 6;
    printf("a library that fails later: %s, %u lines in the log\n", right ? "ok" : "WRONG", lines);
    free(plain);
    free(got);
    trial_finish(&t);
    on.plugin->close(on.context);
    return right;
}

static bool check_options(bool emulated)
{
    struct gqa_reason reason = {""};
    void *context;

    bool right = off.plugin->open(&side_host, "cublaslt=perhaps", &context, &reason) == -EINVAL;
    printf("%s\n", reason.text);
    if (emulated) {
        setenv("EMULATED_CUBLASLT", "create", 1);
        right = off.plugin->open(&side_host, "cublaslt=on", &context, &reason) == -ENODEV && right;
        unsetenv("EMULATED_CUBLASLT");
        printf("%s\n", reason.text);
    }
    printf("options: %s\n", right ? "ok" : "WRONG");
    return right;
}

static int check_all(void)
{
    void *library = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_NOLOAD);
    void *symbol = library != NULL ? dlsym(library, "emulated_cublaslt_matmuls") : NULL;
    unsigned (*n_matmuls)(void) = NULL;
    int wrong = 0;

    memcpy(&n_matmuls, &symbol, sizeof(symbol));
    wrong += !check_type(GQA_TYPE_BF16, CUDA_LT_TOLERANCE_BF16);
    wrong += !check_type(GQA_TYPE_F16, CUDA_LT_TOLERANCE_F16);
    /* F32 is F16 on cuda, and wrong by as much again. */
    wrong += !check_type(GQA_TYPE_F32, 2 * CUDA_LT_TOLERANCE_F16);
    wrong += !check_type(GQA_TYPE_Q4_0, 0);
    wrong += !check_options(n_matmuls != NULL);
    if (n_matmuls != NULL) {
        wrong += !check_mood("heuristic", 2); /* a line for each shape */
        wrong += !check_mood("matmul", 2);
        wrong += !check_mood("rows", 2);
        wrong += !check_mood("wrong", 2);
        wrong += !check_later(n_matmuls);
    }
    return wrong;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: check-cublaslt CPU.so CUDA.so\n");
        return 1;
    }
    for (uint32_t row = 0, run = 0; row < ROWS; row++) {
        run += row == runs[run].end;
        classes[row] = runs[run].row_class;
    }
    path = argv[2];
    int r = side_open(&cpu, argv[1], "isa=c");
    r = r == 0 ? side_open(&off, path, "cublaslt=off") : r;
    if (r != 0) {
        return r;
    }
    struct gqa_reason reason = {""};
    void *context;
    if (off.plugin->open(&side_host, "cublaslt=on", &context, &reason) < 0) {
        printf("SKIPPED: %s\n", reason.text);
        return 77;
    }
    off.plugin->close(context);
    int wrong = check_all();
    off.plugin->close(off.context);
    cpu.plugin->close(cpu.context);
    printf(wrong ? "%d WRONG\n" : "all right\n", wrong);
    return wrong != 0;
}
