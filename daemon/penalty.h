/* daemon/penalty.h - who misbehaves is slowed while others are there.
 *
 * What only a faulty or hostile program does, and what does much for nothing, counts as strikes
 * against its uid. They drain all the time, so that what honest programs do now and then never adds
 * up. A uid with more than the limit is slowed: a small share of the loop's time is left to its
 * connections, which are answered, only later. While it is slowed strikes drain ten times slower,
 * and below half of the limit it is forgiven: 10 to 30 s after the last of them.
 *
 *   strikes
 *     2 x max  |           _______                 no more are counted
 *              |          /       `--.__
 *         max  |- - - - -/- - - - - - - `--.__
 *              |   /`.  /                     `--.__
 *     max / 2  |- / - `/ - - - - - - - - - - - - - - `\
 *              |_/_____|__________________________|____\___ time
 *                      ^ slowed                   ^ forgiven
 *
 * A uid that is alone on the daemon is never slowed: there is nobody whom it would disturb.
 *
 * Plain data without a clock. Loop thread only. */
#ifndef DAEMON_PENALTY_H
#define DAEMON_PENALTY_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>

/* P(KIND, strikes, what). By the limit of 1,000 a uid is slowed by ten violations at once, or by
 * more than five, 250 connections or 500 cancelled calls a second for a while. */
#define GQAD_PENALTIES(P)                                                                 \
    P(VIOLATION, 100, "broke the protocol")                                               \
    P(LATE, 20, "sent no first message, left one unfinished or did not read its answers") \
    P(IDLE_BELLS, 20, "rang its doorbell for nothing")                                    \
    P(ABRUPT_END, 5, "left in the middle of a call or of a message")                      \
    P(CONNECTION, 2, "connected")                                                         \
    P(CANCEL, 1, "cancelled a call, or one that is not open")

enum penalty_kind {
#define P(KIND, strikes, what) PENALTY_##KIND,
    GQAD_PENALTIES(P)
#undef P
        PENALTY_COUNT
};

/* Uids without a connection whose strikes are remembered, at most. */
#define PENALTY_IDLE_MAX 1024u

struct penalty_limits {
    uint32_t strikes_max;    /* a uid with more is slowed; 0: nobody is */
    uint32_t share_permille; /* of the loop's time, for a uid that is slowed; at least 1 */
};

/* A uid's. */
struct penalty {
    LIST_ENTRY(penalty) entry;
    uid_t uid;
    uint32_t n_refs;
    bool slowed;
    double strikes; /* at at_ns */
    uint64_t at_ns;
    uint64_t next_ns;   /* slowed: its next step is not before */
    uint64_t n_refused; /* connections, since it was slowed */
};

struct penalty_table {
    LIST_HEAD(, penalty) users; /* with a reference or with strikes */
    struct penalty_limits limits;
    uint32_t n_idle; /* of those without a reference */
    /* The uid that was served last, and the last one that is another; when. */
    struct {
        uid_t uid;
        uint64_t ns;
    } served[2];
};

/* The limits are to be set. */
void penalty_init(struct penalty_table *t);
void penalty_finish(struct penalty_table *t);

/* The uid's, with a reference; NULL: no memory. */
struct penalty *penalty_ref(struct penalty_table *t, uid_t uid);
void penalty_unref(struct penalty_table *t, struct penalty *p);
/* The uid's, or NULL: it is not connected and nothing is known of it. */
struct penalty *penalty_find(const struct penalty_table *t, uid_t uid);

/* Counts strikes; logs when the uid is slowed by them. p NULL: nothing. */
void penalty_strike(struct penalty_table *t, struct penalty *p, enum penalty_kind kind,
                    uint64_t now_ns);
/* Lets strikes drain; forgives and forgets whom it may. About once a second. */
void penalty_tick(struct penalty_table *t, uint64_t now_ns);

/* The uid has had a step. */
static inline void penalty_note_served(struct penalty_table *t, uid_t uid, uint64_t now_ns)
{
    if (t->served[0].uid != uid) {
        t->served[1] = t->served[0];
        t->served[0].uid = uid;
    }
    t->served[0].ns = now_ns;
}

/* Whether the uid is to wait between its steps: it is slowed, and another has had one lately. */
bool penalty_is_paced(const struct penalty_table *t, const struct penalty *p, uint64_t now_ns);
/* A step of a uid that is slowed has taken so long: sets when the next one may be. */
void penalty_charge(const struct penalty_table *t, struct penalty *p, uint64_t step_ns,
                    uint64_t now_ns);

#endif
