#include "daemon/model/shadow.h"

#include "daemon/model/model_internal.h"

#include <math.h>
#include <stdio.h>

#define FAULTS_IN_A_ROW_MAX 3u

struct model_shadow *model_shadow(struct model *m)
{
    return &m->shadow;
}

struct plan *model_set_shadow(struct model *m, struct plan *p, uint32_t every)
{
    struct model_shadow *s = &m->shadow;
    struct plan *old = s->plan;
    model_lock(m);
    s->plan = p;
    if (p != NULL) {
        s->n_seen = s->faults_in_a_row = 0;
        s->facts = (struct shadow_facts){.every = every};
        snprintf(s->facts.program, sizeof(s->facts.program), "%s", backend_spec(plan_backend(p)));
        snprintf(s->facts.attention, sizeof(s->facts.attention), "%s",
                 backend_spec(plan_attention(p)));
    }
    s->facts.active = p != NULL;
    model_unlock(m);
    return old;
}

bool model_shadow_facts(const struct model *m, struct shadow_facts *ret)
{
    model_lock(m);
    *ret = m->shadow.facts;
    model_unlock(m);
    return ret->every > 0;
}

static uint32_t best_of(const float *logits, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

static double log_sum(const float *logits, uint32_t n, float max)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)logits[i] - (double)max);
    }
    return (double)max + log(sum);
}

static double larger(double a, double b)
{
    return b > a ? b : a;
}

static void compare_row(struct shadow_facts *f, const float *a, const float *b, uint32_t n)
{
    uint32_t best_a = best_of(a, n), best_b = best_of(b, n);
    double sum_a = log_sum(a, n, a[best_a]), sum_b = log_sum(b, n, b[best_b]);
    double kl = 0, difference = 0, largest = 0;
    for (uint32_t i = 0; i < n; i++) {
        double log_a = (double)a[i] - sum_a, log_b = (double)b[i] - sum_b;
        kl += exp(log_a) * (log_a - log_b);
        difference = larger(difference, fabs((double)a[i] - (double)b[i]));
        largest = larger(largest, fabs((double)a[i]));
    }
    f->n_rows++;
    f->n_top1 += best_a != best_b;
    f->abs_max = larger(f->abs_max, difference);
    f->rel_max = larger(f->rel_max, largest > 0 ? difference / largest : 0);
    f->kl_max = larger(f->kl_max, kl);
}

void model_shadow_compare(struct model *m, const float *own, const float *other, uint32_t n_rows,
                          uint64_t own_ns, uint64_t other_ns)
{
    struct shadow_facts f = m->shadow.facts; /* this thread alone writes them */
    for (uint32_t i = 0; i < n_rows; i++) {
        size_t at = (size_t)i * m->shape.n_vocab;
        compare_row(&f, own + at, other + at, m->shape.n_vocab);
    }
    f.n_steps++;
    f.ns += other_ns;
    f.model_ns += own_ns;
    m->shadow.faults_in_a_row = 0;
    model_lock(m);
    m->shadow.facts = f;
    model_unlock(m);
}

bool model_shadow_fault(struct model *m, const char *what)
{
    struct model_shadow *s = &m->shadow;
    model_lock(m);
    s->facts.n_faults++;
    snprintf(s->facts.last_fault, sizeof(s->facts.last_fault), "%s", what);
    model_unlock(m);
    return ++s->faults_in_a_row == FAULTS_IN_A_ROW_MAX;
}
