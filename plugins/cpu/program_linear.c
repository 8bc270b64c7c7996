/* plugins/cpu/program_linear.c - LINEAR ops: which products go together, and which rows go which
 * way. */
#include "plugins/cpu/program.h"

/* Consecutive LINEARs of one input that share a call. */
#define PRODUCTS_MAX 8u

static int views_overlap(const struct gqa_view *a, const struct gqa_view *b)
{
    return a->reg == b->reg && a->first < b->first + b->width && b->first < a->first + a->width;
}

/* Whether op may join the products ops[0..n): same input, and an output of its own. */
static int may_join(const struct cpu_op *ops, uint32_t n, const struct cpu_op *op)
{
    const struct gqa_view *a = &ops[0].op.src, *b = &op->op.src;

    if (op->op.kind != GQA_OP_LINEAR || n == PRODUCTS_MAX || a->reg != b->reg ||
        a->first != b->first || a->width != b->width) {
        return 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (views_overlap(&ops[i].op.dst, &op->op.dst)) {
            return 0;
        }
    }
    return 1;
}

/* The classes of a view's rows, or NULL where all are of class D: rows that are asked for are few
 * and have their own numbering. */
static const uint8_t *row_classes(const struct cpu_program *p, const struct gqa_view *view)
{
    if (p->batch->attention == NULL || p->regs[view->reg].flags & GQA_REG_OUT) {
        return NULL;
    }
    return p->batch->attention->row_class;
}

/* The input that products share. */
struct input {
    const float *x;
    size_t stride;
    uint32_t n_rows;
};

/* Every run of neighbours of class D is a product of its own: a batch has few, and reading the
 * weights for each is what its rows cost alone. */
static void run_class_d(struct cpu_program *p, const struct input *in, const uint8_t *classes,
                        const struct cpu_product *products, uint32_t n)
{
    for (uint32_t first = 0, last = 0; first < in->n_rows; first = last) {
        struct cpu_product run[PRODUCTS_MAX];

        for (last = first + 1; last < in->n_rows && classes[last] == classes[first];) {
            last++;
        }
        if (classes[first] != GQA_ROW_D) {
            continue;
        }
        for (uint32_t i = 0; i < n; i++) {
            run[i] = products[i];
            run[i].dst += first * products[i].dst_stride;
        }
        cpu_linear_run(&p->linear, in->x + first * in->stride, in->stride, last - first, run, n);
    }
}

/* Products whose class P rows have panels, and the others. */
static void run_by_class(struct cpu_program *p, const struct input *in, const uint8_t *classes,
                         const struct cpu_product *products, uint32_t n)
{
    struct cpu_product taken[PRODUCTS_MAX], others[PRODUCTS_MAX];
    uint32_t n_taken = 0, n_others = 0;

    for (uint32_t i = 0; i < n; i++) {
        if (cpu_panels_take(&p->panels, products[i].matrix)) {
            taken[n_taken++] = products[i];
        } else {
            others[n_others++] = products[i];
        }
    }
    if (n_others > 0) {
        cpu_linear_run(&p->linear, in->x, in->stride, in->n_rows, others, n_others);
    }
    if (n_taken > 0) {
        cpu_panels_run(&p->panels, in->x, in->stride, classes, in->n_rows, taken, n_taken);
        run_class_d(p, in, classes, taken, n_taken);
    }
}

uint32_t cpu_program_run_linears(struct cpu_program *p, const struct cpu_op *ops, uint32_t n_ops)
{
    struct cpu_product products[PRODUCTS_MAX];
    const struct gqa_view *src = &ops[0].op.src;
    const struct input in = {cpu_view_row(p, src, 0), p->regs[src->reg].width,
                             cpu_view_n_rows(p, src)};
    const uint8_t *classes = row_classes(p, src);
    uint32_t n = 0;

    do {
        products[n] = (struct cpu_product){
            .matrix = &ops[n].matrix,
            .dst = cpu_view_row(p, &ops[n].op.dst, 0),
            .dst_stride = p->regs[ops[n].op.dst.reg].width,
        };
        n++;
    } while (n < n_ops && may_join(ops, n, &ops[n]));
    if (in.n_rows > 0 && classes != NULL && p->panels.kernels != NULL) {
        run_by_class(p, &in, classes, products, n);
    } else if (in.n_rows > 0) {
        cpu_linear_run(&p->linear, in.x, in.stride, in.n_rows, products, n);
    }
    for (uint32_t i = 0; i < n; i++) {
        cpu_adapters_run(p, &ops[i]);
    }
    return n;
}
