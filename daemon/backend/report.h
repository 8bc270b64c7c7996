/* daemon/backend/report.h - what gqa-plugin-check tells of a plugin: "key=value" lines.
 *
 * The lines come from a process in which a plugin's code ran, or from a file of the cache: nothing
 * in them is believed beyond its field's size. */
#ifndef DAEMON_BACKEND_REPORT_H
#define DAEMON_BACKEND_REPORT_H

#include <gqa/plugin.h>
#include <stdbool.h>
#include <stddef.h>

#define PLUGIN_REPORT_BYTES_MAX 8192u
#define PLUGIN_CASES_MAX        32u

struct plugin_case { /* one problem of the self-test */
    char name[64];
    char verdict[24]; /* "ok", "not supported", "wrong" */
    float error;      /* the largest difference from the reference */
};

struct plugin_report {
    char name[32], version[32], build[128];
    char interfaces[128];  /* comma-separated */
    uint32_t caps;         /* enum gqa_attn_caps */
    uint32_t threads_left; /* that outlive close(): it can never be unmapped */
    struct gqa_probe probe;
    struct plugin_case cases[PLUGIN_CASES_MAX];
    uint32_t n_cases;
    bool complete;   /* the last line came: nothing in the plugin ended the process early */
    bool remembered; /* of an earlier check: see verdict.h */
};

/* Takes what it knows of any bytes; the last of two lines of one key counts. */
void plugin_report_parse(const char *text, size_t bytes, struct plugin_report *ret);

/* Whether the name is one, of a-z, 0-9, '_' and '-': it stands in specs, logs and lists. */
bool plugin_report_has_name(const struct plugin_report *r);

#endif
