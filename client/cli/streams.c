/* client/cli/streams.c - how fast several generations go on together, seen from outside.
 *
 * Between the moment when the last stream has its first token and the one when the first stream has
 * its last, all streams decode together; the tokens that arrive in that window, by its length, are
 * the figure. */
#include "client/cli/cli.h"

#include <stdlib.h>

/* Tokens that arrive within less are timed from the request on: their arrival says more of the
 * client's wake-ups than of the daemon. */
#define WINDOW_US 50000.0

void cli_stream_take(struct cli_stream *s, size_t n_tokens)
{
    double now = cli_now_us();
    while (n_tokens-- > 0 && s->n < s->n_max) {
        s->at_us[s->n++] = now;
    }
}

static double count_between(const struct cli_stream *streams, size_t n, double after, double until)
{
    double tokens = 0;
    for (size_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < streams[i].n; k++) {
            tokens += streams[i].at_us[k] > after && streams[i].at_us[k] <= until;
        }
    }
    return tokens;
}

double cli_streams_tps(const struct cli_stream *streams, size_t n, double start_us)
{
    double last = 0, open = 0, close = 0;
    for (size_t i = 0; i < n; i++) {
        if (streams[i].n < 2) {
            return 0;
        }
        double begin = streams[i].at_us[0], end = streams[i].at_us[streams[i].n - 1];
        last = i == 0 || end > last ? end : last;
        open = i == 0 || begin > open ? begin : open;
        close = i == 0 || end < close ? end : close;
    }
    if (close - open < WINDOW_US) {
        open = start_us;
        close = last;
    }
    return close > open ? count_between(streams, n, open, close) / (close - open) * 1e6 : 0;
}

double cli_streams_gap_ms(const struct cli_stream *streams, size_t n, double percent)
{
    size_t n_gaps = 0;
    for (size_t i = 0; i < n; i++) {
        n_gaps += streams[i].n;
    }
    double *gaps = calloc(n_gaps + 1, sizeof(*gaps)), ms = 0;
    n_gaps = 0;
    for (size_t i = 0; gaps != NULL && i < n; i++) {
        for (uint32_t k = 1; k < streams[i].n; k++) {
            gaps[n_gaps++] = (streams[i].at_us[k] - streams[i].at_us[k - 1]) / 1e3;
        }
    }
    if (n_gaps > 0) {
        ms = cli_percentile(gaps, n_gaps, percent);
    }
    free(gaps);
    return ms;
}
