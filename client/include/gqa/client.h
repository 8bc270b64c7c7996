/* gqa/client.h - libgqa: talks to gqad, the inference daemon.
 *
 * The shape is sd-bus's. A connection (struct gqa) has one file descriptor that never changes;
 * calls are started with callbacks, and gqa_process() moves them on. A program with a loop of its
 * own polls gqa_fd() for gqa_events() until gqa_timeout_usec() and then calls gqa_process();
 * everybody else uses gqa_wait(), or the synchronous helpers at the end of this header.
 *
 *   struct gqa *g;
 *   if (gqa_connect(NULL, &g, &error) < 0) ...
 *   gqa_params_create(&params);
 *   gqa_params_str(params, "model", "tiny");
 *   gqa_params_str(params, "prompt", "Once upon a time");
 *   gqa_generate(g, params, NULL, print_text, NULL, NULL, &error);
 *
 * Promises:
 * - Functions return 0 (or a documented number) or -errno; outputs are untouched on failure. A
 *   struct gqa_error, where one is asked for, tells the reason in words.
 * - Every wait has a deadline. A daemon that dies, in whatever state, ends every pending call once,
 *   with -ECONNRESET. A call is never sent a second time: nothing is generated twice unasked. A
 * lost connection comes back only when the program says so, by gqa_reconnect().
 * - No global state, no signals raised (nor handlers installed), no threads, nothing printed.
 * - Structs that begin with struct_size may grow: set it to sizeof, zero the rest. NULL options
 *   mean the defaults.
 *
 * Threads: a connection, with its params and values, belongs to one thread at a time: no two
 * threads may be inside functions of it at once, gqa_wait() included, but it may pass from thread
 * to thread (by a lock, or by being handed over). Callbacks run in the thread that calls
 * gqa_process(), inside that call or inside a synchronous helper; they may start and cancel calls
 * and close the connection, and nothing else that waits. To wake a thread out of gqa_wait() use a
 * descriptor of your own and poll() for both. Different connections are independent; connections
 * are cheap: one for each thread is the usual way. Params and replies belong to no connection:
 * build and read them anywhere, one thread at a time. After fork() only one of the two processes
 * may go on with a connection; the other only closes the descriptor. gqa_version() and
 * gqa_strcode() may be called from anywhere. No function is async-signal-safe.
 *
 * C11 and C++11. Link with -lgqa (pkg-config libgqa). */
#ifndef GQA_CLIENT_H
#define GQA_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

struct gqa;        /* a connection */
struct gqa_params; /* the parameters of a call, being built */
struct gqa_value;  /* a value inside a message, read-only */
struct gqa_reply;  /* a result that outlives its call */

/* "0.1.0", of the library at run time. Static. */
const char *gqa_version(void);

/* ---- errors ------------------------------------------------------------------------------ */

/* Why a call failed. code: the daemon's own error code (GQA_E_...), or 0 when the daemon did not
 * say it: the connection broke, a deadline passed, a parameter could not be packed. */
struct gqa_error {
    int32_t code;
    uint32_t retry_after_ms; /* BUSY: when to try again; 0: no hint */
    char name[32];           /* "INVALID_PARAMS"; for code 0 the errno's: "ECONNRESET" */
    char message[480];       /* one sentence without a line break */
};

/* The daemon's error codes, and the -errno that functions return for them. */
enum gqa_error_code {
    GQA_E_INVALID_REQUEST = 1,  /* -EINVAL */
    GQA_E_METHOD_NOT_FOUND = 2, /* -EOPNOTSUPP */
    GQA_E_INVALID_PARAMS = 3,   /* -EINVAL */
    GQA_E_ACCESS_DENIED = 4,    /* -EACCES */
    GQA_E_VERSION = 5,          /* -EPROTONOSUPPORT */
    GQA_E_NOT_FOUND = 6,        /* -ENOENT */
    GQA_E_EXISTS = 7,           /* -EEXIST */
    GQA_E_MODEL_REFUSED = 8,    /* -ENOEXEC */
    GQA_E_CONTEXT_EXCEEDED = 9, /* -E2BIG */
    GQA_E_BUSY = 10,            /* -EBUSY */
    GQA_E_CANCELLED = 11,       /* -ECANCELED */
    GQA_E_DEADLINE = 12,        /* -ETIMEDOUT */
    GQA_E_DRAINING = 13,        /* -ESHUTDOWN */
    GQA_E_NO_MEMORY = 14,       /* -ENOMEM */
    GQA_E_BACKEND = 15,         /* -ENODEV */
    GQA_E_IO = 16,              /* -EIO */
    GQA_E_INTERNAL = 17         /* -EREMOTEIO, as for any code that is newer than this library */
};

