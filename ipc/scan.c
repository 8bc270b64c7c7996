/* ipc/scan.c - finds the end of a message in a stream, before anything of it is unpacked.
 *
 * A MessagePack value is a head (a type byte and 0, 1, 2 or 4 bytes of length) and then that many
 * bytes or values; numbers are a type byte and a fixed number of bytes. The scanner keeps the part
 * of a head that has come, the bytes of a string or number still to come, and per depth the values
 * still to come; that is all the state there is, so input may be cut anywhere.
 *
 * A count is believed only if so many values could still come in a frame of the largest size. It is
 * counted against the element limit at once: a header of 5 bytes cannot make anybody reserve
 * gigabytes. */
#include "ipc/codec.h"

#include <errno.h>
#include <string.h>

/* What a type byte announces. */
enum kind { KIND_BAD, KIND_FIXED, KIND_STRING, KIND_ARRAY, KIND_MAP };

struct head {
    enum kind kind;
    uint32_t head_bytes; /* with the length */
    uint32_t count;      /* bytes or values where head_bytes is 1; else the length tells */
};

static struct head read_type(uint8_t type)
{
    if (type <= 0x7f || type >= 0xe0) {
        return (struct head){KIND_FIXED, 1, 0};
    }
    if (type <= 0x8f) {
        return (struct head){KIND_MAP, 1, type & 0x0fu};
    }
    if (type <= 0x9f) {
        return (struct head){KIND_ARRAY, 1, type & 0x0fu};
    }
    if (type <= 0xbf) {
        return (struct head){KIND_STRING, 1, type & 0x1fu};
    }
    static const struct head heads[0x20] = {
        [0x00] = {KIND_FIXED, 1, 0},                                /* nil */
        [0x02] = {KIND_FIXED, 1, 0},  [0x03] = {KIND_FIXED, 1, 0},  /* false, true */
        [0x04] = {KIND_STRING, 2, 0}, [0x05] = {KIND_STRING, 3, 0}, /* bin */
        [0x06] = {KIND_STRING, 5, 0}, [0x0a] = {KIND_FIXED, 1, 4},
        [0x0b] = {KIND_FIXED, 1, 8},                               /* float */
        [0x0c] = {KIND_FIXED, 1, 1},  [0x0d] = {KIND_FIXED, 1, 2}, /* uint */
        [0x0e] = {KIND_FIXED, 1, 4},  [0x0f] = {KIND_FIXED, 1, 8},
        [0x10] = {KIND_FIXED, 1, 1},  [0x11] = {KIND_FIXED, 1, 2}, /* int */
        [0x12] = {KIND_FIXED, 1, 4},  [0x13] = {KIND_FIXED, 1, 8},
        [0x19] = {KIND_STRING, 2, 0}, [0x1a] = {KIND_STRING, 3, 0}, /* str */
        [0x1b] = {KIND_STRING, 5, 0}, [0x1c] = {KIND_ARRAY, 3, 0},
        [0x1d] = {KIND_ARRAY, 5, 0},  [0x1e] = {KIND_MAP, 3, 0},
        [0x1f] = {KIND_MAP, 5, 0},
        /* 0xc1 does not exist; the extension types (0x07-0x09, 0x14-0x18) are not ours. */
    };
    return heads[type - 0xc0];
}

static uint64_t read_length(const uint8_t *p, uint32_t bytes)
{
    uint64_t value = 0;
    for (uint32_t i = 0; i < bytes; i++) {
        value = value << 8 | p[i];
    }
    return value;
}

static void reset(struct ipc_scanner *s)
{
    s->depth = 0;
    s->message_elements = s->n_elements;
    s->n_elements = 0;
    s->bytes = 0;
    s->skip = 0;
    s->head_bytes = 0;
}

void ipc_scanner_init(struct ipc_scanner *s, uint32_t frame_bytes_max)
{
    memset(s, 0, sizeof(*s));
    s->frame_bytes_max = frame_bytes_max;
}

/* A value has ended, and with it every container whose last value it was. True when the message
 * has ended too. */
static bool end_value(struct ipc_scanner *s)
{
    while (s->depth > 0 && --s->left[s->depth] == 0) {
        s->depth--;
    }
    return s->depth == 0;
}

/* A container of so many values begins. 1: the message ended with it, being empty; 0; -errno. */
static int begin_container(struct ipc_scanner *s, uint64_t n_values)
{
    if (s->depth >= PROTO_DEPTH_MAX) {
        return -ELOOP;
    }
    /* Each value takes a byte at least. */
    if (n_values > s->frame_bytes_max - s->bytes || n_values > PROTO_ELEMENTS_MAX - s->n_elements) {
        return -EMSGSIZE;
    }
    s->n_elements += (uint32_t)n_values;
    if (n_values == 0) {
        return end_value(s);
    }
    s->left[++s->depth] = n_values;
    return 0;
}

/* A head is complete. 1: the message ended with it; 0; -errno. */
static int take_head(struct ipc_scanner *s, struct head h, const uint8_t *p)
{
    uint64_t count = h.head_bytes > 1 ? read_length(p + 1, h.head_bytes - 1) : h.count;

    s->head_bytes = 0;
    if (h.kind == KIND_ARRAY || h.kind == KIND_MAP) {
        return begin_container(s, h.kind == KIND_MAP ? 2 * count : count);
    }
    if (count > s->frame_bytes_max - s->bytes) {
        return -EMSGSIZE;
    }
    s->skip = count;
    return count == 0 && end_value(s);
}

/* Takes one byte of a head. 1: the message ended with it; 0; -errno. */
static int take_byte(struct ipc_scanner *s, uint8_t byte)
{
    if (s->bytes == s->frame_bytes_max) {
        return -EMSGSIZE;
    }
    s->bytes++;
    s->head[s->head_bytes++] = byte;
    struct head h = read_type(s->head[0]);
    if (h.kind == KIND_BAD) {
        return -EPROTO;
    }
    return s->head_bytes == h.head_bytes ? take_head(s, h, s->head) : 0;
}

int ipc_scanner_feed(struct ipc_scanner *s, const uint8_t *data, size_t bytes, size_t *ret_used)
{
    size_t used = 0;
    while (used < bytes) {
        int rc;
        if (s->skip > 0) {
            size_t n = s->skip < bytes - used ? (size_t)s->skip : bytes - used;
            s->skip -= n;
            s->bytes += n;
            used += n;
            rc = s->skip == 0 && end_value(s);
        } else {
            rc = take_byte(s, data[used]);
            if (rc < 0) {
                return rc;
            }
            used++;
        }
        if (rc > 0) {
            reset(s);
            *ret_used = used;
            return 1;
        }
    }
    *ret_used = used;
    return 0;
}
