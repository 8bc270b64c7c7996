/* client/internal.h - what the files of libgqa share.
 *
 * A connection is a socket, perhaps rings in shared memory, an output buffer, an input buffer with
 * a scanner over it for each of the two, and the list of pending calls. Everything happens in the
 * thread that calls in; a reference count covers the one reentrancy that is allowed, gqa_close()
 * inside a callback. */
#ifndef CLIENT_INTERNAL_H
#define CLIENT_INTERNAL_H

#include <gqa/client.h>

#include "ipc/codec.h"
#include "ipc/extents.h"
#include "ipc/ring_map.h"

#include <sys/types.h>

#define CLIENT_TIMEOUT_MS      30000u
#define CLIENT_TIMEOUT_LONG_MS 600000u /* of text.* and model.*: they may wait for their turn */
#define CLIENT_CANCEL_GRACE_MS 5000u
#define CLIENT_PENDING_MAX     1024u
#define CLIENT_OUT_BYTES_MAX   (2u * PROTO_FRAME_BYTES_MAX) /* waiting to be sent */
#define CLIENT_OUT_BYTES_RESERVE                                    \
    (64u << 10) /* more of it, for small messages: cancelling works \
                 */
#define CLIENT_SMALL_BYTES 64u
#define CLIENT_DIRECT_BYTES_MIN \
    4096u /* messages that are sent from where they lie, if nothing waits */
#define CLIENT_READ_BYTES       (64u << 10) /* room made before each recv */
#define CLIENT_READS_MAX        64u /* in a row without looking at deadlines: 4 MiB and more */
#define CLIENT_IN_BYTES_KEPT    (1u << 20) /* a larger input buffer is freed when it is empty */
#define CLIENT_CHILD_EOF_MS     10000u     /* a spawned daemon's time to end by itself */
#define CLIENT_CHILD_SIGTERM_MS 5000u      /* and after SIGTERM */
#define CLIENT_AT_ONCE          0u /* as a deadline of connecting: not even a full backlog waits */

/* A call that has not ended. In the list of its connection, oldest first. */
struct client_pending {
    struct client_pending *next;
    uint32_t id;
    uint32_t next_seq; /* of its events, once one has come */
    bool has_seq;
    bool by_socket;    /* its request went that way, and so does its cancel */
    bool cancelled;    /* the deadline is then final and events do not move it */
    uint32_t total_ms; /* 0: no limit */
    uint64_t silence_us;
    uint64_t end_us;      /* CLOCK_MONOTONIC; UINT64_MAX: no limit */
    uint64_t deadline_us; /* the nearer of silence's and end_us */
    gqa_event_fn event;
    gqa_done_fn done;
    void *arg;
    char method[]; /* for messages */
};

/* Unread: [first, end); scanned without an end: [first, scanned). */
struct client_input {
    uint8_t *data;
    size_t first, scanned, end, capacity;
    struct ipc_scanner scanner;
};

#define CLIENT_RING_FDS 3u /* memfds of the rings and of the data area, the doorbell */

/* The rings of a connection, once they carry its messages. */
struct client_ring {
    struct ring_map map;
    struct ring_in in;
    struct ring_out out;
    struct client_input input;
    int doorbell;
    size_t batch;  /* bytes that the last record told to come behind it */
    bool is_full;  /* output waits for room in the submission ring */
    uint32_t told; /* what the daemon was last told that we wait for */

    /* The data area: its first part is ours to give out. In the second lie tensors that messages
     * name by handle, from the message's coming until they are given back. */
    struct extents mine;
    uint64_t borrowed[EXTENTS_MAX];
    size_t n_borrowed;
};

/* A daemon that gqa_spawn() started. pid 0: none. */
struct client_child {
    pid_t pid;
    int lifetime_fd; /* write end of the pipe whose end tells the daemon to end */
};

struct gqa {
    unsigned n_refs; /* the user's, and one per function on the stack that runs callbacks */
    int fd;          /* -1 once it is closed; a lost connection keeps its number */
    int lost;        /* 0, or the -errno with which it was lost */
    int write_error; /* 0, or the -errno of a failed send: input is still read to its end */
    bool dispatching;
    uint32_t timeout_ms;
    uint32_t next_id;

    struct ipc_buffer out; /* whole messages; the first out_sent bytes are gone */
    size_t out_sent;

    size_t out_by_socket; /* of what waits, the first so many bytes, while there are rings */