/* The -errno for a daemon's error code, as in the list above. */
int gqa_strcode(int32_t code);

/* ---- connecting -------------------------------------------------------------------------- */

#define GQA_CONNECT_FD 1u /* flags: use fd, an already connected stream socket */

/* flags, for gqa_spawn() as well: messages travel in rings of shared memory instead of the socket;
 * everything in this header works as before, and what is said of gqa_fd() too. A call then costs no
 * system call while the daemon looks at its rings, and tensors are not copied through a socket.
 * GQA_F_SHM: or else connecting fails (-EOPNOTSUPP: the daemon has none; -EBUSY: the user has all
 * the shared memory that it may, max_ring_bytes_per_user); GQA_F_SHM_AUTO: where that is possible.
 * With neither the environment's GQA_TRANSPORT decides: socket, ring or auto; else the socket.
 */
#define GQA_F_SHM      0x100u
#define GQA_F_SHM_AUTO 0x200u

#define GQA_SPIN_NEVER 0xffffffffu /* spin_us: every wait sleeps at once */

struct gqa_connect_options {
    size_t struct_size;
    /* Path of the socket. NULL: the environment's GQA_SOCKET; without it the first that answers of
     * $XDG_RUNTIME_DIR/gqad.sock and /run/gqad/gqad.sock. */
    const char *socket;
    const char *client; /* name and version of the program, for the daemon's logs; NULL: libgqa's */
    uint32_t flags;
    int fd;              /* with GQA_CONNECT_FD */
    uint32_t timeout_ms; /* to connect, and the default of quick calls; 0: 30 s */
    /* For so long gqa_wait() and the synchronous helpers look for what may come before they sleep,
     * which takes a core's time and spares that of being woken. 0: as the environment's GQA_SPIN_US
     * says (0 there: never); without it only the first wait after a request does, for twice as long
     * as answers of late took and at most 100 us, and only while they take less than 150. */
    uint32_t spin_us;
    /* Shared memory for what the program gives and what the daemon gives; 0: 1 and 16 MiB. */
    uint64_t ring_in_bytes, ring_out_bytes;
};

/* Connects and says hello; blocks for at most timeout_ms.
 * On success *ret is the caller's, to be given to gqa_close(), and owns the fd. On failure an fd
 * passed with GQA_CONNECT_FD is still the caller's (it may have become non-blocking).
 * ret_error may be NULL; it is filled on failure only.
 * -ENOENT, -ECONNREFUSED: nobody serves there; -EACCES; -EPROTONOSUPPORT: no common version of the
 * protocol; -ETIMEDOUT; -ECONNRESET: the daemon went away; -EPROTO: it talked nonsense; -EINVAL,
 * -ENAMETOOLONG: of the options; -ENOMEM and the like. */
int gqa_connect(const struct gqa_connect_options *options, struct gqa **ret,
                struct gqa_error *ret_error);

#define GQA_SPAWN_QUIET 1u /* flags: the daemon's messages go to /dev/null, not to our stderr */

struct gqa_spawn_options {
    size_t struct_size;
    /* Path of gqad. NULL: the environment's GQAD_PATH; else gqad beside the running program or in
     * ../daemon of its folder; else gqad in PATH. */
    const char *program;
    const char *cache_dir;  /* kept afterwards; NULL: a temporary one, which the daemon removes */
    const char *models_dir; /* or NULL */
    /* More arguments for gqad, a NULL-terminated list, or NULL. */
    const char *const *args;
    const char *client;
    uint32_t flags;
    uint32_t timeout_ms; /* until it serves, and the default of quick calls; 0: 30 s */
    /* As in struct gqa_connect_options. */
    uint32_t spin_us;
    uint64_t ring_in_bytes, ring_out_bytes;
};

/* Starts a private daemon and connects to it by a socket pair; no path is involved and nobody else
 * can reach it. It lives as long as the connection: gqa_close() ends it, and so does the death of
 * this process, by the end of a pipe that it watches. It runs in a process group of its own, so
 * that a terminal's Ctrl-C reaches only the caller.
 * Waits for the child with its pid only; a program that reaps all its children itself does no harm.
 * Returns as gqa_connect(); -ENOENT: no gqad was found; -ECHILD: it ended before it served. */
