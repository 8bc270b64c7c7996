/* daemon/model/tokenizer_pre_internal.h - what the files of the pre-tokeniser share.
 *
 *   tokenizer_pre_names.c  names, and the expressions that they stand for
 *   tokenizer_pre.c        runs a list of expressions over a text, by PCRE2 where it must
 *   tokenizer_scan.c       the most common expressions again, by hand
 *   tokenizer_classes.c    the character classes that those scan for */
#ifndef DAEMON_MODEL_TOKENIZER_PRE_INTERNAL_H
#define DAEMON_MODEL_TOKENIZER_PRE_INTERNAL_H

#include "daemon/model/tokenizer_internal.h"

#define PRE_MAX_EXPRESSIONS 6

/* Sets of characters that both an expression and a class name. */
#define PRE_CJK "[\\x{4E00}-\\x{9FA5}\\x{0800}-\\x{4E00}\\x{AC00}-\\x{D7FF}]"
/* Cased letters, as listed by the tokenizer of deepseek-llm (not the same as \p{L&}). */
#define PRE_CASED_LETTERS                                                                   \
    "[A-Za-z\\x{B5}\\x{C0}-\\x{D6}\\x{D8}-\\x{F6}\\x{F8}-\\x{1BA}\\x{1BC}-\\x{1BF}"         \
    "\\x{1C4}-\\x{293}\\x{295}-\\x{2AF}\\x{370}-\\x{373}\\x{376}\\x{377}\\x{37B}-\\x{37D}"  \
    "\\x{37F}\\x{386}\\x{388}-\\x{38A}\\x{38C}\\x{38E}-\\x{3A1}\\x{3A3}-\\x{3F5}"           \
    "\\x{3F7}-\\x{481}\\x{48A}-\\x{52F}\\x{531}-\\x{556}\\x{10A0}-\\x{10C5}"                \
    "\\x{13A0}-\\x{13F5}\\x{13F8}-\\x{13FD}\\x{1C90}-\\x{1CBA}\\x{1CBD}-\\x{1CBF}"          \
    "\\x{1D00}-\\x{1D2B}\\x{1D6B}-\\x{1D77}\\x{1D79}-\\x{1D9A}\\x{1E00}-\\x{1F15}"          \
    "\\x{1F18}-\\x{1F1D}\\x{1F20}-\\x{1F45}\\x{1F48}-\\x{1F4D}\\x{1F50}-\\x{1F57}\\x{1F59}" \
    "\\x{1F5B}\\x{1F5D}\\x{1F5F}-\\x{1F7D}\\x{1F80}-\\x{1FB4}\\x{1FB6}-\\x{1FBC}\\x{1FBE}"  \
    "\\x{1FC2}-\\x{1FC4}\\x{1FC6}-\\x{1FCC}\\x{1FD0}-\\x{1FD3}\\x{1FD6}-\\x{1FDB}"          \
    "\\x{1FE0}-\\x{1FEC}\\x{1FF2}-\\x{1FF4}\\x{1FF6}-\\x{1FFC}\\x{2102}\\x{2107}"           \
    "\\x{210A}-\\x{2113}\\x{2115}\\x{2119}-\\x{211D}\\x{2124}\\x{2126}\\x{2128}"            \
    "\\x{212A}-\\x{212D}\\x{212F}-\\x{2134}\\x{2139}\\x{213C}-\\x{213F}\\x{2145}-\\x{2149}" \
    "\\x{214E}\\x{2183}\\x{2184}\\x{2C00}-\\x{2C7B}\\x{2C7E}-\\x{2CE4}\\x{2CEB}-\\x{2CEE}"  \
    "\\x{2CF2}\\x{2CF3}\\x{A640}-\\x{A66D}\\x{A680}-\\x{A69B}\\x{A722}-\\x{A76F}"           \
    "\\x{A771}-\\x{A787}\\x{A78B}-\\x{A78E}\\x{AB70}-\\x{ABBF}\\x{FB00}-\\x{FB06}"          \
    "\\x{FB13}-\\x{FB17}\\x{FF21}-\\x{FF3A}\\x{FF41}-\\x{FF5A}\\x{10400}-\\x{1044F}"        \
    "\\x{104B0}-\\x{104D3}\\x{104D8}-\\x{104FB}\\x{10C80}-\\x{10CB2}\\x{10CC0}-\\x{10CF2}"  \
    "\\x{118A0}-\\x{118DF}\\x{1E900}-\\x{1E943}]"
#define PRE_SIGNS \
    "[!-/:-~\\x{FF01}-\\x{FF0F}\\x{FF1A}-\\x{FF5E}\\x{2018}-\\x{201F}\\x{3000}-\\x{3002}]"

/* What a character is, in bits. A byte that continues a character has the bits of its first. */
enum {
    CLASS_LETTER = 1,    /* \p{L} */
    CLASS_NUMBER = 2,    /* \p{N} */
    CLASS_SPACE = 4,     /* \s */
    CLASS_MARK = 8,      /* \p{M} */
    CLASS_CASED = 16,    /* PRE_CASED_LETTERS */
    CLASS_SIGN = 32,     /* PRE_SIGNS */
    CLASS_CJK = 64,      /* PRE_CJK */
    CLASS_NEWLINE = 128, /* [\r\n] */
};

/* The classes of all characters, by code point; made once, by PCRE2's own properties, so that an
 * expression by hand means what it means to PCRE2. NULL when there is no memory for that. Safe from
 * any thread. */
const uint8_t *pre_classes(void);

/* A growing list of offsets. */
struct pre_ends {
    uint32_t *end;
    size_t n, capacity;
};

int pre_add_end_slowly(struct pre_ends *list, uint32_t end);

static inline int pre_add_end(struct pre_ends *list, uint32_t end)
{
    if (list->n == list->capacity) {
        return pre_add_end_slowly(list, end);
    }
    list->end[list->n++] = end;
    return 0;
}

/* Cuts the piece text[start..end) as the expression does and appends the ends of what it gives.
 * classes: one for each byte of the text. 0 or -ENOMEM. */
typedef int pre_scan_fn(const char *text, const uint8_t *classes, uint32_t start, uint32_t end,
                        struct pre_ends *to);

struct pre_expression {
    const char *pattern; /* for PCRE2: the truth */
    pre_scan_fn *scan;   /* the same by hand, or NULL */
    uint8_t needs;       /* without a character of these classes it cuts nothing; 0: it may */
    bool in_threes;      /* a match is cut into groups of three characters, counted from its end */
    bool glued;          /* what lies before a match stays with the match's first piece */
};

pre_scan_fn pre_scan_gpt2, pre_scan_llama3, pre_scan_qwen2, pre_scan_qwen35;
pre_scan_fn pre_scan_newline, pre_scan_number, pre_scan_numbers, pre_scan_numbers3;
pre_scan_fn pre_scan_spaced_cased, pre_scan_spaced_signs, pre_scan_last_spaces, pre_scan_cjk;

struct pre_row {
    const char *name;
    const struct pre_expression *const *expressions; /* NULL behind the last */
    bool ignore_merges;                              /* words that are tokens are taken whole */
    bool add_bos;                                    /* where the file does not say */
};

/* The row of a name, or NULL. */
const struct pre_row *pre_find_row(struct gguf_string name);
/* All names, separated by spaces, as many as fit; terminated. */
void pre_list_names(char *text, size_t size);
/* The i-th row, or NULL behind the last. */
const struct pre_row *pre_row_at(size_t i);

#endif
