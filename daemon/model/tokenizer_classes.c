/* daemon/model/tokenizer_classes.c - the classes of all characters, asked of PCRE2 once. */
#include "daemon/model/tokenizer_pre_internal.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <pthread.h>
#include <string.h>

#define N_POINTS    0x110000u
#define CHUNK       0x800u /* a divisor of the surrogates' range, which no text has */
#define CHUNK_BYTES (CHUNK * 4)

static uint8_t classes[N_POINTS];
static bool classes_ready;
static pthread_once_t classes_once = PTHREAD_ONCE_INIT;

static const struct {
    const char *pattern;
    uint8_t bit;
} rows[] = {
    {"\\p{L}+", CLASS_LETTER},
    {"\\p{N}+", CLASS_NUMBER},
    {"\\s+", CLASS_SPACE},
    {"\\p{M}+", CLASS_MARK},
    {PRE_SIGNS "+", CLASS_SIGN},
    {PRE_CJK "+", CLASS_CJK},
    {PRE_CASED_LETTERS "+", CLASS_CASED},
    {"[\\r\\n]+", CLASS_NEWLINE},
};
#define N_ROWS (sizeof(rows) / sizeof(rows[0]))

static size_t put_character(unsigned char *to, uint32_t point)
{
    if (point < 0x80) {
        to[0] = (unsigned char)point;
        return 1;
    }
    size_t n = point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    static const unsigned char lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = n; --i > 0; point >>= 6) {
        to[i] = (unsigned char)(0x80 | (point & 0x3F));
    }
    to[0] = (unsigned char)(lead[n] | point);
    return n;
}

/* Marks the characters of text, which are count successive ones from first, that match. */
static bool mark_chunk(const pcre2_code *code, pcre2_match_data *match, const unsigned char *text,
                       size_t bytes, uint8_t *to, uint8_t bit)
{
    size_t at = 0;
    for (;;) {
        int rc = pcre2_match(code, text, bytes, at, PCRE2_NO_UTF_CHECK, match, NULL);
        if (rc == PCRE2_ERROR_NOMATCH) {
            return true;
        }
        if (rc < 0) {
            return false;
        }
        const PCRE2_SIZE *bounds = pcre2_get_ovector_pointer(match);
        for (; at < bounds[0]; at++) {
            to += (text[at] & 0xC0) != 0x80;
        }
        for (; at < bounds[1]; at++) {
            if ((text[at] & 0xC0) != 0x80) {
                *to++ |= bit;
            }
        }
    }
}

static bool fill_classes(pcre2_code *const *codes, pcre2_match_data *match)
{
    static unsigned char text[CHUNK_BYTES];
    for (uint32_t first = 0; first < N_POINTS; first += CHUNK) {
        if (first == 0xD800) {
            continue;
        }
        size_t bytes = 0;
        for (uint32_t i = 0; i < CHUNK; i++) {
            bytes += put_character(text + bytes, first + i);
        }
        for (size_t i = 0; i < N_ROWS; i++) {
            if (!mark_chunk(codes[i], match, text, bytes, classes + first, rows[i].bit)) {
                return false;
            }
        }
    }
    return true;
}

static void make_classes(void)
{
    pcre2_code *codes[N_ROWS] = {NULL};
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    bool ok = match != NULL;
    for (size_t i = 0; i < N_ROWS && ok; i++) {
        int code;
        PCRE2_SIZE offset;
        codes[i] = pcre2_compile((PCRE2_SPTR)rows[i].pattern, PCRE2_ZERO_TERMINATED,
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &code, &offset, NULL);
        ok = codes[i] != NULL;
        if (ok) {
            (void)pcre2_jit_compile(codes[i], PCRE2_JIT_COMPLETE);
        }
    }
    classes_ready = ok && fill_classes(codes, match);
    for (size_t i = 0; i < N_ROWS; i++) {
        pcre2_code_free(codes[i]);
    }
    pcre2_match_data_free(match);
}

const uint8_t *pre_classes(void)
{
    (void)pthread_once(&classes_once, make_classes);
    return classes_ready ? classes : NULL;
}
