/* ipc/error.c - the sentence of an error, fit to be sent and printed whatever it quotes. */
#include "ipc/codec_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* An error quotes what strangers sent: no terminal and no peer may stumble over it. */
static void sanitise(char *text)
{
    size_t bytes = strlen(text);
    for (size_t at = 0; at < bytes; at++) {
        size_t valid = ipc_utf8_valid_bytes(text + at, bytes - at);
        for (size_t end = at + valid; at < end; at++) {
            if ((uint8_t)text[at] < ' ' || text[at] == 0x7f) {
                text[at] = '?';
            }
        }
        if (at < bytes) {
            text[at] = '?';
        }
    }
}

void ipc_error_set(struct ipc_error *e, enum proto_error_code code, const char *format, ...)
{
    va_list args;
    e->code = code;
    e->retry_after_ms = 0;
    va_start(args, format);
    if (vsnprintf(e->message, sizeof(e->message), format, args) < 0) {
        e->message[0] = '\0';
    }
    va_end(args);
    sanitise(e->message);
}