    struct client_input in; /* from the socket */
    struct client_ring *ring;
    bool awaits_ring; /* descriptors may come */
    int ring_fds[CLIENT_RING_FDS];
    size_t n_ring_fds;
    gqa_reconnect_fn ring_opened; /* of the ring.open that is under way */
    void *ring_opened_arg;
    uint32_t flags;
    uint32_t spin_us; /* as the options have it */
    uint32_t pace_us; /* how soon answers came of late, from the beginning of the first wait */
    bool has_asked;   /* since the last wait */
    uint64_t ring_in_bytes, ring_out_bytes; /* wanted; 0: the daemon's defaults */
    unsigned n_reads;                       /* since deadlines were last looked at */

    /* The frame whose callback runs, for gqa_call()'s copy of a result. */
    const uint8_t *frame;
    size_t frame_bytes;

    struct client_pending *pending;
    uint32_t n_pending;

    gqa_notify_fn notify;
    void *notify_arg;

    struct gqa_reply *hello;
    struct client_child child;

    /* The way back, as gqa_connect() was told it. */
    bool has_address; /* false: adopted or spawned */
    char *socket;     /* NULL: looked for anew */
    char *client;     /* NULL: libgqa's own name */
    struct {
        gqa_reconnect_fn done;
        void *arg;
        uint32_t timeout_ms;
    } reconnect; /* of the gqa_reconnect_async() that is under way */
};

struct gqa_params {
    struct ipc_buffer body; /* keys and values in turn */
    size_t n_keys;
    int error;
};

struct gqa_reply {
    struct ipc_message message; /* points into frame */
    uint8_t frame[];
};

static inline const struct ipc_value *client_to_ipc(const struct gqa_value *v)
{
    return (const struct ipc_value *)v;
}

static inline const struct gqa_value *client_from_ipc(const struct ipc_value *v)
{
    return (const struct gqa_value *)v;
}

