/* daemon_ring_tsan - the whole daemon on its loop and libgqa in other threads of one process, and
 * both on one mapping of each connection's shared memory: a thread sanitizer compares addresses, so
 * that two mappings of the same memory would hide every race from it. For -Db_sanitize=thread.
 *
 * Clients call, stream, cancel, give prompts and take tensors through the data area, and leave in
 * the midst of it, while the engine writes rows where they read. Rows must be the bits that came
 * first.
 *
 *   daemon_ring_tsan [ROUNDS]      connections of each client; default 40 */
#include "daemon/backend/backend.h"
#include "daemon/log.h"
#include "daemon/options.h"
#include "daemon/server.h"
#include "ipc/ring_map.h"
#include "tests/unit/engine/folder.h"
#include "tests/unit/engine/tiny.h"

#include <gqa/client.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define N_CLIENTS  3u
#define N_PROMPT   100u
#define MODEL      "tiny"
#define TIMEOUT_MS 120000u

static const char config_text[] = "weights_cache = false\n"
                                  "plugin_verdicts = false\n"
                                  "kv_store = false\n"
                                  "threads = 2\n"
                                  "parallel = 4\n"
                                  "log_level = error\n";

static struct folder folder;
static char socket_path[128];
static unsigned n_rounds = 40;
static float truth[N_PROMPT * TINY_VOCAB]; /* the rows of the prompt; before there are clients */
static atomic_uint n_calls, n_rows, n_left;

static void fail(const char *what, int rc, const char *why)
{
    fprintf(stderr, "daemon_ring_tsan: %s: %s (%d)\n", what, why, rc);
    _exit(EXIT_FAILURE);
}

/* ---- one mapping for both ends ----------------------------------------------------------- */

/* What the daemon has mapped; shared with the client that opens the same file. */
struct mapping {
    struct mapping *next;
    struct ring_map map;
    ino_t file;
    unsigned n_users;
};
static struct mapping *mappings;
static pthread_mutex_t mappings_lock = PTHREAD_MUTEX_INITIALIZER;

int __real_ring_map_create(const struct ring_sizes *sizes, struct ring_map *ret, int ret_fds[2]);
int __wrap_ring_map_create(const struct ring_sizes *sizes, struct ring_map *ret, int ret_fds[2]);
int __real_ring_map_open(const int fds[2], const struct ring_sizes *sizes, struct ring_map *ret);
int __wrap_ring_map_open(const int fds[2], const struct ring_sizes *sizes, struct ring_map *ret);
void __real_ring_map_finish(struct ring_map *m);
void __wrap_ring_map_finish(struct ring_map *m);

static ino_t file_of(int fd)
{
    struct stat st;
    return fstat(fd, &st) == 0 ? st.st_ino : 0;
}

int __wrap_ring_map_create(const struct ring_sizes *sizes, struct ring_map *ret, int ret_fds[2])
{
    struct mapping *m = calloc(1, sizeof(*m));
    int rc = m ? __real_ring_map_create(sizes, ret, ret_fds) : -ENOMEM;
    if (rc < 0) {
        free(m);
        return rc;
    }
    *m = (struct mapping){.map = *ret, .file = file_of(ret_fds[0]), .n_users = 1};
    pthread_mutex_lock(&mappings_lock);
    m->next = mappings;
    mappings = m;
    pthread_mutex_unlock(&mappings_lock);
    return 0;
}

/* Checked as ever; then the daemon's mapping takes the place of the client's own. */
int __wrap_ring_map_open(const int fds[2], const struct ring_sizes *sizes, struct ring_map *ret)
{
    struct ring_map own;
    int rc = __real_ring_map_open(fds, sizes, &own);
    if (rc < 0) {
        return rc;
    }
    __real_ring_map_finish(&own);
    pthread_mutex_lock(&mappings_lock);
    struct mapping *m = mappings;
    while (m && m->file != file_of(fds[0])) {
        m = m->next;
    }
    if (m) {
        m->n_users++;
        *ret = m->map;
    }
    pthread_mutex_unlock(&mappings_lock);
    return m ? 0 : -EPROTO;
}

