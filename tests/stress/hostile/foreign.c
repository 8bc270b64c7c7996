/* Ids that belong to somebody else: one connection generates, COUNT others name
 * its calls, and calls that never were, in every message that takes an id.
 * Nothing of that reaches the call. */
#include "tests/stress/hostile/attack.h"

#include <stdlib.h>
#include <unistd.h>

#define N_PREDICT 200u
#define IDS       64u

static struct ipc_buffer names; /* every id of a small range, cancelled */

static void pack_names(void)
{
    ipc_buffer_init(&names);
    for (uint32_t id = 0; id < IDS; id++) {
        attack_pack_cancel(&names, id);
    }
    attack_pack_cancel(&names, UINT32_MAX);
}

/* Whether the victim's generation came whole, while the others did what they
 * do. */
static bool generates(struct attack_reader *victim, uint32_t id, const int *others, unsigned n)
{
    struct ipc_buffer b;
    struct ipc_message m;
    uint64_t n_generated = 0;
    ipc_buffer_init(&b);
    attack_pack_generate(&b, id, 8, N_PREDICT, 1);
    attack_send_buffer(victim->fd, &b);
    for (unsigned events = 0;; events++) {
        const int fd = others[events % n];
        if (!attack_send(fd, names.data, names.bytes) || attack_read(victim, &m) == 0) {
            return false;
        }
        bool ended = m.kind == IPC_RESPONSE && m.id == id;
        if (ended) {
            ipc_value_u64(ipc_value_get(m.result, "n_generated"), &n_generated);
        }
        ipc_message_finish(&m);
        if (ended) {
            return n_generated == N_PREDICT;
        }
    }
}

int main(int argc, char **argv)
{
    struct attack a;
    struct ipc_message m;
    attack_begin(&a, argc, argv);
    int *others = calloc(a.count, sizeof(*others));
    struct attack_reader victim = {.fd = attack_connect(&a)};
    if (others == NULL) {
        return 2;
    }
    struct ipc_buffer b;
    for (unsigned i = 0; i < a.count; i++) {
        others[i] = attack_connect(&a);
        ipc_buffer_init(&b);
        attack_pack_hello(&b, 1);
        attack_send_buffer(others[i], &b);
        struct attack_reader r = {.fd = others[i]};
        if (attack_read(&r, &m) == 1) {
            ipc_message_finish(&m);
        }
        attack_reader_finish(&r);
    }
    pack_names();
    attack_stands();
    unsigned long n_whole = 0, n_broken = 0;
    for (uint32_t id = 1; !attack_is_over(0) || n_whole + n_broken == 0; id = id % (IDS - 1) + 1) {
        if (generates(&victim, id, others, a.count)) {
            n_whole++;
        } else {
            n_broken++;
            break;
        }
    }
    attack_reader_finish(&victim);
    ipc_buffer_finish(&names);
    free(others);
    return attack_report(n_broken == 0 && n_whole > 0, "{\"whole\": %lu, \"broken\": %lu}", n_whole,
                         n_broken);
}