int gqa_spawn(const struct gqa_spawn_options *options, struct gqa **ret,
              struct gqa_error *ret_error);

/* The process id of the daemon that gqa_spawn() started for this connection; 0: none, or it has
 * been waited for. For measuring and for signals; waiting for it is the library's. */
int gqa_spawned_pid(const struct gqa *g);

/* Ends all pending calls (their done callbacks are called with -ECANCELED) and closes. For a
 * spawned daemon it also waits until that has ended: asked by the pipe, after 10 s by SIGTERM,
 * after 15 s by SIGKILL. May be called from a callback; g is then gone when gqa_process() returns.
 * NULL is legal. Always returns NULL. */
struct gqa *gqa_close(struct gqa *g);

/* The daemon's answer to hello: {server, version, protocol, features, limits, uid, realm, admin}.
 * Lives as long as g, or until the next gqa_reconnect(). */
const struct gqa_value *gqa_server_info(const struct gqa *g);

/* False once the connection is lost, which gqa_process() has told by a negative result. */
bool gqa_is_connected(const struct gqa *g);

/* Whether its messages travel in rings. */
bool gqa_has_ring(const struct gqa *g);

/* Opens a lost connection again: looks for the socket as gqa_connect() did (GQA_SOCKET and all,
 * where the options named none) and says hello. What was pending has ended with the loss and is not
 * sent again. The settings, the notify callback and the number that gqa_fd() returns stay; what
 * lies behind that number is another socket, so stop watching it before and begin again after
 * (epoll forgets the old one by itself). Blocks for at most timeout_ms (0: the connection's own)
 * and tries again, after 10 ms and then longer, while nobody serves there: a daemon that is being
 * restarted is waited for. 0; the connection is as new. Otherwise it stays lost, and this may be
 * called again: -EISCONN: it is not lost; -EOPNOTSUPP: it has no address (GQA_CONNECT_FD,
 * gqa_spawn()); -EDEADLK: inside a callback; -ENOTCONN: it was closed; else as gqa_connect(). */
int gqa_reconnect(struct gqa *g, uint32_t timeout_ms, struct gqa_error *ret_error);

/* The end of gqa_reconnect_async(); called exactly once where that returned 0. status 0: the
 * daemon has answered hello; otherwise -errno, and error is set and lives until it returns. */
typedef void (*gqa_reconnect_fn)(void *arg, int status, const struct gqa_error *error);

/* The same for a loop: one attempt that never blocks. On 0 the socket is open, hello is on its way
 * and has timeout_ms (0: the connection's own) to be answered; go on with gqa_process(). Calls may
 * be started at once: they go behind hello and end with it where it fails.
 * Negative as gqa_reconnect(), without waiting: -ENOENT, -ECONNREFUSED: nobody serves there;
 * -EAGAIN: the daemon's backlog is full; try again later, by a timer of the loop. */
int gqa_reconnect_async(struct gqa *g, uint32_t timeout_ms, gqa_reconnect_fn done, void *arg,
                        struct gqa_error *ret_error);

/* ---- the loop ---------------------------------------------------------------------------- */

/* The descriptor to poll; the same from connect to close. Not to be read, written or closed. */
int gqa_fd(const struct gqa *g);

/* What to poll it for now: POLLIN, and POLLOUT while something waits to be sent. */
int gqa_events(const struct gqa *g);

/* When gqa_process() is due even if the descriptor stays quiet: microseconds on CLOCK_MONOTONIC;
 * 0: at once; UINT64_MAX: never. */
uint64_t gqa_timeout_usec(const struct gqa *g);

/* Sends, receives and dispatches what is there, without blocking, a bounded amount per call; ends
 * calls whose deadline has passed. Callbacks run inside it.
 * Returns 1 when something was done, 0 when there was nothing to do. -ECONNRESET (the daemon went
 * away), -EPROTO (it broke the protocol) or -ENOMEM, after all pending calls were ended with the
 * same; -ENOTCONN from then on; -EDEADLK inside a callback. After a negative result stop watching
 * the descriptor, for it would be ready for ever, and gqa_reconnect() or gqa_close(). */
int gqa_process(struct gqa *g);

