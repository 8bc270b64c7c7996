/* Requests for tests: packed with the product's packers, scanned, parsed and decoded as the daemon
 * does it. */
#ifndef TESTS_IPC_REQUEST_H
#define TESTS_IPC_REQUEST_H

#include "ipc/codec.h"

/* A message in memory of exactly its size, so that a sanitizer sees a byte too far. */
struct test_message {
    uint8_t *frame;
    struct ipc_message message;
};

/* Takes the buffer's bytes, expects one whole message, parses it and empties the buffer. */
struct test_message test_parse(struct ipc_buffer *b);
void test_message_finish(struct test_message *t);

/* A params map of n_pairs, packed by the caller into body, is decoded for the method. Empties body.
 * Returns what ipc_params_decode does. The message must be finished when the call succeeded; where
 * ret_message is NULL that is done here. */
int test_decode(enum proto_method method, size_t n_pairs, struct ipc_buffer *body,
                union proto_params *ret, struct ipc_error *e, struct test_message *ret_message);

#endif
