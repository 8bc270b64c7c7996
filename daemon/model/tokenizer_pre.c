/* daemon/model/tokenizer_pre.c - cuts a text into words by a list of expressions.
 *
 * Where an expression has been written by hand (tokenizer_scan.c), that is used; PCRE2 runs the
 * others, compiled where the process may map executable memory and interpreted elsewhere. */
#include "daemon/model/tokenizer_pre_internal.h"
#include "daemon/model/utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct pre_tokenizer {
    const struct pre_row *row;
    const uint8_t *classes;                /* by code point; NULL: everything by PCRE2 */
    pcre2_code *code[PRE_MAX_EXPRESSIONS]; /* NULL where the expression is scanned by hand */
    size_t n;
};

struct pre_scratch {
    pcre2_match_data *match;
    pcre2_match_context *context;
    uint8_t *classes; /* of each byte of the text */
    size_t classes_capacity;
    uint8_t seen;             /* all of them together */
    struct pre_ends from, to; /* an expression reads one list and writes the other */
};

const char *pre_tokenizer_name(const struct pre_tokenizer *p)
{
    return p->row->name;
}

bool pre_tokenizer_ignores_merges(const struct pre_tokenizer *p)
{
    return p->row->ignore_merges;
}

bool pre_tokenizer_adds_bos(const struct pre_tokenizer *p)
{
    return p->row->add_bos;
}

void pre_tokenizer_destroy(struct pre_tokenizer *p)
{
    if (!p) {
        return;
    }
    for (size_t i = 0; i < p->n; i++) {
        pcre2_code_free(p->code[i]);
    }
    free(p);
}

static int unknown_name(struct gguf_string name, struct fmt_error *err)
{
    char known[256];
    pre_list_names(known, sizeof(known));
    int shown = name.bytes < 40 ? (int)name.bytes : 40;
    return fmt_fail(err, -ENOTSUP, "tokenizer.ggml.pre: unknown pre-tokeniser '%.*s'; known: %s",
                    shown, name.data, known);
}

static int compile(const char *expression, pcre2_code **ret, struct fmt_error *err)
{
    int code;
    PCRE2_SIZE offset;
    pcre2_code *compiled = pcre2_compile(
        (PCRE2_SPTR)expression, PCRE2_ZERO_TERMINATED,
        PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK | PCRE2_DOLLAR_ENDONLY, &code, &offset, NULL);
    if (!compiled) {
        char text[120] = "";
        (void)pcre2_get_error_message(code, (PCRE2_UCHAR *)text, sizeof(text));
        return fmt_fail(err, code == PCRE2_ERROR_HEAP_FAILED ? -ENOMEM : -ENOTSUP,
                        "pre-tokeniser's expression at %zu: %s", (size_t)offset, text);
    }
    /* Refused where the process may not map executable memory: pcre2_match then interprets. */
    (void)pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);
    *ret = compiled;
    return 0;
}

int pre_tokenizer_create(struct gguf_string name, bool by_hand, struct pre_tokenizer **ret,
                         struct fmt_error *err)
{
    const struct pre_row *row = pre_find_row(name);
    if (!row) {
        return unknown_name(name, err);
    }
    struct pre_tokenizer *p = calloc(1, sizeof(*p));
    if (!p) {
        return fmt_fail(err, -ENOMEM, "pre-tokeniser: out of memory");
    }
    p->row = row;
    p->classes = by_hand ? pre_classes() : NULL;
    for (; row->expressions[p->n]; p->n++) {
        const struct pre_expression *e = row->expressions[p->n];
        if (p->classes && e->scan) {
            continue;
        }
        int rc = compile(e->pattern, &p->code[p->n], err);
        if (rc < 0) {
            pre_tokenizer_destroy(p);
            return rc;
        }
    }
    *ret = p;
    return 0;
}

void pre_scratch_destroy(struct pre_scratch *s)
{
    if (!s) {
        return;
    }
    pcre2_match_data_free(s->match);
    pcre2_match_context_free(s->context);
    free(s->classes);
    free(s->from.end);
    free(s->to.end);
    free(s);
}

int pre_scratch_create(const struct pre_tokenizer *p, struct pre_scratch **ret)
{
    struct pre_scratch *s = calloc(1, sizeof(*s));
    if (!s) {
        return -ENOMEM;
    }
    s->match = pcre2_match_data_create(1, NULL);
    s->context = pcre2_match_context_create(NULL);
    if (!s->match || !s->context) {
        pre_scratch_destroy(s);
        return -ENOMEM;
    }
    /* The expressions are linear: the limits, made for those that are not, would only forbid
     * long texts. */
    (void)pcre2_set_match_limit(s->context, UINT32_MAX);
    (void)pcre2_set_depth_limit(s->context, UINT32_MAX);
    (void)pcre2_set_heap_limit(s->context, UINT32_MAX);
    *ret = s;
    return 0;
}

int pre_add_end_slowly(struct pre_ends *list, uint32_t end)
{
    size_t capacity = list->capacity ? list->capacity * 2 : 64;
    uint32_t *grown = reallocarray(list->end, capacity, sizeof(*grown));
    if (!grown) {
        return -ENOMEM;
    }
    list->end = grown;
    list->capacity = capacity;
    list->end[list->n++] = end;
    return 0;
}