/* Blocks until gqa_process() has something to do, for at most timeout_usec microseconds
 * (UINT64_MAX: until the nearest deadline of a call; with no call pending that may be for ever).
 * Returns 1 when there is something, 0 at the timeout, -EINTR for a signal, -ENOTCONN, -EDEADLK. */
int gqa_wait(struct gqa *g, uint64_t timeout_usec);

/* ---- calls ------------------------------------------------------------------------------- */

/* A step of a streaming call, in order. The value lives until the callback returns. */
typedef void (*gqa_event_fn)(void *arg, uint32_t id, const struct gqa_value *event);

/* The end of a call; called exactly once per started call, and no event comes after it.
 * status 0: result is set and error is NULL. Otherwise status is -errno, error is set and result is
 * NULL. Both live until the callback returns. */
typedef void (*gqa_done_fn)(void *arg, uint32_t id, int status, const struct gqa_value *result,
                            const struct gqa_error *error);

struct gqa_call_options {
    size_t struct_size;
    /* The longest silence: the call ends with -ETIMEDOUT when neither its answer nor an event has
     * come for so long, and the daemon is told to stop. 0: the connection's timeout_ms; for text.*
     * and model.* methods, which may have to wait for their turn, ten minutes. */
    uint32_t timeout_ms;
    gqa_event_fn event; /* or NULL */
    gqa_done_fn done;   /* or NULL */
    void *arg;          /* first argument of both */
    uint32_t total_ms;  /* the same for the whole call, however much is heard of it; 0: no limit */
};

/* Starts a call and tries to send it. Never blocks, never calls back. params may be NULL (none) and
 * stay the caller's; they are free to be used again at once. *ret_id (ret_id may be NULL) names the
 * call until its done callback returns.
 * On failure nothing was sent and done will not be called: the params' own error; -EMSGSIZE: more
 * than one message of the protocol holds; -ENOBUFS: too much is waiting to be sent, or too many
 * calls are pending; -ENOTCONN; -ENOMEM; -EINVAL. A connection that breaks while sending is told by
 * done, not here. The methods ring.* are the library's own: -EINVAL; see GQA_F_SHM. */
int gqa_call_async(struct gqa *g, const char *method, const struct gqa_params *params,
                   const struct gqa_call_options *options, uint32_t *ret_id);

/* Asks the daemon to stop a call. It stays pending until its end has come: usually at once, with
 * what was made so far or with -ECANCELED; at the latest after 5 s, with -ECANCELED.
 * Works while the socket is full. -ENOENT: no such call is pending (it may just have ended);
 * -ENOMEM. May be called from callbacks. */
int gqa_cancel(struct gqa *g, uint32_t id);

/* Notifications that belong to no call ("gqa.draining"): fn is called for each from
 * gqa_process(). method is terminated; it and params live until fn returns. NULL: none. */
typedef void (*gqa_notify_fn)(void *arg, const char *method, const struct gqa_value *params);
void gqa_set_notify(struct gqa *g, gqa_notify_fn fn, void *arg);

/* ---- parameters ------------------------------------------------------------------------------
 * A map, built key by key; every value is copied at once. Keys must differ. Setters return 0 or the
 * builder's first error, which sticks and is what the call returns: checking only the call is fine.
 * -ENOMEM; -EINVAL: a NULL that is not allowed; -EMSGSIZE: longer than any message. */
int gqa_params_create(struct gqa_params **ret);
struct gqa_params *gqa_params_destroy(struct gqa_params *p); /* NULL is legal; returns NULL */

int gqa_params_bool(struct gqa_params *p, const char *key, bool value);
int gqa_params_i64(struct gqa_params *p, const char *key, int64_t value);
int gqa_params_u64(struct gqa_params *p, const char *key, uint64_t value);
int gqa_params_f64(struct gqa_params *p, const char *key, double value);
int gqa_params_str(struct gqa_params *p, const char *key, const char *text);
/* Any bytes: sent as a string where they are UTF-8, else as binary. */
int gqa_params_text(struct gqa_params *p, const char *key, const void *data, size_t bytes);
int gqa_params_tokens(struct gqa_params *p, const char *key, const int32_t *ids, size_t count);
int gqa_params_strings(struct gqa_params *p, const char *key, const char *const *texts,
                       size_t count);
/* logit_bias: (count) pairs. -INFINITY forbids a token. */
int gqa_params_biases(struct gqa_params *p, const char *key, const int32_t *ids,
                      const float *biases, size_t count);

