/* daemon/backend/verdict.h - self-tests that a plugin has passed, remembered between starts.
 *
 * A check takes a tenth of a second, which would be most of a daemon's start, and its outcome
 * depends on what stands still: the plugin's bytes, the program that checks them, the options, the
 * processor, the C library, the kernel. A verdict is the report of a check that was passed, in a
 * file whose name is a hash over all of these, and over the start of the machine: after each one
 * everything is checked once. A changed plugin is another file, and finds nothing.
 *
 *   FOLDER/KEY.verdict    "gqad verdict 1 KEY CHECKSUM\n", then the report's lines
 *
 * Only host-memory plugins are remembered: a device, and the driver between, may be another one.
 *
 * Files must belong to this user alone and are hostile input otherwise; one that is not right in
 * every byte is as good as none. They are written under another name and renamed; nothing is
 * synced, as nothing is lost with them. There are 64 at most: the oldest go. */
#ifndef DAEMON_BACKEND_VERDICT_H
#define DAEMON_BACKEND_VERDICT_H

#include "daemon/backend/report.h"

#define VERDICTS_MAX           64u
#define VERDICT_HEAD_BYTES     65u /* of the first line */
#define VERDICT_FILE_BYTES_MAX (VERDICT_HEAD_BYTES + PLUGIN_REPORT_BYTES_MAX)

struct verdict_key {
    char text[33]; /* hexadecimal */
};

/* 0, or -errno where something that decides cannot be read: then nothing may be remembered. */
int verdict_key(const char *check_program, int image_fd, const char *options,
                struct verdict_key *ret);

/* Whether a report is of the kind that is kept: passed, usable, no device. */
bool verdict_may_be_kept(const struct plugin_report *r);

/* The report of an earlier check, or false. */
bool verdict_recall(const char *folder, const struct verdict_key *key, struct plugin_report *ret);
/* Where that fails there is no verdict. Makes the folder. */
void verdict_remember(const char *folder, const struct verdict_key *key, const char *report,
                      size_t bytes);
void verdict_forget(const char *folder, const struct verdict_key *key);

/* A file's bytes, whole: for verdict_recall(), and for the fuzzer. */
bool verdict_parse(const char *file, size_t bytes, const struct verdict_key *key,
                   struct plugin_report *ret);

#endif