void __wrap_ring_map_finish(struct ring_map *map)
{
    pthread_mutex_lock(&mappings_lock);
    struct mapping **at = &mappings;
    while (*at && (*at)->map.control != map->control) {
        at = &(*at)->next;
    }
    struct mapping *m = *at;
    if (m && --m->n_users == 0) {
        *at = m->next;
        __real_ring_map_finish(&m->map);
        free(m);
    }
    pthread_mutex_unlock(&mappings_lock);
    memset(map, 0, sizeof(*map));
}

/* ---- the daemon -------------------------------------------------------------------------- */

int __real_backend_catalogue_create(const struct backend_catalogue_options *options,
                                    struct backend_catalogue **ret);
int __wrap_backend_catalogue_create(const struct backend_catalogue_options *options,
                                    struct backend_catalogue **ret);

/* The program that checks plugins lies beside gqad, which this is not. */
int __wrap_backend_catalogue_create(const struct backend_catalogue_options *options,
                                    struct backend_catalogue **ret)
{
    struct backend_catalogue_options o = *options;
    o.check_program = getenv("GQAD_TEST_CHECK");
    o.check_timeout_ms = TIMEOUT_MS;
    return __real_backend_catalogue_create(&o, ret);
}

static void make_folder(void)
{
    size_t bytes;
    const struct tiny t = tiny_default();
    folder_init(&folder);
    unsigned char *plugin = file_read(getenv("GQAD_TEST_CPU"), &bytes);
    folder_write(&folder, "cpu.so", plugin, bytes, 0755);
    free(plugin);
    folder_write(&folder, "gqad.conf", config_text, sizeof(config_text) - 1, 0600);
    tiny_write(&t, folder_path(&folder, MODEL ".gguf"));
    snprintf(socket_path, sizeof(socket_path), "%s", folder_path(&folder, "s"));
}

static struct server *start_server(struct options *o)
{
    char config_path[128];
    struct config *config = NULL;
    struct config_error err = {"no memory"};
    struct server *server;
    snprintf(config_path, sizeof(config_path), "%s", folder_path(&folder, "gqad.conf"));
    const char *const argv[] = {
        "gqad",         "--user",       "--config",  config_path,   "--socket",
        socket_path,    "--models-dir", folder.path, "--cache-dir", folder.path,
        "--plugin-dir", folder.path,    "--model",   MODEL,         NULL};
    int rc = options_parse(sizeof(argv) / sizeof(argv[0]) - 1, (char **)argv, o);
    rc = rc < 0 ? rc : config_create(&o->source, &config, &err);
    if (rc < 0) {
        fail("the configuration", rc, err.text);
    }
    log_init((enum log_level)config->log_level);
    const struct server_options options = {.config = config,
                                           .source = &o->source,
                                           .serve_fd = -1,
                                           .lifetime_fd = -1,
                                           .listen = true,
                                           .temporary_cache = true};
    rc = server_create(&options, &server);
    if (rc < 0) {
        fail("server_create", rc, strerror(-rc));
    }
    return server;
}

/* ---- clients ----------------------------------------------------------------------------- */

struct client {
    struct gqa *g;
    uint64_t x;
    bool ended; /* the call that is under way */
    unsigned n_events, n_taken;
};

static uint32_t next(struct client *c)
{
    c->x ^= c->x << 13;
    c->x ^= c->x >> 7;
    c->x ^= c->x << 17;
    return (uint32_t)(c->x >> 32);
}

