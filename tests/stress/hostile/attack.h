/* tests/stress/hostile/attack.h - what the hostile programs share: how they live, raw connections.
 *
 *   PROGRAM SOCKET UID COUNT
 *
 * becomes that uid (-1: stays what it is), does its worst with COUNT of something, prints "held"
 * when that stands, and goes on with it until standard input ends. Then it prints what it counted,
 * as an object of JSON on one line, and exits with 0 where the daemon did to it what it should.
 * hostile.py runs them and looks after everybody else. */
#ifndef TESTS_STRESS_HOSTILE_ATTACK_H
#define TESTS_STRESS_HOSTILE_ATTACK_H

#include "ipc/codec.h"

#include <stdbool.h>
#include <stdint.h>

struct attack {
    const char *socket;
    unsigned count;
};

/* Exits with 2 on wrong usage. SIGPIPE is ignored. */
void attack_begin(struct attack *a, int argc, char **argv);
void attack_stands(void);         /* "held" */
bool attack_is_over(int wait_ms); /* whether standard input has ended, within that time */
/* Prints the counts, a JSON object; returns the exit status. */
int attack_report(bool right, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A connected stream socket, blocking. A full backlog is waited for; anything else ends the
 * program. */
int attack_connect(const struct attack *a);
/* All bytes, unless the daemon closes: then false. */
bool attack_send(int fd, const void *data, size_t bytes);
/* Packed messages; the buffer is emptied. */
bool attack_send_buffer(int fd, struct ipc_buffer *b);
/* Reads until the daemon closes, for at most timeout_ms. */
bool attack_is_cut(int fd, int timeout_ms);

/* Requests, appended to b. */
void attack_pack_hello(struct ipc_buffer *b, uint32_t id);
void attack_pack_generate(struct ipc_buffer *b, uint32_t id, uint32_t n_prompt, uint32_t n_predict,
                          uint32_t n);
void attack_pack_cancel(struct ipc_buffer *b, uint32_t id);

/* Messages that come in. */
struct attack_reader {
    int fd;
    uint8_t *data;
    size_t bytes, capacity, consumed;
};
void attack_reader_finish(struct attack_reader *r);
/* The next message, valid until the next call: 1; 0: the daemon closed. Nonsense, or no message
 * for a minute, end the program. */
int attack_read(struct attack_reader *r, struct ipc_message *ret);

#endif
