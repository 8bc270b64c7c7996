/* ipc/utf8.c - well-formed UTF-8, as Unicode's table 3-7 has it. */
#include "ipc/codec_internal.h"

/* The length of the sequence at p, or 0 when it is not well formed. */
static size_t sequence_bytes(const uint8_t *p, size_t left)
{
    uint8_t lead = p[0], low = 0x80, high = 0xbf;
    size_t n;

    if (lead < 0x80) {
        return 1;
    }
    if (lead >= 0xc2 && lead <= 0xdf) {
        n = 2;
    } else if (lead >= 0xe0 && lead <= 0xef) {
        n = 3;
        low = lead == 0xe0 ? 0xa0 : 0x80;  /* overlong below */
        high = lead == 0xed ? 0x9f : 0xbf; /* surrogates above */
    } else if (lead >= 0xf0 && lead <= 0xf4) {
        n = 4;
        low = lead == 0xf0 ? 0x90 : 0x80;
        high = lead == 0xf4 ? 0x8f : 0xbf; /* beyond U+10FFFF */
    } else {
        return 0;
    }
    if (left < n || p[1] < low || p[1] > high) {
        return 0;
    }
    for (size_t i = 2; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    return n;
}

size_t ipc_utf8_valid_bytes(const char *text, size_t bytes)
{
    const uint8_t *p = (const uint8_t *)text;
    size_t at = 0;
    while (at < bytes) {
        size_t n = sequence_bytes(p + at, bytes - at);
        if (n == 0) {
            break;
        }
        at += n;
    }
    return at;
}
