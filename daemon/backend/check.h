/* daemon/backend/check.h - probe and self-test of a plugin in a process of their own.
 *
 * gqa-plugin-check loads the sealed copy, probes, opens, compares a few problems with the reference
 * and prints "key=value" lines; a plugin that crashes, hangs or computes nonsense ends that process
 * and nothing else. What has passed is remembered, where there is a folder for that. */
#ifndef DAEMON_BACKEND_CHECK_H
#define DAEMON_BACKEND_CHECK_H

#include "daemon/backend/report.h"

struct plugin_checker {
    const char *program;  /* gqa-plugin-check */
    unsigned timeout_ms;  /* of one child */
    const char *verdicts; /* folder of verdict.h, or NULL: nothing is remembered */
};

/* Runs the program on the image's descriptor, with options for the plugin. 0 and *ret (probe.usable
 * may be 0, with the plugin's own words); otherwise -errno with a reason: it crashed, hung, failed.
 * A pass is remembered, anything else forgotten. */
int plugin_check(const struct plugin_checker *k, int image_fd, const char *options,
                 struct plugin_report *ret, struct gqa_reason *reason);

/* The same, unless these bytes have passed here before. */
int plugin_check_once(const struct plugin_checker *k, int image_fd, const char *options,
                      struct plugin_report *ret, struct gqa_reason *reason);

#endif
