/* daemon/model/tokenizer_scan.c - the most common expressions of pre-tokenisers, by hand.
 *
 * Each function gives exactly the pieces that its expression gives by PCRE2
 * (tests/unit/model/tokenizer_pre.c and the fuzzer compare them), several times as fast: a class is
 * looked up once for each character, and then a piece is a run of bytes of some classes. Continuing
 * bytes have their character's class, so that runs need no decoding. */
#include "daemon/model/tokenizer_pre_internal.h"
#include "daemon/model/utf8.h"

#include <string.h>

#define CLASS_WORD (CLASS_LETTER | CLASS_NUMBER | CLASS_SPACE)

static inline uint32_t run_of(const uint8_t *classes, uint32_t at, uint32_t end, uint8_t mask)
{
    while (at < end && (classes[at] & mask)) {
        at++;
    }
    return at;
}

static inline uint32_t run_without(const uint8_t *classes, uint32_t at, uint32_t end, uint8_t mask)
{
    while (at < end && !(classes[at] & mask)) {
        at++;
    }
    return at;
}

static inline uint32_t next_character(const char *text, uint32_t at, uint32_t end)
{
    do {
        at++;
    } while (at < end && utf8_is_continuation((unsigned char)text[at]));
    return at;
}

static inline uint32_t previous_character(const char *text, uint32_t at)
{
    do {
        at--;
    } while (utf8_is_continuation((unsigned char)text[at]));
    return at;
}

/* 's 't 'm 'd 're 've 'll at an apostrophe: their length, or 0. */
static inline uint32_t contraction(const char *text, uint32_t at, uint32_t end, bool any_case)
{
    char fold = any_case ? 0x20 : 0; /* also folds characters that are not letters: see below */
    if (at + 1 >= end) {
        return 0;
    }
    char a = (char)(text[at + 1] | fold);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') {
        return 2;
    }
    if (at + 2 >= end) {
        return 0;
    }
    char b = (char)(text[at + 2] | fold);
    bool two = (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l');
    return two ? 3 : 0; /* 0x20 turns only A-Z into a-z: 0x53 and 0x73 are S and s, nothing else */
}

/* White space from at on, to the piece's end or another character: \s+(?!\S)|\s+ */
static inline uint32_t spaces_end(const char *text, uint32_t at, uint32_t run, uint32_t end)
{
    if (run == end) {
        return run;
    }
    uint32_t last = previous_character(text, run);
    return last > at ? last : run;
}

int pre_scan_gpt2(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                  struct pre_ends *to)
{
    int rc = 0;
    for (uint32_t at = start; at < end && rc == 0;) {
        uint32_t skip = text[at] == '\'' ? contraction(text, at, end, false) : 0;
        if (skip == 0) {
            uint32_t from = at + (text[at] == ' ' && at + 1 < end);
            uint8_t class = classes[from];
            if (class & CLASS_LETTER) {
                skip = run_of(classes, from, end, CLASS_LETTER) - at;
            } else if (class & CLASS_NUMBER) {
                skip = run_of(classes, from, end, CLASS_NUMBER) - at;
            } else if (!(class & CLASS_SPACE)) {
                skip = run_without(classes, from, end, CLASS_WORD) - at;
            } else {
                uint32_t run = run_of(classes, from, end, CLASS_SPACE);
                skip = spaces_end(text, at, run, end) - at;
            }
        }
        at += skip;
        rc = pre_add_end(to, at);
    }
    return rc;
}

/* The end of at most max characters of the class from at on. */
static inline uint32_t run_at_most(const char *text, const uint8_t *classes, uint32_t at,
                                   uint32_t end, uint8_t class, int max)
{
    for (int i = 0; i < max && at < end && (classes[at] & class); i++) {
        at = next_character(text, at, end);
    }
    return at;
}

/* \s*[\r\n]+|\s+(?!\S)|\s+ */
static inline uint32_t breaks_or_spaces(const char *text, const uint8_t *classes, uint32_t at,
                                        uint32_t end)
{
    uint32_t run = run_of(classes, at, end, CLASS_SPACE);
    for (uint32_t i = run; i > at; i--) {
        if (classes[i - 1] & CLASS_NEWLINE) {
            return i;
        }
    }
    return spaces_end(text, at, run, end);
}

/* llama3 and its family: letters are letters, or letters and marks; numbers have at most max
 * characters. */