/* Parameters in shared memory, for connections with rings: the program writes token ids (int32_t)
 * or text where the daemon reads them, and the request only names the place.
 * gqa_shared_take(): *ret is bytes of memory, aligned to 64, the program's until it gives them back
 * or the connection is closed or opened again. -ENOTSUP: there are no rings; -ENOSPC: no room (see
 * ring_in_bytes), or 256 places are taken.
 * gqa_params_shared(): bytes at data, anywhere inside of such memory, are the value of key, whose
 * parameter is token ids or text. Only for calls of that connection g. What lies there must stay as
 * it is until the call has ended or its first event has come. -EINVAL: not inside. */
int gqa_shared_take(struct gqa *g, size_t bytes, void **ret);
int gqa_shared_give(struct gqa *g, void *data); /* -ENOENT: nothing was taken there */
int gqa_params_shared(struct gqa_params *p, const char *key, const struct gqa *g, const void *data,
                      size_t bytes);

/* ---- values ----------------------------------------------------------------------------------
 * Readers accept NULL (an absent value), so that they can be nested:
 *   gqa_value_u64(gqa_value_get(result, "n_cached"), &n)
 * They return 0; -ENOENT: absent (or nil, for the typed readers); -EINVAL: of another type;
 * -ERANGE: a number that does not fit. Strings and data point into the message. */
enum gqa_value_type {
    GQA_VALUE_NIL = 0,
    GQA_VALUE_BOOL = 1,
    GQA_VALUE_UINT = 2,
    GQA_VALUE_INT = 3, /* negative */
    GQA_VALUE_FLOAT = 4,
    GQA_VALUE_STR = 5,
    GQA_VALUE_BIN = 6,
    GQA_VALUE_ARRAY = 7,
    GQA_VALUE_MAP = 8,
    GQA_VALUE_OTHER = 9
};

enum gqa_value_type gqa_value_type(const struct gqa_value *v);
int gqa_value_bool(const struct gqa_value *v, bool *ret);
int gqa_value_u64(const struct gqa_value *v, uint64_t *ret);
int gqa_value_i64(const struct gqa_value *v, int64_t *ret);
int gqa_value_f64(const struct gqa_value *v, double *ret); /* integers convert */
/* Strings and binary; not terminated. */
int gqa_value_bytes(const struct gqa_value *v, const char **ret_data, size_t *ret_bytes);
size_t gqa_value_count(const struct gqa_value *v); /* of an array or map; else 0 */
const struct gqa_value *gqa_value_at(const struct gqa_value *array, size_t index);   /* or NULL */
const struct gqa_value *gqa_value_get(const struct gqa_value *map, const char *key); /* or NULL */
/* The index-th pair of a map; false past its end. */
bool gqa_value_pair(const struct gqa_value *map, size_t index, const struct gqa_value **ret_key,
                    const struct gqa_value **ret_value);
/* An array of token ids: fills up to room of ids and sets *ret_count to how many there are.
 * ids may be NULL when room is 0. */
int gqa_value_tokens(const struct gqa_value *v, int32_t *ids, size_t room, size_t *ret_count);

/* A tensor inside a message: {nd: true, type, shape, data}. Row-major, little-endian. */
struct gqa_tensor_view {
    const char *type; /* "<f4"; not terminated */
    size_t type_bytes;
    size_t n_dims;
    uint64_t shape[8];
    /* Not aligned: copy before use. Of a connection with rings a large tensor may lie in shared
     * memory, aligned to 64; it lives as long as its message all the same: until the callback
     * returns, or in a reply, which has a copy. */
    const void *data;
    size_t bytes;
};
/* -EINVAL where v is not a tensor of four-byte floats ("<f4") whose data has the size that its
 * shape tells. */
int gqa_value_tensor_f32(const struct gqa_value *v, struct gqa_tensor_view *ret);

/* ---- synchronous helpers ---------------------------------------------------------------------
 * Each runs the loop until its own call has ended; other pending calls move on meanwhile, and their
 * callbacks run. None may be used inside a callback (-EDEADLK). They return 0 or the call's status,
 * and fill *ret_error (which may be NULL) on failure. Interrupting signals do not end them. */

/* Any method. options->done is not used; event and arg are. *ret (ret may be NULL) becomes the
 * caller's, to be given to gqa_reply_destroy(); it may outlive the connection. */