static void connect_client(struct client *c, uint32_t flags)
{
    struct gqa_error e;
    const struct gqa_connect_options o = {.struct_size = sizeof(o),
                                          .socket = socket_path,
                                          .flags = flags,
                                          .timeout_ms = TIMEOUT_MS,
                                          .spin_us = next(c) % 2 * 50,
                                          .ring_in_bytes = 16384,
                                          .ring_out_bytes = 4096u << next(c) % 8};
    int rc = gqa_connect(&o, &c->g, &e);
    if (rc < 0) {
        fail("gqa_connect", rc, e.message);
    }
}

/* Rows lie where the engine has put them, until this returns. */
static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct client *c = arg;
    struct gqa_tensor_view t;
    uint64_t first = 0;
    c->n_events++;
    if (gqa_value_tensor_f32(gqa_value_get(event, "logits"), &t) < 0 ||
        gqa_value_u64(gqa_value_get(event, "first_row"), &first) < 0 ||
        (first + t.shape[0]) * TINY_VOCAB * sizeof(float) > sizeof(truth)) {
        fail("text.logits", -EPROTO, "an event that is none");
    }
    if (memcmp(t.data, truth + first * TINY_VOCAB, t.bytes) != 0) {
        fail("text.logits", -EPROTO, "rows that differ from the first ones");
    }
    c->n_taken += (unsigned)t.shape[0];
    atomic_fetch_add(&n_rows, (unsigned)t.shape[0]);
}

static void on_token(void *arg, uint32_t id, const struct gqa_value *event)
{
    ((struct client *)arg)->n_events++;
}

static void on_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                    const struct gqa_error *error)
{
    ((struct client *)arg)->ended = true;
    if (status < 0 && status != -ECANCELED) {
        fail("a call", status, error->message);
    }
    atomic_fetch_add(&n_calls, 1);
}

static void fill_prompt(int32_t *ids)
{
    for (uint32_t i = 0; i < N_PROMPT; i++) {
        ids[i] = (int32_t)(3 + i * 7 % (TINY_VOCAB - 3));
    }
}

/* Begins text.logits or text.generate; the prompt by handle, or in the message. */
static uint32_t begin(struct client *c, bool logits)
{
    int32_t own[N_PROMPT];
    void *shared = NULL;
    uint32_t id;
    struct gqa_params *p;
    const struct gqa_call_options o = {.struct_size = sizeof(o),
                                       .event = logits ? on_rows : on_token,
                                       .done = on_done,
                                       .timeout_ms = TIMEOUT_MS,
                                       .arg = c};
    gqa_params_create(&p);
    gqa_params_text(p, "model", MODEL, strlen(MODEL));
    if (next(c) % 2 && gqa_shared_take(c->g, sizeof(own), &shared) == 0) {
        fill_prompt(shared);
        gqa_params_shared(p, "tokens", c->g, shared, sizeof(own));
    } else {
        fill_prompt(own);
        gqa_params_tokens(p, "tokens", own, N_PROMPT);
    }
    if (!logits) {
        gqa_params_u64(p, "n_predict", 1 + next(c) % 30);
    }
    c->ended = false;
    c->n_events = c->n_taken = 0;
    int rc = gqa_call_async(c->g, logits ? "text.logits" : "text.generate", p, &o, &id);
    gqa_params_destroy(p);
    if (rc < 0) {
        fail("gqa_call_async", rc, strerror(-rc));
    }
    return id;
}

/* Until the call has ended, or so many events have come. */
static void run(struct client *c, unsigned n_events)
{
    while (!c->ended && c->n_events < n_events) {
        int rc = gqa_process(c->g);
        rc = rc == 0 && !c->ended ? gqa_wait(c->g, UINT64_MAX) : rc;
        if (rc < 0 && rc != -EINTR) {
            fail("the connection", rc, strerror(-rc));
        }
    }
}

