/* format/error.h - one sentence of why a file was refused.
 *
 * Functions of format/ return 0 or -errno and never log. Where the reason needs words (which key,
 * which tensor, which offset), they also fill a caller-owned fmt_error; a NULL one is legal. The
 * sentence names a file without its folder, which not everybody who reads it may know. */
#ifndef FORMAT_ERROR_H
#define FORMAT_ERROR_H

struct fmt_error {
    char text[320]; /* always terminated; empty when nothing was reported */
};

/* Formats into err (NULL is legal) and returns rc, so that "return fmt_fail(err, -EINVAL, ...)". */
int fmt_fail(struct fmt_error *err, int rc, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* "name.gguf" of "/a/b/name.gguf": into path. */
const char *fmt_file_name(const char *path);

#endif
