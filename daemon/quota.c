#include "daemon/quota.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name, *what;
    uint32_t retry_after_ms;
} quotas[QUOTA_COUNT] = {
#define Q(KIND, name, retry, what) [QUOTA_##KIND] = {#name, what, retry},
    GQAD_QUOTAS(Q)
#undef Q
};

const char *quota_name(enum quota_kind kind)
{
    return quotas[kind].name;
}

void quota_init(struct quota_table *t)
{
    memset(t, 0, sizeof(*t));
    LIST_INIT(&t->users);
}

void quota_finish(struct quota_table *t)
{
    struct quota_user *u;
    while ((u = LIST_FIRST(&t->users)) != NULL) {
        LIST_REMOVE(u, entry);
        free(u);
    }
}

struct quota_user *quota_user(struct quota_table *t, uid_t uid)
{
    struct quota_user *u;
    LIST_FOREACH(u, &t->users, entry)
    {
        if (u->uid == uid) {
            return u;
        }
    }
    return NULL;
}

static int refuse(struct quota_user *u, uid_t uid, enum quota_kind kind, uint64_t used,
                  uint64_t wanted, uint64_t limit, struct ipc_error *e)
{
    ipc_error_set(e, PROTO_E_BUSY,
                  "uid %u has %llu %s and wants %llu more; the limit is %llu "
                  "(max_%s_per_user)",
                  uid, (unsigned long long)used, quotas[kind].what, (unsigned long long)wanted,
                  (unsigned long long)limit, quotas[kind].name);
    e->retry_after_ms = quotas[kind].retry_after_ms;
    if (u) {
        u->n_refused++;
    }
    return -EBUSY;
}

int quota_take(struct quota_table *t, uid_t uid, const struct quota_amounts *wanted,
               struct ipc_error *e)
{
    static const struct quota_amounts nothing;
    struct quota_user *u = quota_user(t, uid);
    const struct quota_amounts *used = u ? &u->used : &nothing;
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        uint64_t limit = t->limits.of[k];
        if (wanted->of[k] > 0 && (used->of[k] >= limit || wanted->of[k] > limit - used->of[k])) {
            return refuse(u, uid, k, used->of[k], wanted->of[k], limit, e);
        }
    }
    if (!u) {
        u = calloc(1, sizeof(*u));
        if (!u) {
            ipc_error_set(e, PROTO_E_NO_MEMORY, "no memory for another user");
            return -ENOMEM;
        }
        u->uid = uid;
        LIST_INSERT_HEAD(&t->users, u, entry);
    }
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        u->used.of[k] += wanted->of[k];
    }
    return 0;
}

/* Who holds nothing is forgotten. */
static void forget_idle(struct quota_user *u)
{
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        if (u->used.of[k] > 0) {
            return;
        }
    }
    LIST_REMOVE(u, entry);
    free(u);
}

static void note_unread(struct quota_table *t, struct quota_user *u)
{
    bool before = atomic_load_explicit(&u->is_unread, memory_order_relaxed);
    bool now = u->used.of[QUOTA_OUTPUT_BYTES] >= t->limits.of[QUOTA_OUTPUT_BYTES];
    atomic_store_explicit(&u->is_unread, now, memory_order_relaxed);
    if (before && !now && t->relieved) {
        t->relieved(t->relieved_arg);
    }
}

static void give(struct quota_user *u, struct quota_amounts *held, enum quota_kind kind)
{
    assert(u->used.of[kind] >= held->of[kind]);
    u->used.of[kind] -= held->of[kind];
    held->of[kind] = 0;
}

void quota_give(struct quota_table *t, uid_t uid, struct quota_amounts *held)
{
    struct quota_user *u = quota_user(t, uid);
    if (!u) {
        return;
    }
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        give(u, held, k);
    }
    note_unread(t, u);
    forget_idle(u);
}

void quota_give_one(struct quota_table *t, uid_t uid, struct quota_amounts *held,
                    enum quota_kind kind)
{
    struct quota_user *u = held->of[kind] > 0 ? quota_user(t, uid) : NULL;
    if (u) {
        give(u, held, kind);
        forget_idle(u);
    }
}

void quota_change(struct quota_table *t, uid_t uid, enum quota_kind kind, uint64_t before,
                  uint64_t now)
{
    struct quota_user *u = before != now ? quota_user(t, uid) : NULL;
    if (u) {
        assert(u->used.of[kind] >= before);
        u->used.of[kind] += now - before;
        note_unread(t, u);
    }
}

int quota_check(struct quota_table *t, uid_t uid, enum quota_kind kind, struct ipc_error *e)
{
    struct quota_user *u = quota_user(t, uid);
    uint64_t limit = t->limits.of[kind];
    if (!u || u->used.of[kind] < limit) {
        return 0;
    }
    return refuse(u, uid, kind, u->used.of[kind], 1, limit, e);
}
