/* daemon/sched/publish.h - what a step's logits become: tokens, text, rows of logits, the end.
 *
 * Makes the events that the loop takes. Engine thread only. */
#ifndef DAEMON_SCHED_PUBLISH_H
#define DAEMON_SCHED_PUBLISH_H

#include "daemon/sched/draw.h"
#include "daemon/sched/sequence.h"

/* Where events go; set up by the engine. */
struct publisher {
    void (*emit)(void *arg, struct request_event *event);
    void *arg;
};

/* Appends the token that was drawn for it, and emits what may be shown. The sequence goes on until
 * it is finished. -ENOMEM, or the draw's. */
int publish_token(const struct publisher *p, struct sequence *s, const struct draw *draw,
                  uint64_t now_ns);

/* Emits the rows that a step gave for a REQUEST_LOGITS. logits: (step_outs, n_vocab). */
int publish_rows(const struct publisher *p, struct sequence *s, const float *logits);

/* Emits the rows that a step gave for a REQUEST_EMBED without pooling, cut and scaled as it asks.
 * rows: (step_outs, n_embd). */
int publish_embeddings(const struct publisher *p, struct sequence *s, const float *rows,
                       uint32_t n_embd);

/* Emits text that was held back, when a generation ends other than by a stop string. */
int publish_rest(const struct publisher *p, struct sequence *s);

/* The final event; the request is the loop's afterwards. Never fails: the event was allocated with
 * the request's admission (done). */
void publish_done(const struct publisher *p, struct request *r, struct request_event *done);

#endif