int gqa_call(struct gqa *g, const char *method, const struct gqa_params *params,
             const struct gqa_call_options *options, struct gqa_reply **ret,
             struct gqa_error *ret_error);

/* The result; lives as long as the reply. */
const struct gqa_value *gqa_reply_value(const struct gqa_reply *r);
struct gqa_reply *gqa_reply_destroy(struct gqa_reply *r); /* NULL is legal; returns NULL */

int gqa_ping(struct gqa *g, struct gqa_error *ret_error);

/* flags: BOS and EOS are not added; control tokens written in the text are plain text. */
#define GQA_TOKENIZE_NO_SPECIAL       1u
#define GQA_TOKENIZE_NO_PARSE_SPECIAL 2u

/* *ret_ids: (*ret_count) ids, the caller's, to be given to free(); never NULL on success. */
int gqa_tokenize(struct gqa *g, const char *model, const void *text, size_t bytes, uint32_t flags,
                 int32_t **ret_ids, size_t *ret_count, struct gqa_error *ret_error);

/* flags: control tokens are written out, not left out. */
#define GQA_DETOKENIZE_SPECIAL 1u

/* *ret_text: the caller's, to be given to free(); a NUL follows its *ret_bytes bytes. */
int gqa_detokenize(struct gqa *g, const char *model, const int32_t *ids, size_t count,
                   uint32_t flags, char **ret_text, size_t *ret_bytes, struct gqa_error *ret_error);

/* New text of a generation, as it comes: always whole UTF-8 characters where the model makes such;
 * bytes may be 0 while a character is incomplete. ids: the tokens of this step. All live until it
 * returns. Non-zero: stop here; the generation ends with finish "cancelled". */
typedef int (*gqa_text_fn)(void *arg, const char *text, size_t bytes, const int32_t *ids,
                           size_t n_ids);

/* text.generate: params as that method's table says (at least model, and prompt or tokens), for one
 * continuation: with n above 1 fn could not tell them apart. fn may be NULL. options: timeout_ms
 * and total_ms only; NULL for the defaults. *ret (may be NULL): the result, as with gqa_call(). */
int gqa_generate(struct gqa *g, const struct gqa_params *params,
                 const struct gqa_call_options *options, gqa_text_fn fn, void *arg,
                 struct gqa_reply **ret, struct gqa_error *ret_error);

/* The same of many continuations: sample, from 0 to n - 1, is whose text it is. Samples' texts come
 * in between each other, each one's in order. Non-zero ends all of them. */
typedef int (*gqa_sample_fn)(void *arg, uint32_t sample, const char *text, size_t bytes,
                             const int32_t *ids, size_t n_ids);

/* As gqa_generate(), with params' n. The result's samples tell how each of them ended. */
int gqa_generate_samples(struct gqa *g, const struct gqa_params *params,
                         const struct gqa_call_options *options, gqa_sample_fn fn, void *arg,
                         struct gqa_reply **ret, struct gqa_error *ret_error);

/* Progress of a load; stage is terminated. total may be 0 where it is not known. */
typedef void (*gqa_progress_fn)(void *arg, const char *stage, uint64_t done, uint64_t total);

/* model.load: params as that method's table says (at least model). fn may be NULL. *ret (may be
 * NULL): what model.info tells. */
int gqa_model_load(struct gqa *g, const struct gqa_params *params, gqa_progress_fn fn, void *arg,
                   struct gqa_reply **ret, struct gqa_error *ret_error);

int gqa_model_unload(struct gqa *g, const char *model, struct gqa_error *ret_error);

/* text.embed: params as that method's table says (at least model, and one of prompt, tokens and
 * inputs). *ret_values: (*ret_n_rows, *ret_n_dims) numbers, row-major, the caller's, to be given to
 * free(); never NULL on success. A row is a text's vector, in the order of inputs; with pooling
 * "none" a token's, the first text's first, then the second's, and so on (the result's n_tokens
 * tells how many each has). options: timeout_ms and total_ms only; NULL for the defaults. *ret (may
 * be NULL): the result, as with gqa_call(). */
int gqa_embed(struct gqa *g, const struct gqa_params *params,
              const struct gqa_call_options *options, float **ret_values, size_t *ret_n_rows,
              size_t *ret_n_dims, struct gqa_reply **ret, struct gqa_error *ret_error);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
