/* Fuzzes JSON Schemas: what is converted must be a grammar, unless a limit or left recursion of the
 * schema's own stands against it. */
#include "daemon/model/grammar.h"
#include "daemon/model/grammar_schema.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct fmt_error err = {""};
    struct grammar *g = NULL;
    char *text = NULL;
    int rc = grammar_from_schema((const char *)data, bytes, &text, &err);
    if (rc == -EINVAL && err.text[0] == '\0') {
        abort();
    }
    if (rc < 0) {
        return 0;
    }
    rc = grammar_compile(text, strlen(text), &g, &err);
    if (rc == -EINVAL && !strstr(err.text, "left recursion") && !strstr(err.text, "more than") &&
        !strstr(err.text, "repetition")) {
        fprintf(stderr, "%s\n%s", err.text, text);
        abort();
    }
    free(text);
    grammar_destroy(g);
    return 0;
}
