/* daemon/config.h - the daemon's settings: one table, three sources.
 *
 * A setting can come from the configuration file (libconfuse, KEY = value), from the environment
 * (GQAD_KEY) and from the command line (--key); flags beat the environment, which beats the file.
 * Every source hands over text, and one function parses and checks it, so that a value means the
 * same everywhere and an error always says where it stands. Lists of a stronger source replace
 * those of a weaker one. */
#ifndef DAEMON_CONFIG_H
#define DAEMON_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct config_list {
    char **items; /* each owned */
    size_t count;
};

#define CONFIG_CTYPE_STRING char *
#define CONFIG_CTYPE_LIST   struct config_list
#define CONFIG_CTYPE_U32    uint32_t
#define CONFIG_CTYPE_BYTES  uint64_t
#define CONFIG_CTYPE_BOOL   bool
#define CONFIG_CTYPE_LEVEL  uint32_t /* enum log_level */
#define CONFIG_CTYPE_CACHE  uint32_t /* enum gqa_type of K or V */

/* S(kind, key, short flag or 0, when a change acts, min, max, default, doc). Bounds are of the
 * value, or of a text's bytes; an empty default of STRING means "decided at start". */
#define CONFIG_SETTINGS(S)                                                                     \
    S(STRING, socket, 0, RESTART, 0, 4095, "", "path of the socket")                           \
    S(STRING, group, 0, RESTART, 0, 255, "gqad", "group that may use the system's socket")     \
    S(STRING, admin_group, 0, RESTART, 0, 255, "", "group whose members are administrators")   \
    S(STRING, cache_dir, 0, RESTART, 0, 4095, "", "folder of the KV cache and packed weights") \
    S(LIST, models_dir, 0, LIVE, 1, 4095, "", "folder with models; may be given again")        \
    S(LIST, plugin_dir, 0, RESTART, 1, 4095, "", "folder with backends; may be given again")   \
    S(LIST, model, 'm', RESTART, 1, 4095, "", "model to load at start; may be given again")    \
    S(BOOL, allow_autoload, 0, LIVE, 0, 1, "true", "requests load the models that they name")  \
    S(LIST, allow_models, 0, LIVE, 1, 255, "", "pattern of names that may load so; none: all") \
    S(U32, ctx_size, 'c', RESTART, 0, 16777216, "0", "context of a model; 0: the file's own")  \
    S(U32, batch_size, 'b', RESTART, 1, 65536, "512", "most rows of one step")                 \
    S(U32, parallel, 0, RESTART, 1, 4096, "8", "most sequences that run at once (-np)")        \
    S(U32, queue_size, 0, RESTART, 1, 1048576, "256", "most requests that wait")               \
    S(U32, step_ms_target, 0, RESTART, 0, 60000, "0",                                          \
      "time of a step that prompts may use up beside generations; 0: little")                  \
    S(LIST, user_weight, 0, LIVE, 3, 255, "", "NAME=WEIGHT: a user's share; others have 1")    \
    S(U32, threads, 't', RESTART, 0, 1024, "0", "threads that compute; 0: a core each")        \
    S(CACHE, cache_type_k, 0, RESTART, 0, 0, "f16", "type of K in the cache (-ctk)")           \
    S(CACHE, cache_type_v, 0, RESTART, 0, 0, "f16", "type of V in the cache (-ctv)")           \
    S(BYTES, kv_bytes, 0, RESTART, 0, 1125899906842624, "0",                                   \
      "most memory of the KV cache, as in 8G; 0: a quarter of the host's")                     \
    S(BOOL, kv_store, 0, RESTART, 0, 1, "true", "keep the KV cache on disk, in cache_dir")     \
    S(BYTES, kv_store_bytes, 0, RESTART, 0, 1125899906842624, "0",                             \
      "most disk space of the KV cache; 0: a tenth of what is free, 32 GiB at most")           \
    S(BYTES, kv_store_bytes_per_user, 0, RESTART, 0, 1125899906842624, "0",                    \
      "the same for one uid; 0: no bound of its own")                                          \
    S(BOOL, weights_cache, 0, RESTART, 0, 1, "true",                                           \
      "keep packed weights in files of cache_dir, which later starts map")                     \
    S(BYTES, weights_cache_bytes, 0, RESTART, 0, 1125899906842624, "0",                        \
      "most disk space of packed weights; 0: a quarter of what is free")                       \
    S(BOOL, plugin_verdicts, 0, RESTART, 0, 1, "true",                                         \
      "remember in cache_dir which backends have passed their self-test here")                 \
    S(STRING, kv_realm, 0, RESTART, 0, 40, "",                                                 \
      "all users share cached prompts under this name; empty: each has only its own")          \
    S(STRING, backend, 0, RESTART, 0, 63, "", "backend of models, NAME or NAME:options")       \
    S(STRING, attention, 0, RESTART, 0, 63, "", "backend of attention alone")                  \
    S(BOOL, io_uring, 0, RESTART, 0, 1, "true", "read through io_uring where it is allowed")   \
    S(U32, max_connections, 0, LIVE, 1, 1048576, "4096", "connections in all")                 \
    S(U32, max_connections_per_user, 0, LIVE, 1, 1048576, "1024", "connections of one uid")    \
    S(U32, max_fds_per_user, 0, LIVE, 1, 1048576, "4096", "descriptors held for one uid")      \
    S(U32, max_calls_per_user, 0, LIVE, 1, 1048576, "1024", "open calls of one uid")           \
    S(U32, max_queued_requests_per_user, 0, LIVE, 1, 1048576, "256",                           \
      "requests of one uid whose prompt is not computed")                                      \
    S(U32, max_queued_tokens_per_user, 0, LIVE, 1, 1073741824, "4194304",                      \
      "tokens of their prompts")                                                               \
    S(U32, max_sequences_per_user, 0, LIVE, 1, 1048576, "8192",                                \
      "sequences of one uid that wait or run: each text of text.embed is one")                 \
    S(BYTES, max_input_bytes_per_user, 0, LIVE, 65536, 1099511627776, "256M",                  \
      "messages of one uid that come in or wait: a call that passes it is refused")            \
    S(BYTES, max_output_bytes_per_user, 0, LIVE, 65536, 1099511627776, "64M",                  \
      "answers that programs of one uid have not read: no new calls, nor rows, above")         \
    S(BYTES, max_ring_bytes_per_user, 0, LIVE, 0, 1099511627776, "512M",                       \
      "shared memory of one uid's connections: rings and data areas")                          \
    S(U32, max_strikes_per_user, 0, LIVE, 0, 1000000, "1000",                                  \
      "a uid that misbehaves more is slowed while others are there; 0: nobody is")             \
    S(U32, slowed_share_permille, 0, LIVE, 1, 1000, "5",                                       \
      "of the loop's time, for a uid that is slowed")                                          \
    S(U32, ring_poll_us, 0, LIVE, 0, 1000, "50",                                               \
      "after a request in a ring look for the next one so long before sleeping")               \
    S(U32, max_calls_per_connection, 0, LIVE, 1, 65536, "256", "open calls of one connection") \
    S(U32, handshake_timeout_ms, 0, LIVE, 1, 3600000, "5000", "for a client's first message")  \
    S(U32, reader_timeout_ms, 0, LIVE, 1, 3600000, "30000",                                    \
      "a client that takes none of its answers for so long is cut off")                        \
    S(U32, paused_timeout_ms, 0, LIVE, 1, 3600000, "10000",                                    \
      "a request that waits so long for its client to read is ended")                          \
    S(U32, drain_timeout_ms, 0, LIVE, 0, 3600000, "30000", "for requests that run at the end") \
    S(LEVEL, log_level, 0, LIVE, 0, 0, "info", "error, warning, info or debug")

