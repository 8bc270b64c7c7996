/* daemon/handlers.h - what the daemon does with a message: decode, check, answer.
 *
 * The service is the daemon as requests see it: engine, models, backends and the calls that are
 * open. A caller is one client; the transport (peer.c) embeds it, hands messages in and carries
 * bytes out. A call is one request from its arrival to its answer; it outlives its caller where
 * the engine or the task pool still works on it.
 *
 * Everything here belongs to the loop thread, except service_host.post. Nothing here knows of the
 * loop: what it needs of it comes as functions in service_host and caller_sink. */
#ifndef DAEMON_HANDLERS_H
#define DAEMON_HANDLERS_H

#include "daemon/backend/backend.h"
#include "daemon/model/registry.h"
#include "daemon/penalty.h"
#include "daemon/quota.h"
#include "daemon/sched/engine.h"
#include "daemon/task_queue.h"
#include "ipc/codec.h"
#include "ipc/ring_map.h"

#include <sys/queue.h>
#include <sys/types.h>

/* A message of more values than that, or whose handles name more bytes, is taken apart and freed on
 * the task pool, and a longer text encoded there, so that the loop does not stall. How long a
 * message is does not matter: texts are not looked into. What is left to the loop of the longest
 * message is to hold a million token ids against the vocabulary, and one copy of them. */
#define SERVICE_INLINE_ELEMENTS     4096u
#define SERVICE_INLINE_HANDLE_BYTES (256u << 10)
#define SERVICE_INLINE_TEXT_BYTES   (4u << 10)
#define SERVICE_INLINE_TOKENS       4096u

struct service;
struct caller;
struct call;

/* For server.stats. */
struct service_host_facts {
    uint32_t n_connections;
    uint64_t n_turns;         /* of the loop */
    uint64_t turn_ns_max;     /* the longest time that a turn has kept the loop from its clients */
    uint64_t turn_cpu_ns_max; /* the most that a turn has computed */
    uint64_t turn_ns_busy;    /* all turns together */
};

struct service_host {
    void *data;
    /* 0: work, then done, will be called, or done alone (is_owed); -ENOMEM. */
    int (*run)(void *data, struct task *t);
    /* Takes back a task that waits to be run: nothing of it will be called. False, and nothing has
     * happened: it runs already, or is owed, or was never given to run. */
    bool (*recall)(void *data, struct task *t);
    /* From any thread: done will be called. */
    void (*post)(void *data, struct task *t);
    /* Begins the daemon's end; answers come through service_drained. */
    void (*drain)(void *data, uint32_t timeout_ms);
    int (*reload)(void *data, struct ipc_error *e);
    void (*facts)(void *data, struct service_host_facts *ret);
};

/* What a new configuration may change while requests run. */
struct service_limits {
    bool allow_autoload;             /* requests load a model that is available */
    const char *const *allow_models; /* patterns of the names that may; none: all. Copied. */
    size_t n_allow_models;
    uint32_t calls_per_connection;
};

struct service_options {
    struct engine *engine;
    struct registry *registry;
    struct backend_catalogue *catalogue;
    struct quota_table *quotas; /* outlives the service, and so do penalties */
    struct penalty_table *penalties;
    const char *realm; /* whose cached prompts all users share; "": each has its own. Copied. */
    struct service_host host;
    struct service_limits limits;
};

int service_create(const struct service_options *options, struct service **ret);
/* free() of memory of about so many bytes, by the task pool where it may take long. NULL is legal.
 */
void service_free(struct service *s, void *memory, size_t bytes);
/* The same of a message's frame, and of what parsing it made, if m is not NULL (always by the pool;
 * *m is taken). The uid holds so many bytes of QUOTA_INPUT_BYTES for them, and gets them back. */
void service_free_message(struct service *s, uid_t uid, struct ipc_message *m, void *memory,
                          size_t bytes, uint64_t held_bytes);
