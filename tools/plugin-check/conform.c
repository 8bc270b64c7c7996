#include "tools/plugin-check/conform.h"

#include "tools/plugin-check/problem.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t n_floats(const struct problem_spec *s)
{
    return (size_t)s->n_rows * s->n_heads * s->dim;
}

static int fail(struct gqa_reason *reason, const struct problem_spec *s, const char *what)
{
    snprintf(reason->text, sizeof(reason->text),
             "%s: %u heads over %u groups of %u, KV type %u, window %u, past %u, rows %u: %s",
             s->name, s->n_heads, s->n_kv_heads, s->dim, s->kv_type, s->window, s->n_past,
             s->n_rows, what);
    return -EBADMSG;
}

static int compare(struct results_family *f, const struct problem_spec *s, const float *truth,
                   const float *got, float tolerance, struct gqa_reason *reason)
{
    for (size_t i = 0; i < n_floats(s); i++) {
        float difference = fabsf(truth[i] - got[i]);
        if (!(difference <= tolerance)) {
            char what[64];
            snprintf(what, sizeof(what), "wrong by %g, tolerance %g", (double)difference,
                     (double)tolerance);
            return fail(reason, s, what);
        }
        f->worst = difference > f->worst ? difference : f->worst;
    }
    return 0;
}

/* One problem against the reference. */
static int check_case(const struct conform *c, struct results_family *f,
                      const struct problem_spec *s, struct gqa_reason *reason)
{
    const struct problem_way plain = {0};
    float *truth = NULL, *got = NULL;
    int rc = problem_run_as(s, &plain, c->reference, c->reference_context, &truth, reason);
    rc = rc < 0 ? rc : problem_run_as(s, &plain, c->attention, c->context, &got, reason);
    if (rc == -ENOTSUP) {
        results_skip(f, reason);
        rc = 0;
    } else if (rc < 0) {
        rc = fail(reason, s, strerror(-rc));
    } else {
        f->n_run++;
        rc = compare(f, s, truth, got, c->tolerance, reason);
    }
    free(truth);
    free(got);
    return rc;
}

/* One problem in two ways that must give the same bits. */
static int check_way(const struct conform *c, struct results_family *f,
                     const struct problem_spec *s, const struct problem_way *way, void *context,
                     struct gqa_reason *reason)
{
    const struct problem_way plain = {0};
    float *truth = NULL, *got = NULL;
    int rc = problem_run_as(s, &plain, c->attention, c->context, &truth, reason);
    rc = rc < 0 ? rc : problem_run_as(s, way, c->attention, context, &got, reason);
    if (rc == -ENOTSUP) {
        results_skip(f, reason);
        rc = 0;
    } else if (rc < 0) {
        rc = fail(reason, s, strerror(-rc));
    } else {
        f->n_run++;
        bool same = memcmp(truth, got, n_floats(s) * sizeof(float)) == 0;
        rc = same ? 0 : fail(reason, s, "other bits than the same rows gave alone");
    }
    free(truth);
    free(got);
    return rc;
}

static struct results_family family(const struct conform *c, const char *name, bool bits)
{
    if (c->results != NULL && c->results->at != NULL) {
        *c->results->at = name;
    }
    return (struct results_family){
        .interface = GQA_ATTENTION_0, .name = name, .tolerance = bits ? 0 : c->tolerance};
}

/* ---- shapes ------------------------------------------------------------------------------ */

static const uint32_t dims[] = {16, 32, 64, 80, 96, 128, 256};
static const uint32_t ratios[] = {1, 2, 3, 4, 5, 6, 7, 8, 32};
static const uint32_t types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0,
                                 GQA_TYPE_Q4_0};
#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
/* Of problems that are about something else: what every backend on a device has, and the exact one.
 */
static const uint32_t plain_types[] = {GQA_TYPE_F16, GQA_TYPE_F32};
#define N_PLAIN (sizeof(plain_types) / sizeof(plain_types[0]))

