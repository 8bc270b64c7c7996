/* daemon/sched/engine_shadow.c - some steps run a second time, on the shadow of the model's plan.
 *
 * The shadow gets pages of its own wherever it would write: copies of the blocks that the step's
 * tokens lie in. It appends and attends as it would in earnest, and leaves nothing behind. */
#include "daemon/log.h"
#include "daemon/model/shadow.h"
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK GQA_KV_BLOCK_TOKENS

/* A sequence's tables with other pages from block first on, of each class. */
struct private_tables {
    struct gqa_page_table tables[KV_MAX_CLASSES];
    void **pages[KV_MAX_CLASSES];
    uint32_t first[KV_MAX_CLASSES];
};

static void private_finish(struct private_tables *p)
{
    for (uint32_t c = 0; c < KV_MAX_CLASSES; c++) {
        for (uint32_t i = p->first[c]; p->pages[c] != NULL && i < p->tables[c].n_pages; i++) {
            free(p->pages[c][i]);
        }
        free(p->pages[c]);
    }
}

static int private_init(struct private_tables *p, const struct kv_layout *layout,
                        const struct gqa_attn_seq *s)
{
    memset(p, 0, sizeof(*p));
    for (uint32_t c = 0; c < layout->n_classes; c++) {
        const struct gqa_page_table *own = &s->tables[c];
        uint32_t past = s->n_past - own->n_dropped;
        p->first[c] = past / BLOCK;
        p->tables[c] = *own;
        p->tables[c].n_pages = (past + s->n_rows + BLOCK - 1) / BLOCK;
        p->pages[c] = calloc(p->tables[c].n_pages, sizeof(void *));
        if (p->pages[c] == NULL) {
            return -ENOMEM;
        }
        p->tables[c].pages = p->pages[c];
        p->tables[c].versions = NULL; /* each step has other copies */
        memcpy(p->pages[c], own->pages, p->first[c] * sizeof(void *));
        for (uint32_t i = p->first[c]; i < p->tables[c].n_pages; i++) {
            p->pages[c][i] = calloc(1, layout->classes[c].block_bytes);
            if (p->pages[c][i] == NULL) {
                return -ENOMEM;
            }
            if (i == p->first[c] && past % BLOCK != 0) {
                memcpy(p->pages[c][i], own->pages[i], layout->classes[c].block_bytes);
            }
        }
    }
    return 0;
}

/* Runs the batch on the shadow with tables of its own. -ENOMEM: it was not run. */
static int run_apart(struct batch *b, struct plan *plan, struct batch_result *ret)
{
    struct private_tables *apart = calloc(b->n_seqs, sizeof(*apart));
    const struct gqa_page_table **own = calloc(b->n_seqs, sizeof(*own));
    bool has_cache = !model_is_encoder(b->model);
    int rc = apart == NULL || own == NULL ? -ENOMEM : 0;
    for (uint32_t i = 0; rc == 0 && has_cache && i < b->n_seqs; i++) {
        rc = private_init(&apart[i], model_kv_layout(b->model), &b->seqs[i]);
    }
    if (rc == 0) {
        for (uint32_t i = 0; i < b->n_seqs; i++) {
            own[i] = b->seqs[i].tables;
            b->seqs[i].tables = has_cache ? apart[i].tables : own[i];
        }
        batch_run(b, plan, ret);
        for (uint32_t i = 0; i < b->n_seqs; i++) {
            b->seqs[i].tables = own[i];
        }
    }
    for (uint32_t i = 0; apart != NULL && i < b->n_seqs; i++) {
        private_finish(&apart[i]);
    }
    free(apart);
    free(own);
    return rc;
}

void engine_shadow_step(struct engine *e, const struct model_outputs *out, uint64_t step_ns)
{
    struct batch *b = &e->batch;
    struct model *m = b->model;
    struct model_shadow *s = model_shadow(m);
    if (s->plan == NULL || out->logits == NULL || b->n_outs == 0 || b->caps != 0 ||
        s->n_seen++ % s->facts.every != 0) {
        return;
    }
    struct batch_result r;
    uint64_t start = engine_now_ns();
    if (run_apart(b, s->plan, &r) < 0) {
        return; /* memory is short: a comparison is the least that matters */
    }
    if (r.rc == 0 && r.sound) {
        model_shadow_compare(m, out->logits, r.outputs.logits, b->n_outs, step_ns,
                             engine_now_ns() - start);
        return;
    }
    const char *what = r.rc < 0 ? strerror(-r.rc) : "it gave what are not numbers";
    backend_note_fault(r.blame, what);
    if (model_shadow_fault(m, what)) {
        log_error("model '%s': its shadow on %s ends, since it goes on failing: %s", model_name(m),
                  backend_spec(r.blame), what);
        engine_retire_plan(e, m, model_set_shadow(m, NULL, 0));
    }
}
