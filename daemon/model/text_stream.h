/* daemon/model/text_stream.h - tokens in, whole characters out, stop strings caught.
 *
 * Sits between the sampler and the client. Holds back (a) the bytes of an unfinished UTF-8
 * character and (b) any tail that could still become a stop string, so that no half character and
 * no part of a stop string is ever sent. Bytes that can never become valid UTF-8 are replaced by
 * U+FFFD at once, as decoders do; stop strings are looked for in the text as sent. Used by the
 * engine thread; one object per sequence. */
#ifndef DAEMON_MODEL_TEXT_STREAM_H
#define DAEMON_MODEL_TEXT_STREAM_H

#include <stdbool.h>
#include <stddef.h>

#define TEXT_STREAM_MAX_STOPS      16
#define TEXT_STREAM_MAX_STOP_BYTES 256

struct text_stream;

/* Stop strings are copied; an empty one is refused with -EINVAL, too many or too long -E2BIG. */
int text_stream_create(const char *const *stops, const size_t *stop_bytes, size_t n_stops,
                       struct text_stream **ret);
void text_stream_destroy(struct text_stream *s);

/* Adds a token's bytes. *ret_text and *ret_bytes: what may be sent now (a view valid until the next
 * call; may be empty). *ret_stop: index of the stop string that ended the text, or -1; after a
 * stop the text before it has been released and nothing more may be pushed (-EPIPE). Earliest match
 * in the text wins; of those that start at the same place, the first in the list. -ENOMEM leaves
 * the stream as it was before the bytes. */
int text_stream_push(struct text_stream *s, const char *bytes, size_t n, const char **ret_text,
                     size_t *ret_bytes, int *ret_stop);

/* The end of generation without a stop string: everything held back is released, an unfinished
 * character as one U+FFFD. A complete stop string that was held back only because an earlier one in
 * the list, with the same beginning, might have followed still ends the text. -EPIPE after the end.
 */
int text_stream_flush(struct text_stream *s, const char **ret_text, size_t *ret_bytes);

#endif
