#include "tests/cuda/check_trial.h"

#include <math.h>
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

float trial_distance(const float *truth, const float *got, size_t n)
{
    float worst = 0.0f, squares = 0.0f;

    for (size_t i = 0; i < n; i++) {
        float d = fabsf(truth[i] - got[i]);
        worst = d > worst || isnan(d) ? d : worst;
        squares += truth[i] * truth[i];
    }
    return worst / sqrtf(squares / (float)n);
}
