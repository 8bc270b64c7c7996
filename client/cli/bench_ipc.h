/* client/cli/bench_ipc.h - the rows of gqa bench ipc. */
#ifndef CLI_BENCH_IPC_H
#define CLI_BENCH_IPC_H

#include "client/cli/cli.h"

#define BENCH_IPC_PAUSE_US 500u /* between two calls, after which everybody sleeps */

/* How a message travels, and how both ends wait. */
struct bench_ipc_way {
    const char *transport, *wait;
    const char *bare;  /* the transport of the bare waking that a call is compared with, or NULL */
    uint32_t flags;    /* of the connection */
    uint32_t spin_us;  /* the client's; as in struct gqa_connect_options */
    uint32_t pause_us; /* between calls, so that the daemon sleeps */
    bool carries;      /* payloads, too */
};

void bench_ipc_pause(uint32_t us);
/* Adds a row; us (n) is sorted. */
void bench_ipc_row(json_t *rows, const char *test, const struct bench_ipc_way *w, size_t bytes,
                   double *us, size_t n);

/* bench_bare.c: what no transport can undercut here. Each adds rows; they print and return an exit
 * code. */
int bench_bare_copy(json_t *rows);
/* count times there and back, by each of the two means, without and with a pause before it. */
int bench_bare_wakings(size_t count, json_t *rows);
/* The p50 of the bare waking with the way's pause; 0: the way has none. */
double bench_bare_of(const json_t *rows, const struct bench_ipc_way *w);

#endif
