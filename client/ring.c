/* client/ring.c - messages by shared memory (ipc/ring.h): opening, taking, putting, waiting.
 *
 * The daemon wakes by a futex or by a message on the socket, as the client asks each time it goes
 * to sleep (client_wait). gqa_wait() looks for a while (wait.c), then sleeps on the futex for a
 * moment, which is the quickest, and then on the socket, which also tells of the daemon's death. A
 * program with a loop of its own watches the socket: gqa_events() and gqa_timeout_usec(), which it
 * asks before it sleeps, ask for the message. */
#include "client/internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FUTEX_US_MAX     2000u /* then the socket: a daemon's death rings no futex */
#define SPINS_PER_LOOK   32u   /* at the ring, for one at the clock */
#define TAKE_RECORDS_MAX 64u   /* per call of gqa_process() */
#define TAKE_BYTES_MAX   (1u << 20)

_Static_assert(CLIENT_READ_BYTES >= RING_RECORD_MAX, "a record fits the room that is made");

/* ---- opening ----------------------------------------------------------------------------- */

void client_ring_destroy(struct gqa *g)
{
    struct client_ring *r = g->ring;
    if (r == NULL) {
        return;
    }
    g->ring = NULL;
    close(r->doorbell);
    ring_map_finish(&r->map);
    client_input_finish(&r->input);
    free(r);
}

void client_ring_drop_fds(struct gqa *g)
{
    for (size_t i = 0; i < g->n_ring_fds; i++) {
        close(g->ring_fds[i]);
    }
    g->n_ring_fds = 0;
}

/* From the answer to ring.open, with the descriptors that came along. */
static int adopt(struct gqa *g, const struct gqa_value *result, struct gqa_error *ret_error)
{
    uint64_t ring_bytes = 0;
    struct ring_sizes sizes = {0};
    int r = -EPROTO;
    struct client_ring *ring = calloc(1, sizeof(*ring));
    if (ring == NULL) {
        return client_fail(ret_error, -ENOMEM, "no memory");
    }
    if (g->n_ring_fds == CLIENT_RING_FDS &&
        gqa_value_u64(gqa_value_get(result, "ring_bytes"), &ring_bytes) == 0 &&
        gqa_value_u64(gqa_value_get(result, "in_bytes"), &sizes.in_bytes) == 0 &&
        gqa_value_u64(gqa_value_get(result, "out_bytes"), &sizes.out_bytes) == 0 &&
        ring_bytes <= RING_BYTES_MAX) {
        sizes.ring_bytes = (uint32_t)ring_bytes;
        r = ring_map_open(g->ring_fds, &sizes, &ring->map);
    }
    if (r < 0) {
        free(ring);
        return client_fail(ret_error, r, "ring.open: the rings cannot be used: %s", strerror(-r));
    }
    ring_map_client_ends(&ring->map, &ring->in, &ring->out);
    extents_init(&ring->mine, 0, sizes.in_bytes);
    client_input_init(&ring->input);
    ring->doorbell = g->ring_fds[2];
    g->n_ring_fds = 2; /* the doorbell is the ring's now; the memory is mapped */
    g->ring = ring;
    g->out_by_socket = g->out.bytes - g->out_sent;
    return 0;
}

/* The end of ring.open. A daemon that gave rings speaks in them from then on: where they cannot be
 * used the connection is of no more use. */
static void on_opened(void *arg, uint32_t id, int status, const struct gqa_value *result,
                      const struct gqa_error *error)
{
    struct gqa *g = arg;
    struct gqa_error e;
    g->awaits_ring = false;
    if (status < 0) {
        e = *error;
        status = (g->flags & GQA_F_SHM) != 0 || g->lost < 0 ? status : 0;
    } else {
        status = adopt(g, result, &e);
        if (status < 0) {
            client_lose(g, status, "connection lost: the daemon's rings cannot be used");
        }
    }
    client_ring_drop_fds(g);
    g->ring_opened(g->ring_opened_arg, status, status < 0 ? &e : NULL);
}

