/* daemon/server.h - the loop: sockets, signals, timers, and the parts that it keeps running.
 *
 * The server owns engine, models, backends and every connection. It is created, run and destroyed
 * by the main thread, which is the loop thread. */
#ifndef DAEMON_SERVER_H
#define DAEMON_SERVER_H

#include "daemon/config.h"

struct server;

struct server_options {
    struct config *config;              /* taken over when server_create succeeds */
    const struct config_source *source; /* for reloads; outlives the server */
    int serve_fd, lifetime_fd;          /* or -1; taken over when server_create succeeds */
    bool listen;                        /* on config's socket, unless the manager passed some */
    bool temporary_cache;               /* nothing is kept in cache_dir */
};

/* 0, or -errno after what went wrong is in the log. */
int server_create(const struct server_options *options, struct server **ret);
/* Serves until a signal, a drain or the end of lifetime_fd. 0, or -errno. */
int server_run(struct server *s);
/* NULL is legal. False: tasks or loads run for ever. What is to be saved is saved, but all else
 * stays as it is since they use it, and the process can only end with _exit(): libuv waits for them
 * in exit().
 */
bool server_destroy(struct server *s);

#endif
