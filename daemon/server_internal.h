/* daemon/server_internal.h - what the files of the server share. */
#ifndef DAEMON_SERVER_INTERNAL_H
#define DAEMON_SERVER_INTERNAL_H

#include "daemon/log.h"
#include "daemon/peer.h"
#include "daemon/quota.h"
#include "daemon/server.h"

#include <pthread.h>
#include <sys/stat.h>
#include <uv.h>

#define SERVER_LISTENERS_MAX 8
#define SERVER_BACKLOG       1024
#define SERVER_TICK_MS       1000u
#define SERVER_END_MS        1000u  /* for the last answers to leave */
#define SERVER_CUT_MS        5000u  /* for cancelled requests to end */
#define SERVER_LOADS_MS      10000u /* for loads to be given up: REGISTRY_END_S */
#define SERVER_TASKS_MS      10000u /* for tasks that run, when all else has ended */
#define SERVER_DISK_MS       10000u /* for the cache to save what it was saving: KV_END_S */

enum server_state {
    SERVER_STARTING, /* preloading; connections are served already */
    SERVER_SERVING,
    SERVER_DRAINING, /* no new work; waits for the open calls */
    SERVER_CUTTING,  /* the time is up: they are being cancelled */
    SERVER_ENDING,   /* the last answers leave */
    SERVER_STOPPED
};

struct listener {
    struct server *server;
    uv_poll_t poll;
    int fd; /* -1: closed */
    bool rests;
};

/* What computes: made before the service, destroyed after it. */
struct parts {
    struct pool *pool;
    struct io *io;
    struct io *kv_io;              /* the KV store's, or NULL */
    char *kv_folder;               /* the same */
    char *digests;                 /* file that remembers what models contain, or NULL */
    struct weights_cache *weights; /* packed weights, or NULL */
    struct backend_catalogue *catalogue;
    struct registry *registry;
    struct engine *engine;
};

/* Turns of the loop, measured. */
struct turns {
    uint64_t count, ns_busy, ns_max;
    uint64_t cpu_ns_max; /* of the loop's thread: without the time in which it was not run */
    uint64_t ended_ns;   /* the last one */
    uint64_t slept_ns;   /* as libuv had counted then */
    uint64_t cpu_ns;     /* of the thread, when it was last read, */
    uint64_t unread_ns;  /* and how long turns have taken since */
};

/* A task that was handed to libuv. */
struct task_thread {
    uv_work_t request;
    struct server *server;
    struct task *task; /* NULL: none */
};

struct server {
    struct peer_host peers; /* on_closed finds the server through it */
    struct config *config;
    const struct config_source *source;
    uv_loop_t loop;
    enum server_state state;
    struct parts parts;
    struct service *service;
    bool in_memory; /* nothing is kept in cache_dir */

    /* Sockets. */
    struct listener listeners[SERVER_LISTENERS_MAX];
    uint32_t n_listeners;
    struct peer_alarm rested; /* when those that rest are to be polled again */
    bool owns_socket;         /* we made it: socket_stat tells whether the file is still ours */
    struct stat socket_stat;
    int reserve_fd;           /* given up to refuse a connection when descriptors have run out */
    struct log_pace fd_lines; /* of the log, about that */
    struct quota_table quotas;
    struct penalty_table penalties;
    gid_t admin_gid;
    bool has_admin_gid;
    bool only_client; /* serves one passed connection: ends with it */

    /* Handles of the loop. */
    uv_async_t engine_news, task_news;
    uv_prepare_t before_sleep;
    uv_timer_t tick, deadline;
    uv_timer_t last; /* when the other handles are closed */
    uv_signal_t on_hup, on_term, on_int;
    uv_poll_t lifetime;
    int lifetime_fd;
    uint32_t n_signals; /* that asked for the end */
    struct turns turns;
    uint64_t watchdog_usec, watchdog_sent_ns;
    uint32_t n_preloading;
    uint32_t n_cores; /* that this process may use */

    struct task_queue tasks; /* that wait for a thread */
    struct task_thread task_threads[TASK_THREADS];

    /* Tasks posted by other threads. */
    pthread_mutex_t posted_lock;
    struct task_list posted;
};

static inline struct server *server_of_peers(struct peer_host *host)
{
    return (struct server *)((char *)host - offsetof(struct server, peers));
}

/* server_parts.c */
int parts_create(struct parts *p, const struct config *c, bool in_memory, void (*notify)(void *),
                 void *notify_arg);
/* Ends the threads that report into the service. The engine stays, with what it has lent to tasks.
 * False: a model's disk does not answer, and what loads it uses all the parts. */
bool parts_stop(struct parts *p);
/* No task is left. May post the answer to a purge. */
void parts_destroy_engine(struct parts *p);
void parts_destroy(struct parts *p);

/* server_places.c */
int places_create(const struct server *s);
int places_make_private(const char *path);             /* a folder of mode 0700, with its parents */
void places_tell_missing(const struct config *c);      /* folders of models, to the log */
uint64_t places_store_bytes(const struct config *c);   /* the bound of the KV store */
uint64_t places_weights_bytes(const struct config *c); /* of packed weights; 0: none */

/* server_listen.c */
int listen_open(struct server *s, const struct server_options *options);
void listen_close(struct server *s);        /* also removes our own socket's file */
void listen_rested(struct peer_alarm *a);   /* of server->rested */
int listen_adopt(struct server *s, int fd); /* a connection that is already open */

/* server_tasks.c */
int tasks_run(void *data, struct task *t);
bool tasks_recall(void *data, struct task *t);
void tasks_post(void *data, struct task *t);
void tasks_deliver(struct server *s);
void tasks_give_up(struct server *s); /* those that nobody waits for any more */
/* Runs the loop, whose handles are being closed, until no task runs. False: SERVER_TASKS_MS have
 * gone by, and some do (it is logged). */
bool tasks_end(struct server *s);

/* server_end.c */
void server_drain(struct server *s, uint32_t timeout_ms);
void server_check_end(struct server *s);

/* server_reload.c */
int server_reload(struct server *s, struct config_error *err);
int server_apply_live(struct server *s); /* hands on what may change while requests run */

#endif
