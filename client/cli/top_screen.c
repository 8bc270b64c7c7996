/* client/cli/top_screen.c - gqa top on a terminal. */
#include "client/cli/top.h"

#include <unistd.h>

#if HAVE_CURSES

#include <curses.h>

#define CTRL_C 3
#define CTRL_L 12

struct screen {
    struct cli *c;
    struct top_view before, now;
    enum top_sort sort;
    unsigned first; /* line of the page that is shown first */
    bool over;
};

static void leave(void)
{
    endwin();
}

static void draw(struct screen *s)
{
    static struct top_page page;
    int rows = LINES > 1 ? LINES - 1 : 1;
    page.columns = COLS > 0 ? (unsigned)COLS : 80;
    top_page_make(&s->now, &s->before, s->sort, &page);
    unsigned last = page.n_lines > (unsigned)rows ? page.n_lines - (unsigned)rows : 0;
    s->first = s->first < last ? s->first : last;
    erase();
    for (int y = 0; y < rows && s->first + (unsigned)y < page.n_lines; y++) {
        enum top_style style = page.lines[s->first + (unsigned)y].style;
        attrset(style == TOP_HEAD ? A_REVERSE : style == TOP_LOUD ? A_BOLD : A_NORMAL);
        mvaddnstr(y, 0, page.lines[s->first + (unsigned)y].text, COLS);
    }
    attrset(A_DIM);
    mvaddnstr(LINES - 1, 0, "q quit  a g p u sort by age, generated, prompt, user", COLS - 1);
    printw("  [%s]", top_sort_name(s->sort));
    attrset(A_NORMAL);
    refresh();
}

static void take_key(struct screen *s, int key)
{
    unsigned page = LINES > 2 ? (unsigned)LINES - 2 : 1;
    switch (key) {
    case 'q':
    case CTRL_C:
        s->over = true;
        break;
    case 'a':
        s->sort = TOP_BY_AGE;
        break;
    case 'g':
        s->sort = TOP_BY_GENERATED;
        break;
    case 'p':
        s->sort = TOP_BY_PROMPT;
        break;
    case 'u':
        s->sort = TOP_BY_USER;
        break;
    case KEY_DOWN:
        s->first++;
        break;
    case KEY_UP:
        s->first -= s->first > 0;
        break;
    case KEY_NPAGE:
        s->first += page;
        break;
    case KEY_PPAGE:
        s->first = s->first > page ? s->first - page : 0;
        break;
    case KEY_HOME:
        s->first = 0;
        break;
    case CTRL_L: /* somebody else has written on the terminal */
    case KEY_RESIZE:
        clearok(stdscr, TRUE);
        break;
    default:
        break;
    }
}

/* Until the next view is due. Draws after each key. */
static void take_keys(struct screen *s, double due_us)
{
    while (!s->over && cli_now_us() < due_us) {
        cli_wait_input(STDIN_FILENO, (due_us - cli_now_us()) / 1e6);
        s->over = s->over || cli_interrupted();
        for (int key; !s->over && (key = getch()) != ERR;) {
            if (key == ' ') {
                return;
            }
            take_key(s, key);
            if (!s->over) {
                draw(s);
            }
        }
    }
}

int top_screen(struct cli *c, double delay_s)
{
    struct screen s = {.c = c};
    if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO)) {
        return cli_error(EX_USAGE, "top: this is no terminal; -b prints pages");
    }
    SCREEN *terminal = newterm(NULL, stdout, stdin);
    if (terminal == NULL) {
        return cli_error(EX_UNAVAILABLE, "top: the terminal is not known; -b prints pages");
    }
    raw(); /* Ctrl-C is a key: the terminal must be itself again afterwards */
    noecho();
    keypad(stdscr, TRUE);
    nodelay(stdscr, TRUE);
    curs_set(0);
    int code = CLI_OK;
    while (!s.over && code == CLI_OK) {
        double due_us = cli_now_us() + delay_s * 1e6;
        struct top_view next;
        code = top_view_take(c, &next, leave);
        if (code == CLI_OK) {
            top_view_drop(&s.before);
            s.before = s.now;
            s.now = next;
            draw(&s);
            take_keys(&s, due_us);
        }
    }
    leave();
    delscreen(terminal);
    top_view_drop(&s.before);
    top_view_drop(&s.now);
    return code;
}

#else

int top_screen(struct cli *c, double delay_s)
{
    return cli_error(EX_UNAVAILABLE, "top: built without ncurses; -b prints pages");
}

#endif
