/* daemon/handlers_internal.h - calls, and what the files of the handlers share. */
#ifndef DAEMON_HANDLERS_INTERNAL_H
#define DAEMON_HANDLERS_INTERNAL_H

#include "daemon/handlers.h"
#include "daemon/log.h"

struct backend_job;
struct kv_job;
struct transfer;

/* What an open call waits for. */
enum call_wait {
    CALL_WAIT_NOTHING,
    CALL_WAIT_TASK,   /* the task pool has call->task: the call must live until done() */
    CALL_WAIT_POST,   /* the engine has the call and will post call->task, likewise */
    CALL_WAIT_LOAD,   /* call->load, which can be left behind at any time */
    CALL_WAIT_ENGINE, /* the engine has call->request: the call must live until its DONE event */
    CALL_WAIT_UNLOAD, /* call->unload, likewise */
    CALL_WAIT_READER, /* an export whose client is to take what it was sent */
    CALL_WAIT_DRAIN   /* among service->drains */
};

/* What a sample of a request with stream=false has collected so far. */
struct call_collected {
    char *text;
    size_t text_bytes, text_capacity;
    int32_t *tokens;
    size_t n_tokens, tokens_capacity;
    struct ipc_buffer logprobs; /* packed entries, n_tokens of them */
};

/* A text on its way to tokens. */
struct call_encode {
    const char *field; /* for messages */
    struct proto_string text;
    bool add_special, parse_special;
    void (*then)(struct call *call); /* with call->tokens set */
};

struct call {
    LIST_ENTRY(call) of_caller;
    LIST_ENTRY(call) of_id; /* once it is open: service->by_id */
    bool is_open;
    LIST_ENTRY(call) of_drain;
    struct service *service;
    struct caller *caller; /* NULL: went away; answers are thrown away */
    uid_t uid;
    uint8_t *frame; /* owned; the message's strings point into it */
    size_t frame_bytes;
    uint64_t frame_held_bytes; /* of QUOTA_INPUT_BYTES, as long as the frame is there */
    struct ipc_message message;
    bool parsed;
    int parse_result;
    uint32_t parse_id;
    bool is_large;     /* taken apart on the task pool, and freed there */
    struct area *area; /* a reference, meanwhile: what its handles name */
    bool decoded;      /* params, or why there are none: */
    int decode_result;
    struct ipc_error decode_error;

    uint32_t id, seq;
    enum proto_method method;
    union proto_params params;
    enum call_wait wait;
    bool cancelled;            /* by the caller: $cancel */
    bool cut;                  /* by the daemon's end */
    uint32_t paused_ms;        /* ended since its client did not read for so long; 0: it was not */
    struct quota_amounts held; /* of its uid's quotas */

    struct task task;
    int task_result;
    struct load *load;
    struct unload *unload;
    struct model *model; /* a reference */
    struct call_encode encode;
    int32_t *tokens; /* owned until the request takes them */
    size_t n_tokens;
    size_t n_encoded; /* of text.embed's texts */
    char *text;       /* of a detokenise */
    size_t text_bytes;
    struct registry_entry *entries; /* (n_entries) of a model.list */
    size_t n_entries;
    struct request *request;
    struct kv_job *kv;           /* CALL_WAIT_POST of kv.list, drop and purge: the engine has it */
    struct backend_job *backend; /* of backend.use and selftest; freed with the call */
    struct transfer *transfer;   /* of kv.export and kv.import */
    void (*prepared)(struct call *call); /* goes on when the request's sampling is ready */
    struct fmt_error prepare_error;
    size_t held_bytes;                /* of events packed for a congested caller */
    struct call_collected *collected; /* (n_collected), one per sample; or NULL: nothing so far */
    uint32_t n_collected;
    bool collecting_failed; /* no memory: the request is being cancelled */
};

/* A model that is being unloaded: it takes no new requests, and its last one ends it. */
struct unload {
    LIST_ENTRY(unload) entry;
    struct model *model; /* a reference */
    struct call *call;   /* NULL: the caller went away */
    struct task task;    /* drops the reference off the loop */
};

#define SERVICE_ID_BUCKETS 4096u

/* A plan that is being made for a model whose backend has failed: one at a time, since each takes
 * all processors, and in place, since the engine waits for an answer whatever memory there is. */
struct substitute {
    struct task task;
    struct service *service; /* NULL: none is being made */
    struct engine_wanted wanted;
    struct engine_swap swap;
};

