#include "daemon/sched/fair.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void fair_init(struct fair *f)
{
    memset(f, 0, sizeof(*f));
}

void fair_finish(struct fair *f)
{
    while (f->users != NULL) {
        struct fair_user *u = f->users;
        f->users = u->next;
        free(u);
    }
    free(f->weights);
    memset(f, 0, sizeof(*f));
}

static uint32_t weight_of(const struct fair *f, uid_t uid)
{
    uint32_t weight = 1;
    for (size_t i = 0; i < f->n_weights; i++) {
        weight = f->weights[i].uid == uid ? f->weights[i].weight : weight;
    }
    return weight;
}

int fair_set_weights(struct fair *f, const struct fair_weight *weights, size_t n)
{
    struct fair_weight *copy = malloc((n + 1) * sizeof(*copy));
    if (copy == NULL) {
        return -ENOMEM;
    }
    if (n > 0) {
        memcpy(copy, weights, n * sizeof(*copy));
    }
    free(f->weights);
    f->weights = copy;
    f->n_weights = n;
    return 0;
}

void fair_apply_weights(struct fair *f)
{
    for (struct fair_user *u = f->users; u != NULL; u = u->next) {
        u->weight = weight_of(f, u->uid);
    }
}

/* The virtual time of those who are here never goes back. */
static void advance(struct fair *f)
{
    double least = -1;
    for (const struct fair_user *u = f->users; u != NULL; u = u->next) {
        if (u->n_requests > 0 && (least < 0 || u->served < least)) {
            least = u->served;
        }
    }
    f->now = least > f->now ? least : f->now;
}

/* Forgets the user that has been gone for longest. */
static void forget_one(struct fair *f)
{
    struct fair_user **victim = NULL;
    for (struct fair_user **link = &f->users; *link != NULL; link = &(*link)->next) {
        if ((*link)->n_requests == 0 && (victim == NULL || (*link)->left_at < (*victim)->left_at)) {
            victim = link;
        }
    }
    if (victim != NULL) {
        struct fair_user *u = *victim;
        *victim = u->next;
        f->n_users--;
        free(u);
    }
}

struct fair_user *fair_find(const struct fair *f, uid_t uid)
{
    struct fair_user *u = f->users;
    while (u != NULL && u->uid != uid) {
        u = u->next;
    }
    return u;
}

int fair_come(struct fair *f, uid_t uid, struct fair_user **ret)
{
    struct fair_user *u = fair_find(f, uid);
    if (u == NULL) {
        u = calloc(1, sizeof(*u));
        if (u == NULL) {
            return -ENOMEM;
        }
        if (f->n_users >= FAIR_USERS_MAX) {
            forget_one(f);
        }
        u->uid = uid;
        u->weight = weight_of(f, uid);
        u->next = f->users;
        f->users = u;
        f->n_users++;
    }
    if (u->n_requests++ == 0) {
        u->served = u->served > f->now ? u->served : f->now;
    }
    *ret = u;
    return 0;
}

void fair_leave(struct fair *f, struct fair_user *u)
{
    if (--u->n_requests == 0) {
        u->left_at = ++f->n_left;
        advance(f);
    }
}

void fair_charge(struct fair *f, struct fair_user *u, uint64_t n_tokens)
{
    u->served += (double)n_tokens / (double)u->weight;
    advance(f);
}

static bool is_served_before(const struct fair_claim *a, const struct fair_claim *b)
{
    return a->level != b->level ? a->level > b->level : a->served < b->served;
}

void fair_share(struct fair_claim *claims, size_t n, uint32_t rows)
{
    for (size_t i = 0; i < n; i++) {
        claims[i].given = 0;
        claims[i].served = claims[i].user->served;
    }
    while (rows > 0) {
        struct fair_claim *next = NULL;
        for (size_t i = 0; i < n; i++) {
            struct fair_claim *c = &claims[i];
            bool open = c->given < c->wanted && (!c->whole || c->wanted <= rows);
            if (open && (next == NULL || is_served_before(c, next))) {
                next = c;
            }
        }
        if (next == NULL) {
            return;
        }
        uint32_t some = next->wanted - next->given;
        some = next->whole || some < FAIR_QUANTUM ? some : FAIR_QUANTUM;
        some = some < rows ? some : rows;
        next->given += some;
        rows -= some;
        for (size_t i = 0; i < n; i++) {
            bool same_user = claims[i].user == next->user;
            claims[i].served += same_user ? (double)some / (double)next->user->weight : 0;
        }
    }
}
