#include "daemon/sched/cost.h"

#define FADING      0.97 /* of a step's weight, with every step after it */
#define SWEEPS      16u  /* of coordinate descent, from the last solution on */
#define STIFFNESS   1e-3 /* pull to the last solution, where the data says nothing */
#define OUTLIER     4.0  /* a step that took longer than so many times the expected tells no more */
#define KNOWN_STEPS 4u
#define COUNT_MAX   1000u
#define MS_LEAST    1e-3

enum { BASE, DECODE, PREFILL, DEPTH };

static void features_of(const struct cost_work *work, double x[COST_TERMS])
{
    x[BASE] = 1;
    x[DECODE] = work->decode_rows;
    x[PREFILL] = work->prefill_rows;
    x[DEPTH] = work->depth_tokens;
}

static void solve(struct cost *c)
{
    double before[COST_TERMS];
    for (unsigned j = 0; j < COST_TERMS; j++) {
        before[j] = c->terms[j];
    }
    for (unsigned sweep = 0; sweep < SWEEPS; sweep++) {
        for (unsigned j = 0; j < COST_TERMS; j++) {
            double pull = STIFFNESS * c->products[j][j];
            double rest = c->with_ms[j] + pull * before[j];
            for (unsigned k = 0; k < COST_TERMS; k++) {
                rest -= k != j ? c->products[j][k] * c->terms[k] : 0;
            }
            double scale = c->products[j][j] + pull;
            double term = scale > 0 ? rest / scale : before[j];
            c->terms[j] = term > 0 ? term : 0;
        }
    }
}

void cost_learn(struct cost *c, const struct cost_work *work, double ms)
{
    double x[COST_TERMS];
    bool known = work->prefill_rows > 0 ? cost_knows_prefill(c) : cost_knows_decode(c);
    double most = known ? OUTLIER * cost_ms(c, work) : ms;
    ms = ms < most ? ms : most;
    ms = ms > MS_LEAST ? ms : MS_LEAST;
    features_of(work, x);
    for (unsigned j = 0; j < COST_TERMS; j++) {
        for (unsigned k = 0; k < COST_TERMS; k++) {
            c->products[j][k] = FADING * c->products[j][k] + x[j] * x[k] / (ms * ms);
        }
        c->with_ms[j] = FADING * c->with_ms[j] + x[j] / ms;
    }
    c->n_decode += work->decode_rows > 0 && c->n_decode < COUNT_MAX;
    c->n_prefill += work->prefill_rows > 0 && c->n_prefill < COUNT_MAX;
    solve(c);
}

double cost_ms(const struct cost *c, const struct cost_work *work)
{
    double x[COST_TERMS], ms = 0;
    features_of(work, x);
    for (unsigned j = 0; j < COST_TERMS; j++) {
        ms += x[j] * c->terms[j];
    }
    return ms;
}

bool cost_knows_prefill(const struct cost *c)
{
    return c->n_prefill >= KNOWN_STEPS;
}

bool cost_knows_decode(const struct cost *c)
{
    return c->n_decode >= KNOWN_STEPS;
}

double cost_row_ms(const struct cost *c, double depth)
{
    return c->terms[PREFILL] + c->terms[DEPTH] * depth;
}
