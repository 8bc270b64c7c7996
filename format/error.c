/* format/error.c - the sentence that says why a file was refused. */
#include "format/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int fmt_fail(struct fmt_error *err, int rc, const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        if (vsnprintf(err->text, sizeof(err->text), format, args) < 0) {
            err->text[0] = '\0';
        }
        va_end(args);
    }
    return rc;
}

const char *fmt_file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != NULL && slash[1] != '\0' ? slash + 1 : path;
}