static inline int scan_family(const char *text, const uint8_t *classes, uint32_t start,
                              uint32_t end, struct pre_ends *to, uint8_t letters, int max)
{
    uint8_t known = letters | CLASS_NUMBER | CLASS_SPACE;
    int rc = 0;
    for (uint32_t at = start; at < end && rc == 0;) {
        uint8_t class = classes[at];
        uint32_t skip = 0;
        if (class & letters) {
            skip = run_of(classes, at, end, letters) - at;
        } else if (class & CLASS_NUMBER) {
            skip = run_at_most(text, classes, at, end, CLASS_NUMBER, max) - at;
        } else if (text[at] == '\'') {
            skip = contraction(text, at, end, true);
        }
        if (skip == 0) {
            uint32_t next = next_character(text, at, end);
            if (!(class & CLASS_NEWLINE) && next < end && (classes[next] & letters)) {
                skip = run_of(classes, next, end, letters) - at;
            } else {
                uint32_t from = at + (text[at] == ' ' && at + 1 < end);
                if (!(classes[from] & known)) {
                    uint32_t run = run_without(classes, from, end, known);
                    skip = run_of(classes, run, end, CLASS_NEWLINE) - at;
                } else {
                    skip = breaks_or_spaces(text, classes, at, end) - at;
                }
            }
        }
        at += skip;
        rc = pre_add_end(to, at);
    }
    return rc;
}

int pre_scan_llama3(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                    struct pre_ends *to)
{
    return scan_family(text, classes, start, end, to, CLASS_LETTER, 3);
}

int pre_scan_qwen2(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                   struct pre_ends *to)
{
    return scan_family(text, classes, start, end, to, CLASS_LETTER, 1);
}

int pre_scan_qwen35(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                    struct pre_ends *to)
{
    return scan_family(text, classes, start, end, to, CLASS_LETTER | CLASS_MARK, 1);
}

/* Matches of at most max characters of one class, and what lies between. */
static inline int scan_class(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                             struct pre_ends *to, uint8_t class, int max)
{
    int rc = 0;
    for (uint32_t at = start; at < end && rc == 0;) {
        uint32_t match = run_without(classes, at, end, class);
        if (match > at) {
            rc = pre_add_end(to, match);
        }
        if (rc == 0 && match < end) {
            at = max > 0 ? run_at_most(text, classes, match, end, class, max)
                         : run_of(classes, match, end, class);
            rc = pre_add_end(to, at);
        } else {
            at = match;
        }
    }
    return rc;
}

int pre_scan_newline(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                     struct pre_ends *to)
{
    return scan_class(text, classes, start, end, to, CLASS_NEWLINE, 1);
}

int pre_scan_number(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                    struct pre_ends *to)
{
    return scan_class(text, classes, start, end, to, CLASS_NUMBER, 1);
}

int pre_scan_numbers3(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                      struct pre_ends *to)
{
    return scan_class(text, classes, start, end, to, CLASS_NUMBER, 3);
}

int pre_scan_numbers(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                     struct pre_ends *to)
{
    return scan_class(text, classes, start, end, to, CLASS_NUMBER, 0);
}

int pre_scan_cjk(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                 struct pre_ends *to)
{
    return scan_class(text, classes, start, end, to, CLASS_CJK, 0);
}

/* \s?[class]+: a run takes the space before it along, unless the match before has it. */
static inline int scan_spaced(const char *text, const uint8_t *classes, uint32_t start,
                              uint32_t end, struct pre_ends *to, uint8_t class)
{
    int rc = 0;
    for (uint32_t at = start; at < end && rc == 0;) {
        uint32_t run = run_without(classes, at, end, class), match = run;
        if (run < end && run > at && (classes[run - 1] & CLASS_SPACE)) {
            match = previous_character(text, run);
        }
        if (match > at) {
            rc = pre_add_end(to, match);
        }
        at = run;
        if (rc == 0 && run < end) {
            at = run_of(classes, run, end, class);
            rc = pre_add_end(to, at);
        }
    }
    return rc;
}

int pre_scan_spaced_cased(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                          struct pre_ends *to)
{
    return scan_spaced(text, classes, start, end, to, CLASS_CASED);
}

int pre_scan_spaced_signs(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                          struct pre_ends *to)
{
    return scan_spaced(text, classes, start, end, to, CLASS_SIGN);
}

/* \s+$ */
int pre_scan_last_spaces(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                         struct pre_ends *to)
{
    (void)text;
    uint32_t at = end;
    while (at > start && (classes[at - 1] & CLASS_SPACE)) {
        at--;
    }
    int rc = at > start && at < end ? pre_add_end(to, at) : 0;
    return rc == 0 ? pre_add_end(to, end) : rc;
}
