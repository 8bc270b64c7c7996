/* Defaults that depend on the host: folders, cores, memory. */
#include "daemon/config_internal.h"

#include <errno.h>
#include <limits.h>
#include <pwd.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- places ------------------------------------------------------------------------------ */

static const char *home_dir(void)
{
    const char *home = getenv("HOME");
    if (home && home[0] == '/') {
        return home;
    }
    const struct passwd *pw = getpwuid(geteuid());
    return pw && pw->pw_dir && pw->pw_dir[0] == '/' ? pw->pw_dir : "/";
}

char *config_user_dir(const char *variable, const char *below_home, const char *tail)
{
    const char *base = getenv(variable);
    char *path = NULL;
    int n = base && base[0] == '/' ? asprintf(&path, "%s/%s", base, tail)
                                   : asprintf(&path, "%s/%s/%s", home_dir(), below_home, tail);
    return n < 0 ? NULL : path;
}

/* Takes over text; an existing value stays. */
static int decide(char **field, char *text, struct config_error *err)
{
    if (!text) {
        return config_fail(err, -ENOMEM, "no memory for the configuration");
    }
    if ((*field)[0]) {
        free(text);
        return 0;
    }
    free(*field);
    *field = text;
    return 0;
}

static int decide_list(struct config_list *list, char *text, struct config_error *err)
{
    if (!text) {
        return config_fail(err, -ENOMEM, "no memory for the configuration");
    }
    char **items = realloc(list->items, (list->count + 1) * sizeof(*items));
    if (!items) {
        free(text);
        return config_fail(err, -ENOMEM, "no memory for the configuration");
    }
    items[list->count++] = text;
    list->items = items;
    return 0;
}

static int decide_socket(struct config *c, struct config_error *err)
{
    if (c->socket[0] || !c->user_mode) {
        return decide(&c->socket, strdup("/run/gqad/gqad.sock"), err);
    }
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    char *path = NULL;
    if (!runtime || runtime[0] != '/') {
        return config_fail(err, -EINVAL,
                           "socket: XDG_RUNTIME_DIR is not set; say where with --socket");
    }
    return decide(&c->socket, asprintf(&path, "%s/gqad.sock", runtime) < 0 ? NULL : path, err);
}

/* In a build tree the daemon finds the backends that were built with it. */
static char *build_tree_plugins(void)
{
    char exe[PATH_MAX];
    char *path = NULL;
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    if (n <= 0) {
        return NULL;
    }
    exe[n] = '\0';
    char *slash = strrchr(exe, '/');
    if (!slash) {
        return NULL;
    }
    *slash = '\0';
    struct stat st;
    if (asprintf(&path, "%s/../plugins/cpu", exe) < 0) {
        return NULL;
    }
    char *real = stat(path, &st) == 0 && S_ISDIR(st.st_mode) ? realpath(path, NULL) : NULL;
    free(path);
    return real;
}

static int decide_plugins(struct config *c, struct config_error *err)
{
    if (c->plugin_dir.count > 0) {
        return 0;
    }
    char *built = build_tree_plugins();
    int rc = built ? decide_list(&c->plugin_dir, built, err) : 0;
    return rc < 0 ? rc : decide_list(&c->plugin_dir, strdup(GQAD_PLUGIN_DIR), err);
}

int config_decide_places(struct config *c, bool wants_socket, struct config_error *err)
{
    int rc = wants_socket ? decide_socket(c, err) : 0;
    if (rc == 0) {
        rc = decide(&c->cache_dir,
                    c->user_mode ? config_user_dir("XDG_CACHE_HOME", ".cache", "gqad")
                                 : strdup("/var/cache/gqad"),
                    err);
    }
    if (rc == 0 && c->models_dir.count == 0) {
        rc = decide_list(&c->models_dir,
                         c->user_mode
                             ? config_user_dir("XDG_DATA_HOME", ".local/share", "gqad/models")
                             : strdup("/var/lib/gqad/models"),
                         err);
    }
    return rc < 0 ? rc : decide_plugins(c, err);
}

/* ---- the machine ------------------------------------------------------------------------- */

/* The lowest CPU of the core that a CPU belongs to: its siblings share the core's units. Where the
 * kernel does not tell, every CPU counts. */
static int core_of(int cpu)
{
    char path[96];
    int first = cpu;
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
             cpu);
    FILE *f = fopen(path, "re");
    if (f) {
        if (fscanf(f, "%d", &first) != 1) {
            first = cpu;
        }
        fclose(f);
    }
    return first;
}

static uint32_t count_cores(void)
{
    cpu_set_t usable;
    cpu_set_t cores;
    CPU_ZERO(&cores);
    if (sched_getaffinity(0, sizeof(usable), &usable) < 0) {
        return 1;
    }
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        int core = CPU_ISSET(cpu, &usable) ? core_of(cpu) : -1;
        if (core >= 0 && core < CPU_SETSIZE) {
            CPU_SET(core, &cores);
        }
    }
    int n = CPU_COUNT(&cores);
    return n > 0 ? (uint32_t)n : 1;
}

int config_decide_machine(struct config *c)
{
    if (c->threads == 0) {
        c->threads = count_cores();
    }
    if (c->kv_bytes == 0) {
        long pages = sysconf(_SC_PHYS_PAGES);
        long page_bytes = sysconf(_SC_PAGESIZE);
        if (pages <= 0 || page_bytes <= 0) {
            return -EIO;
        }
        c->kv_bytes = (uint64_t)pages * (uint64_t)page_bytes / 4;
    }
    return 0;
}
