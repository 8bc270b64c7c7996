/* Connecting: hello, versions, sockets that are not there. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void quiet(int fd, void *arg)
{
    char byte;
    while (read(fd, &byte, 1) > 0) {
    }
}

static void old_version(int fd, void *arg)
{
    peer_hello(fd, GQA_PROTOCOL_VERSION + 1);
    quiet(fd, NULL);
}

static int connect_fd(int fd, uint32_t timeout_ms, struct gqa **ret, struct gqa_error *e)
{
    struct gqa_connect_options o = {
        .struct_size = sizeof(o), .flags = GQA_CONNECT_FD, .fd = fd, .timeout_ms = timeout_ms};
    return gqa_connect(&o, ret, e);
}

Test(connect, hello_tells_about_the_server)
{
    pid_t pid;
    const char *server = NULL;
    size_t bytes = 0;
    struct gqa *g = peer_connect(quiet, NULL, &pid);
    cr_assert_eq(gqa_value_bytes(gqa_value_get(gqa_server_info(g), "server"), &server, &bytes), 0);
    cr_expect(bytes == 4 && memcmp(server, "peer", 4) == 0);
    cr_expect_geq(gqa_fd(g), 0);
    cr_expect_eq(gqa_timeout_usec(g), UINT64_MAX, "no call is pending");
    cr_expect_null(gqa_close(g));
    cr_expect_eq(peer_finish(pid), 0);
}

Test(connect, foreign_version_is_refused_and_the_fd_given_back)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    int fd;
    pid_t pid = peer_start(old_version, NULL, &fd);
    cr_expect_eq(connect_fd(fd, 20000, &g, &e), -EPROTONOSUPPORT);
    cr_expect_null(g);
    cr_expect_str_eq(e.name, "EPROTONOSUPPORT");
    cr_expect_eq(close(fd), 0, "the descriptor is still the caller's");
    cr_expect_eq(peer_finish(pid), 0);
}

static void says_version_error(int fd, void *arg)
{
    struct ipc_buffer b;
    struct ipc_error e;
    uint32_t id = peer_expect(fd, "gqa.hello");
    ipc_buffer_init(&b);
    ipc_error_set(&e, PROTO_E_VERSION, "this daemon speaks 7 to 9");
    ipc_pack_response_error(&b, id, &e);
    peer_send(fd, &b);
}

Test(connect, the_daemons_own_refusal_is_told)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    int fd;
    pid_t pid = peer_start(says_version_error, NULL, &fd);
    cr_expect_eq(connect_fd(fd, 20000, &g, &e), -EPROTONOSUPPORT);
    cr_expect_eq(e.code, GQA_E_VERSION);
    cr_expect_str_eq(e.message, "this daemon speaks 7 to 9");
    close(fd);
    cr_expect_eq(peer_finish(pid), 0);
}

Test(connect, silence_ends_at_the_deadline)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    int fd;
    pid_t pid = peer_start(quiet, NULL, &fd);
    cr_expect_eq(connect_fd(fd, 50, &g, &e), -ETIMEDOUT);
    close(fd);
    cr_expect_eq(peer_finish(pid), 0);
}

Test(connect, absent_socket)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    struct gqa_connect_options o = {.struct_size = sizeof(o), .socket = "/nonexistent/gqad.sock"};
    cr_expect_eq(gqa_connect(&o, &g, &e), -ENOENT);
    cr_expect_not_null(strstr(e.message, "/nonexistent/gqad.sock"));
    setenv("GQA_SOCKET", "/nonexistent/other.sock", 1);
    cr_expect_eq(gqa_connect(NULL, &g, &e), -ENOENT);
    cr_expect_not_null(strstr(e.message, "/nonexistent/other.sock"));
}

Test(connect, socket_path_that_is_too_long)
{
    char path[200];
    struct gqa *g = NULL;
    struct gqa_error e;
    memset(path, 'a', sizeof(path) - 1);
    path[0] = '/';
    path[sizeof(path) - 1] = '\0';
    struct gqa_connect_options o = {.struct_size = sizeof(o), .socket = path};
    cr_expect_eq(gqa_connect(&o, &g, &e), -ENAMETOOLONG);
}

/* A listener whose backlog is full never accepts: connect() would block for ever. */
Test(connect, full_backlog_ends_at_the_deadline)
{
    char path[] = "/tmp/gqa-test-XXXXXX";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct gqa *g = NULL;
    struct gqa_error e;
    cr_assert_not_null(mkdtemp(path));
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/s", path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(listener, 0), 0);
    int first = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(connect(first, (struct sockaddr *)&address, sizeof(address)), 0);
    struct gqa_connect_options o = {
        .struct_size = sizeof(o), .socket = address.sun_path, .timeout_ms = 50};
    cr_expect_eq(gqa_connect(&o, &g, &e), -ETIMEDOUT);
    unlink(address.sun_path);
    rmdir(path);
}

Test(connect, user_socket_comes_before_the_systems)
{
    char path[] = "/tmp/gqa-test-XXXXXX";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct gqa *g = NULL;
    struct gqa_error e;
    cr_assert_not_null(mkdtemp(path));
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/gqad.sock", path);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    cr_assert_eq(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(listener, 4), 0);
    unsetenv("GQA_SOCKET");
    setenv("XDG_RUNTIME_DIR", path, 1);
    pid_t pid = fork();
    if (pid == 0) {
        int fd = accept(listener, NULL, NULL);
        peer_hello(fd, GQA_PROTOCOL_VERSION);
        quiet(fd, NULL);
        _exit(0);
    }
    cr_expect_eq(gqa_connect(NULL, &g, &e), 0);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
    unlink(address.sun_path);
    rmdir(path);
}
