/* SIGHUP and server.reload: what may change while requests run, changes; the rest is reported. */
#include "daemon/server_internal.h"

#include "daemon/log.h"
#include "daemon/notify.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

_Static_assert(CONFIG_WEIGHT_MAX == FAIR_WEIGHT_MAX, "what can be configured is what is known");

static int apply_weights(struct server *s)
{
    struct config_error err;
    struct config_weight *weights = NULL;
    size_t n = s->config->user_weight.count;
    struct fair_weight *copy = calloc(n + 1, sizeof(*copy));
    int rc = copy ? config_weights(s->config, &weights, &err) : -ENOMEM;
    for (size_t i = 0; rc == 0 && i < n; i++) {
        copy[i] = (struct fair_weight){weights[i].uid, weights[i].weight};
    }
    rc = rc < 0 ? rc : engine_set_weights(s->parts.engine, copy, n);
    free(weights);
    free(copy);
    return rc;
}

int server_apply_live(struct server *s)
{
    const struct config *c = s->config;
    const struct service_limits limits = {.allow_autoload = c->allow_autoload,
                                          .allow_models =
                                              (const char *const *)c->allow_models.items,
                                          .n_allow_models = c->allow_models.count,
                                          .calls_per_connection = c->max_calls_per_connection};
#define Q(KIND, name, retry, what) s->quotas.limits.of[QUOTA_##KIND] = c->max_##name##_per_user;
    GQAD_QUOTAS(Q)
#undef Q
    s->penalties.limits = (struct penalty_limits){.strikes_max = c->max_strikes_per_user,
                                                  .share_permille = c->slowed_share_permille};
    s->peers.handshake_ns = (uint64_t)c->handshake_timeout_ms * 1000000u;
    s->peers.paused_timeout_ns = (uint64_t)c->paused_timeout_ms * 1000000u;
    s->peers.ring_poll_ns = (uint64_t)c->ring_poll_us * 1000u;
    s->peers.reader_timeout_ns = (uint64_t)c->reader_timeout_ms * 1000000u;
    int rc = service_set_limits(s->service, &limits);
    rc = rc < 0 ? rc : apply_weights(s);
    return rc < 0 ? rc
                  : registry_set_dirs(s->parts.registry, (const char *const *)c->models_dir.items,
                                      c->models_dir.count);
}

struct change {
    struct config *current, *fresh;
    unsigned n_live;
};

static void on_changed(void *arg, const struct config_setting *setting)
{
    struct change *change = arg;
    if (setting->when == CONFIG_LIVE) {
        config_move(change->current, change->fresh, setting);
        change->n_live++;
        log_info("%s has changed", setting->key);
    } else {
        log_warning("%s has changed: it needs a restart", setting->key);
    }
}

int server_reload(struct server *s, struct config_error *err)
{
    struct config *fresh;
    bool serves = s->state == SERVER_SERVING; /* else it is not ready, or about to end */
    if (serves) {
        notify_reloading();
    }
    int rc = config_create(s->source, &fresh, err);
    if (rc == 0) {
        struct change change = {.current = s->config, .fresh = fresh};
        config_compare(s->config, fresh, on_changed, &change);
        config_destroy(fresh);
        log_init((enum log_level)s->config->log_level);
        log_info("the configuration was read again: %u settings changed", change.n_live);
        rc = server_apply_live(s);
        if (rc < 0) {
            snprintf(err->text, sizeof(err->text), "no memory for the new settings");
        }
    }
    if (serves) {
        notify_ready();
    }
    return rc;
}
