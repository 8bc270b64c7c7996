/* daemon/options.h - the command line of gqad. */
#ifndef DAEMON_OPTIONS_H
#define DAEMON_OPTIONS_H

#include "daemon/config.h"

struct options {
    struct config_source source; /* flags and paths of it belong to options and argv */
    bool check_config;           /* read the configuration, say what is wrong, end */
    int serve_fd;                /* a connected socket, the first client; -1: none */
    int lifetime_fd;             /* the daemon ends when this reads end-of-file; -1: none */
    bool socket_given;           /* --socket: listen even with serve_fd */
    bool cache_given;            /* --cache-dir */
    char **argv;                 /* rewritten copy of the vector, owned */
};

/* Parses; on a usage error it prints and exits with 64, as argp does for --help and --version with
 * 0. -ENOMEM otherwise possible. */
int options_parse(int argc, char **argv, struct options *ret);
void options_finish(struct options *o);

#endif
