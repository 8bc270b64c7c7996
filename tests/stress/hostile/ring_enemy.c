#include "tests/stress/hostile/ring_enemy.h"

#include "ipc/codec.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define RING_BYTES 4096u

uint32_t enemy_random(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return (uint32_t)(*x >> 32);
}

/* ---- opening and closing ----------------------------------------------------------------- */

static bool send_open(int fd, const struct ring_sizes *sizes)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, "ring.open");
    ipc_pack_map(&b, 3);
    ipc_pack_str(&b, "ring_bytes");
    ipc_pack_u64(&b, sizes->ring_bytes);
    ipc_pack_str(&b, "in_bytes");
    ipc_pack_u64(&b, sizes->in_bytes);
    ipc_pack_str(&b, "out_bytes");
    ipc_pack_u64(&b, sizes->out_bytes);
    bool sent = send(fd, b.data, b.bytes, MSG_NOSIGNAL) == (ssize_t)b.bytes;
    ipc_buffer_finish(&b);
    return sent;
}

/* The descriptors come with the answer's first byte. */
static int receive_fds(struct ring_enemy *e)
{
    union {
        char space[CMSG_SPACE(sizeof(e->fds))];
        struct cmsghdr align;
    } control;
    char data[512];
    struct iovec iov = {.iov_base = data, .iov_len = sizeof(data)};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control.space,
                         .msg_controllen = sizeof(control.space)};
    ssize_t n = recvmsg(e->fd, &msg, MSG_CMSG_CLOEXEC);
    if (n <= 0) {
        return -EPIPE;
    }
    if (memmem(data, (size_t)n, "BUSY", strlen("BUSY")) != NULL) {
        return -EBUSY;
    }
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    if (!c || c->cmsg_len != CMSG_LEN(sizeof(e->fds))) {
        return -EPROTO;
    }
    memcpy(e->fds, CMSG_DATA(c), sizeof(e->fds));
    return 0;
}

int ring_enemy_open(struct ring_enemy *e, int fd, uint64_t seed)
{
    static const struct ring_sizes sizes = {RING_BYTES, RING_BYTES, RING_BYTES};
    *e = (struct ring_enemy){.fd = fd, .fds = {-1, -1, -1}, .x = seed | 1};
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    if (!send_open(fd, &sizes)) {
        return -EPIPE;
    }
    int rc = receive_fds(e);
    rc = rc < 0 ? rc : ring_map_open(e->fds, &sizes, &e->map);
    if (rc == 0) {
        ring_map_client_ends(&e->map, &e->in, &e->out);
    }
    return rc;
}

void ring_enemy_close(struct ring_enemy *e)
{
    if (e->map.control) {
        ring_map_finish(&e->map);
    }
    for (unsigned i = 0; i < 3; i++) {
        if (e->fds[i] >= 0) {
            close(e->fds[i]);
        }
    }
    close(e->fd);
}

/* ---- harm -------------------------------------------------------------------------------- */

void ring_enemy_ask(struct ring_enemy *e)
{
    struct ipc_buffer b;
    size_t done = 0;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 2 + enemy_random(&e->x) % 1000,
                     enemy_random(&e->x) % 8 ? "gqa.api_info" : "ring.close");
    ipc_pack_map(&b, 0);
    ring_out_put(&e->out, b.data, b.bytes, &done);
    ring_out_publish(&e->out);
    ipc_buffer_finish(&b);
}

static void flip(struct ring_enemy *e)
{
    size_t bytes = RING_CONTROL_BYTES + 2 * RING_BYTES;
    volatile uint8_t *at = (uint8_t *)e->map.control;
    size_t place =
        enemy_random(&e->x) % 4 ? 128 + enemy_random(&e->x) % 900 : enemy_random(&e->x) % bytes;
    at[place] ^= (uint8_t)(1u << enemy_random(&e->x) % 8);
}

static void jump(struct ring_enemy *e)
{
    struct ring_control *c = e->map.control;
    _Atomic uint32_t *const words[] = {&c->sub_tail,    &c->comp_head, &c->daemon_wait,
                                       &c->client_wait, &c->sub_head,  &c->comp_tail};
    _Atomic uint32_t *word = words[enemy_random(&e->x) % 6];
    atomic_store(word, enemy_random(&e->x) % 3 ? atomic_load(word) + enemy_random(&e->x) % 64 * 8
                                               : enemy_random(&e->x));
}

/* The doorbell's count to the brim, without O_NONBLOCK, or drained under the daemon's eyes. */
void ring_enemy_flood(struct ring_enemy *e)
{
    uint64_t count = UINT64_MAX - 1;
    fcntl(e->fds[2], F_SETFL, fcntl(e->fds[2], F_GETFL) | O_NONBLOCK);
    ssize_t n = enemy_random(&e->x) % 2 ? write(e->fds[2], &count, sizeof(count))
                                        : read(e->fds[2], &count, sizeof(count));
    (void)n;
    fcntl(e->fds[2], F_SETFL, fcntl(e->fds[2], F_GETFL) & ~O_NONBLOCK);
}

static void take_answers(struct ring_enemy *e)
{
    static _Thread_local uint8_t record[RING_RECORD_MAX];
    size_t bytes;
    bool last;
    while (ring_in_take(&e->in, PROTO_FRAME_BYTES_MAX, record, &bytes, &last) == 1) {
    }
    ring_in_publish(&e->in);
}

void ring_enemy_harm(struct ring_enemy *e)
{
    char scratch[256];
    switch (enemy_random(&e->x) % 8) {
    case 0:
        flip(e);
        break;
    case 1:
        jump(e);
        break;
    case 2:
    case 3:
        ring_enemy_flood(e);
        break;
    case 4: /* sometimes it behaves */
        take_answers(e);
        break;
    case 5:
        while (recv(e->fd, scratch, sizeof(scratch), MSG_DONTWAIT) > 0) {
        }
        break;
    default:
        ring_enemy_ask(e);
        ring_enemy_flood(e);
    }
}
