/* client/cli/top_page.c - a view of the daemon as lines of text. */
#include "client/cli/top.h"

#include <pwd.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---- lines ------------------------------------------------------------------------------- */

static void add(struct top_page *p, enum top_style style, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static void add(struct top_page *p, enum top_style style, const char *format, ...)
{
    va_list args;
    if (p->n_lines == TOP_LINES_MAX) {
        return;
    }
    char *text = p->lines[p->n_lines].text;
    va_start(args, format);
    vsnprintf(text, p->columns + 1, format, args);
    va_end(args);
    p->lines[p->n_lines++].style = style;
}

/* What others chose, made harmless for a terminal. */
static const char *printable(const char *text, char *buffer, size_t room)
{
    size_t n = 0;
    for (; text[n] != '\0' && n + 1 < room; n++) {
        buffer[n] = text[n] >= ' ' && text[n] < 0x7f ? text[n] : '?';
    }
    buffer[n] = '\0';
    return buffer;
}

static double at(const json_t *object, const char *outer, const char *key)
{
    return cli_num(json_object_get(object, outer), key, 0);
}

static double share(double part, double whole)
{
    return whole > 0 ? 100 * part / whole : 0;
}

/* ---- the head ---------------------------------------------------------------------------- */

static double per_second(const struct top_view *now, const struct top_view *before, const char *key)
{
    double seconds = cli_num(now->stats, "uptime_s", 0) - cli_num(before->stats, "uptime_s", 0);
    double count = cli_num(now->stats, key, 0) - cli_num(before->stats, key, 0);
    return seconds > 0 && count > 0 ? count / seconds : 0;
}

static void add_latency(struct top_page *p, const json_t *stats, const char *title, const char *key,
                        const char *title2, const char *key2)
{
    const json_t *all = json_object_get(stats, "latency");
    add(p, TOP_PLAIN, "%-12s p50 %8.1f  p99 %8.1f ms   %-5s p50 %7.1f  p99 %7.1f ms", title,
        at(all, key, "p50") * 1e3, at(all, key, "p99") * 1e3, title2, at(all, key2, "p50") * 1e3,
        at(all, key2, "p99") * 1e3);
}

static void add_cache(struct top_page *p, const json_t *kv)
{
    char used[CLI_SIZE_CHARS], max[CLI_SIZE_CHARS], store[CLI_SIZE_CHARS], state[48];
    add(p, TOP_PLAIN, "cache        %s of %s (%.0f %%)  hits %.1f %% of %.0f tokens",
        cli_bytes(cli_num(kv, "memory_bytes_used", 0), used),
        cli_bytes(cli_num(kv, "memory_bytes_max", 0), max),
        100 * cli_num(kv, "kv_cache_usage_perc", 0),
        share(cli_num(kv, "prefix_cache_hits", 0), cli_num(kv, "prefix_cache_queries", 0)),
        cli_num(kv, "prefix_cache_queries", 0));
    add(p, TOP_PLAIN, "store        %s  %.0f blocks  %.0f pending  %s",
        cli_bytes(cli_num(kv, "store_bytes", 0), store), cli_num(kv, "blocks", 0),
        cli_num(kv, "store_pending", 0),
        printable(cli_str(kv, "store_state", "?"), state, sizeof(state)));
}

static void add_head(struct top_page *p, const struct top_view *now, const struct top_view *before)
{
    const json_t *s = now->stats;
    unsigned long up = (unsigned long)cli_num(s, "uptime_s", 0);
    add(p, json_is_true(json_object_get(s, "draining")) ? TOP_LOUD : TOP_PLAIN,
        "gqad %s%s  up %lu:%02lu:%02lu  %.0f connections  loop %.1f ms at most",
        cli_str(s, "version", "?"),
        json_is_true(json_object_get(s, "draining")) ? " is draining" : "", up / 3600, up / 60 % 60,
        up % 60, cli_num(s, "connections", 0), at(s, "loop", "turn_ms_max"));
    add(p, TOP_PLAIN, "sequences    %.0f running  %.0f waiting  %.0f so far  %.0f preempted",
        cli_num(s, "num_requests_running", 0), cli_num(s, "num_requests_waiting", 0),
        cli_num(s, "requests_total", 0), cli_num(s, "preemptions_total", 0));
    add(p, TOP_PLAIN, "tokens       %.1f generated/s  %.1f prompt/s%s",
        per_second(now, before, "tokens_generated_total"),
        per_second(now, before, "tokens_prompt_total"),
        before->stats == NULL ? "  (since the start)" : "");
    add_latency(p, s, "first token", "time_to_first_token_seconds", "queue",
                "request_queue_time_seconds");
    const json_t *all = json_object_get(s, "latency");
    add(p, TOP_PLAIN, "%-12s p50 %8.1f  p99 %8.1f ms   %-5s p50 %7.1f  p99 %7.1f ms", "next token",
        at(all, "inter_token_latency_seconds", "p50") * 1e3,
        at(all, "inter_token_latency_seconds", "p99") * 1e3, "step", at(s, "step", "p50_ms"),
        at(s, "step", "p99_ms"));
    add_cache(p, now->kv);
}

/* ---- tables ------------------------------------------------------------------------------ */

static const json_t *find(const json_t *array, const char *key, const json_t *value)
{
    for (size_t i = 0; i < json_array_size(array); i++) {
        const json_t *j = json_array_get(array, i);
        if (json_equal(json_object_get(j, key), value)) {
            return j;
        }
    }
    return NULL;
}

static void add_models(struct top_page *p, const struct top_view *v)
{
    const json_t *models = json_object_get(v->models, "models");
    const json_t *loaded = json_object_get(v->stats, "models");
    add(p, TOP_HEAD, "%-28s %-9s %-8s %11s %8s %5s %5s", "MODEL", "STATE", "TYPE", "SIZE", "CTX",
        "RUN", "WAIT");
    for (size_t i = 0; i < json_array_size(models); i++) {
        const json_t *m = json_array_get(models, i);
        const json_t *now = find(loaded, "name", json_object_get(m, "name"));
        char name[64], size[CLI_SIZE_CHARS];
        if (strcmp(cli_str(m, "state", ""), "available") == 0) {
            continue; /* there may be hundreds in the folder */
        }
        add(p, TOP_PLAIN, "%-28.28s %-9s %-8.8s %11s %8.0f %5.0f %5.0f",
            printable(cli_str(m, "name", "?"), name, sizeof(name)), cli_str(m, "state", "?"),
            cli_str(m, "type", ""), cli_bytes(cli_num(m, "bytes", 0), size), cli_num(m, "n_ctx", 0),
            cli_num(now, "n_running", 0), cli_num(now, "n_waiting", 0));
    }
}

static const char *user_name(double uid, char buffer[33])
{
    const struct passwd *who = getpwuid((uid_t)uid);
    if (who != NULL) {
        return printable(who->pw_name, buffer, 33);
    }
    snprintf(buffer, 33, "%.0f", uid);
    return buffer;
}

static void add_users(struct top_page *p, const struct top_view *now, const struct top_view *before)
{
    const json_t *users = json_object_get(now->stats, "users");
    const json_t *then = json_object_get(before->stats, "users");
    double seconds = cli_num(now->stats, "uptime_s", 0) - cli_num(before->stats, "uptime_s", 0);
    add(p, TOP_HEAD, "%-16s %6s %5s %5s %10s %10s %6s %8s", "USER", "WEIGHT", "RUN", "WAIT",
        "GEN/S", "PROMPT/S", "CONN", "REFUSED");
    for (size_t i = 0; i < json_array_size(users); i++) {
        const json_t *u = json_array_get(users, i);
        const json_t *old = find(then, "uid", json_object_get(u, "uid"));
        double generated =
            cli_num(u, "tokens_generated_total", 0) - cli_num(old, "tokens_generated_total", 0);
        double prompt =
            cli_num(u, "tokens_prompt_total", 0) - cli_num(old, "tokens_prompt_total", 0);
        char name[33];
        add(p, TOP_PLAIN, "%-16.16s %6.0f %5.0f %5.0f %10.1f %10.1f %6.0f %8.0f%s",
            user_name(cli_num(u, "uid", 0), name), cli_num(u, "weight", 1),
            cli_num(u, "n_running", 0), cli_num(u, "n_waiting", 0),
            seconds > 0 ? generated / seconds : 0, seconds > 0 ? prompt / seconds : 0,
            cli_num(u, "connections", 0), cli_num(u, "refused", 0),
            json_is_true(json_object_get(u, "slowed")) ? " slowed" : "");
    }
}

/* ---- requests ---------------------------------------------------------------------------- */

static const struct {
    const char *name, *key;
    bool falls; /* the largest first */
} sorts[TOP_SORTS] = {
    [TOP_BY_AGE] = {"age", "age_ms", true},
    [TOP_BY_GENERATED] = {"generated", "n_generated", true},
    [TOP_BY_PROMPT] = {"prompt", "n_prompt", true},
    [TOP_BY_USER] = {"user", "uid", false},
};

const char *top_sort_name(enum top_sort sort)
{
    return sorts[sort].name;
}

static int compare(const void *a, const void *b, void *arg)
{
    const enum top_sort sort = *(const enum top_sort *)arg;
    double x = cli_num(*(json_t *const *)a, sorts[sort].key, 0);
    double y = cli_num(*(json_t *const *)b, sorts[sort].key, 0);
    return sorts[sort].falls ? (x < y) - (x > y) : (x > y) - (x < y);
}

static void add_request(struct top_page *p, const json_t *r)
{
    char user[33], model[64];
    add(p, TOP_PLAIN, "%-10.10s %-14.14s %-8s %-9s %3.0f %7.0f %7.0f %6.0f %6.1fs",
        user_name(cli_num(r, "uid", 0), user),
        printable(cli_str(r, "model", "?"), model, sizeof(model)), cli_str(r, "kind", "?"),
        cli_str(r, "state", "?"), cli_num(r, "priority", 0), cli_num(r, "n_prompt", 0),
        cli_num(r, "n_cached", 0), cli_num(r, "n_generated", 0), cli_num(r, "age_ms", 0) / 1e3);
}

static void add_requests(struct top_page *p, const struct top_view *v, enum top_sort sort)
{
    const json_t *requests = json_object_get(v->requests, "requests");
    size_t n = json_array_size(requests);
    const json_t **sorted = calloc(n + 1, sizeof(const json_t *));
    add(p, TOP_HEAD, "%-10s %-14s %-8s %-9s %3s %7s %7s %6s %7s", "USER", "MODEL", "KIND", "STATE",
        "PRI", "PROMPT", "CACHED", "GEN", "AGE");
    for (size_t i = 0; sorted != NULL && i < n; i++) {
        sorted[i] = json_array_get(requests, i);
    }
    if (sorted != NULL) {
        qsort_r(sorted, n, sizeof(const json_t *), compare, &sort);
    }
    for (size_t i = 0; sorted != NULL && i < n; i++) {
        add_request(p, sorted[i]);
    }
    free(sorted);
}

void top_page_make(const struct top_view *now, const struct top_view *before, enum top_sort sort,
                   struct top_page *page)
{
    page->n_lines = 0;
    page->columns = page->columns < TOP_COLUMNS_MAX ? page->columns : TOP_COLUMNS_MAX;
    add_head(page, now, before);
    add(page, TOP_PLAIN, "%s", "");
    add_models(page, now);
    add(page, TOP_PLAIN, "%s", "");
    add_users(page, now, before);
    add(page, TOP_PLAIN, "%s", "");
    add_requests(page, now, sort);
}
