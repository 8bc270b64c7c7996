/* daemon/model/text_stream.c - the text between sampler and client.
 *
 *   bytes ->  [ partial: 0..3 bytes of a character ]  ->  held: whole characters  ->  the caller
 *
 * "held" begins with what the last call returned (released bytes, dropped at the next call); what
 * follows is either not scanned yet or the start of a possible stop string. Matching begins at
 * first bytes of characters only, so a stop string that is not UTF-8 can never cut one in two. */
#include "daemon/model/text_stream.h"

#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define UTF8_MAX_BYTES    4
#define REPLACEMENT       "\xEF\xBF\xBD"
#define REPLACEMENT_BYTES 3

struct stop_string {
    char *data;
    size_t bytes;
};

struct text_stream {
    struct stop_string stops[TEXT_STREAM_MAX_STOPS];
    size_t n_stops;
    bool starts[256]; /* which bytes begin some stop string */
    unsigned char partial[UTF8_MAX_BYTES];
    size_t n_partial;
    char *held;
    size_t held_bytes, held_capacity;
    size_t released; /* bytes of held that the caller's view covers */
    bool ended;
};

void text_stream_destroy(struct text_stream *s)
{
    if (!s) {
        return;
    }
    for (size_t i = 0; i < s->n_stops; i++) {
        free(s->stops[i].data);
    }
    free(s->held);
    free(s);
}

int text_stream_create(const char *const *stops, const size_t *stop_bytes, size_t n_stops,
                       struct text_stream **ret)
{
    if (n_stops > TEXT_STREAM_MAX_STOPS) {
        return -E2BIG;
    }
    for (size_t i = 0; i < n_stops; i++) {
        if (stop_bytes[i] == 0) {
            return -EINVAL;
        }
        if (stop_bytes[i] > TEXT_STREAM_MAX_STOP_BYTES) {
            return -E2BIG;
        }
    }
    struct text_stream *s = calloc(1, sizeof(*s));
    if (!s) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < n_stops; i++) {
        char *copy = malloc(stop_bytes[i]);
        if (!copy) {
            text_stream_destroy(s);
            return -ENOMEM;
        }
        memcpy(copy, stops[i], stop_bytes[i]);
        s->stops[i] = (struct stop_string){copy, stop_bytes[i]};
        s->n_stops = i + 1;
        s->starts[(unsigned char)copy[0]] = true;
    }
    *ret = s;
    return 0;
}

/* Makes room for the well-formed text that n more bytes can become: every byte at most one U+FFFD,
 * and a held-back partial character one more. */
static int reserve(struct text_stream *s, size_t n)
{
    size_t need;
    if (__builtin_mul_overflow(n, (size_t)REPLACEMENT_BYTES, &need) ||
        __builtin_add_overflow(need, s->held_bytes + UTF8_MAX_BYTES + REPLACEMENT_BYTES, &need)) {
        return -ENOMEM;
    }
    if (need <= s->held_capacity) {
        return 0;
    }
    char *held = realloc(s->held, need * 2 > need ? need * 2 : need);
    if (!held) {
        return -ENOMEM;
    }
    s->held = held;
    s->held_capacity = need * 2 > need ? need * 2 : need;
    return 0;
}

static void append_held(struct text_stream *s, const void *bytes, size_t n)
{
    memcpy(s->held + s->held_bytes, bytes, n);
    s->held_bytes += n;
}

/* Appends p[0..n) as well-formed text; returns how many bytes at the end belong to an unfinished
 * character and were left alone. */
static size_t decode(struct text_stream *s, const unsigned char *p, size_t n)
{
    while (n > 0) {
        size_t step;
        switch (utf8_step(p, n, &step)) {
        case UTF8_VALID:
            append_held(s, p, step);
            break;
        case UTF8_INVALID:
            append_held(s, REPLACEMENT, REPLACEMENT_BYTES);
            break;
        case UTF8_INCOMPLETE:
            return n;
        }
        p += step;
        n -= step;
    }
    return 0;
}

