/* daemon/sched/batch.h - the rows of one step: which sequences, which tokens of theirs.
 *
 * All rows of a step belong to one model. Every sequence that generates gets its one row first;
 * what is left of the step's budget (budget.h) goes to prompts, in chunks, by priority and fair
 * share (fair.h). Engine thread only. */
#ifndef DAEMON_SCHED_BATCH_H
#define DAEMON_SCHED_BATCH_H

#include "daemon/model/plan.h"
#include "daemon/sched/budget.h"
#include "daemon/sched/fair.h"
#include "daemon/sched/sequence.h"

struct draw;

struct batch {
    uint32_t max_rows, max_seqs;
    struct model *model; /* of this step; borrowed from its sequences */
    uint32_t max_outs;   /* that the model can give */
    uint32_t wants;      /* enum model_wants, of all members together */
    uint32_t n_rows, n_outs, n_seqs;
    uint32_t n_decoding;       /* the first so many members generate; the others have prompts */
    struct sequence **members; /* (n_seqs) */
    int32_t *tokens;           /* (n_rows) */
    uint32_t *positions;
    uint8_t *row_class;
    uint32_t *out_rows;
    struct gqa_attn_seq *seqs;
    struct gqa_attn_shared *shared; /* (max_seqs / 2) */
    struct model_observer *observers;
    uint32_t n_observers; /* members whose rows vote in this step */
    uint32_t caps;        /* enum gqa_attn_caps that members' KV policies need */
    /* While the batch is formed: whose prompts ask for rows. */
    struct fair_claim *claims; /* (max_seqs) */
    struct sequence **claimants;
    struct draw *draws; /* (max_seqs) of the members that generate: draw.h */
};

/* What prompts may have of a step. */
struct batch_rules {
    struct budget budget;
    const struct cost *cost; /* of the model */
    uint32_t *n_mixed;       /* budget_rows() */
    uint64_t now_ns;
    bool alone; /* nothing else runs */
};

int batch_init(struct batch *b, uint32_t max_rows, uint32_t max_seqs);
void batch_finish(struct batch *b);

/* Fills the batch from the running sequences of one model, leaving out those without a place and
 * those that wait for a slow reader. A prompt first adopts what is known of it; one whose next
 * block another sequence is about to compute waits for that. Reserves KV. Sequences that cannot
 * take part are left out and say why in hold. Returns the number of rows. */
uint32_t batch_form(struct batch *b, struct model *model, struct sequence *running,
                    const struct batch_rules *rules);

struct batch_result {
    int rc;                       /* 0 or -errno */
    struct backend *blame;        /* who failed, or would have */
    struct model_outputs outputs; /* what the output rows gave, valid until the plan's next step */
    bool sound;                   /* all are numbers, as far as can be seen */
};
/* Runs the step on a plan of the batch's model. It may be run again, on another. */
void batch_run(struct batch *b, struct plan *plan, struct batch_result *ret);

/* Before it is run again: the votes that it may have cast count for nothing. */
void batch_spoil_votes(struct batch *b);

/* The step's results are good: the members' KV counts from now on, and others may adopt it. */
void batch_commit(struct batch *b);

#endif