struct service {
    struct engine *engine;
    struct registry *registry;
    struct backend_catalogue *catalogue;
    struct quota_table *quotas;
    struct penalty_table *penalties;
    char realm[KV_REALM_BYTES]; /* shared by all users, or "" */
    struct service_host host;
    struct service_limits limits; /* allow_models is an owned copy */
    uint64_t started_ns;
    bool draining;
    bool stopped;       /* the engine has ended, or is about to */
    bool using_backend; /* a backend.use is in progress */
    uint32_t n_open;
    struct substitute substitute;
    struct ipc_buffer nowhere;                   /* takes the answers to callers that went away */
    struct ipc_buffer api_info;                  /* packed: it never changes */
    LIST_HEAD(, call) by_id[SERVICE_ID_BUCKETS]; /* open calls, by caller and id */
    uint64_t id_seed;                            /* which bucket it is nobody can choose */
    LIST_HEAD(, unload) unloads;
    LIST_HEAD(, call) drains;
};

uint64_t clock_now_ns(void); /* CLOCK_MONOTONIC */

/* ---- calls (handlers_call.c) ------------------------------------------------------------------
 * Every call ends by exactly one call_end or call_fail (or call_drop), which destroy it. */
struct call *call_create(struct caller *c, uint8_t *frame, size_t bytes, uint64_t held_bytes);
/* Puts the call among its caller's, within the limits. -EBUSY and e. */
int call_open(struct call *call, struct ipc_error *e);
void call_drop(struct call *call); /* without an answer */
/* The message is not needed any more, nor are params, which point into it. */
void call_release_message(struct call *call);
/* The caller has done with it, or is gone: it is no longer among its calls. */
void call_leave_caller(struct call *call);
/* The caller's open call of that id, or NULL. */
struct call *call_find(const struct caller *c, uint32_t id);
/* Takes more of the uid's quotas for the call, until it ends. -EBUSY or -ENOMEM, and e. */
int call_take(struct call *call, const struct quota_amounts *wanted, struct ipc_error *e);

struct ipc_buffer *call_begin_result(struct call *call); /* then pack the result, then: */
void call_end(struct call *call);
void call_end_empty(struct call *call);                 /* the result {} */
struct ipc_buffer *call_begin_event(struct call *call); /* then pack the event's map, then: */
void call_end_event(struct call *call);

/* Into a result or event that was begun: in the data area where there is room, else inside. */
void call_pack_tensor(struct call *call, struct ipc_buffer *b, const float *data,
                      const uint64_t *shape, size_t n_dims);
/* An event's rows, for a caller that is there: those that lie in its data area are only named.
 * Where the rings were closed meanwhile they go inside, and the place goes with the area. */
void call_pack_rows(struct call *call, struct ipc_buffer *b, const struct request_event *ev,
                    const uint64_t *shape, size_t n_dims);