static bool daemon_has_rings(const struct gqa *g)
{
    const struct gqa_value *features = gqa_value_get(gqa_server_info(g), "features");
    for (size_t i = 0; i < gqa_value_count(features); i++) {
        const char *name;
        size_t bytes;
        if (gqa_value_bytes(gqa_value_at(features, i), &name, &bytes) == 0 && bytes == 4 &&
            memcmp(name, "ring", 4) == 0) {
            return true;
        }
    }
    return false;
}

int client_ring_open(struct gqa *g, uint32_t timeout_ms, gqa_reconnect_fn done, void *arg,
                     struct gqa_error *ret_error)
{
    if ((g->flags & (GQA_F_SHM | GQA_F_SHM_AUTO)) == 0) {
        return 0;
    }
    if (!daemon_has_rings(g)) {
        return (g->flags & GQA_F_SHM) == 0
                   ? 0
                   : client_fail(ret_error, -EOPNOTSUPP, "the daemon has no shared-memory rings");
    }
    struct gqa_params *p;
    int r = gqa_params_create(&p);
    if (r < 0) {
        return client_fail(ret_error, r, "no memory");
    }
    if (g->ring_in_bytes > 0) {
        gqa_params_u64(p, "in_bytes", g->ring_in_bytes);
    }
    if (g->ring_out_bytes > 0) {
        gqa_params_u64(p, "out_bytes", g->ring_out_bytes);
    }
    const struct gqa_call_options o = {
        .struct_size = sizeof(o), .timeout_ms = timeout_ms, .done = on_opened, .arg = g};
    g->ring_opened = done;
    g->ring_opened_arg = arg;
    r = client_start(g, "ring.open", p, &o, NULL);
    gqa_params_destroy(p);
    if (r < 0) {
        return client_fail(ret_error, r, "ring.open: cannot be sent: %s", strerror(-r));
    }
    g->awaits_ring = true;
    return 1;
}

struct opening {
    bool ended;
    int status;
    struct gqa_error error;
};

static void on_opening_ended(void *arg, int status, const struct gqa_error *error)
{
    struct opening *o = arg;
    o->ended = true;
    o->status = status;
    if (status < 0) {
        o->error = *error;
    }
}

int client_ring_open_and_wait(struct gqa *g, uint32_t timeout_ms, struct gqa_error *ret_error)
{
    struct opening o = {0};
    int r = client_ring_open(g, timeout_ms, on_opening_ended, &o, ret_error);
    if (r <= 0) {
        return r;
    }
    while (!o.ended) {
        if (gqa_process(g) == 0 && !o.ended) {
            gqa_wait(g, UINT64_MAX);
        }
    }
    if (o.status < 0 && ret_error != NULL) {
        *ret_error = o.error;
    }
    return o.status;
}

bool gqa_has_ring(const struct gqa *g)
{
    return g->ring != NULL && g->lost == 0;
}

/* ---- putting ----------------------------------------------------------------------------- */

/* A doorbell that is full rings as well. */
static void ring_doorbell(struct client_ring *r)
{
    const uint64_t one = 1;
    ssize_t n = write(r->doorbell, &one, sizeof(one));
    (void)n;
}

ssize_t client_ring_put(struct client_ring *r, const uint8_t *data, size_t bytes, bool more)
{
    size_t limit = bytes < PROTO_FRAME_BYTES_MAX ? bytes : PROTO_FRAME_BYTES_MAX;
    size_t batch = r->batch > 0 ? r->batch : limit;
    size_t done = 0;
    int rc = ring_out_put(&r->out, data, batch, &done);
    if (rc < 0) {
        return rc;
    }
    r->batch = batch - done;
    r->is_full = rc == 0;
    if (rc == 1 && more) {
        return (ssize_t)done;
    }
    if (ring_out_publish(&r->out) &&
        ring_take_wait(&r->map.control->daemon_wait, RING_WAIT_FUTEX) != RING_WAIT_NOTHING) {
        ring_doorbell(r);
    }
    return (ssize_t)done;
}

