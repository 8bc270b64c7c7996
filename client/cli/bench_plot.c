/* client/cli/bench_plot.c - rows of gqa bench as a picture.
 *
 * What differs between the rows becomes the axis: numbers of KV heads, or depths, or streams. Of
 * prompts and of generation there is one picture each, below each other. Against numbers of KV
 * heads it is the time per token, as in figure 6 of Ainslie et al. 2023, else tokens per second.
 * Values of the axis lie at equal distances: they are usually powers of two. The colours follow the
 * reader's light or dark scheme, and lines differ in their dashes and marks as well. */
#include "client/cli/bench.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define WIDTH     760.0
#define HEIGHT    380.0 /* of one picture */
#define LEFT      70.0
#define RIGHT     210.0 /* the legend's */
#define TOP       40.0
#define BOTTOM    55.0
#define N_COLOURS 6u
#define N_TICKS   5u
#define LINES_MAX 24u

struct plot {
    FILE *f;
    const json_t *rows;
    const char *axis, *axis_name; /* key of the rows */
    bool time;                    /* ms per token rather than tokens per second */
    double values[BENCH_LIST_MAX];
    size_t n_values;
    char lines[LINES_MAX][64];
    size_t n_lines;
    double most; /* of all rows of this picture */
};

static bool is_prompt(const json_t *row)
{
    return strncmp(cli_str(row, "test", ""), "pp", 2) == 0;
}

static double height_of(const struct plot *p, const json_t *row)
{
    double tps = cli_num(row, "tps_mean", 0), streams = cli_num(row, "streams", 1);
    return !p->time ? tps : tps > 0 ? 1e3 * streams / tps : 0;
}

/* What is the same along a line: all that names a test but the axis. */
static void line_name(const struct plot *p, const json_t *row, char *ret, size_t bytes)
{
    static const struct {
        const char *key, *format;
    } parts[] = {{"depth", " @ d%.0f"}, {"streams", " x %.0f"}, {"kv_heads", ", %.0f KV heads"}};
    int n = snprintf(ret, bytes, "%s", cli_str(row, "test", ""));
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]) && n < (int)bytes; i++) {
        double x = cli_num(row, parts[i].key, 0);
        bool plain = x == 0 || (i == 1 && x == 1);
        if (strcmp(parts[i].key, p->axis) != 0 && !plain) {
            n += snprintf(ret + n, bytes - (size_t)n, parts[i].format, x);
        }
    }
}

static bool differs(const json_t *rows, const char *key)
{
    for (size_t i = 1; i < json_array_size(rows); i++) {
        if (cli_num(json_array_get(rows, i), key, 0) != cli_num(json_array_get(rows, 0), key, 0)) {
            return true;
        }
    }
    return false;
}