void call_fail(struct call *call, enum proto_error_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void call_fail_error(struct call *call, const struct ipc_error *e);
/* The answer to a call that stopped because its caller, or the daemon's end, wished so. */
void call_fail_cancelled(struct call *call);
/* Paths tell of the host's folders, which concerns those who may name them. */
bool call_may_see_paths(const struct call *call);
static inline bool call_is_stopped(const struct call *call)
{
    return call->cancelled || call->cut || call->paused_ms > 0 || !call->caller;
}

/* Stops the call as soon as may be; it may be destroyed on return. */
void call_stop(struct call *call);
/* Runs work on the task pool, then done; call_fail when there is no memory. */
void call_run(struct call *call, void (*work)(struct task *), void (*done)(struct task *));
/* The same for work that asks a disk, which may never answer. */
void call_run_on_disk(struct call *call, void (*work)(struct task *), void (*done)(struct task *));
static inline struct call *call_of_task(struct task *t)
{
    return (struct call *)((char *)t - offsetof(struct call, task));
}

/* ---- models (handlers_load.c) ------------------------------------------------------------ */

/* Calls then(call) with call->model set, now or when the model is loaded; or fails the call. */
void call_with_model(struct call *call, struct proto_string name, void (*then)(struct call *));
/* Starts a load for a model.load call. */
void call_load(struct call *call, const char *name, const char *serve_as,
               const struct model_options *options, void (*then)(struct call *));
void load_detach(struct load *load); /* its call ends; the load goes on */
void service_check_unloads(struct service *s);
/* Answers the call when the last request of m, a reference that it takes, has ended. */
void unload_start(struct call *call, struct model *m);
void unload_detach(struct call *call); /* the call ends; the unload goes on */

/* ---- texts (handlers_text.c, handlers_embed.c, handlers_tokens.c, handlers_events.c) ----- */

/* A request of the call's model, in call->request, with call->tokens as its prompt. NULL, and the
 * call has failed, without memory. */
struct request *call_begin_request(struct call *call, enum request_kind kind);
/* What its parameters say of its turn. False, and the call has failed, where it may not. */
bool call_fill_scheduling(struct call *call, int32_t priority, uint32_t deadline_ms);
/* Hands call->request to the engine, or fails the call. */
void call_submit(struct call *call);
/* Rows and result of a text.embed. */
void call_deliver_embeddings(struct call *call, const struct request_event *ev);
void call_answer_embed(struct call *call, const struct request *r);

/* False, and the call has failed, for a model that predicts nothing. */
bool call_check_decoder(struct call *call);
/* Exactly one of 'prompt' and 'tokens' is given; else false, and the call has failed. */
bool call_check_prompt(struct call *call);
/* Puts the prompt's tokens into call->tokens, then goes on with then. */
void call_take_prompt(struct call *call, void (*then)(struct call *call));
/* Sets call->tokens, in the calling thread or on the task pool, then calls encode->then. */
void call_tokenise(struct call *call, const struct call_encode *encode);
/* False, and the call has failed, when an id is outside of the vocabulary. */
bool call_check_tokens(struct call *call, const char *field, struct proto_tokens tokens);
/* True: bytes were delivered, of which the engine should hear. */
bool call_deliver(struct call *call, struct request_event *ev);
void call_release_held(struct call *call); /* held_bytes are delivered now */
void call_drop_collected(struct call *call);
void call_finish_cancelled_generate(struct call *call);

/* The realm whose cached blocks the caller shares. */
void call_realm(const struct call *call, char realm[KV_REALM_BYTES]);

/* ---- what is kept (handlers_policy.c) ----------------------------------------------------- */

/* *ret of the fields kv_*; false: it has failed the call. The model must be known. */
bool call_read_policy(struct call *call, struct kv_policy *ret);

/* ---- sampling (handlers_sampling.c) ------------------------------------------------------ */

/* False, and the call has failed, when a token, name or text among the parameters is wrong. */
bool call_check_sampling(struct call *call);
/* From the call's parameters, which were checked, to its request's. -ENOMEM. */
int call_fill_sampling(struct call *call);
/* Does what the sampler needs and what takes long, then calls then, or fails the call. */
void call_prepare_sampling(struct call *call, void (*then)(struct call *call));

/* ---- prefixes that leave and come (handlers_transfer.c) ---------------------------------- */

void transfer_go_on(struct call *call);   /* its client has read */
void transfer_stop(struct call *call);    /* of CALL_WAIT_READER */
void transfer_destroy(struct call *call); /* before the call is; one that failed drops its import */
void caller_drop_import(struct caller *c);

void backend_job_destroy(struct call *call); /* before the call is */

/* ---- plans that the engine asks for, and has done with (handlers_plans.c) ----------------- */

void service_close_retired(struct service *s);
void service_make_substitutes(struct service *s);

/* ---- the methods ------------------------------------------------------------------------- */
#define M(ID, id, name, access, FIELDS, doc) void handle_##id(struct call *call);
GQA_METHODS(M)
#undef M

void pack_model_info(struct ipc_buffer *b, const struct model *m, bool with_path);

/* ---- pairs of a map (handlers_pack.c) ---------------------------------------------------- */
void pack_kv_str(struct ipc_buffer *b, const char *key, const char *value);
void pack_kv_u64(struct ipc_buffer *b, const char *key, uint64_t value);
void pack_kv_i64(struct ipc_buffer *b, const char *key, int64_t value);
void pack_kv_f64(struct ipc_buffer *b, const char *key, double value);
void pack_kv_bool(struct ipc_buffer *b, const char *key, bool value);
void pack_kv_map(struct ipc_buffer *b, const char *key, size_t count);   /* its pairs follow */
void pack_kv_array(struct ipc_buffer *b, const char *key, size_t count); /* its values follow */
/* "a,b,c" as an array of strings. */
void pack_kv_list(struct ipc_buffer *b, const char *key, const char *comma_separated);

#endif
