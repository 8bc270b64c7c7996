/* Fuzzes grammars: a text, NUL, a grammar. The text is tried byte by byte, in one piece, and in
 * two; all three must agree, and a refusal must leave the state where it was. */
#include "daemon/model/grammar.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* How many bytes of the text fit, one after the other. */
static size_t accept_bytes(struct grammar_state *s, const char *text, size_t bytes, bool *ret_limit)
{
    for (size_t i = 0; i < bytes; i++) {
        bool possible[256];
        grammar_state_first_bytes(s, possible);
        int allowed = grammar_state_allows(s, text + i, 1);
        int rc = grammar_state_accept(s, text + i, 1);
        *ret_limit = allowed < 0 || (rc < 0 && rc != -EINVAL);
        if (*ret_limit) {
            return i;
        }
        if (allowed != (rc == 0) || possible[(unsigned char)text[i]] != (rc == 0)) {
            abort();
        }
        if (rc < 0) {
            return i;
        }
    }
    return bytes;
}

static void try_text(const struct grammar *g, const char *text, size_t bytes)
{
    struct grammar_state *s = NULL, *whole = NULL;
    bool limit = false;
    if (grammar_state_create(g, &s) == 0 && grammar_state_create(g, &whole) == 0) {
        size_t fits = accept_bytes(s, text, bytes, &limit);
        int at_once = grammar_state_allows(whole, text, bytes);
        if (!limit && at_once >= 0 && at_once != (fits == bytes)) {
            abort();
        }
        if (!limit && grammar_state_accept(whole, text, fits / 2) == 0 &&
            grammar_state_accept(whole, text + fits / 2, fits - fits / 2) == 0 &&
            grammar_state_may_end(s) != grammar_state_may_end(whole)) {
            abort();
        }
    }
    grammar_state_destroy(s);
    grammar_state_destroy(whole);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const char *text = (const char *)data;
    size_t text_bytes = strnlen(text, bytes);
    size_t at = text_bytes < bytes ? text_bytes + 1 : bytes;
    size_t grammar_bytes = bytes - at;
    char *copy = malloc(grammar_bytes + (grammar_bytes == 0)); /* a byte too far is seen */
    struct grammar *g = NULL;
    struct fmt_error err = {""};
    if (copy == NULL) {
        return 0;
    }
    memcpy(copy, text + at, grammar_bytes);
    int rc = grammar_compile(copy, grammar_bytes, &g, &err);
    free(copy); /* it is not needed any more */
    if (rc == 0) {
        try_text(g, text, text_bytes < 200 ? text_bytes : 200);
    } else if (rc == -EINVAL && err.text[0] == '\0') {
        abort();
    }
    grammar_destroy(g);
    return 0;
}
