/* Clients that are killed with SIGKILL, in every state that a client can be in:
 * COUNT cycles of fork, connect, reach the state, die. Several die at the same
 * time. */
#include "tests/stress/hostile/attack.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define AT_ONCE 4u

static struct attack a;

static void say_hello(struct attack_reader *r)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    attack_pack_hello(&b, 1);
    attack_send_buffer(r->fd, &b);
}

static void hear(struct attack_reader *r)
{
    struct ipc_message m;
    if (attack_read(r, &m) == 1) {
        ipc_message_finish(&m);
    }
}

static void ask(struct attack_reader *r, uint32_t n_prompt, uint32_t n_predict, uint32_t n)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    attack_pack_generate(&b, 2, n_prompt, n_predict, n);
    attack_send_buffer(r->fd, &b);
}

/* ---- states
 * ------------------------------------------------------------------------------
 */

static void connected(struct attack_reader *r)
{
}

static void inside_of_hello(struct attack_reader *r)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    attack_pack_hello(&b, 1);
    attack_send(r->fd, b.data, b.bytes / 2);
}

static void hello_said(struct attack_reader *r)
{
    say_hello(r);
}

static void hello_heard(struct attack_reader *r)
{
    say_hello(r);
    hear(r);
}

static void inside_of_a_request(struct attack_reader *r)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    attack_pack_generate(&b, 2, 500, 100, 1);
    say_hello(r);
    attack_send(r->fd, b.data, b.bytes * 2 / 3);
}

static void request_sent(struct attack_reader *r)
{
    ask(r, 100, 1000, 1);
}

static void while_it_generates(struct attack_reader *r)
{
    ask(r, 20, 1000, 1);
    hear(r);
    hear(r);
}

static void while_samples_generate(struct attack_reader *r)
{
    ask(r, 20, 1000, 6);
    for (unsigned i = 0; i < 8; i++) {
        hear(r);
    }
}

static void without_reading(struct attack_reader *r)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    for (uint32_t id = 2; id < 8; id++) {
        ipc_pack_request(&b, id, "gqa.api_info");
        ipc_pack_map(&b, 0);
    }
    attack_pack_generate(&b, 9, 20, 1000, 1);
    attack_send_buffer(r->fd, &b);
}

static void after_cancelling(struct attack_reader *r)
{
    struct ipc_buffer b;
    ask(r, 20, 1000, 1);
    hear(r);
    ipc_buffer_init(&b);
    attack_pack_cancel(&b, 2);
    attack_send_buffer(r->fd, &b);
}

/* Long enough for the task pool. */
static void while_a_text_is_tokenised(struct attack_reader *r)
{
    static char text[100000];
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 2, "text.generate");
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "tiny");
    ipc_pack_str(&b, "prompt");
    ipc_pack_bin(&b, text, sizeof(text));
    attack_send_buffer(r->fd, &b);
}

static void with_a_prompt(struct attack_reader *r, const char *method)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 2, method);
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "tiny");
    ipc_pack_str(&b, "tokens");
    ipc_pack_array(&b, 300);
    for (uint32_t i = 0; i < 300; i++) {
        ipc_pack_u64(&b, 3 + i % 250);
    }
    attack_send_buffer(r->fd, &b);
}

static void while_logits_come(struct attack_reader *r)
{
    with_a_prompt(r, "text.logits");
    hear(r);
}

static void while_it_embeds(struct attack_reader *r)
{
    with_a_prompt(r, "text.embed");
}

static void while_a_prefix_is_exported(struct attack_reader *r)
{
    ask(r, 300, 0, 1);
    hear(r);
    with_a_prompt(r, "kv.export");
    hear(r);
}

static void when_all_is_done(struct attack_reader *r)
{
    ask(r, 3, 1, 1);
    hear(r);
    hear(r);
}

static const struct state {
    const char *name;
    void (*reach)(struct attack_reader *r);
} states[] = {
#define S(name)     \
    {               \
#name, name \
    }
    S(connected),
    S(inside_of_hello),
    S(hello_said),
    S(hello_heard),
    S(inside_of_a_request),
    S(request_sent),
    S(while_it_generates),
    S(while_samples_generate),
    S(without_reading),
    S(after_cancelling),
    S(while_a_text_is_tokenised),
    S(while_logits_come),
    S(while_it_embeds),
    S(while_a_prefix_is_exported),
    S(when_all_is_done),
#undef S
};
#define N_STATES (sizeof(states) / sizeof(states[0]))

/* ---- cycles
 * ------------------------------------------------------------------------------
 */

static void live_and_die(const struct state *state)
{
    struct attack_reader r = {.fd = attack_connect(&a)};
    state->reach(&r);
    raise(SIGKILL);
}

/* Whether a client ended as it should: by SIGKILL, having reached its state. */
static bool bury(void)
{
    int status;
    while (wait(&status) < 0 && errno == EINTR) {
    }
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

int main(int argc, char **argv)
{
    attack_begin(&a, argc, argv);
    unsigned n_alive = 0, n_wrong = 0, n_of[N_STATES] = {0};
    attack_stands();
    for (unsigned i = 0; i < a.count; i++) {
        const struct state *state = &states[i % N_STATES];
        if (n_alive == AT_ONCE) {
            n_wrong += !bury();
            n_alive--;
        }
        pid_t pid = fork();
        if (pid == 0) {
            live_and_die(state);
        }
        n_alive += pid > 0;
        n_wrong += pid < 0;
        n_of[i % N_STATES]++;
    }
    for (; n_alive > 0; n_alive--) {
        n_wrong += !bury();
    }
    attack_is_over(-1);
    printf("{");
    for (size_t i = 0; i < N_STATES; i++) {
        printf("\"%s\": %u, ", states[i].name, n_of[i]);
    }
    return attack_report(n_wrong == 0, "\"wrong\": %u}", n_wrong);
}