/* A few calls; the last of them may be cancelled, or left alone with the connection. */
static void converse(struct client *c)
{
    struct gqa_error e;
    for (unsigned n = 1 + next(c) % 4; n > 0; n--) {
        bool logits = next(c) % 3 > 0;
        int rc = gqa_ping(c->g, &e);
        if (rc < 0) {
            fail("gqa.ping", rc, e.message);
        }
        uint32_t id = begin(c, logits);
        unsigned fate = next(c) % 6;
        if (fate == 0) {
            gqa_cancel(c->g, id);
        } else if (fate == 1) {
            run(c, 1);
            gqa_cancel(c->g, id);
        } else if (fate == 2 && n == 1) {
            run(c, next(c) % 2);
            return;
        }
        run(c, UINT32_MAX);
        if (logits && fate > 1 && c->n_taken != N_PROMPT) {
            fail("text.logits", -EPROTO, "rows are missing");
        }
    }
}

static void *client(void *arg)
{
    struct client c = {.x = 88172645463325252u + (uintptr_t)arg * 7919};
    for (unsigned i = 0; i < n_rounds; i++) {
        connect_client(&c, GQA_F_SHM);
        converse(&c);
        gqa_close(c.g);
        atomic_fetch_add(&n_left, 1);
    }
    return NULL;
}

/* ---- all of it --------------------------------------------------------------------------- */

static void keep_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct gqa_tensor_view t;
    uint64_t first = 0;
    if (gqa_value_tensor_f32(gqa_value_get(event, "logits"), &t) < 0 ||
        gqa_value_u64(gqa_value_get(event, "first_row"), &first) < 0 ||
        first * TINY_VOCAB * sizeof(float) + t.bytes > sizeof(truth)) {
        fail("text.logits", -EPROTO, "an event that is none");
    }
    memcpy(truth + first * TINY_VOCAB, t.data, t.bytes);
}

/* The truth, by the socket. */
static void learn_truth(struct client *c)
{
    int32_t ids[N_PROMPT];
    struct gqa_error e;
    struct gqa_params *p;
    const struct gqa_call_options o = {
        .struct_size = sizeof(o), .event = keep_rows, .timeout_ms = TIMEOUT_MS};
    fill_prompt(ids);
    gqa_params_create(&p);
    gqa_params_text(p, "model", MODEL, strlen(MODEL));
    gqa_params_tokens(p, "tokens", ids, N_PROMPT);
    int rc = gqa_call(c->g, "text.logits", p, &o, NULL, &e);
    gqa_params_destroy(p);
    if (rc < 0) {
        fail("text.logits", rc, e.message);
    }
}

static void *run_clients(void *arg)
{
    pthread_t threads[N_CLIENTS];
    struct client c = {.x = 1};
    struct gqa_error e;
    connect_client(&c, 0);
    learn_truth(&c);
    for (uintptr_t i = 0; i < N_CLIENTS; i++) {
        pthread_create(&threads[i], NULL, client, (void *)i);
    }
    for (unsigned i = 0; i < N_CLIENTS; i++) {
        pthread_join(threads[i], NULL);
    }
    int rc = gqa_call(c.g, "server.drain", NULL, NULL, NULL, &e);
    if (rc < 0) {
        fail("server.drain", rc, e.message);
    }
    gqa_close(c.g);
    return NULL;
}

int main(int argc, char **argv)
{
    struct options options;
    pthread_t clients;
    n_rounds = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : n_rounds;
    unsetenv("GQA_TRANSPORT");
    make_folder();
    struct server *server = start_server(&options); /* it listens */
    if (pthread_create(&clients, NULL, run_clients, NULL) != 0) {
        return EXIT_FAILURE;
    }
    int rc = server_run(server);
    pthread_join(clients, NULL);
    server_destroy(server);
    options_finish(&options);
    folder_finish(&folder);
    printf("daemon_ring_tsan: %u connections with rings, %u calls, %u rows\n", atomic_load(&n_left),
           atomic_load(&n_calls), atomic_load(&n_rows));
    if (rc < 0 || mappings || atomic_load(&n_rows) == 0) {
        fprintf(stderr, "daemon_ring_tsan: %s\n",
                mappings ? "rings are still mapped" : "the daemon failed, or no rows came");
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
