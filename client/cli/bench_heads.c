/* client/cli/bench_heads.c - models of one shape that differ in their number of KV heads.
 *
 * gqa-synth writes them, one at a time, with random weights: speed does not depend on these. */
#include "client/cli/bench.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define SYNTH "gqa-synth"

extern char **environ;

/* Beside this program, where both are installed or built; else for PATH to find. */
static void find_synth(char ret[PATH_MAX])
{
    static const char *const places[] = {"", "../tools/synth/"};
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    for (size_t i = 0; slash != NULL && i < sizeof(places) / sizeof(places[0]); i++) {
        int k = snprintf(ret, PATH_MAX, "%.*s%s" SYNTH, (int)(slash + 1 - self), self, places[i]);
        if (k < PATH_MAX && access(ret, X_OK) == 0) {
            return;
        }
    }
    strcpy(ret, SYNTH);
}

int bench_heads_folder(const struct cli *c, char ret[PATH_MAX])
{
    const char *in = c->cache_dir != NULL ? c->cache_dir : getenv("TMPDIR");
    snprintf(ret, PATH_MAX, "%s/gqa-bench-heads-XXXXXX", in != NULL ? in : "/tmp");
    return mkdtemp(ret) != NULL ? CLI_OK : cli_error(EX_CANTCREAT, "%s: %s", ret, strerror(errno));
}

/* The first line of what comes, without its end; the rest is read and dropped. */
static void read_line(int fd, char *ret, size_t room)
{
    char piece[256];
    size_t used = 0;
    ssize_t n;
    while ((n = read(fd, piece, sizeof(piece))) > 0 || (n < 0 && errno == EINTR)) {
        for (ssize_t i = 0; i < n && used + 1 < room; i++) {
            ret[used++] = piece[i];
        }
    }
    ret[used] = '\0';
    ret[strcspn(ret, "\n")] = '\0';
}

/* Runs it to its end; complaint is what it says first on standard error. */
static int run_synth(char *const *argv, char *complaint, size_t room, int *ret_status)
{
    char program[PATH_MAX];
    int errors[2];
    pid_t child;
    find_synth(program);
    if (pipe2(errors, O_CLOEXEC) < 0) {
        return -errno;
    }
    posix_spawn_file_actions_t actions; /* what it says is not what this command prints */
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, errors[1], STDERR_FILENO);
    int rc = -posix_spawnp(&child, program, &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(errors[1]);
    if (rc == 0) {
        read_line(errors[0], complaint, room);
        while (waitpid(child, ret_status, 0) < 0 && errno == EINTR) {
        }
    }
    close(errors[0]);
    return rc;
}

int bench_heads_model(const char *shape, const char *type, uint32_t n_kv_heads, const char *folder,
                      char ret[PATH_MAX])
{
    char given[256], complaint[256];
    int status = 0;
    snprintf(given, sizeof(given), "%s,n_kv_heads=%u", shape, n_kv_heads);
    if (snprintf(ret, PATH_MAX, "%s/kv%u.gguf", folder, n_kv_heads) >= PATH_MAX) {
        return cli_error(EX_CANTCREAT, "%s: the path is too long", folder);
    }
    char *argv[] = {(char *)SYNTH, (char *)"--shape", given, (char *)"--type",
                    (char *)type,  (char *)"-o",      ret,   NULL};
    int rc = run_synth(argv, complaint, sizeof(complaint), &status);
    if (rc < 0) {
        return cli_error(EX_UNAVAILABLE, SYNTH ": %s", strerror(-rc));
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        unlink(ret);
        return cli_error(CLI_FAILED, "bench: no model of shape '%s': %s", given, complaint);
    }
    return CLI_OK;
}
