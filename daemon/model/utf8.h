/* daemon/model/utf8.h - stepping through bytes that claim to be UTF-8.
 *
 * Well-formed means Unicode's table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF.
 * An ill-formed step covers the "maximal subpart", the unit that WHATWG decoders replace by one
 * U+FFFD. */
#ifndef DAEMON_MODEL_UTF8_H
#define DAEMON_MODEL_UTF8_H

#include <stdbool.h>
#include <stddef.h>

enum utf8_kind {
    UTF8_VALID,      /* *ret_bytes: the character's length */
    UTF8_INVALID,    /* *ret_bytes: the length of the ill-formed part, at least 1 */
    UTF8_INCOMPLETE, /* the text ends inside a character that is well-formed so far */
};

/* Looks at the character at p, of which n > 0 bytes exist. */
static inline enum utf8_kind utf8_step(const unsigned char *p, size_t n, size_t *ret_bytes)
{
    unsigned char lead = p[0];
    unsigned char low = 0x80, high = 0xBF; /* bounds of the second byte */
    size_t need;
    if (lead < 0x80) {
        *ret_bytes = 1;
        return UTF8_VALID;
    }
    if (lead >= 0xC2 && lead <= 0xDF) {
        need = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        need = 3;
        low = lead == 0xE0 ? 0xA0 : 0x80;
        high = lead == 0xED ? 0x9F : 0xBF;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        need = 4;
        low = lead == 0xF0 ? 0x90 : 0x80;
        high = lead == 0xF4 ? 0x8F : 0xBF;
    } else {
        *ret_bytes = 1;
        return UTF8_INVALID;
    }
    for (size_t i = 1; i < need; i++) {
        if (i == n) {
            *ret_bytes = n;
            return UTF8_INCOMPLETE;
        }
        if (p[i] < low || p[i] > high) {
            *ret_bytes = i;
            return UTF8_INVALID;
        }
        low = 0x80;
        high = 0xBF;
    }
    *ret_bytes = need;
    return UTF8_VALID;
}

/* Whether a byte continues a character (and so cannot begin one). */
static inline bool utf8_is_continuation(unsigned char byte)
{
    return (byte & 0xC0) == 0x80;
}

#endif
