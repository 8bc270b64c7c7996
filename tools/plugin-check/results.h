/* tools/plugin-check/results.h - what was found, for people, for the daemon, or as JSON.
 *
 * People and the daemon get each line when it is known; JSON is one document at the end. */
#ifndef TOOLS_PLUGIN_CHECK_RESULTS_H
#define TOOLS_PLUGIN_CHECK_RESULTS_H

#include <gqa/plugin.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>

enum results_form { RESULTS_TEXT, RESULTS_REPORT, RESULTS_JSON };

struct results {
    FILE *out;
    enum results_form form;
    json_t *root;    /* JSON only */
    const char **at; /* the problem or family that runs now, for whoever finds this process dead;
                        the name stays where it is */
};

/* out is the caller's. 0 or -ENOMEM. */
int results_init(struct results *r, FILE *out, enum results_form form);
/* Prints what is left to print. 0, or -EIO. */
int results_finish(struct results *r);

/* A fact of the plugin. */
void results_text(struct results *r, const char *key, const char *value);
void results_number(struct results *r, const char *key, uint32_t value);
/* The same of a comma-separated list. */
void results_list(struct results *r, const char *key, const char *value);
void results_caps(struct results *r, uint32_t caps);

/* One problem of the self-test. why: of what is not supported, or "". */
void results_case(struct results *r, const char *name, const char *verdict, float error,
                  const char *why);

/* A family of the matrix: problems that were run, and those that the plugin does not support. */
struct results_family {
    const char *interface, *name;
    uint32_t n_run, n_skipped;
    float worst, tolerance; /* the largest difference; 0 and 0: bits must be equal */
    char why[96];           /* what the plugin said of the first one that it does not support */
};
/* One that is not run; reason->text is empty then. */
void results_skip(struct results_family *f, struct gqa_reason *reason);
void results_family(struct results *r, const struct results_family *f, bool right);

/* A line of the bench. */
struct results_speed {
    const char *what, *unit; /* "attention decode ...", "GB/s" or "GFLOP/s" */
    double rate, limit;      /* and what the machine gave a plain loop in the same run */
    double us;               /* of one call */
};
void results_speed(struct results *r, const struct results_speed *s);

#endif
