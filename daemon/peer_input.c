/* From a stream of bytes to whole messages: the same way for both transports. */
#include "daemon/peer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FRAME_FIRST_BYTES 256u
#define FRAME_AHEAD_BYTES (1u << 20)      /* room made at once for a text that has begun */
#define UNCOUNTED_BYTES   PEER_READ_BYTES /* any message may take so much, outside of the quota */

void peer_input_init(struct peer_input *in)
{
    *in = (struct peer_input){0};
    ipc_scanner_init(&in->scanner, PROTO_FRAME_BYTES_MAX);
}

void peer_input_finish(struct peer *p, struct peer_input *in)
{
    struct quota_amounts held = {.of = {[QUOTA_INPUT_BYTES] = in->held_bytes}};
    quota_give_one(p->host->quotas, p->uid, &held, QUOTA_INPUT_BYTES);
    free(in->frame);
    free(in->rest);
    in->held_bytes = 0;
    in->frame = in->rest = NULL;
}

bool peer_may_take(const struct peer *p)
{
    return !p->closed && !p->ending && !p->caller.parsing && !p->caller.congested;
}

bool peer_may_read(const struct peer *p, const struct peer_input *in)
{
    return peer_may_take(p) && in->rest_bytes == 0;
}

/* Takes so much of the uid's quota in all for the message that is coming in. */
static int hold(struct peer *p, struct peer_input *in, uint64_t bytes, struct ipc_error *e)
{
    if (bytes <= UNCOUNTED_BYTES || bytes <= in->held_bytes) {
        return 0;
    }
    const struct quota_amounts more = {.of = {[QUOTA_INPUT_BYTES] = bytes - in->held_bytes}};
    int rc = quota_take(p->host->quotas, p->uid, &more, e);
    if (rc == 0) {
        in->held_bytes = bytes;
    }
    return rc;
}

/* There is no room for the message that is coming in, of which `data` comes next. Waiting for room
 * could be for ever: all that is held may belong to messages that wait as well. So the call is
 * answered at once and its bytes are thrown away as they come; the others go on. What is no request
 * cannot be answered, nor be left out silently, and ends the connection. */
static void refuse_message(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes,
                           const struct ipc_error *e)
{
    uint8_t head[IPC_HEAD_BYTES];
    size_t n = in->frame_bytes < sizeof(head) ? in->frame_bytes : sizeof(head);
    size_t more = bytes < sizeof(head) - n ? bytes : sizeof(head) - n;
    if (n > 0) {
        memcpy(head, in->frame, n);
    }
    if (more > 0) {
        memcpy(head + n, data, more);
    }
    service_free_message(p->host->service, p->uid, NULL, in->frame, in->frame_capacity,
                         in->held_bytes);
    in->frame = NULL;
    in->frame_capacity = in->held_bytes = 0;
    in->refused = true;
    if (caller_refuse(&p->caller, head, n + more, e) < 0) {
        p->ending = true;
    }
}

/* A text that has begun tells how long it is: room for what comes of it spares moving the frame as
 * it grows. Memory that is not written to costs nothing, so its word is taken up to a limit. */
static size_t capacity_for(const struct peer_input *in, size_t wanted)
{
    uint64_t ahead = in->scanner.skip;
    size_t capacity = in->frame_capacity ? in->frame_capacity * 2 : FRAME_FIRST_BYTES;
    wanted += ahead < FRAME_AHEAD_BYTES ? (size_t)ahead : FRAME_AHEAD_BYTES;
    capacity = capacity < PROTO_FRAME_BYTES_MAX ? capacity : PROTO_FRAME_BYTES_MAX;
    return capacity < wanted ? wanted : capacity;
}

/* -ENOMEM. */
static int make_room(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes)
{
    struct ipc_error e;
    size_t capacity = capacity_for(in, in->frame_bytes + bytes);
    if (hold(p, in, capacity, &e) < 0) {
        refuse_message(p, in, data, bytes, &e);
        return 0;
    }
    uint8_t *frame = realloc(in->frame, capacity);
    if (!frame) {
        return -ENOMEM;
    }
    in->frame = frame;
    in->frame_capacity = capacity;
    return 0;
}

