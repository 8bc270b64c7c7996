/* daemon/quota.h - what each uid holds of the daemon, and how much it may hold.
 *
 * One table for all quotas. Whoever hands something out takes it here first and gives it back when
 * it ends; a use that would pass a limit is refused with BUSY, a sentence that names the quota, the
 * limit and what is in use, and a hint when to try again. A limit that was lowered below what is in
 * use takes nothing away: it refuses more.
 *
 * Loop thread only, but for is_unread. */
#ifndef DAEMON_QUOTA_H
#define DAEMON_QUOTA_H

#include "ipc/codec.h"

#include <stdatomic.h>
#include <sys/queue.h>
#include <sys/types.h>

/* Q(KIND, name, retry_after_ms, what). The name is that of server.stats; the setting is
 * max_NAME_per_user. */
#define GQAD_QUOTAS(Q)                                                                   \
    Q(CONNECTIONS, connections, 1000, "connections")                                     \
    Q(FDS, fds, 1000, "file descriptors")                                                \
    Q(CALLS, calls, 100, "open calls")                                                   \
    Q(QUEUED_REQUESTS, queued_requests, 250, "requests whose prompt is not computed")    \
    Q(QUEUED_TOKENS, queued_tokens, 250, "tokens of prompts that are not computed")      \
    Q(SEQUENCES, sequences, 250, "sequences that wait or run")                           \
    Q(INPUT_BYTES, input_bytes, 250, "bytes of messages that come in or wait")           \
    Q(OUTPUT_BYTES, output_bytes, 250, "bytes of answers that its programs do not read") \
    Q(RING_BYTES, ring_bytes, 1000, "bytes of shared memory")

enum quota_kind {
#define Q(KIND, name, retry, what) QUOTA_##KIND,
    GQAD_QUOTAS(Q)
#undef Q
        QUOTA_COUNT
};

/* Amounts, one per quota; a limit or a use. */
struct quota_amounts {
    uint64_t of[QUOTA_COUNT];
};

struct quota_user {
    LIST_ENTRY(quota_user) entry;
    uid_t uid;
    struct quota_amounts used;
    uint64_t n_refused; /* since it came */
    /* Its programs leave as many answers unread as they may: what would make more of them rests.
     * Any thread that knows of something that the uid holds. */
    atomic_bool is_unread;
};

struct quota_table {
    LIST_HEAD(, quota_user) users; /* those that hold something */
    struct quota_amounts limits;
    void (*relieved)(void *arg); /* some uid's is_unread was cleared; or NULL */
    void *relieved_arg;
};

const char *quota_name(enum quota_kind kind);

void quota_init(struct quota_table *t);
void quota_finish(struct quota_table *t);

/* All or nothing. -EBUSY and e (BUSY), or -ENOMEM and e. */
int quota_take(struct quota_table *t, uid_t uid, const struct quota_amounts *wanted,
               struct ipc_error *e);
/* No more than was taken; *held becomes zero. */
void quota_give(struct quota_table *t, uid_t uid, struct quota_amounts *held);
/* Gives one quota of *held back. */
void quota_give_one(struct quota_table *t, uid_t uid, struct quota_amounts *held,
                    enum quota_kind kind);

/* What is in use of a quota was `before` and is `now`, which nobody can refuse; the uid holds
 * something else already. See quota_check. */
void quota_change(struct quota_table *t, uid_t uid, enum quota_kind kind, uint64_t before,
                  uint64_t now);
/* Whether there is room at all: -EBUSY and e where the limit is reached. */
int quota_check(struct quota_table *t, uid_t uid, enum quota_kind kind, struct ipc_error *e);

/* What the uid holds, or NULL: nothing. */
struct quota_user *quota_user(struct quota_table *t, uid_t uid);

#endif
