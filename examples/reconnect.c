/* reconnect.c - a program that outlives the daemon: it asks how much was generated, every second,
 * and opens the connection again when the daemon was restarted. What was lost with the connection
 * is told as an error; whether to ask again is this program's decision, and for a question that
 * only reads it is an easy one.
 *
 *   cc reconnect.c $(pkg-config --cflags --libs libgqa) -o reconnect
 *   ./reconnect
 */
#include <gqa/client.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#define PATIENCE_MS 60000u /* a restart with a large model takes its time */

static int ask(struct gqa *g, struct gqa_error *error)
{
    struct gqa_reply *reply;
    uint64_t n = 0;
    /* Two seconds, where the default of such calls is the connection's. */
    struct gqa_call_options options = {.struct_size = sizeof(options), .total_ms = 2000};
    int r = gqa_call(g, "server.stats", NULL, &options, &reply, error);
    if (r < 0) {
        return r;
    }
    gqa_value_u64(gqa_value_get(gqa_reply_value(reply), "tokens_generated_total"), &n);
    gqa_reply_destroy(reply);
    printf("%" PRIu64 " tokens\n", n);
    return fflush(stdout) == 0 ? 0 : -errno;
}

int main(void)
{
    struct gqa_error error;
    struct gqa *g;
    if (gqa_connect(NULL, &g, &error) < 0) {
        fprintf(stderr, "reconnect: %s\n", error.message);
        return 69;
    }
    int r = 0;
    while (r == 0) {
        r = ask(g, &error);
        if (r < 0) {
            fprintf(stderr, "reconnect: %s\n", error.message);
        }
        if (r < 0 && !gqa_is_connected(g)) {
            r = gqa_reconnect(g, PATIENCE_MS, &error);
            fprintf(stderr, "reconnect: %s\n", r < 0 ? error.message : "connected again");
        } else if (r == -ETIMEDOUT || r == -EBUSY) {
            r = 0; /* it is busy: asked again below */
        }
        sleep(r == 0 ? 1 : 0);
    }
    gqa_close(g);
    return 1;
}
