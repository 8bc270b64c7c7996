#include "tests/stress/hostile/attack.h"

#include <errno.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SILENCE_MS 60000

static void die(const char *what)
{
    fprintf(stderr, "attack: %s: %s\n", what, strerror(errno));
    exit(3);
}

/* ---- life
 * --------------------------------------------------------------------------------
 */

static void become(long uid)
{
    if (uid >= 0 && (setgroups(0, NULL) < 0 || setresgid((gid_t)uid, (gid_t)uid, (gid_t)uid) < 0 ||
                     setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) < 0)) {
        die("setresuid");
    }
    prctl(PR_SET_DUMPABLE, 1); /* or the leak sanitizer could not look */
}

void attack_begin(struct attack *a, int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: %s SOCKET UID COUNT\n", argv[0]);
        exit(2);
    }
    a->socket = argv[1];
    a->count = (unsigned)strtoul(argv[3], NULL, 10);
    become(strtol(argv[2], NULL, 10));
    signal(SIGPIPE, SIG_IGN);
}

void attack_stands(void)
{
    puts("held");
    fflush(stdout);
}

bool attack_is_over(int wait_ms)
{
    struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
    return poll(&p, 1, wait_ms) > 0;
}

int attack_report(bool right, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
    return right ? 0 : 1;
}

/* ---- sending
 * -----------------------------------------------------------------------------
 */

int attack_connect(const struct attack *a)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", a->socket);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        die("socket");
    }
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        if (errno != EINTR) {
            die("connect");
        }
    }
    return fd;
}

bool attack_send(int fd, const void *data, size_t bytes)
{
    const char *at = data;
    while (bytes > 0) {
        ssize_t n = send(fd, at, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR) {
            return false;
        }
        at += n > 0 ? n : 0;
        bytes -= n > 0 ? (size_t)n : 0;
    }
    return true;
}

bool attack_send_buffer(int fd, struct ipc_buffer *b)
{
    bool sent = attack_send(fd, b->data, b->bytes);
    ipc_buffer_finish(b);
    return sent;
}

bool attack_is_cut(int fd, int timeout_ms)
{
    char data[4096];
    struct pollfd p = {.fd = fd, .events = POLLIN};
    while (poll(&p, 1, timeout_ms) > 0) {
        ssize_t n = read(fd, data, sizeof(data));
        if (n == 0 || (n < 0 && errno != EINTR)) {
            return true;
        }
    }
    return false;
}

void attack_pack_hello(struct ipc_buffer *b, uint32_t id)
{
    ipc_pack_request(b, id, "gqa.hello");
    ipc_pack_map(b, 1);
    ipc_pack_str(b, "client");
    ipc_pack_str(b, "nobody's friend");
}

void attack_pack_generate(struct ipc_buffer *b, uint32_t id, uint32_t n_prompt, uint32_t n_predict,
                          uint32_t n)
{
    ipc_pack_request(b, id, "text.generate");
    ipc_pack_map(b, 5);
    ipc_pack_str(b, "model");
    ipc_pack_str(b, "tiny");
    ipc_pack_str(b, "tokens");
    ipc_pack_array(b, n_prompt);
    for (uint32_t i = 0; i < n_prompt; i++) {
        ipc_pack_u64(b, 3 + i % 250);
    }
    ipc_pack_str(b, "n_predict");
    ipc_pack_u64(b, n_predict);
    ipc_pack_str(b, "ignore_eos");
    ipc_pack_bool(b, true);
    ipc_pack_str(b, "n");
    ipc_pack_u64(b, n);
}

void attack_pack_cancel(struct ipc_buffer *b, uint32_t id)
{
    ipc_pack_notification(b, "$cancel");
    ipc_pack_array(b, 1);
    ipc_pack_u64(b, id);
}

/* ---- reading
 * -----------------------------------------------------------------------------
 */

void attack_reader_finish(struct attack_reader *r)
{
    free(r->data);
    r->data = NULL;
}

/* More bytes behind those that are there; 0: the daemon closed. */
static ssize_t read_more(struct attack_reader *r)
{
    if (r->bytes == r->capacity) {
        r->capacity = r->capacity > 0 ? r->capacity * 2 : 65536;
        r->data = realloc(r->data, r->capacity);
        if (r->data == NULL) {
            die("memory");
        }
    }
    struct pollfd p = {.fd = r->fd, .events = POLLIN};
    if (poll(&p, 1, SILENCE_MS) == 0) {
        errno = ETIMEDOUT;
        die("no answer");
    }
    ssize_t n = read(r->fd, r->data + r->bytes, r->capacity - r->bytes);
    r->bytes += n > 0 ? (size_t)n : 0;
    return n > 0 ? n : 0;
}

int attack_read(struct attack_reader *r, struct ipc_message *ret)
{
    size_t scanned = 0, used = 0;
    if (r->consumed > 0) {
        memmove(r->data, r->data + r->consumed, r->bytes - r->consumed);
        r->bytes -= r->consumed;
        r->consumed = 0;
    }
    struct ipc_scanner scanner;
    uint32_t id;
    ipc_scanner_init(&scanner, PROTO_FRAME_BYTES_MAX);
    for (;;) {
        if (r->bytes == scanned && read_more(r) == 0) {
            return 0;
        }
        int ended = ipc_scanner_feed(&scanner, r->data + scanned, r->bytes - scanned, &used);
        scanned = ended == 0 ? r->bytes : scanned + used;
        if (ended < 0) {
            errno = -ended;
            die("the daemon sent nonsense");
        }
        if (ended > 0) {
            break;
        }
    }
    r->consumed = scanned;
    if (ipc_message_parse(r->data, scanned, ret, &id) < 0) {
        errno = EPROTO;
        die("the daemon sent no message");
    }
    return 1;
}
