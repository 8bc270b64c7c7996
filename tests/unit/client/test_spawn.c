/* gqa_spawn(): a private daemon, played by fake_gqad, starts and ends with its client. */
#include <gqa/client.h>

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *fake(void)
{
    const char *path = getenv("GQAD_TEST_FAKE");
    cr_assert_not_null(path, "GQAD_TEST_FAKE is not set");
    return path;
}

static int spawn(struct gqa **ret, struct gqa_error *e)
{
    static const char *const args[] = {"-t", "2", NULL};
    struct gqa_spawn_options o = {.struct_size = sizeof(o),
                                  .program = fake(),
                                  .cache_dir = "/some/cache",
                                  .args = args,
                                  .flags = GQA_SPAWN_QUIET,
                                  .timeout_ms = 20000};
    return gqa_spawn(&o, ret, e);
}

Test(spawn, serves_and_ends_at_close)
{
    static const char *const wanted[] = {
        "--user", "--serve-fd", "3", "--lifetime-fd", "4", "--cache-dir", "/some/cache", "-t", "2"};
    struct gqa *g = NULL;
    struct gqa_error e;
    cr_assert_eq(spawn(&g, &e), 0, "%s", e.message);
    const struct gqa_value *args = gqa_value_get(gqa_server_info(g), "args");
    cr_assert_eq(gqa_value_count(args), 1 + sizeof(wanted) / sizeof(wanted[0]));
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        const char *arg = "";
        size_t bytes = 0;
        gqa_value_bytes(gqa_value_at(args, i + 1), &arg, &bytes);
        cr_expect(bytes == strlen(wanted[i]) && memcmp(arg, wanted[i], bytes) == 0, "argument %zu",
                  i + 1);
    }
    cr_expect_eq(gqa_ping(g, &e), 0);
    cr_expect_gt(gqa_spawned_pid(g), 0);
    cr_expect_eq(kill(gqa_spawned_pid(g), 0), 0);
    gqa_close(g);
    cr_expect(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "the child was waited for");
}

Test(spawn, program_comes_from_the_environment)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    setenv("GQAD_PATH", fake(), 1);
    cr_assert_eq(gqa_spawn(NULL, &g, &e), 0, "%s", e.message);
    gqa_close(g);
}

/* With 3 to 9 free, the socket pair and the pipe get the numbers that the child is to have. In a
 * process of its own: those descriptors are the test framework's here. */
Test(spawn, low_descriptors_do_not_collide)
{
    int status = -1;
    pid_t pid = fork();
    if (pid == 0) {
        struct gqa *g;
        struct gqa_error e;
        for (int fd = 3; fd < 10; fd++) {
            close(fd);
        }
        int r = spawn(&g, &e);
        r = r == 0 ? gqa_ping(g, &e) : r;
        gqa_close(r == 0 ? g : NULL);
        _exit(r == 0 ? 0 : 1);
    }
    cr_assert_eq(waitpid(pid, &status, 0), pid);
    cr_expect_eq(status, 0);
}

Test(spawn, absent_program)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    struct gqa_spawn_options o = {.struct_size = sizeof(o), .program = "/nonexistent/gqad"};
    cr_expect_eq(gqa_spawn(&o, &g, &e), -ENOENT);
    cr_expect_not_null(strstr(e.message, "/nonexistent/gqad"));
    cr_expect_null(g);
}

Test(spawn, a_daemon_that_dies_tells_its_status)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    setenv("FAKE_GQAD", "die", 1);
    cr_expect_eq(spawn(&g, &e), -ECHILD);
    cr_expect_not_null(strstr(e.message, "status 3"), "%s", e.message);
    cr_expect(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "the child was waited for");
}

/* kill -9 of the client leaves no daemon: the test holds the reading end of a pipe whose writing
 * end the daemon inherits, and sees its end. */
Test(spawn, dies_with_its_client)
{
    int alive[2], ready[2];
    char byte;
    cr_assert_eq(pipe(alive), 0);
    cr_assert_eq(pipe2(ready, O_CLOEXEC), 0);
    fcntl(alive[0], F_SETFD, FD_CLOEXEC);
    pid_t client = fork();
    if (client == 0) {
        struct gqa *g;
        struct gqa_error e;
        byte = spawn(&g, &e) == 0 ? 'y' : 'n';
        close(alive[1]);
        if (write(ready[1], &byte, 1) == 1) {
            pause();
        }
        _exit(1);
    }
    close(alive[1]);
    cr_assert_eq(read(ready[0], &byte, 1), 1);
    cr_assert_eq(byte, 'y');
    kill(client, SIGKILL);
    waitpid(client, NULL, 0);
    cr_expect_eq(read(alive[0], &byte, 1), 0, "the daemon has ended");
}
