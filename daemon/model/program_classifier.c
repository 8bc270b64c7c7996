/* daemon/model/program_classifier.c - a reranker's head over hidden states. */
#include "daemon/model/program_build.h"

#include <errno.h>

#define MAX_SCORES 65536u

/* A matrix that the file may lack: GQA_NONE then. */
static uint32_t optional_weight(struct builder *b, const char *name, uint64_t n_in, uint64_t n_out)
{
    return gguf_find_tensor(b->g, name) != NULL ? build_weight(b, name, n_in, n_out) : GQA_NONE;
}

void build_classifier(struct builder *b)
{
    const struct model_shape *s = b->s;
    const uint64_t flops = b->p->flops_per_row;
    const struct gguf_tensor *out = gguf_find_tensor(b->g, "cls.output.weight");
    uint32_t dense = optional_weight(b, "cls.weight", s->n_embd, s->n_embd);
    struct gqa_view h = {b->p->embd_reg, 0, s->n_embd};
    b->p->scores_op = b->p->n_ops;
    if (b->rc < 0 || (out == NULL && dense == GQA_NONE)) {
        return;
    }
    if (out != NULL && (out->ne[1] < 1 || out->ne[1] > MAX_SCORES)) {
        b->rc = fmt_fail(b->err, -EINVAL, "%s: tensor cls.output.weight has %llu rows, limit %u",
                         gguf_name(b->g), (unsigned long long)out->ne[1], MAX_SCORES);
        return;
    }
    b->p->n_scores = out != NULL ? (uint32_t)out->ne[1] : s->n_embd;
    struct gqa_view scores = build_view(b, REG_SCORES, 0, b->p->n_scores);
    if (dense != GQA_NONE) {
        struct gqa_view c = out != NULL ? build_view(b, REG_CLS, 0, s->n_embd) : scores;
        build_linear(b, GQA_NONE, h, c, dense, build_bias(b, "cls.bias", s->n_embd, false));
        build_op(b, GQA_OP_SOFTCAP, GQA_NONE, c, c); /* with a cap of 1 that is tanh */
        h = c;
    }
    if (out != NULL) {
        build_linear(b, GQA_NONE, h, scores,
                     build_weight(b, "cls.output.weight", s->n_embd, b->p->n_scores),
                     build_bias(b, "cls.output.bias", b->p->n_scores, false));
    }
    b->p->scores_reg = scores.reg;
    b->p->flops_per_row = flops; /* only those who rank pay for it */
}
