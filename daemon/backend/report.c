#include "daemon/backend/report.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void copy_text(char *dst, size_t bytes, const char *src)
{
    snprintf(dst, bytes, "%s", src);
}

/* "VERDICT,ERROR,NAME" */
static void take_case(struct plugin_report *r, const char *value)
{
    struct plugin_case c = {""};
    if (r->n_cases < PLUGIN_CASES_MAX &&
        sscanf(value, "%23[^,],%f,%63[^\n]", c.verdict, &c.error, c.name) == 3) {
        r->cases[r->n_cases++] = c;
    }
}

static void take_line(struct plugin_report *r, const char *key, const char *value)
{
    const struct {
        const char *key;
        char *dst;
        size_t bytes;
    } texts[] = {
        {"name", r->name, sizeof(r->name)},
        {"version", r->version, sizeof(r->version)},
        {"build", r->build, sizeof(r->build)},
        {"interfaces", r->interfaces, sizeof(r->interfaces)},
        {"isa", r->probe.isa, sizeof(r->probe.isa)},
        {"isas", r->probe.isas, sizeof(r->probe.isas)},
        {"device", r->probe.device, sizeof(r->probe.device)},
        {"reason", r->probe.reason, sizeof(r->probe.reason)},
    };
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        if (strcmp(key, texts[i].key) == 0) {
            copy_text(texts[i].dst, texts[i].bytes, value);
        }
    }
    if (strcmp(key, "usable") == 0) {
        r->probe.usable = strcmp(value, "1") == 0;
    } else if (strcmp(key, "score") == 0) {
        r->probe.score = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "caps") == 0) {
        r->caps = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "threads_left") == 0) {
        r->threads_left = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "case") == 0) {
        take_case(r, value);
    } else if (strcmp(key, "devices") == 0) {
        r->probe.n_devices = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "verdict") == 0) {
        r->complete = true;
    }
}

void plugin_report_parse(const char *text, size_t bytes, struct plugin_report *ret)
{
    char line[PLUGIN_REPORT_BYTES_MAX];
    *ret = (struct plugin_report){.probe.struct_size = sizeof(ret->probe)};
    for (size_t at = 0; at < bytes;) {
        const char *end = memchr(text + at, '\n', bytes - at);
        size_t n = end != NULL ? (size_t)(end - text) - at : bytes - at;
        size_t kept = n < sizeof(line) ? n : sizeof(line) - 1;
        memcpy(line, text + at, kept);
        line[kept] = '\0';
        char *equals = strchr(line, '=');
        if (equals != NULL) {
            *equals = '\0';
            take_line(ret, line, equals + 1);
        }
        at += n + 1;
    }
}

/* Names stand in specs, logs and lists. */
bool plugin_report_has_name(const struct plugin_report *r)
{
    size_t bytes = strspn(r->name, "abcdefghijklmnopqrstuvwxyz0123456789_-");
    return bytes > 0 && r->name[bytes] == '\0';
}
