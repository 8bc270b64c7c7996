/* daemon/sched/fair.h - the users, their weights, what they have had, and whose turn it is.
 *
 * Weighted fair queueing in tokens (A. Demers, S. Keshav, S. Shenker, "Analysis and Simulation of a
 * Fair Queueing Algorithm", 1989, with tokens for bits): a user's virtual time grows by the tokens
 * that are computed for it, divided by its weight, and whoever is behind is served first. A user
 * that comes back after a pause starts where those who stayed are: what it did not use is gone, and
 * what others used meanwhile is not held against them.
 *
 * Plain data without clock or lock; the engine guards it. */
#ifndef DAEMON_SCHED_FAIR_H
#define DAEMON_SCHED_FAIR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define FAIR_USERS_MAX  256u /* remembered: beyond it those are forgotten that have nothing here */
#define FAIR_WEIGHT_MAX 1000u

struct fair_weight {
    uid_t uid;
    uint32_t weight; /* 1 to FAIR_WEIGHT_MAX */
};

struct fair_user {
    struct fair_user *next;
    uid_t uid;
    uint32_t weight;
    double served;       /* virtual time: tokens by weight */
    uint32_t n_running;  /* sequences that hold a place */
    uint32_t n_waiting;  /* requests in the queue */
    uint32_t n_requests; /* open ones: while there are some, the user stays */
    uint64_t tokens_prompt, tokens_generated;
    uint64_t left_at; /* counts departures: who has been gone longest */
};

struct fair {
    struct fair_user *users;
    uint32_t n_users;
    double now; /* the virtual time of those who are here and furthest behind */
    uint64_t n_left;
    struct fair_weight *weights; /* (n_weights), owned; others have 1 */
    size_t n_weights;
};

/* No users; no weights but 1. */
void fair_init(struct fair *f);
void fair_finish(struct fair *f);
/* Copies; for those who come from now on. -ENOMEM. */
int fair_set_weights(struct fair *f, const struct fair_weight *weights, size_t n);
/* For those who are here. */
void fair_apply_weights(struct fair *f);

/* The user, or NULL: it has nothing here, and is not remembered either. */
struct fair_user *fair_find(const struct fair *f, uid_t uid);
/* A request of that user comes, *ret stays until it leaves. -ENOMEM. */
int fair_come(struct fair *f, uid_t uid, struct fair_user **ret);
void fair_leave(struct fair *f, struct fair_user *u);

/* Tokens were computed for the user. */
void fair_charge(struct fair *f, struct fair_user *u, uint64_t n_tokens);

/* ---- a step's rows ---- */

#define FAIR_QUANTUM 64u /* rows given at once: a block of the KV cache */

struct fair_claim {
    struct fair_user *user;
    int32_t level;   /* order_level() */
    bool whole;      /* all or nothing */
    uint32_t wanted; /* rows */
    uint32_t given;  /* result */
    double served;   /* fair_share()'s own: the user's, with what is given here */
};
/* Gives rows to claims, the highest level first, within it to the user that is behind, counting
 * what it is given here; of a user's claims the first goes first. */
void fair_share(struct fair_claim *claims, size_t n, uint32_t rows);

#endif
