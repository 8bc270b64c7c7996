/* client/cli/verb_top.c - gqa top: what the daemon does, for whom, and how fast. */
#include "client/cli/top.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGES_MAX 1000000u

struct top {
    bool batch;
    uint64_t n_pages; /* with batch; 0: without end */
    double delay_s;
};

static const struct argp_option options[] = {
    {"batch", 'b', NULL, 0, "Print pages, for files and other programs", 5},
    {"iterations", 'n', "N", 0, "With -b: so many pages (endless)", 5},
    {"delay", 'd', "SECONDS", 0, "Between two pages (1)", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct top *t = state->input;
    char *end;
    switch (key) {
    case 'b':
        t->batch = true;
        return 0;
    case 'n':
        t->n_pages = cli_number(state, "iterations", arg, 1, PAGES_MAX);
        return 0;
    case 'd':
        t->delay_s = strtod(arg, &end);
        if (end == arg || *end != '\0' || !(t->delay_s >= 0.1 && t->delay_s <= 3600)) {
            cli_usage(state, "--delay: '%s' is no number from 0.1 to 3600", arg);
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp argp = {
    .options = options,
    .parser = parse,
    .doc = "Shows models, users, requests, the cache and how long things take, again and again.\v"
           "Keys: q ends; a, g, p, u sort requests by age, generated tokens, prompt, user; arrows "
           "and page keys scroll; space asks at once."};

/* ---- views ------------------------------------------------------------------------------- */

/* Administrators see everybody's requests, others their own. */
static struct gqa_params *whose(const struct cli *c)
{
    bool admin = false;
    struct gqa_params *p = cli_params();
    gqa_value_bool(gqa_value_get(gqa_server_info(c->g), "admin"), &admin);
    gqa_params_bool(p, "all", admin);
    return p;
}

int top_view_take(struct cli *c, struct top_view *ret, void (*before_failing)(void))
{
    static const char *const methods[] = {"server.stats", "server.requests", "kv.stats",
                                          "model.list"};
    struct cli_call calls[4] = {{0}};
    int code = CLI_OK;
    for (unsigned i = 0; i < 4; i++) {
        cli_start(c, &calls[i], methods[i], i == 1 ? whose(c) : NULL);
    }
    cli_finish(c, calls, 4);
    for (unsigned i = 0; i < 4 && code == CLI_OK; i++) {
        if (calls[i].status < 0 && before_failing != NULL) {
            before_failing();
        }
        code = cli_report(&calls[i]);
    }
    *ret = (struct top_view){calls[0].result, calls[1].result, calls[2].result, calls[3].result};
    if (code != CLI_OK) {
        top_view_drop(ret);
    }
    return code;
}

void top_view_drop(struct top_view *v)
{
    json_decref(v->stats);
    json_decref(v->requests);
    json_decref(v->kv);
    json_decref(v->models);
    *v = (struct top_view){NULL};
}

/* ---- -b ---------------------------------------------------------------------------------- */

/* As wide as its lines are: nobody cuts a file's. */
static void print_page(const struct top_view *now, const struct top_view *before)
{
    static struct top_page page;
    page.columns = TOP_COLUMNS_MAX;
    top_page_make(now, before, TOP_BY_AGE, &page);
    for (unsigned i = 0; i < page.n_lines; i++) {
        puts(page.lines[i].text);
    }
    cli_show();
}

static int print_view(const struct top_view *v)
{
    json_t *object = json_pack("{s:O, s:O, s:O, s:O}", "stats", v->stats, "requests",
                               json_object_get(v->requests, "requests"), "kv", v->kv, "models",
                               json_object_get(v->models, "models"));
    int code = cli_print_json_line(object);
    cli_show();
    return code;
}

static int print_pages(struct cli *c, const struct top *t)
{
    struct top_view before = {NULL}, now;
    int code = CLI_OK;
    for (uint64_t i = 0; code == CLI_OK && (t->n_pages == 0 || i < t->n_pages); i++) {
        if (i > 0) {
            cli_wait_input(-1, t->delay_s);
        }
        if (cli_interrupted() || ferror(stdout)) {
            break;
        }
        code = top_view_take(c, &now, NULL);
        if (code != CLI_OK) {
            break;
        }
        if (c->json) {
            code = print_view(&now);
        } else {
            fputs(i > 0 ? "\n" : "", stdout);
            print_page(&now, &before);
        }
        top_view_drop(&before);
        before = now;
    }
    top_view_drop(&before);
    return code == CLI_OK && cli_interrupted() ? CLI_INTERRUPTED : code;
}

int cli_verb_top(struct cli *c, int argc, char **argv)
{
    struct top t = {.delay_s = 1};
    cli_parse(c, &argp, argc, argv, &t);
    int code = cli_connect(c);
    if (code != CLI_OK) {
        return code;
    }
    return t.batch || c->json ? print_pages(c, &t) : top_screen(c, t.delay_s);
}