/* error.c: fills *e (may be NULL) with a local failure and returns err, a -errno. */
int client_fail(struct gqa_error *e, int err, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* From a response's error map; -EPROTO where it is none. Returns 0. */
int client_error_read(const struct ipc_value *map, struct gqa_error *ret);

/* connection.c */
uint64_t client_now_us(void);
/* Takes fd on success; client (may be NULL) is copied. */
int client_create(int fd, uint32_t timeout_ms, const char *client, struct gqa **ret);
struct gqa *client_ref(struct gqa *g);
void client_unref(struct gqa *g);
/* Appends one whole message, in one piece or two (rest may be NULL); what cannot be sent now waits.
 * -EMSGSIZE, -ENOBUFS, -ENOMEM. */
int client_send(struct gqa *g, const struct ipc_buffer *head, const struct ipc_buffer *rest);
/* The same by the socket, whatever rings there are: behind what still waits for it. */
int client_send_by_socket(struct gqa *g, const struct ipc_buffer *message);
/* Ends all calls with status, once; runs callbacks. Returns status. */
int client_lose(struct gqa *g, int status, const char *why);
/* When gqa_process() is due by the calls' deadlines alone. */
uint64_t client_timeout_usec(const struct gqa *g);
/* A new socket lies under g->fd: forgets what the old one had sent and received. */
void client_reopen(struct gqa *g);

/* input.c */
void client_input_init(struct client_input *in);
void client_input_finish(struct client_input *in);
void client_input_reset(struct client_input *in); /* forgets what has come */
/* Makes CLIENT_READ_BYTES of room behind end. -ENOMEM. */
int client_input_room(struct client_input *in);
/* Dispatches every whole message. A callback may close the connection. -EPROTO, -ENOMEM. */
int client_input_dispatch(struct gqa *g, struct client_input *in);

/* ring.c. Asks for rings where the connection's flags want them. 1: done will be called, once, with
 * the result; 0: there is nothing to ask for; -errno. A lack of rings is a failure with GQA_F_SHM
 * only. */
int client_ring_open(struct gqa *g, uint32_t timeout_ms, gqa_reconnect_fn done, void *arg,
                     struct gqa_error *ret_error);
/* The same, and runs the loop until it is decided. */
int client_ring_open_and_wait(struct gqa *g, uint32_t timeout_ms, struct gqa_error *ret_error);
void client_ring_destroy(struct gqa *g);  /* none is legal */
void client_ring_drop_fds(struct gqa *g); /* those that came and were not used */
/* Puts what fits of the output and shows it to the daemon, unless all fits and more follows at
 * once. Bytes put, or -EPROTO. */
ssize_t client_ring_put(struct client_ring *r, const uint8_t *data, size_t bytes, bool more);
/* Takes what is there, a bounded amount, and dispatches it. 1: something; 0; -EPROTO, -ENOMEM. */
int client_ring_take(struct gqa *g);
/* Lets what handles in a message name be read in its place. The second: of a message that was
 * resolved before, as a copy. -EPROTO, -ENOMEM. */
int client_ring_resolve(struct client_ring *r, struct ipc_message *m);
int client_ring_keep(struct client_ring *r, struct ipc_message *m);
/* Nobody reads the last message any more. What cannot be sent now is sent with the next. */
void client_ring_give_back(struct gqa *g);
/* Before a sleep on the socket: asks for a message there. True: there is something already. */
bool client_ring_arm(struct client_ring *r);
void client_ring_disarm(struct client_ring *r); /* awake again */
/* gqa_wait() until then, after looking until an earlier time: 1, 0, -errno. */
int client_ring_wait(struct gqa *g, uint64_t look_until_us, uint64_t until_us);

/* wait.c: what is left until then. */
uint64_t client_left_until(uint64_t deadline_us);
/* poll() of the socket until then; UINT64_MAX: for ever; 0: just now. -errno. */
int client_poll(const struct gqa *g, short events, uint64_t until_us);

/* call.c. The caller's options in this library's size; those that an older caller does not know,
 * and all where given is NULL, are zero. -EINVAL. */
int client_call_options(const struct gqa_call_options *given, struct gqa_call_options *ret);
/* gqa_call_async() and gqa_call() for any method, the library's own (ring.*) among them. */
int client_start(struct gqa *g, const char *method, const struct gqa_params *params,
                 const struct gqa_call_options *options, uint32_t *ret_id);
bool client_is_own_method(const char *method);
/* client_dispatch, client_end_all and client_end run callbacks; client_dispatch returns 0
 * or -EPROTO. */
int client_dispatch(struct gqa *g, const uint8_t *frame, size_t bytes);
void client_end_all(struct gqa *g, int status, const char *why);
void client_unlink(struct gqa *g, struct client_pending *p);
/* The call has left the list; tells its owner and frees it. */
void client_end(struct client_pending *p, int status, const struct gqa_value *result,
                const struct gqa_error *error);
/* Tells the daemon to stop, by the way that the request went, so that it cannot come before it.
 * Where that cannot be sent the daemon's work is wasted, nothing else. */
int client_send_cancel(struct gqa *g, const struct client_pending *p);

/* deadline.c: the deadlines of a call at its start (its method is set), when an event has come, and
 * when it was cancelled. */
void client_deadline_start(const struct gqa *g, struct client_pending *p,
                           const struct gqa_call_options *o);
void client_deadline_heard(struct client_pending *p);
void client_deadline_cancelled(struct client_pending *p);
/* Ends calls whose deadline has passed; returns how many. Runs callbacks. */
unsigned client_expire(struct gqa *g);

/* connect.c. Finds and connects a socket; given NULL: as the environment says. CLIENT_AT_ONCE:
 * -EAGAIN where that would have to wait. */
int client_find_socket(const char *given, uint64_t deadline_us, int *ret_fd,
                       struct gqa_error *ret_error);
/* What is left until then, at least 1. */
uint32_t client_left_ms(uint64_t deadline_us);
/* Says hello on a fresh connection and keeps the answer. */
int client_hello(struct gqa *g, uint64_t deadline_us, struct gqa_error *ret_error);
/* Its two halves: the parameters (NULL: no memory), and the answer, which is taken in every case.
 */
struct gqa_params *client_hello_params(const struct gqa *g);
int client_hello_accept(struct gqa *g, struct gqa_reply *reply, struct gqa_error *ret_error);

/* value.c: copies the frame of a message that is being dispatched; 0, -ENOMEM or -EPROTO. */
int client_reply_create(struct gqa *g, const uint8_t *frame, size_t bytes, struct gqa_reply **ret);

/* params.c: NULL is -EINVAL, as with every setter. */
int client_params_handle(struct gqa_params *p, const char *key, const struct ipc_handle *handle);

/* spawn.c: ends a spawned daemon and waits for it; the connection is closed already. */
void client_child_finish(struct client_child *child);

#endif