/* The next match in text[at..bytes): 1 and its bounds, 0 for none. */
static int next_match(const pcre2_code *code, struct pre_scratch *s, const char *text, size_t bytes,
                      size_t at, size_t *ret_start, size_t *ret_end)
{
    int rc =
        pcre2_match(code, (PCRE2_SPTR)text, bytes, at, PCRE2_NO_UTF_CHECK, s->match, s->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
        rc = pcre2_match(code, (PCRE2_SPTR)text, bytes, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         s->match, s->context);
    }
    if (rc == PCRE2_ERROR_NOMATCH) {
        return 0;
    }
    if (rc < 0) {
        return rc == PCRE2_ERROR_NOMEMORY ? -ENOMEM : -EIO;
    }
    const PCRE2_SIZE *bounds = pcre2_get_ovector_pointer(s->match);
    *ret_start = bounds[0];
    *ret_end = bounds[1];
    return 1;
}

/* Appends the ends of a match of text[start..end): of the whole, or of groups of three characters
 * counted from its end. */
static int add_match(const struct pre_expression *e, struct pre_ends *to, const char *text,
                     size_t start, size_t end)
{
    size_t left = 0;
    for (size_t i = start; e->in_threes && i < end; i++) {
        left += !utf8_is_continuation((unsigned char)text[i]);
    }
    for (size_t i = start; e->in_threes && i < end; i++) {
        bool first = !utf8_is_continuation((unsigned char)text[i]);
        if (first && i > start && left % 3 == 0) {
            int rc = pre_add_end(to, (uint32_t)i);
            if (rc < 0) {
                return rc;
            }
        }
        left -= first;
    }
    return pre_add_end(to, (uint32_t)end);
}

/* Cuts the piece text[start..end) by one expression. */
static int cut_piece(const struct pre_expression *e, const pcre2_code *code, struct pre_scratch *s,
                     const char *text, uint32_t start, uint32_t end)
{
    const char *piece = text + start;
    size_t at = 0, bytes = end - start, match, match_end;
    while (at < bytes) {
        int rc = next_match(code, s, piece, bytes, at, &match, &match_end);
        if (rc < 0) {
            return rc;
        }
        if (rc == 0 || match_end == match) { /* no expression here matches nothing */
            return pre_add_end(&s->to, end);
        }
        if (match > at && !e->glued) {
            rc = pre_add_end(&s->to, start + (uint32_t)match);
            if (rc < 0) {
                return rc;
            }
        }
        rc = add_match(e, &s->to, text, start + match, start + match_end);
        if (rc < 0) {
            return rc;
        }
        at = match_end;
    }
    return 0;
}

/* Looks up the class of each character, for each of its bytes. */
static int classify(const struct pre_tokenizer *p, struct pre_scratch *s, const char *text,
                    size_t bytes)
{
    if (s->classes_capacity < bytes) {
        uint8_t *room = realloc(s->classes, bytes);
        if (!room) {
            return -ENOMEM;
        }
        s->classes = room;
        s->classes_capacity = bytes;
    }
    const unsigned char *in = (const unsigned char *)text;
    uint8_t *out = s->classes, seen = 0;
    for (size_t at = 0; at < bytes;) {
        uint32_t lead = in[at];
        if (lead < 0x80) {
            out[at] = p->classes[lead];
            seen |= out[at++];
            continue;
        }
        size_t n = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        uint32_t point = lead & (0x7Fu >> n);
        for (size_t i = 1; i < n; i++) {
            point = point << 6 | (in[at + i] & 0x3Fu);
        }
        seen |= p->classes[point];
        for (size_t i = 0; i < n; i++) {
            out[at + i] = p->classes[point];
        }
        at += n;
    }
    s->seen = seen;
    return 0;
}

static int cut_all(const struct pre_tokenizer *p, size_t i, struct pre_scratch *s, const char *text)
{
    const struct pre_expression *e = p->row->expressions[i];
    int rc = 0;
    uint32_t start = 0;
    if (!p->code[i] && e->needs && !(e->needs & s->seen)) {
        return 0;
    }
    s->to.n = 0;
    for (size_t j = 0; j < s->from.n && rc == 0; j++) {
        uint32_t end = s->from.end[j];
        rc = p->code[i] ? cut_piece(e, p->code[i], s, text, start, end)
                        : e->scan(text, s->classes, start, end, &s->to);
        start = end;
    }
    struct pre_ends done = s->to;
    s->to = s->from;
    s->from = done;
    return rc;
}

int pre_tokenizer_split(const struct pre_tokenizer *p, struct pre_scratch *s, const char *text,
                        size_t bytes, const uint32_t **ret_ends, size_t *ret_count)
{
    s->from.n = 0;
    int rc = bytes > 0 ? pre_add_end(&s->from, (uint32_t)bytes) : 0;
    if (rc == 0 && p->classes) {
        rc = classify(p, s, text, bytes);
    }
    for (size_t i = 0; i < p->n && rc == 0; i++) {
        rc = cut_all(p, i, s, text);
    }
    if (rc < 0) {
        return rc;
    }
    *ret_ends = s->from.end;
    *ret_count = s->from.n;
    return 0;
}