static int frame_append(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes)
{
    int rc = 0;
    if (!in->refused && in->frame_bytes + bytes > in->frame_capacity) {
        rc = make_room(p, in, data, bytes);
    }
    if (rc == 0 && !in->refused) {
        memcpy(in->frame + in->frame_bytes, data, bytes);
    }
    in->begun_ns = in->frame_bytes > 0 ? in->begun_ns : in->frame_ns;
    in->frame_bytes += bytes;
    return rc;
}

static void refuse(struct peer *p, int rc)
{
    struct ipc_error e;
    if (rc == -EMSGSIZE) {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST,
                      "a message is longer than %u bytes or has more than %u values",
                      PROTO_FRAME_BYTES_MAX, PROTO_ELEMENTS_MAX);
    } else if (rc == -ELOOP) {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST, "a message is nested deeper than %u",
                      PROTO_DEPTH_MAX);
    } else if (rc == -ENOMEM) {
        ipc_error_set(&e, PROTO_E_NO_MEMORY, "no memory for a message");
    } else {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST, "not MessagePack");
    }
    caller_notify_error(&p->caller, &e);
    p->ending = true;
    if (rc != -ENOMEM) {
        peer_strike(p, PENALTY_VIOLATION);
    }
}

static void deliver_frame(struct peer *p, struct peer_input *in)
{
    struct ipc_error e;
    uint32_t n_elements = in->scanner.message_elements;
    uint64_t parsed_bytes = (uint64_t)n_elements * IPC_VALUE_BYTES;
    p->greeted = true;
    if (!in->refused && hold(p, in, in->frame_capacity + parsed_bytes, &e) < 0) {
        refuse_message(p, in, NULL, 0, &e);
    }
    uint8_t *frame = in->frame;
    size_t bytes = in->frame_bytes;
    uint64_t held_bytes = in->held_bytes;
    bool refused = in->refused;
    in->frame = NULL;
    in->frame_bytes = in->frame_capacity = in->held_bytes = 0;
    in->refused = false;
    if (!refused) {
        caller_message(&p->caller, frame, bytes, n_elements, held_bytes);
    }
}

/* Looks at bytes until they are used or the peer has to wait. Returns how many were used. */
static size_t consume(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes)
{
    size_t done = 0;
    bool some = false;
    while (done < bytes && peer_may_take(p) && !(some && peer_step_is_over(p->host))) {
        size_t used = 0;
        int rc = ipc_scanner_feed(&in->scanner, data + done, bytes - done, &used);
        if (rc == 0) {
            used = bytes - done;
        }
        if (rc >= 0) {
            int appended = frame_append(p, in, data + done, used);
            rc = appended < 0 ? appended : rc;
        }
        if (rc < 0) {
            refuse(p, rc);
            return bytes;
        }
        done += used;
        if (rc > 0) {
            some = true;
            deliver_frame(p, in);
        }
    }
    return p->ending ? bytes : done;
}

void peer_feed(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes)
{
    size_t used = consume(p, in, data, bytes);
    if (used == bytes) {
        return;
    }
    uint8_t *rest = malloc(bytes - used);
    if (!rest) {
        refuse(p, -ENOMEM);
        return;
    }
    memcpy(rest, data + used, bytes - used);
    in->rest = rest;
    in->rest_bytes = bytes - used;
}

void peer_feed_rest(struct peer *p, struct peer_input *in)
{
    uint8_t *rest = in->rest;
    size_t bytes = in->rest_bytes;
    if (rest && peer_may_take(p)) {
        in->rest = NULL;
        in->rest_bytes = 0;
        in->frame_ns = uv_hrtime(); /* what it has waited here is not its client's fault */
        peer_feed(p, in, rest, bytes);
        free(rest);
    }
}
