#include "tools/plugin-check/results.h"

#include <errno.h>
#include <math.h>
#include <string.h>

int results_init(struct results *r, FILE *out, enum results_form form)
{
    *r = (struct results){.out = out, .form = form};
    if (form == RESULTS_JSON) {
        r->root = json_object();
        return r->root != NULL ? 0 : -ENOMEM;
    }
    return 0;
}

int results_finish(struct results *r)
{
    if (r->root != NULL) {
        json_dumpf(r->root, r->out, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
        fputc('\n', r->out);
        json_decref(r->root);
        r->root = NULL;
    }
    return fflush(r->out) == 0 && !ferror(r->out) ? 0 : -EIO;
}

/* A plugin's words need not be UTF-8. */
static json_t *json_words(const char *text)
{
    json_t *s = json_string(text);
    return s != NULL ? s : json_string("(not UTF-8)");
}

/* JSON has no infinity. */
static json_t *json_float(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

/* The array of that key, made when it is wanted first. */
static json_t *array_of(struct results *r, const char *key)
{
    if (json_object_get(r->root, key) == NULL) {
        json_object_set_new(r->root, key, json_array());
    }
    return json_object_get(r->root, key);
}

void results_text(struct results *r, const char *key, const char *value)
{
    if (r->form == RESULTS_JSON) {
        json_object_set_new(r->root, key, json_words(value));
    } else {
        fprintf(r->out, "%s=%s\n", key, value);
    }
}

void results_number(struct results *r, const char *key, uint32_t value)
{
    if (r->form == RESULTS_JSON) {
        json_object_set_new(r->root, key, json_integer(value));
    } else {
        fprintf(r->out, "%s=%u\n", key, value);
    }
}

void results_list(struct results *r, const char *key, const char *value)
{
    if (r->form != RESULTS_JSON) {
        results_text(r, key, value);
        return;
    }
    json_t *list = array_of(r, key);
    for (const char *at = value; *at != '\0';) {
        size_t n = strcspn(at, ",");
        json_array_append_new(list, json_stringn(at, n));
        at += n + (at[n] == ',');
    }
}

void results_caps(struct results *r, uint32_t caps)
{
    static const char *const names[] = {"shared",    "sparse",  "tree",
                                        "no_commit", "observe", "mutual"};
    if (r->form != RESULTS_JSON) {
        results_number(r, "caps", caps);
        return;
    }
    json_t *list = array_of(r, "attention");
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (caps >> i & 1) {
            json_array_append_new(list, json_string(names[i]));
        }
    }
}

void results_case(struct results *r, const char *name, const char *verdict, float error,
                  const char *why)
{
    if (r->form == RESULTS_JSON) {
        json_array_append_new(array_of(r, "selftest"),
                              json_pack("{s:s, s:s, s:o, s:o}", "name", name, "verdict", verdict,
                                        "error", json_float((double)error), "why",
                                        json_words(why)));
    } else if (r->form == RESULTS_REPORT) {
        /* No comma of a name ends it: it comes last. */
        fprintf(r->out, "case=%s,%.9g,%s\n", verdict, (double)error, name);
    } else {
        fprintf(r->out, "%-47s %s  %.3g%s%s\n", name,
                strcmp(verdict, "wrong") == 0 ? "WRONG" : verdict, (double)error,
                why[0] != '\0' ? "  " : "", why);
    }
}

void results_skip(struct results_family *f, struct gqa_reason *reason)
{
    if (f->n_skipped++ == 0) {
        snprintf(f->why, sizeof(f->why), "%.95s", reason->text);
    }
    reason->text[0] = '\0';
}

void results_family(struct results *r, const struct results_family *f, bool right)
{
    const char *verdict = !right ? "wrong" : f->n_run == 0 ? "not supported" : "ok";
    if (r->form == RESULTS_JSON) {
        json_array_append_new(array_of(r, "matrix"),
                              json_pack("{s:s, s:s, s:i, s:i, s:o, s:o, s:s, s:o}", "interface",
                                        f->interface, "family", f->name, "run", (int)f->n_run,
                                        "not_supported", (int)f->n_skipped, "error",
                                        json_float((double)f->worst), "tolerance",
                                        json_float((double)f->tolerance), "verdict", verdict, "why",
                                        json_words(f->why)));
    } else if (r->form == RESULTS_TEXT) {
        fprintf(r->out, "%-47s %3u run, %3u NOT SUPPORTED  %.3g  %s\n", f->name, f->n_run,
                f->n_skipped, (double)f->worst, right ? "ok" : "WRONG");
        if (f->why[0] != '\0') {
            fprintf(r->out, "    the first: %s\n", f->why);
        }
    }
}

void results_speed(struct results *r, const struct results_speed *s)
{
    double share = s->limit > 0 ? s->rate / s->limit : 0;
    if (r->form == RESULTS_JSON) {
        json_array_append_new(array_of(r, "bench"),
                              json_pack("{s:s, s:f, s:s, s:f, s:f, s:f}", "what", s->what, "rate",
                                        s->rate, "unit", s->unit, "limit", s->limit, "share", share,
                                        "us", s->us));
    } else {
        fprintf(r->out, "%-52s %9.1f us %9.2f %-7s %3.0f %% of %.2f\n", s->what, s->us, s->rate,
                s->unit, 100 * share, s->limit);
    }
}
