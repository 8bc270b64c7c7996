/* Cancel storms: calls that are cancelled before they are read, while they run,
 * many times over and after they have ended. Each of them gets exactly one
 * answer. COUNT calls at a time. */
#include "tests/stress/hostile/attack.h"

#include <stdlib.h>
#include <string.h>

/* A generation of some samples or, now and then, a text that the task pool
 * tokenises. Answers that are not read while more is sent must not amount to
 * what congests a connection. */
static void pack_call(struct ipc_buffer *b, uint32_t id)
{
    static char text[50000];
    if (id % 20 != 0) {
        attack_pack_generate(b, id, 1 + id % 300, 2000, 1 + id % 3);
        return;
    }
    memset(text, 'a', sizeof(text));
    ipc_pack_request(b, id, "text.tokenize");
    ipc_pack_map(b, 2);
    ipc_pack_str(b, "model");
    ipc_pack_str(b, "tiny");
    ipc_pack_str(b, "text");
    ipc_pack_text(b, text, sizeof(text));
}

/* Sends the calls and their cancellations, `times` for each; before and behind
 * them. */
static bool send_storm(int fd, uint32_t first, unsigned count, unsigned times)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    for (uint32_t id = first; id < first + count; id++) {
        attack_pack_cancel(&b, id);
        pack_call(&b, id);
    }
    for (unsigned i = 0; i < times; i++) {
        for (uint32_t id = first; id < first + count; id++) {
            attack_pack_cancel(&b, id);
        }
    }
    return attack_send_buffer(fd, &b);
}

/* Takes in one answer to each call; false where one comes twice or is of no
 * call. */
static bool take_answers(struct attack_reader *r, uint32_t first, unsigned count)
{
    struct ipc_message m;
    bool right = true, *answered = calloc(count, sizeof(*answered));
    for (unsigned n = 0; answered != NULL && right && n < count;) {
        if (attack_read(r, &m) == 0) {
            right = false;
            break;
        }
        if (m.kind == IPC_RESPONSE) {
            right = m.id >= first && m.id < first + count && !answered[m.id - first];
            answered[right ? m.id - first : 0] = true;
            n++;
        }
        ipc_message_finish(&m);
    }
    free(answered);
    return right && answered != NULL;
}

int main(int argc, char **argv)
{
    struct attack a;
    attack_begin(&a, argc, argv);
    struct attack_reader r = {.fd = attack_connect(&a)};
    unsigned long n_calls = 0;
    bool right = true;
    attack_stands();
    for (uint32_t first = 1; right && (!attack_is_over(0) || n_calls == 0); first += a.count) {
        right = send_storm(r.fd, first, a.count, 5) && take_answers(&r, first, a.count);
        n_calls += a.count;
    }
    attack_reader_finish(&r);
    return attack_report(right, "{\"calls\": %lu}", n_calls);
}
