/* client/input.c - what has come of a stream of messages, and its messages one by one. */
#include "client/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void client_input_init(struct client_input *in)
{
    *in = (struct client_input){0};
    ipc_scanner_init(&in->scanner, PROTO_FRAME_BYTES_MAX);
}

void client_input_finish(struct client_input *in)
{
    free(in->data);
    in->data = NULL;
}

void client_input_reset(struct client_input *in)
{
    ipc_scanner_init(&in->scanner, PROTO_FRAME_BYTES_MAX);
    in->first = in->scanned = in->end = 0;
}

/* Moves what is unread to the front, then grows. */
int client_input_room(struct client_input *in)
{
    if (in->first == in->end) {
        in->first = in->scanned = in->end = 0;
        if (in->capacity > CLIENT_IN_BYTES_KEPT) {
            free(in->data);
            in->data = NULL;
            in->capacity = 0;
        }
    }
    if (in->capacity - in->end >= CLIENT_READ_BYTES) {
        return 0;
    }
    if (in->first > 0) {
        memmove(in->data, in->data + in->first, in->end - in->first);
        in->scanned -= in->first;
        in->end -= in->first;
        in->first = 0;
    }
    if (in->capacity - in->end >= CLIENT_READ_BYTES) {
        return 0;
    }
    size_t capacity = in->capacity > 0 ? 2 * in->capacity : 2 * CLIENT_READ_BYTES;
    uint8_t *data = realloc(in->data, capacity);
    if (data == NULL) {
        return -ENOMEM;
    }
    in->data = data;
    in->capacity = capacity;
    return 0;
}

int client_input_dispatch(struct gqa *g, struct client_input *in)
{
    while (g->lost == 0 && in->scanned < in->end) {
        size_t used = 0;
        int r =
            ipc_scanner_feed(&in->scanner, in->data + in->scanned, in->end - in->scanned, &used);
        if (r < 0) {
            return -EPROTO;
        }
        in->scanned += used;
        if (r == 0) {
            continue;
        }
        const uint8_t *frame = in->data + in->first;
        size_t bytes = in->scanned - in->first;
        in->first = in->scanned;
        r = client_dispatch(g, frame, bytes);
        if (r < 0) {
            return r;
        }
    }
    return 0;
}
