/* client/cli/format.c - output for people. */
#include "client/cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

char *cli_bytes(double bytes, char buffer[CLI_SIZE_CHARS])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    size_t unit = 0;
    while (bytes >= 1024 && unit + 1 < sizeof(units) / sizeof(units[0])) {
        bytes /= 1024;
        unit++;
    }
    snprintf(buffer, CLI_SIZE_CHARS, unit == 0 ? "%.0f %s" : "%.2f %s", bytes, units[unit]);
    return buffer;
}

char *cli_count(double count, char buffer[CLI_SIZE_CHARS])
{
    static const char *const units[] = {"", " K", " M", " B", " T"};
    size_t unit = 0;
    while (count >= 1000 && unit + 1 < sizeof(units) / sizeof(units[0])) {
        count /= 1000;
        unit++;
    }
    snprintf(buffer, CLI_SIZE_CHARS, unit == 0 ? "%.0f%s" : "%.2f%s", count, units[unit]);
    return buffer;
}

static void print_scalar(const json_t *j)
{
    if (json_is_string(j)) {
        fwrite(json_string_value(j), 1, json_string_length(j), stdout);
    } else if (json_is_real(j)) {
        printf("%.6g", json_real_value(j));
    } else {
        json_dumpf(j, stdout, JSON_ENCODE_ANY);
    }
    putchar('\n');
}

/* Arrays of scalars stay on one line. */
static bool is_flat(const json_t *array)
{
    for (size_t i = 0; i < json_array_size(array); i++) {
        const json_t *j = json_array_get(array, i);
        if (json_is_object(j) || json_is_array(j)) {
            return false;
        }
    }
    return true;
}

static void print_array(const json_t *array, int indent)
{
    for (size_t i = 0; i < json_array_size(array); i++) {
        const json_t *j = json_array_get(array, i);
        if (json_is_object(j)) {
            cli_print_tree(j, indent);
            if (i + 1 < json_array_size(array)) {
                putchar('\n');
            }
        } else {
            printf("%*s", indent, "");
            json_dumpf(j, stdout, JSON_ENCODE_ANY | JSON_REAL_PRECISION(6));
            putchar('\n');
        }
    }
}

void cli_print_tree(const json_t *object, int indent)
{
    const char *key;
    json_t *value;
    int width = 0;
    json_object_foreach((json_t *)object, key, value)
    {
        width = (int)strlen(key) > width ? (int)strlen(key) : width;
    }
    json_object_foreach((json_t *)object, key, value)
    {
        bool nested = json_is_object(value) || (json_is_array(value) && !is_flat(value));
        printf("%*s%-*s", indent, "", nested ? 0 : width + 2, key);
        if (!nested) {
            print_scalar(value);
            continue;
        }
        putchar('\n');
        if (json_is_object(value)) {
            cli_print_tree(value, indent + 2);
        } else {
            print_array(value, indent + 2);
        }
    }
}

bool cli_fancy(FILE *f)
{
    const char *no_color = getenv("NO_COLOR");
    const char *term = getenv("TERM");
    return isatty(fileno(f)) && (no_color == NULL || no_color[0] == '\0') &&
           (term == NULL || strcmp(term, "dumb") != 0);
}

static int shown_errno; /* of the first cli_show() that failed */

void cli_show(void)
{
    if (fflush(stdout) != 0 && shown_errno == 0) {
        shown_errno = errno;
    }
}

int cli_flush(void)
{
    bool failed = ferror(stdout) != 0;
    errno = 0;
    if (fflush(stdout) != 0 || failed) {
        errno = shown_errno != 0 ? shown_errno : errno;
        if (errno == EPIPE) {
            return EX_IOERR; /* the reader has seen enough, as "| head" has */
        }
        return cli_error(EX_IOERR, "output: %s", errno != 0 ? strerror(errno) : "write failed");
    }
    return CLI_OK;
}

void cli_remove_output(const char *path)
{
    struct stat st;
    if (lstat(path, &st) == 0 && S_ISREG(st.st_mode)) {
        unlink(path);
    }
}
