/* The scanner fed at once and in pieces must say the same of any bytes: where messages end, and
 * whether the stream is beyond repair. The first bytes choose the cuts. */
#include "ipc/codec.h"

#include <stdlib.h>

#define CUTS_BYTES  4u
#define FRAME_BYTES 4096u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* What came of the input: an error, or the number of messages and where the last one ended. */
struct outcome {
    int error;
    size_t n_messages, end;
};

static void feed(struct ipc_scanner *s, const uint8_t *data, size_t bytes, size_t offset,
                 struct outcome *o)
{
    size_t at = 0;
    while (at < bytes && o->error == 0) {
        size_t used = 0;
        int rc = ipc_scanner_feed(s, data + at, bytes - at, &used);
        if (rc < 0) {
            o->error = rc;
            return;
        }
        if (used > bytes - at || (rc == 0 && used != bytes - at) || s->depth > PROTO_DEPTH_MAX ||
            s->bytes > FRAME_BYTES) {
            abort();
        }
        at += used;
        if (rc == 1) {
            o->n_messages++;
            o->end = offset + at;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct ipc_scanner whole, pieces;
    struct outcome a = {0}, b = {0};

    if (bytes < CUTS_BYTES) {
        return 0;
    }
    const uint8_t *stream = data + CUTS_BYTES;
    size_t n = bytes - CUTS_BYTES;
    ipc_scanner_init(&whole, FRAME_BYTES);
    ipc_scanner_init(&pieces, FRAME_BYTES);
    feed(&whole, stream, n, 0, &a);
    for (size_t at = 0, i = 0; at < n; i++) {
        size_t piece = 1 + data[i % CUTS_BYTES] % 64u;
        piece = piece < n - at ? piece : n - at;
        feed(&pieces, stream + at, piece, at, &b);
        at += piece;
    }
    if (a.error != b.error || a.n_messages != b.n_messages || a.end != b.end) {
        abort();
    }
    return 0;
}