static void choose_axis(struct plot *p)
{
    bool heads = json_object_get(json_array_get(p->rows, 0), "kv_heads") != NULL;
    bool streams = !differs(p->rows, "depth") && differs(p->rows, "streams");
    p->time = heads;
    p->axis = heads ? "kv_heads" : streams ? "streams" : "depth";
    p->axis_name = heads ? "KV heads (groups)" : streams ? "streams" : "tokens of context";
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Values of the axis, lines and the highest point of the prompts, or of generation. */
static void survey(struct plot *p, bool prompts)
{
    p->n_values = p->n_lines = 0;
    p->most = 0;
    for (size_t i = 0; i < json_array_size(p->rows); i++) {
        const json_t *row = json_array_get(p->rows, i);
        double x = cli_num(row, p->axis, 0);
        char name[64];
        size_t v = 0, l = 0;
        if (is_prompt(row) != prompts) {
            continue;
        }
        while (v < p->n_values && p->values[v] != x) {
            v++;
        }
        if (v == p->n_values && v < BENCH_LIST_MAX) {
            p->values[p->n_values++] = x;
        }
        line_name(p, row, name, sizeof(name));
        while (l < p->n_lines && strcmp(p->lines[l], name) != 0) {
            l++;
        }
        if (l == p->n_lines && l < LINES_MAX) {
            memcpy(p->lines[p->n_lines++], name, sizeof(name));
        }
        p->most = fmax(p->most, height_of(p, row));
    }
    qsort(p->values, p->n_values, sizeof(p->values[0]), by_value);
}

static double x_of(const struct plot *p, size_t i)
{
    double room = WIDTH - LEFT - RIGHT;
    return p->n_values < 2 ? LEFT + room / 2
                           : LEFT + room * (0.04 + 0.92 * (double)i / (double)(p->n_values - 1));
}

/* 1, 2 or 5 times a power of ten: N_TICKS of them reach the top. */
static double tick_step(double most)
{
    double raw = most > 0 ? most / N_TICKS : 1, power = pow(10, floor(log10(raw)));
    double times = raw / power;
    return power * (times <= 1 ? 1 : times <= 2 ? 2 : times <= 5 ? 5 : 10);
}

static double y_of(double value, double top)
{
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top;
}

static void draw_axes(const struct plot *p, double step, double top)
{
    for (unsigned i = 0; i <= N_TICKS; i++) {
        double y = y_of(i * step, top);
        fprintf(p->f,
                "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>"
                "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                LEFT, WIDTH - RIGHT, y, y, LEFT - 8, y + 4, i * step);
    }
    for (size_t i = 0; i < p->n_values; i++) {
        fprintf(p->f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%.0f</text>\n",
                x_of(p, i), HEIGHT - BOTTOM + 18, p->values[i]);
    }
    fprintf(p->f,
            "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>\n"
            "<text x=\"%.1f\" y=\"%.1f\">%s</text>\n",
            LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 12, p->axis_name, 12.0, TOP - 16,
            p->time ? "ms per token and stream" : "tokens per second");
}

static void draw_line(const struct plot *p, size_t line, bool prompts, double top)
{
    unsigned colour = (unsigned)line % N_COLOURS;
    unsigned dash = (unsigned)line / N_COLOURS;
    fprintf(p->f, "<polyline class=\"c%u d%u\" points=\"", colour, dash);
    for (int pass = 0; pass < 2; pass++) {
        for (size_t v = 0; v < p->n_values; v++) {
            for (size_t i = 0; i < json_array_size(p->rows); i++) {
                const json_t *row = json_array_get(p->rows, i);
                char name[64];
                line_name(p, row, name, sizeof(name));
                if (is_prompt(row) == prompts && cli_num(row, p->axis, 0) == p->values[v] &&
                    strcmp(name, p->lines[line]) == 0) {
                    double x = x_of(p, v), y = y_of(height_of(p, row), top);
                    if (pass == 0) {
                        fprintf(p->f, "%.1f,%.1f ", x, y);
                    } else {
                        fprintf(p->f, "<circle class=\"c%u\" cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\"/>",
                                colour, x, y);
                    }
                }
            }
        }
        fputs(pass == 0 ? "\"/>" : "\n", p->f);
    }
    double y = TOP + 6 + 20 * (double)line;
    fprintf(p->f,
            "<line class=\"c%u d%u\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>"
            "<text x=\"%.1f\" y=\"%.1f\">%s</text>\n",
            colour, dash, WIDTH - RIGHT + 14, WIDTH - RIGHT + 38, y, y, WIDTH - RIGHT + 44, y + 4,
            p->lines[line]);
}

static void draw_head(FILE *f, unsigned n_pictures)
{
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
            "font-family=\"sans-serif\" font-size=\"12\">\n"
            "<style>\n"
            "svg { --back: #fff; --ink: #222; --grid: #ccc; --c0: #0060a8; --c1: #b34700; "
            "--c2: #00734d; --c3: #8a2be2; --c4: #a8003f; --c5: #5c5c00; }\n"
            "@media (prefers-color-scheme: dark) { svg { --back: #16181c; --ink: #e6e6e6; "
            "--grid: #444; --c0: #6db8ff; --c1: #ffa366; --c2: #5fd9ac; --c3: #c79bff; "
            "--c4: #ff7fa8; --c5: #d6d65c; } }\n"
            "text { fill: var(--ink); }\n"
            "rect { fill: var(--back); }\n"
            ".grid { stroke: var(--grid); }\n"
            "polyline { fill: none; stroke-width: 2; }\n"
            ".d1 { stroke-dasharray: 6 4; } .d2 { stroke-dasharray: 2 3; } "
            ".d3 { stroke-dasharray: 8 3 2 3; }\n",
            WIDTH, HEIGHT * n_pictures);
    for (unsigned i = 0; i < N_COLOURS; i++) {
        fprintf(f, ".c%u { stroke: var(--c%u); } circle.c%u { fill: var(--c%u); }\n", i, i, i, i);
    }
    fprintf(f, "</style>\n<rect width=\"%.0f\" height=\"%.0f\"/>\n", WIDTH, HEIGHT * n_pictures);
}

static void draw_picture(struct plot *p, bool prompts, unsigned place)
{
    double step = tick_step(p->most), top = step * N_TICKS;
    fprintf(p->f, "<g transform=\"translate(0 %.0f)\">\n", HEIGHT * place);
    draw_axes(p, step, top);
    for (size_t i = 0; i < p->n_lines; i++) {
        draw_line(p, i, prompts, top);
    }
    fputs("</g>\n", p->f);
}

int bench_plot(FILE *f, const char *path, const json_t *rows)
{
    struct plot p = {.rows = rows, .f = f};
    bool there[2] = {false, false};
    unsigned place = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        there[is_prompt(json_array_get(rows, i))] = true;
    }
    choose_axis(&p);
    draw_head(p.f, (unsigned)there[0] + there[1]);
    for (int prompts = 0; prompts < 2; prompts++) {
        if (there[prompts]) {
            survey(&p, prompts);
            draw_picture(&p, prompts, place++);
        }
    }
    fputs("</svg>\n", p.f);
    bool failed = ferror(p.f) != 0;
    failed = fclose(p.f) != 0 || failed;
    return failed ? cli_error(EX_IOERR, "%s: %s", path, strerror(errno)) : CLI_OK;
}
