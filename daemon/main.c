/* daemon/main.c - gqad: options, configuration, then the server. */
#include "daemon/log.h"
#include "daemon/options.h"
#include "daemon/process.h"
#include "daemon/server.h"

#include <gqa/host_x86.h>

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sysexits.h>
#include <unistd.h>

static int serve(const struct options *o, struct config *config)
{
    const struct server_options options = {.config = config,
                                           .source = &o->source,
                                           .serve_fd = o->serve_fd,
                                           .lifetime_fd = o->lifetime_fd,
                                           .listen = o->source.wants_socket,
                                           .temporary_cache = o->serve_fd >= 0 && !o->cache_given};
    struct server *server;
    int rc = server_create(&options, &server);
    if (rc < 0) {
        config_destroy(config);
        return rc == -EADDRINUSE ? EX_UNAVAILABLE : EXIT_FAILURE;
    }
    rc = server_run(server);
    int status = rc < 0 ? EXIT_FAILURE : 0;
    if (!server_destroy(server)) {
        _exit(status);
    }
    return status;
}

int main(int argc, char **argv)
{
    struct options options;
    struct config *config;
    struct config_error err;

    if (process_fill_standard_fds() < 0) {
        return EX_OSERR; /* there may be nowhere to say why */
    }
    gqa_host_permit_tiles();
    umask(0077);
    signal(SIGPIPE, SIG_IGN);
    if (options_parse(argc, argv, &options) < 0) {
        fprintf(stderr, "gqad: no memory\n");
        return EX_OSERR;
    }
    if (config_create(&options.source, &config, &err) < 0) {
        fprintf(stderr, "gqad: %s\n", err.text);
        options_finish(&options);
        return EX_CONFIG;
    }
    if (options.check_config) {
        printf("%s: the configuration is good\n", config->file ? config->file : "gqad");
        config_destroy(config);
        options_finish(&options);
        return 0;
    }
    log_init((enum log_level)config->log_level);
    process_prepare();
    int status = EX_CONFIG;
    if (!config->user_mode && process_check_identity() < 0) {
        config_destroy(config);
    } else {
        status = serve(&options, config);
    }
    options_finish(&options);
    return status;
}