/* As service_host.run: for what the transport has to do off the loop. */
int service_run(struct service *s, struct task *t);
/* The engine is about to end: nothing is handed to it from now on. */
void service_stop(struct service *s);
/* All callers must be finished and all tasks and events delivered. NULL is legal. */
void service_destroy(struct service *s);
int service_set_limits(struct service *s, const struct service_limits *limits);

/* Delivers what the engine has published; called when its notify has woken the loop. */
void service_pump(struct service *s);

/* Loads a model before anybody asks for it; failure is logged. done may be NULL. */
void service_preload(struct service *s, const char *name, void (*done)(void *arg, int result),
                     void *arg);

/* No new work from now on: it is answered with DRAINING. */
void service_drain(struct service *s);
/* Calls that are open, those of server.drain not counted. */
uint32_t service_n_open(const struct service *s);
/* The end of a drain: answers the calls that wait for it. */
void service_drained(struct service *s);

/* How a caller's bytes leave; all are called on the loop, never from inside caller_finish. */
struct caller_sink {
    void (*written)(struct caller *c); /* a whole message was appended to out */
    void (*resumed)(struct caller *c); /* c->parsing ended: the next message may be handed in */
    void (*broken)(struct caller *c);  /* close the connection when out is delivered */
    /* Makes rings of these sizes, which the message written next announces: it takes the
     * descriptors along, and what comes behind it travels in them. -errno and e. */
    int (*open_ring)(struct caller *c, const struct ring_sizes *sizes, struct ipc_error *e);
    /* The message written next is the last that travels in the rings. -ENOENT and e. */
    int (*close_ring)(struct caller *c, struct ipc_error *e);
};

struct caller {
    struct service *service;
    const struct caller_sink *sink;
    struct ipc_buffer *out;
    uid_t uid;
    struct penalty *penalty; /* its uid's, the transport's reference; NULL: strikes do not count */
    bool admin;
    bool parsing;   /* a long message is on the task pool: order demands to wait for it */
    bool congested; /* set by the transport: out is longer than it likes */
    uint32_t n_calls;
    uint64_t import;   /* the engine's number of the import that goes on by kv.import, or 0 */
    bool importing;    /* a piece of it is being taken in */
    struct area *area; /* what handles name, the transport's; NULL: there are no rings */
    LIST_HEAD(, call) calls;
};

void caller_init(struct caller *c, struct service *s, const struct caller_sink *sink,
                 struct ipc_buffer *out, uid_t uid, bool admin);
/* The client went away: cancels its calls and forgets them. */
void caller_finish(struct caller *c);

/* One whole message, of so many values as the scanner counted. Takes over frame (malloc'ed) in
 * every case, and the bytes that are held of QUOTA_INPUT_BYTES for it. Answers faults of the
 * message itself; where it cannot be repaired sink->broken follows. Not to be called while
 * c->parsing. */
void caller_message(struct caller *c, uint8_t *frame, size_t bytes, uint32_t n_elements,
                    uint64_t held_bytes);
/* Refuses a message by its first bytes (IPC_HEAD_BYTES at most): answers e to the request that it
 * is. Else -EPROTO: it is none, and e was sent as a notification. */
int caller_refuse(struct caller *c, const uint8_t *head, size_t bytes, const struct ipc_error *e);

/* Cancels all calls of the caller, as if it had asked for it; used when a drain's time is up. */
void caller_cut(struct caller *c);

/* Ends the calls that have waited timeout_ms for the client to read, with DEADLINE. Returns how
 * many they are. */
unsigned caller_end_paused(struct caller *c, uint32_t timeout_ms);

/* out has become short again: what was held back counts as delivered. */
void caller_uncongested(struct caller *c);

/* Notifications that need no call: "gqa.draining" [], "gqa.error" [{code, name, message}]. */
void caller_notify_draining(struct caller *c);
void caller_notify_error(struct caller *c, const struct ipc_error *e);
/* The latter alone, for connections that never become callers. */
void pack_error_notification(struct ipc_buffer *b, const struct ipc_error *e);

#endif
