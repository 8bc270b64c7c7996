/* daemon/backend/check.h - probe and self-test of a plugin in a process of their own.
 *
 * gqa-plugin-check loads the sealed copy, probes, opens, compares a few problems with the reference
 * and prints "key=value" lines; a plugin that crashes, hangs or computes nonsense ends that process
 * and nothing else. */
#ifndef DAEMON_BACKEND_CHECK_H
#define DAEMON_BACKEND_CHECK_H

#include <gqa/plugin.h>

#define PLUGIN_CASES_MAX 32u

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
};

/* Runs program on the image's descriptor, with options for the plugin, for at most timeout_ms. 0
 * and *ret (probe.usable may be 0, with the plugin's own words); otherwise -errno with a reason: it
 * crashed, hung, failed. */
int plugin_check(const char *program, int image_fd, const char *options, unsigned timeout_ms,
                 struct plugin_report *ret, struct gqa_reason *reason);

#endif
