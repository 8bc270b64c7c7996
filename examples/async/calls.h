/* calls.h - what the three programs of this folder do with libgqa: a generation is printed as it
 * comes; a line that is typed meanwhile is a second call, which tells how many tokens it has;
 * Ctrl-C cancels the generation. How they wait is theirs: poll.c, epoll.c, uv.c. */
#ifndef EXAMPLES_ASYNC_CALLS_H
#define EXAMPLES_ASYNC_CALLS_H

#include <gqa/client.h>

/* What the calls and the loop share. One thread. */
struct calls {
    const char *program; /* for messages */
    const char *model;
    struct gqa *g;
    uint32_t id;      /* of the generation */
    int n_running;    /* calls that have not ended: the loop goes on while there are any */
    int status;       /* the generation's */
    bool interrupted; /* cancel is sent once */
};

/* main() of all three: MODEL PROMPT [N_PREDICT]. It connects, starts the generation and leaves the
 * rest to run(), which calls gqa_process() until no call is running; 0 or -errno. */
int calls_main(int argc, char **argv, const char *program, int (*run)(struct calls *calls));

/* A line was typed. */
void calls_on_line(struct calls *calls, const char *line);
/* Ctrl-C. */
void calls_on_interrupt(struct calls *calls);
/* How long the loop may sleep: -1 for ever. */
int calls_timeout_ms(const struct calls *calls);

#endif
