/* tests/unit/daemon/handlers_client.h - a client of the handlers without a connection, and a
 * service whose engine does what the test says. */
#ifndef TESTS_UNIT_DAEMON_HANDLERS_CLIENT_H
#define TESTS_UNIT_DAEMON_HANDLERS_CLIENT_H

#include "tests/unit/daemon/fakes.h"

/* Of the test that runs: between set_up() and tear_down(). */
extern const struct service_limits limits; /* the service begins with them */
extern struct service *service;
void set_up(void);
void tear_down(void); /* with nothing left open */

struct client {
    struct caller caller;
    struct ipc_buffer out;
    size_t seen;         /* bytes of out that next() has read */
    uint64_t held_bytes; /* of QUOTA_INPUT_BYTES, for what is handed in next; the test takes them */
    unsigned n_resumed, n_broken;
    struct ring_sizes opened;
    struct ipc_message message;
};

struct client *client_create(uid_t uid);
void client_destroy(struct client *c);

/* The next message that the client would have received; NULL when there is none. */
const struct ipc_message *next(struct client *c);
uint64_t error_code(const struct ipc_message *m); /* of a response; 0: it is a result */
bool finish_is(const struct ipc_message *m, const char *finish);

/* Gives the message in the buffer to the handlers, and frees it. */
void hand_in(struct client *c, struct ipc_buffer *b);
void send_generate(struct client *c, uint32_t id, const char *model, const char *prompt,
                   size_t prompt_bytes);
void send_load(struct client *c, uint32_t id, const char *model);
void send_cancel(struct client *c, uint32_t id);

#endif
