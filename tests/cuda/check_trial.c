#include "tests/cuda/check_trial.h"

#include <stdio.h>
#include <string.h>

float *trial_results(struct trial *t, const struct side *s, uint32_t chunk)
{
    struct gqa_reason reason = {""};
    float *y = NULL;

    int r = trial_run(t, s->program, s->context, chunk, &y, &reason);
    if (r < 0) {
        printf("%s: %s: %s (%s)\n", s->plugin->name, t->name, reason.text, strerror(-r));
        return NULL;
    }
    return y;
}
