/* tests/unit/client/peer.h - the daemon's end of a socket pair, played by a forked child.
 *
 * A script is a function that the child runs with its end of the pair; it reads requests and writes
 * whatever it likes, then exits. Its exit status tells whether it met what it expected. */
#ifndef TEST_CLIENT_PEER_H
#define TEST_CLIENT_PEER_H

#include <gqa/client.h>

#include "ipc/codec.h"

#include <sys/types.h>

/* A request as the peer sees it. method is terminated. */
struct peer_request {
    bool is_cancel; /* "$cancel": id is the call's */
    uint32_t id;
    char method[64];
    struct ipc_message message;
    uint8_t *frame;
};

/* Runs in the child; never returns a request that is not well-formed, but exits with status 2. */
void peer_read(int fd, struct peer_request *ret);
void peer_request_finish(struct peer_request *r);
/* Writes all bytes; exits with 0 when the client is gone. */
void peer_write(int fd, const void *data, size_t bytes);
/* Writes a packed message and empties the buffer. */
void peer_send(int fd, struct ipc_buffer *b);
/* Answers hello with that protocol version. */
void peer_hello(int fd, uint32_t version);
/* Expects a request and returns its id. */
uint32_t peer_expect(int fd, const char *method);
/* An answer with an empty map. */
void peer_answer(int fd, uint32_t id);
/* A step of a generation: {text, tokens: [token]}. */
void peer_step(int fd, uint32_t id, uint32_t seq, const char *text, int32_t token);
/* The end of a generation: {finish}. */
void peer_end(int fd, uint32_t id, const char *finish);

typedef void (*peer_script)(int fd, void *arg);

/* Forks the script; *ret_fd is the client's end. */
pid_t peer_start(peer_script script, void *arg, int *ret_fd);
/* Waits for the script; its exit status, or 128 + signal. */
int peer_finish(pid_t pid);

/* A connection to a script that begins with hello: script runs after it. */
struct gqa *peer_connect(peer_script script, void *arg, pid_t *ret_pid);

#endif