static int check_shapes(const struct conform *c, bool chunk, struct gqa_reason *reason)
{
    struct results_family f =
        family(c, chunk ? "head dims and groups, a chunk" : "head dims and groups, decode", false);
    int rc = 0;
    if (!conform_wants(c, f.name)) {
        return 0;
    }
    for (size_t i = 0; rc == 0 && i < COUNT(dims) * COUNT(ratios) * N_PLAIN; i++) {
        uint32_t ratio = ratios[i / N_PLAIN % COUNT(ratios)];
        const struct problem_spec s = {.name = f.name,
                                       .n_heads = 2 * ratio,
                                       .n_kv_heads = 2,
                                       .dim = dims[i / N_PLAIN / COUNT(ratios)],
                                       .kv_type = plain_types[i % N_PLAIN],
                                       .n_past = chunk ? 60 : 130,
                                       .n_rows = chunk ? 9 : 1};
        rc = check_case(c, &f, &s, reason);
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

static int check_types(const struct conform *c, struct gqa_reason *reason)
{
    struct results_family f = family(c, "KV types, plain, windowed, capped, sinks", false);
    int rc = 0;
    if (!conform_wants(c, f.name)) {
        return 0;
    }
    for (size_t t = 0; rc == 0 && t < COUNT(types); t++) {
        for (uint32_t k = 0; rc == 0 && k < 8; k++) {
            const struct problem_spec s = {
                f.name,       8,   2, 64, types[t], k & 1 ? 30 : 0, k & 2 ? 5 : 0,
                (k & 4) != 0, 290, 5, 0,  false};
            rc = check_case(c, &f, &s, reason);
        }
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

static int check_masks(const struct conform *c, struct gqa_reason *reason)
{
    struct results_family f = family(c, "trees, frames, no commit, mutual, nothing seen", false);
    const uint32_t caps[] = {GQA_ATTN_CAP_TREE, GQA_ATTN_CAP_NO_COMMIT,
                             GQA_ATTN_CAP_TREE | GQA_ATTN_CAP_NO_COMMIT,
                             GQA_ATTN_CAP_MUTUAL | GQA_ATTN_CAP_NO_COMMIT};
    int rc = 0;
    if (!conform_wants(c, f.name)) {
        return 0;
    }
    for (size_t i = 0; rc == 0 && i < COUNT(caps) * 4 * N_PLAIN; i++) {
        uint32_t k = i / N_PLAIN % 4;
        const struct problem_spec s = {.name = f.name,
                                       .n_heads = 8,
                                       .n_kv_heads = 2,
                                       .dim = 32,
                                       .kv_type = plain_types[i % N_PLAIN],
                                       .window = k & 1 ? 7 : 0,
                                       .n_past = k & 2 ? 100 : 0,
                                       .n_rows = 70,
                                       .caps = caps[i / N_PLAIN / 4]};
        rc = check_case(c, &f, &s, reason);
    }
    for (uint32_t i = 0; rc == 0 && i < 2 * N_PLAIN; i++) {
        const struct problem_spec frames = {.name = f.name,
                                            .n_heads = 8,
                                            .n_kv_heads = 2,
                                            .dim = 32,
                                            .kv_type = plain_types[i % N_PLAIN],
                                            .n_past = i < N_PLAIN ? 30 : 100,
                                            .n_rows = 70,
                                            .caps = GQA_ATTN_CAP_TREE,
                                            .mask = PROBLEM_FRAMES};
        rc = check_case(c, &f, &frames, reason);
    }
    for (uint32_t i = 0; rc == 0 && i < N_PLAIN; i++) {
        const struct problem_spec blank = {.name = f.name,
                                           .n_heads = 4,
                                           .n_kv_heads = 2,
                                           .dim = 32,
                                           .kv_type = plain_types[i],
                                           .n_rows = 5,
                                           .caps = GQA_ATTN_CAP_TREE,
                                           .mask = PROBLEM_BLANK};
        rc = check_case(c, &f, &blank, reason);
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

#define N_VIEWS 12u /* that a type of KV is seen through */

/* Sinks in one segment and in two, that meet the recent ones there or not; queries that turn;
 * blocks that are gone. */
static struct problem_spec view_spec(const char *name, size_t type, uint32_t k)
{
    static const uint32_t n_sinks[] = {5, 64, 300};
    return (struct problem_spec){.name = name,
                                 .n_heads = 8,
                                 .n_kv_heads = 2,
                                 .dim = 64,
                                 .kv_type = types[type],
                                 .with_sinks = type == 1,
                                 .n_past = 700,
                                 .n_rows = 40,
                                 .caps = GQA_ATTN_CAP_SPARSE,
                                 .view = {n_sinks[k / 4], 130, k & 1 ? 256 : 0, (k & 2) != 0}};
}

static int check_views(const struct conform *c, struct gqa_reason *reason)
{
    struct results_family f = family(c, "views: sinks, recent, dropped, turned", false);
    int rc = 0;
    if (!conform_wants(c, f.name)) {
        return 0;
    }
    for (size_t t = 0; rc == 0 && t < COUNT(types); t++) {
        for (uint32_t k = 0; rc == 0 && k < N_VIEWS; k++) {
            const struct problem_spec s = view_spec(f.name, t, k);
            rc = check_case(c, &f, &s, reason);
        }
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

/* A row sees its view alike when it is cut off, and among others that see all. */
static int check_view_bits(const struct conform *c, struct gqa_reason *reason)
{
    static const struct problem_way ways[] = {
        {.chunk = 1}, {.chunk = 13}, {.n_copies = 2}, {.n_copies = 2, .shared = true}};
    struct results_family f = family(c, "views, same bits in chunks and in company", true);
    int rc = 0;
    if (!conform_wants(c, f.name)) {
        return 0;
    }
    for (size_t t = 0; rc == 0 && t < COUNT(types); t++) {
        for (uint32_t k = 0; rc == 0 && k < N_VIEWS; k += 3) {
            struct problem_spec s = view_spec(f.name, t, k);
            s.n_past = s.view.n_dropped > 0 ? 700 : s.view.n_sinks + 110; /* some see all of it */
            struct problem_way way = ways[k / 3];
            way.shared = way.shared && (c->attention->caps & GQA_ATTN_CAP_SHARED);
            rc = check_way(c, &f, &s, &way, c->context, reason);
        }
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

/* Votes against the reference's, and the same bits when their rows come one by one. */
static int check_votes_of(const struct conform *c, struct results_family *f,
                          const struct problem_spec *s, struct gqa_reason *reason)
{
    float *truth = NULL, *got = NULL, *ones = NULL;
    uint32_t n = 0;
    int rc = problem_vote(s, 20, c->reference, c->reference_context, &truth, &n, reason);
    rc = rc < 0 ? rc : problem_vote(s, 20, c->attention, c->context, &got, &n, reason);
    rc = rc < 0 ? rc : problem_vote(s, 1, c->attention, c->context, &ones, &n, reason);
    if (rc == -ENOTSUP) {
        results_skip(f, reason);
        rc = 0;
    } else if (rc < 0) {
        rc = fail(reason, s, strerror(-rc));
    } else {
        f->n_run++;
        rc =
            memcmp(got, ones, n * sizeof(*got)) == 0 ? 0 : fail(reason, s, "other votes in chunks");
        for (uint32_t i = 0; rc == 0 && i < n; i++) {
            float difference = fabsf(truth[i] - got[i]);
            rc = difference <= c->tolerance ? 0 : fail(reason, s, "wrong votes");
            f->worst = difference > f->worst ? difference : f->worst;
        }
    }
    free(truth);
    free(got);
    free(ones);
    return rc;
}

static int check_votes(const struct conform *c, struct gqa_reason *reason)
{
    struct results_family f = family(c, "votes", false);
    int rc = 0;
    if (!conform_wants(c, f.name)) {
        return 0;
    }
    for (size_t t = 0; rc == 0 && t < COUNT(types); t++) {
        for (uint32_t k = 0; rc == 0 && k < 4; k++) {
            const struct problem_spec s = {.name = f.name,
                                           .n_heads = k & 1 ? 8 : 6,
                                           .n_kv_heads = 2,
                                           .dim = 64,
                                           .kv_type = types[t],
                                           .softcap = k & 2 ? 5 : 0,
                                           .with_sinks = k == 3,
                                           .n_past = 600,
                                           .n_rows = 20};
            rc = check_votes_of(c, &f, &s, reason);
        }
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

/* ---- bits -------------------------------------------------------------------------------- */

static int check_bits(const struct conform *c, const char *name, const struct problem_way *way,
                      void *context, struct gqa_reason *reason)
{
    struct results_family f = family(c, name, true);
    int rc = 0;
    if (!conform_wants(c, f.name)) {
        return 0;
    }
    for (size_t t = 0; rc == 0 && t < COUNT(types); t++) {
        for (uint32_t k = 0; rc == 0 && k < 4; k++) {
            const struct problem_spec s = {
                name, 8, 2, 64, types[t], k & 1 ? 50 : 0, 0, 0, k & 2 ? 700 : 30, 70, 0, false};
            rc = check_way(c, &f, &s, way, context, reason);
        }
    }
    results_family(c->results, &f, rc == 0);
    return rc;
}

int conform_run(const struct conform *c, struct gqa_reason *reason)
{
    static const struct {
        const char *name;
        struct problem_way way;
        uint32_t caps; /* that it takes */
    } ways[] = {
        {"same bits, row by row", {.chunk = 1}, 0},
        {"same bits, in chunks of 13", {.chunk = 13}, 0},
        {"same bits, in company", {.n_copies = 2}, 0},
        {"same bits, with a shared prefix", {.n_copies = 2, .shared = true}, GQA_ATTN_CAP_SHARED},
        {"same bits, with nested shared prefixes",
         {.n_copies = 4, .shared = true},
         GQA_ATTN_CAP_SHARED},
    };
    const struct problem_way plain = {0};
    int rc = check_shapes(c, false, reason);
    rc = rc < 0 ? rc : check_shapes(c, true, reason);
    rc = rc < 0 ? rc : check_types(c, reason);
    rc = rc < 0 ? rc : check_masks(c, reason);
    rc = rc < 0 ? rc : check_views(c, reason);
    rc = rc < 0 ? rc : check_view_bits(c, reason);
    rc = rc < 0 ? rc : check_votes(c, reason);
    for (size_t i = 0; rc == 0 && i < COUNT(ways); i++) {
        if ((ways[i].caps & ~c->attention->caps) == 0) {
            rc = check_bits(c, ways[i].name, &ways[i].way, c->context, reason);
        } else {
            struct results_family f = family(c, ways[i].name, true);
            f.n_skipped = 1;
            snprintf(f.why, sizeof(f.why), "its caps are without GQA_ATTN_CAP_SHARED");
            if (conform_wants(c, f.name)) {
                results_family(c->results, &f, true);
            }
        }
    }
    return rc < 0 ? rc
                  : check_bits(c, "same bits, by other workers", &plain, c->crowd_context, reason);
}