struct config {
#define S(kind, key, flag, when, min, max, fallback, doc) CONFIG_CTYPE_##kind key;
    CONFIG_SETTINGS(S)
#undef S
    bool user_mode;
    char *file; /* that was read, or NULL */
};

enum config_kind {
    CONFIG_STRING,
    CONFIG_LIST,
    CONFIG_U32,
    CONFIG_BYTES,
    CONFIG_BOOL,
    CONFIG_LEVEL,
    CONFIG_CACHE
};

enum config_when { CONFIG_RESTART, CONFIG_LIVE };

struct config_setting {
    const char *key;
    enum config_kind kind;
    int flag; /* a short option's letter, or 0 */
    enum config_when when;
    uint64_t min, max;
    const char *fallback;
    const char *doc;
    size_t offset; /* in struct config */
};

size_t config_n_settings(void);
const struct config_setting *config_setting_at(size_t i);

struct config_error {
    char text[512]; /* "file:line: what" */
};

/* What the command line said, kept for reloads. */
struct config_flag {
    const struct config_setting *setting;
    const char *value; /* into argv */
};
struct config_source {
    bool user_mode;
    bool wants_socket; /* false: no place for one is looked for */
    const char *file;  /* --config, or NULL: the usual place, where it may be absent */
    const struct config_flag *flags;
    size_t n_flags;
};

/* Builds the settings from all sources, with every default that depends on the host decided.
 * -EINVAL or -errno, and err. */
int config_create(const struct config_source *source, struct config **ret,
                  struct config_error *err);
void config_destroy(struct config *c); /* NULL is legal */

#define CONFIG_WEIGHT_MAX 1000u
struct config_weight {
    uid_t uid;
    uint32_t weight; /* 1 to CONFIG_WEIGHT_MAX */
};
/* The users' weights, user_weight.count of them; *ret is the caller's, to be freed. */
int config_weights(const struct config *c, struct config_weight **ret, struct config_error *err);

/* Calls changed for every setting in which the two differ. */
void config_compare(const struct config *before, const struct config *after,
                    void (*changed)(void *arg, const struct config_setting *setting), void *arg);
/* Moves one setting's value from one to the other. */
void config_move(struct config *to, struct config *from, const struct config_setting *setting);

#endif