/* ---- taking ------------------------------------------------------------------------------ */

int client_ring_take(struct gqa *g)
{
    struct client_ring *r = g->ring;
    struct client_input *in = &r->input;
    size_t taken = 0;
    int rc = 1;
    for (unsigned i = 0; i < TAKE_RECORDS_MAX && taken < TAKE_BYTES_MAX; i++) {
        size_t bytes = 0;
        bool last;
        rc = client_input_room(in);
        rc = rc < 0
                 ? rc
                 : ring_in_take(&r->in, PROTO_FRAME_BYTES_MAX, in->data + in->end, &bytes, &last);
        if (rc <= 0) {
            break;
        }
        in->end += bytes;
        taken += bytes;
    }
    if (rc < 0) {
        return rc;
    }
    if (taken == 0) {
        return 0;
    }
    if (ring_in_publish(&r->in) &&
        ring_take_wait(&r->map.control->daemon_wait, RING_WAIT_ROOM) != RING_WAIT_NOTHING) {
        ring_doorbell(r);
    }
    rc = client_input_dispatch(g, in);
    return rc < 0 ? rc : 1;
}

/* ---- waiting ----------------------------------------------------------------------------- */

/* Whether gqa_process() has something to do with the rings. */
static bool is_due(const struct client_ring *r)
{
    return ring_in_has_some(&r->in) || (r->is_full && ring_out_has_moved(&r->out));
}

static void tell(struct client_ring *r, uint32_t wait)
{
    r->told = wait;
    ring_wait_for(&r->map.control->client_wait, wait);
}

/* To be woken that way; for room as well while the ring is full. */
static uint32_t woken_by(const struct client_ring *r, uint32_t way)
{
    return r->is_full ? way | RING_WAIT_ROOM : way;
}

/* What was told before may have been another way, or before the ring was full. */
bool client_ring_arm(struct client_ring *r)
{
    uint32_t wait = woken_by(r, RING_WAIT_MESSAGE);
    if (r->told != wait) {
        tell(r, wait);
    }
    return is_due(r);
}

void client_ring_disarm(struct client_ring *r)
{
    if (r->told != RING_WAIT_NOTHING) {
        tell(r, RING_WAIT_NOTHING);
    }
}

static bool look(const struct client_ring *r, uint64_t until_us)
{
    while (client_now_us() < until_us) {
        for (unsigned i = 0; i < SPINS_PER_LOOK; i++) {
            if (is_due(r)) {
                return true;
            }
            ring_pause();
        }
    }
    return is_due(r);
}

/* 1: there is something; 0: there is not; -EINTR. */
static int sleep_on_futex(struct client_ring *r, uint64_t until_us)
{
    _Atomic uint32_t *bell = &r->map.control->client_bell;
    uint32_t seen = atomic_load_explicit(bell, memory_order_seq_cst);
    int rc = 0;
    tell(r, woken_by(r, RING_WAIT_FUTEX));
    if (!is_due(r)) {
        rc = ring_bell_wait(bell, seen, client_left_until(until_us));
    }
    return rc == -EINTR ? rc : is_due(r);
}

int client_ring_wait(struct gqa *g, uint64_t look_until_us, uint64_t until_us)
{
    struct client_ring *r = g->ring;
    if (look(r, look_until_us)) {
        return 1;
    }
    uint64_t now = client_now_us();
    if (g->out_by_socket == 0 && now < until_us) {
        int rc = sleep_on_futex(r, until_us - now > FUTEX_US_MAX ? now + FUTEX_US_MAX : until_us);
        if (rc != 0) {
            return rc;
        }
    }
    if (now >= until_us) {
        return 0;
    }
    tell(r, woken_by(r, RING_WAIT_MESSAGE));
    if (is_due(r)) {
        return 1;
    }
    int n = client_poll(g, (short)(POLLIN | (g->out_by_socket > 0 ? POLLOUT : 0)), until_us);
    return n < 0 ? n : n > 0 || is_due(r);
}
