/* client/cli/top.h - what gqa top knows, and how it looks.
 *
 * A view is taken from the daemon with four calls; a page is made of one view and the one before
 * it, from which rates come. Pages are lines of text, for the screen (top_screen.c) as for -b. */
#ifndef CLI_TOP_H
#define CLI_TOP_H

#include "client/cli/cli.h"

/* What the daemon told at one time. Zeroed: nothing yet. */
struct top_view {
    json_t *stats, *requests, *kv, *models; /* results of the four calls */
};
/* Prints and returns an exit code. before_failing (or NULL) is called before anything is printed.
 */
int top_view_take(struct cli *c, struct top_view *ret, void (*before_failing)(void));
void top_view_drop(struct top_view *v);

enum top_sort { TOP_BY_AGE, TOP_BY_GENERATED, TOP_BY_PROMPT, TOP_BY_USER, TOP_SORTS };
const char *top_sort_name(enum top_sort sort);

#define TOP_COLUMNS_MAX 256u
#define TOP_LINES_MAX   512u

enum top_style { TOP_PLAIN, TOP_HEAD, TOP_LOUD };

struct top_page {
    unsigned columns; /* wanted, at most TOP_COLUMNS_MAX */
    unsigned n_lines;
    struct {
        enum top_style style;
        char text[TOP_COLUMNS_MAX + 1]; /* ASCII, at most columns of it */
    } lines[TOP_LINES_MAX];
};
/* before: the view before; of nothing, rates are those since the daemon's start. */
void top_page_make(const struct top_view *now, const struct top_view *before, enum top_sort sort,
                   struct top_page *page);

/* Shows pages on the terminal every so many seconds, until somebody wants it to end. */
int top_screen(struct cli *c, double delay_s);

#endif
