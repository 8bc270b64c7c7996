/* daemon/model/sampler_chain.c - the table of samplers, and those of them that move logits.
 *
 * A row sees candidates and changes their logits or drops some; at least one always stays. */
#include "daemon/model/sampler_internal.h"

#include <errno.h>
#include <math.h>

static bool penalties_enabled(const struct sampler_params *p)
{
    return p->repeat_last_n != 0 &&
           (p->repeat_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0);
}

/* The formula: Keskar et al., "CTRL", 2019, section 4.1 (repeat), and OpenAI's frequency and
 * presence penalties. */
static void penalties_apply(struct sampler *s, struct candidates *c)
{
    const struct sampler_params *p = &s->params;
    if (s->history.n == 0) {
        return;
    }
    for (size_t i = 0; i < c->n; i++) {
        uint32_t count = s->counts[c->item[i].token];
        if (count == 0) {
            continue;
        }
        float *logit = &c->item[i].logit;
        *logit = *logit > 0 ? *logit / p->repeat_penalty : *logit * p->repeat_penalty;
        *logit -= (float)count * p->frequency_penalty + p->presence_penalty;
    }
    c->n_sorted = 0;
}

static bool top_n_sigma_enabled(const struct sampler_params *p)
{
    return p->top_n_sigma > 0;
}

static bool top_k_enabled(const struct sampler_params *p)
{
    return p->top_k > 0;
}

static bool typical_p_enabled(const struct sampler_params *p)
{
    return p->typical_p < 1;
}

static bool top_p_enabled(const struct sampler_params *p)
{
    return p->top_p < 1;
}

static bool min_p_enabled(const struct sampler_params *p)
{
    return p->min_p > 0;
}

static bool xtc_enabled(const struct sampler_params *p)
{
    return p->xtc_probability > 0 && p->xtc_threshold <= 0.5f;
}

static bool temperature_enabled(const struct sampler_params *p)
{
    return p->temperature != 1 || p->dynatemp_range > 0;
}

/* Divides the distance from the best, so that no temperature, however small, overflows. */
void temperature_scale(struct candidates *c, float temperature)
{
    if (temperature <= 0) {
        candidates_sort(c, 1);
        candidates_keep_first(c, 1);
        return;
    }
    float max = candidates_max(c);
    for (size_t i = 0; i < c->n; i++) {
        c->item[i].logit = (c->item[i].logit - max) / temperature;
    }
}

/* With a range, the entropy chooses within temperature +- range: none the lowest, that of equally
 * likely candidates the highest (kalomaze, "Dynamic Temperature", 2023). */
static void temperature_apply(struct sampler *s, struct candidates *c)
{
    const struct sampler_params *p = &s->params;
    if (p->dynatemp_range <= 0) {
        temperature_scale(c, p->temperature);
        return;
    }
    if (c->n < 2) {
        return;
    }
    struct softmax all = candidates_softmax(c);
    double entropy = (sampler_log(all.sum) - all.mean) / sampler_log((double)c->n);
    entropy = fmin(fmax(entropy, 0), 1); /* rounding */
    double low = fmax((double)p->temperature - (double)p->dynatemp_range, 0);
    double high = (double)p->temperature + (double)p->dynatemp_range;
    double share = sampler_pow(entropy, (double)p->dynatemp_exponent);
    temperature_scale(c, (float)(low + (high - low) * share));
}

const struct sampler_row sampler_rows[SAMPLER_KINDS] = {
    [SAMPLER_PENALTIES] = {"penalties", NULL, penalties_enabled, penalties_apply, true, false},
    [SAMPLER_DRY] = {"dry", NULL, dry_enabled, dry_apply, true, false},
    [SAMPLER_TOP_N_SIGMA] = {"top_n_sigma", NULL, top_n_sigma_enabled, top_n_sigma_apply, false,
                             true},
    [SAMPLER_TOP_K] = {"top_k", NULL, top_k_enabled, top_k_apply, false, true},
    [SAMPLER_TYPICAL_P] = {"typical_p", "typ_p", typical_p_enabled, typical_p_apply, false, false},
    [SAMPLER_TOP_P] = {"top_p", NULL, top_p_enabled, top_p_apply, false, true},
    [SAMPLER_MIN_P] = {"min_p", NULL, min_p_enabled, min_p_apply, false, true},
    [SAMPLER_XTC] = {"xtc", NULL, xtc_enabled, xtc_apply, false, false},
    [SAMPLER_TEMPERATURE] = {"temperature", "temp", temperature_enabled, temperature_apply, false,
                             true},
};

const char *sampler_name(enum sampler_kind kind)
{
    return sampler_rows[kind].name;
}

static bool is_named(const char *candidate, const char *name, size_t bytes)
{
    return candidate != NULL && strlen(candidate) == bytes && memcmp(candidate, name, bytes) == 0;
}

int sampler_by_name(const char *name, size_t bytes, enum sampler_kind *ret)
{
    for (int kind = 0; kind < SAMPLER_KINDS; kind++) {
        const struct sampler_row *row = &sampler_rows[kind];
        if (is_named(row->name, name, bytes) || is_named(row->other_name, name, bytes)) {
            *ret = (enum sampler_kind)kind;
            return 0;
        }
    }
    return -ENOENT;
}