/* Decodes the partial character and the new bytes after it. Room was reserved. */
static void take_bytes(struct text_stream *s, const unsigned char *p, size_t n)
{
    while (s->n_partial > 0 && n > 0) {
        s->partial[s->n_partial++] = *p++;
        n--;
        size_t step;
        enum utf8_kind kind = utf8_step(s->partial, s->n_partial, &step);
        if (kind == UTF8_INCOMPLETE) {
            continue;
        }
        if (kind == UTF8_VALID) {
            append_held(s, s->partial, step);
        } else {
            append_held(s, REPLACEMENT, REPLACEMENT_BYTES);
            /* The byte that broke the character was the newest: it starts afresh. */
            p -= s->n_partial - step;
            n += s->n_partial - step;
        }
        s->n_partial = 0;
    }
    size_t left = decode(s, p, n);
    if (left > 0) {
        memcpy(s->partial, p + n - left, left);
        s->n_partial = left;
    }
}

enum match { MATCH_NONE, MATCH_PARTIAL, MATCH_STOP };

/* What begins at p: the first stop string in the list that is there, or may still come to be there
 * (not at the end of the text). */
static enum match match_at(const struct text_stream *s, const char *p, size_t n, bool at_end,
                           int *ret_stop)
{
    for (size_t i = 0; i < s->n_stops; i++) {
        const struct stop_string *stop = &s->stops[i];
        size_t common = n < stop->bytes ? n : stop->bytes;
        if (memcmp(p, stop->data, common) != 0) {
            continue;
        }
        if (common == stop->bytes) {
            *ret_stop = (int)i;
            return MATCH_STOP;
        }
        if (!at_end) {
            return MATCH_PARTIAL;
        }
    }
    return MATCH_NONE;
}

/* Finds how much of held may go out, and whether a stop string ends it. Earliest place first, then
 * the list's order; the scan stops where the answer still depends on text to come. */
static int scan(struct text_stream *s, bool at_end)
{
    int stop = -1;
    size_t i = 0;
    for (; i < s->held_bytes; i++) {
        unsigned char c = (unsigned char)s->held[i];
        if (!s->starts[c] || utf8_is_continuation(c)) {
            continue;
        }
        if (match_at(s, s->held + i, s->held_bytes - i, at_end, &stop) != MATCH_NONE) {
            break;
        }
    }
    s->released = i;
    if (stop >= 0) {
        s->held_bytes = i;
        s->ended = true;
    }
    return stop;
}

static void drop_released(struct text_stream *s)
{
    if (s->released > 0) {
        memmove(s->held, s->held + s->released, s->held_bytes - s->released);
        s->held_bytes -= s->released;
        s->released = 0;
    }
}

int text_stream_push(struct text_stream *s, const char *bytes, size_t n, const char **ret_text,
                     size_t *ret_bytes, int *ret_stop)
{
    if (s->ended) {
        return -EPIPE;
    }
    drop_released(s);
    int rc = reserve(s, n);
    if (rc < 0) {
        return rc;
    }
    take_bytes(s, (const unsigned char *)bytes, n);
    *ret_stop = scan(s, false);
    *ret_text = s->held;
    *ret_bytes = s->released;
    return 0;
}

int text_stream_flush(struct text_stream *s, const char **ret_text, size_t *ret_bytes)
{
    if (s->ended) {
        return -EPIPE;
    }
    drop_released(s);
    int rc = reserve(s, 0);
    if (rc < 0) {
        return rc;
    }
    if (s->n_partial > 0) {
        append_held(s, REPLACEMENT, REPLACEMENT_BYTES);
        s->n_partial = 0;
    }
    (void)scan(s, true); /* only a stop string that waited for a longer one can still be found */
    s->ended = true;
    *ret_text = s->held;
    *ret_bytes = s->released;
    return 0;
}
