#include "daemon/penalty.h"

#include "daemon/log.h"

#include <stdlib.h>
#include <string.h>

#define DRAIN_S        2.0          /* for the limit's number of strikes */
#define DRAIN_SLOWED_S 20.0         /* the same, of a uid that is slowed */
#define OTHERS_NS      10000000000u /* who had a step so long ago is there */
#define PAUSE_NS_MIN   10000000u    /* between two steps, however short the first was, */
#define PAUSE_NS_MAX   250000000u   /* and however long */

static const struct {
    unsigned strikes;
    const char *what;
} kinds[PENALTY_COUNT] = {
#define P(KIND, strikes, what) [PENALTY_##KIND] = {strikes, what},
    GQAD_PENALTIES(P)
#undef P
};

void penalty_init(struct penalty_table *t)
{
    memset(t, 0, sizeof(*t));
    LIST_INIT(&t->users);
    t->served[0].uid = t->served[1].uid = (uid_t)-1;
}

void penalty_finish(struct penalty_table *t)
{
    struct penalty *p;
    while ((p = LIST_FIRST(&t->users)) != NULL) {
        LIST_REMOVE(p, entry);
        free(p);
    }
}

/* ---- who is known ------------------------------------------------------------------------ */

struct penalty *penalty_find(const struct penalty_table *t, uid_t uid)
{
    struct penalty *p;
    LIST_FOREACH(p, &t->users, entry)
    {
        if (p->uid == uid) {
            return p;
        }
    }
    return NULL;
}

struct penalty *penalty_ref(struct penalty_table *t, uid_t uid)
{
    struct penalty *p = penalty_find(t, uid);
    if (!p) {
        p = calloc(1, sizeof(*p));
        if (!p) {
            return NULL;
        }
        p->uid = uid;
        LIST_INSERT_HEAD(&t->users, p, entry);
    } else if (p->n_refs == 0) {
        t->n_idle--;
    }
    p->n_refs++;
    return p;
}

static void forget(struct penalty *p)
{
    LIST_REMOVE(p, entry);
    free(p);
}

void penalty_unref(struct penalty_table *t, struct penalty *p)
{
    if (--p->n_refs > 0) {
        return;
    }
    if (p->strikes > 0 && t->n_idle < PENALTY_IDLE_MAX) {
        t->n_idle++;
    } else {
        forget(p);
    }
}

/* ---- strikes ----------------------------------------------------------------------------- */

static void drain(const struct penalty_table *t, struct penalty *p, uint64_t now_ns)
{
    double seconds = now_ns > p->at_ns ? (double)(now_ns - p->at_ns) / 1e9 : 0;
    double max = t->limits.strikes_max;
    p->strikes -= seconds * max / (p->slowed ? DRAIN_SLOWED_S : DRAIN_S);
    p->strikes = p->strikes > 0 && max > 0 ? p->strikes : 0;
    p->at_ns = now_ns > p->at_ns ? now_ns : p->at_ns;
    if (p->slowed && p->strikes <= max / 2) {
        p->slowed = false;
        log_info("uid %u is served like the others again; %llu of its connections were refused",
                 p->uid, (unsigned long long)p->n_refused);
        p->n_refused = 0;
    }
}

void penalty_strike(struct penalty_table *t, struct penalty *p, enum penalty_kind kind,
                    uint64_t now_ns)
{
    if (!p || t->limits.strikes_max == 0) {
        return;
    }
    double max = t->limits.strikes_max;
    drain(t, p, now_ns);
    p->strikes += kinds[kind].strikes;
    p->strikes = p->strikes < 2 * max ? p->strikes : 2 * max;
    if (!p->slowed && p->strikes > max) {
        p->slowed = true;
        p->next_ns = now_ns;
        log_warning("uid %u misbehaves and is slowed while others are there: it last %s "
                    "(max_strikes_per_user)",
                    p->uid, kinds[kind].what);
    }
}

void penalty_tick(struct penalty_table *t, uint64_t now_ns)
{
    struct penalty *next;
    for (struct penalty *p = LIST_FIRST(&t->users); p; p = next) {
        next = LIST_NEXT(p, entry);
        drain(t, p, now_ns);
        if (p->n_refs == 0 && p->strikes <= 0) {
            t->n_idle--;
            forget(p);
        }
    }
}

/* ---- steps ------------------------------------------------------------------------------- */

bool penalty_is_paced(const struct penalty_table *t, const struct penalty *p, uint64_t now_ns)
{
    if (!p->slowed) {
        return false;
    }
    unsigned other = t->served[0].uid == p->uid;
    return t->served[other].uid != (uid_t)-1 && now_ns < t->served[other].ns + OTHERS_NS;
}

void penalty_charge(const struct penalty_table *t, struct penalty *p, uint64_t step_ns,
                    uint64_t now_ns)
{
    uint64_t pause = step_ns * (1000 - t->limits.share_permille) / t->limits.share_permille;
    pause = pause > PAUSE_NS_MIN ? pause : PAUSE_NS_MIN;
    p->next_ns = now_ns + (pause < PAUSE_NS_MAX ? pause : PAUSE_NS_MAX);
}
