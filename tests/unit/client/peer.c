#include "peer.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

pid_t peer_start(peer_script script, void *arg, int *ret_fd)
{
    int pair[2];
    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    pid_t pid = fork();
    cr_assert_geq(pid, 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failed test leaves no peer behind */
        close(pair[0]);
        script(pair[1], arg);
        _exit(0);
    }
    close(pair[1]);
    *ret_fd = pair[0];
    return pid;
}

int peer_finish(pid_t pid)
{
    int status;
    cr_assert_eq(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

struct after_hello {
    peer_script script;
    void *arg;
};

static void hello_then(int fd, void *arg)
{
    const struct after_hello *a = arg;
    peer_hello(fd, GQA_PROTOCOL_VERSION);
    a->script(fd, a->arg);
}

struct gqa *peer_connect(peer_script script, void *arg, pid_t *ret_pid)
{
    struct after_hello a = {script, arg};
    struct gqa_error e;
    struct gqa *g = NULL;
    int fd;
    *ret_pid = peer_start(hello_then, &a, &fd);
    struct gqa_connect_options o = {
        .struct_size = sizeof(o), .flags = GQA_CONNECT_FD, .fd = fd, .timeout_ms = 20000};
    int r = gqa_connect(&o, &g, &e);
    cr_assert_eq(r, 0, "hello failed: %s", r < 0 ? e.message : "");
    return g;
}
