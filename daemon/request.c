#include "daemon/request.h"

#include "daemon/model/dry_breakers.h"

#include <errno.h>
#include <stdlib.h>

const char *request_finish_name(enum request_finish finish)
{
    switch (finish) {
    case FINISH_NONE:
        return "none";
    case FINISH_STOP:
        return "stop";
    case FINISH_EOS:
        return "eos";
    case FINISH_LENGTH:
        return "length";
    case FINISH_TIME:
        return "time";
    case FINISH_CANCELLED:
        return "cancelled";
    case FINISH_ERROR:
        return "error";
    }
    return "unknown";
}

const char *request_state_name(enum request_state state)
{
    static const char *const names[] = {"waiting", "prefill", "decode", "paused", "preempted"};
    return names[state];
}

struct request *request_create(enum request_kind kind, struct model *model)
{
    struct request *r = calloc(1, sizeof(*r));
    if (!r) {
        return NULL;
    }
    r->kind = kind;
    r->model = model_ref(model);
    r->sampling = sampler_params_default();
    if (request_set_samples(r, 1) < 0) {
        request_destroy(r);
        return NULL;
    }
    return r;
}

int request_set_samples(struct request *r, uint32_t n)
{
    struct request_sample *samples = calloc(n, sizeof(*samples));
    if (!samples) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n; i++) {
        samples[i].stop_index = -1;
    }
    free(r->samples);
    r->samples = samples;
    r->n_samples = n;
    return 0;
}

uint64_t request_seed(const struct request *r, uint32_t sample)
{
    return r->sampling.seed + sample;
}

/* Far above what a reader that keeps up leaves behind, and little beside the KV that it holds. */
#define UNDELIVERED_BYTES_MAX (8u << 20)

bool request_is_paused(const struct request *r)
{
    /* Rows are megabytes a step, and a connection has hundreds of calls. */
    bool is_unread = r->kind != REQUEST_GENERATE && r->is_unread != NULL &&
                     atomic_load_explicit(r->is_unread, memory_order_relaxed);
    return is_unread || atomic_load_explicit(&r->undelivered_bytes, memory_order_relaxed) >
                            UNDELIVERED_BYTES_MAX;
}

void request_destroy(struct request *r)
{
    if (!r) {
        return;
    }
    for (size_t i = 0; i < r->n_stops; i++) {
        free(r->stops[i]);
    }
    free(r->stops);
    free(r->stop_bytes);
    free(r->samples);
    free(r->kept);
    free(r->tokens);
    for (size_t i = 0; i < r->embed.n_inputs; i++) {
        free(r->embed.inputs[i].tokens);
    }
    free(r->embed.inputs);
    free(r->embed.vectors);
    free((void *)r->sampling.logit_bias); /* the request's own; the sampler copies it */
    dry_breakers_destroy((struct dry_breakers *)r->sampling.dry_breakers);
    grammar_destroy(r->grammar);
    area_unref(r->area);
    model_unref(r->model);
    free(r);
}
