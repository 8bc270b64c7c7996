/* daemon/model/sampler_candidates.c - the candidates of one step: order, softmax, draw. */
#include "daemon/model/sampler_internal.h"

#include <math.h>

#define LANES 16u /* logits that are looked at together */

static bool better(struct candidate a, struct candidate b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

/* Restores the heap of k candidates, the worst at its root, after item[root] was replaced. */
static void sift_down(struct candidate *item, size_t k, size_t root)
{
    struct candidate moved = item[root];
    for (;;) {
        size_t child = 2 * root + 1;
        if (child >= k) {
            break;
        }
        if (child + 1 < k && better(item[child], item[child + 1])) {
            child++;
        }
        if (!better(moved, item[child])) {
            break;
        }
        item[root] = item[child];
        root = child;
    }
    item[root] = moved;
}

static void make_heap(struct candidate *item, size_t k)
{
    for (size_t i = k / 2; i-- > 0;) {
        sift_down(item, k, i);
    }
}

/* From a heap to an order, best first. */
static void unwind_heap(struct candidate *item, size_t k)
{
    for (size_t end = k; end-- > 1;) {
        struct candidate worst = item[0];
        item[0] = item[end];
        item[end] = worst;
        sift_down(item, end, 0);
    }
}

void candidates_sort(struct candidates *c, size_t k)
{
    if (k <= c->n_sorted) {
        return;
    }
    struct candidate *item = c->item;
    make_heap(item, k);
    float least = item[0].logit; /* most of a large vocabulary fails this one comparison */
    for (size_t i = k; i < c->n; i++) {
        if (item[i].logit >= least && better(item[i], item[0])) {
            struct candidate out = item[0];
            item[0] = item[i];
            item[i] = out;
            sift_down(item, k, 0);
            least = item[0].logit;
        }
    }
    unwind_heap(item, k);
    c->n_sorted = k;
}

static bool any_above(const float *values, float bound)
{
    int any = 0;
    for (size_t j = 0; j < LANES; j++) {
        any |= values[j] > bound;
    }
    return any;
}

void candidates_take_best(struct candidates *c, const float *logits, size_t n, size_t k)
{
    struct candidate *item = c->item;
    for (size_t i = 0; i < k; i++) {
        item[i] = (struct candidate){logits[i], (int32_t)i};
    }
    make_heap(item, k);
    for (size_t i = k; i < n;) {
        if (n - i >= LANES && !any_above(logits + i, item[0].logit)) {
            i += LANES; /* nearly always */
            continue;
        }
        for (size_t end = n - i < LANES ? n : i + LANES; i < end; i++) {
            if (logits[i] > item[0].logit) { /* of equal ones the earlier is better */
                item[0] = (struct candidate){logits[i], (int32_t)i};
                sift_down(item, k, 0);
            }
        }
    }
    unwind_heap(item, k);
    candidates_keep_first(c, k);
}

float candidates_max(const struct candidates *c)
{
    if (c->n_sorted > 0) {
        return c->item[0].logit;
    }
    float max = c->item[0].logit;
    for (size_t i = 1; i < c->n; i++) {
        max = c->item[i].logit > max ? c->item[i].logit : max;
    }
    return max;
}

void candidates_keep_first(struct candidates *c, size_t k)
{
    c->n = k;
    c->n_sorted = k;
}

void candidates_keep_above(struct candidates *c, float least, size_t keep)
{
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++) {
        n += c->item[i].logit >= least;
    }
    if (n < keep) {
        candidates_sort(c, keep);
        candidates_keep_first(c, keep);
        return;
    }
    size_t kept = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (c->item[i].logit >= least) {
            c->item[kept++] = c->item[i];
        }
    }
    c->n = kept;
    c->n_sorted = c->n_sorted < kept ? c->n_sorted : kept;
}

struct softmax candidates_softmax(const struct candidates *c)
{
    struct softmax s = {.max = candidates_max(c)};
    for (size_t i = 0; i < c->n; i++) {
        float below = c->item[i].logit - s.max;
        double share = sampler_exp(below);
        s.sum += share;
        s.mean += share > 0 ? share * below : 0; /* -inf has no share */
    }
    s.mean /= s.sum;
    return s;
}

size_t candidates_draw(const struct candidates *c, struct pcg32 *rng)
{
    float max = candidates_max(c);
    double sum = 0;
    for (size_t i = 0; i < c->n; i++) {
        sum += sampler_exp(c->item[i].logit - max);
    }
    double left = pcg32_unit(rng) * sum;
    size_t last = 0; /* replaced below: the best one's share is 1 */
    for (size_t i = 0; i < c->n; i++) {
        double p = sampler_exp(c->item[i].logit - max);
        if (p == 0) {
            continue;
        }
        last = i;
        left -= p;
        if (left < 0) {
            break;
        }
    }
    return last; /* rounding can leave a rest: then it is the last that is possible */
}
