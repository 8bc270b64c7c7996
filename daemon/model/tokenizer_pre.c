/* daemon/model/tokenizer_pre.c - pre-tokenisers: the expressions that cut a text into words.
 *
 * tokenizer.ggml.pre names a list of expressions. Each cuts the pieces that the ones before it
 * left: matches become pieces, and so does what lies between them. A piece is a text of its own to
 * the next expression (no look-behind over its start).
 *
 * Every expression here is linear in the text, also against an adversary: runs are consumed whole,
 * and "\s+$" is written so that it is tried once per run. Case-insensitive parts are spelled out,
 * because (?i:s) would also match U+017F. [^a-z\P{L}] is "a letter, but not a to z". */
#include "daemon/model/tokenizer_internal.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_EXPRESSIONS 6

#define CONTRACTION "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
#define SPACES      "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define GPT2        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define LLAMA3                                                 \
    CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| " \
                "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" SPACES
#define QWEN2 \
    CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" SPACES
#define QWEN35                                                   \
    CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}|" \
                " ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|" SPACES
/* A word with capitals first, or in capitals; both may end in a contraction. */
#define CASED(tail)                                         \
    "[^\\r\\n\\p{L}\\p{N}]?[^a-z\\P{L}]*[^A-Z\\P{L}]+" tail \
    "|[^\\r\\n\\p{L}\\p{N}]?[^a-z\\P{L}]+[^A-Z\\P{L}]*" tail
#define CJK        "[\\x{4E00}-\\x{9FA5}\\x{0800}-\\x{4E00}\\x{AC00}-\\x{D7FF}]+"
#define KANJI_KANA "[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{30FF}]+"
#define DEEPSEEK3                                                                        \
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?" \
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|" SPACES
/* Cased letters, as listed by the tokenizer of deepseek-llm (not the same as \p{L&}). */
#define DEEPSEEK_LETTERS                                                                    \
    "A-Za-z\\x{B5}\\x{C0}-\\x{D6}\\x{D8}-\\x{F6}\\x{F8}-\\x{1BA}\\x{1BC}-\\x{1BF}"          \
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
    "\\x{118A0}-\\x{118DF}\\x{1E900}-\\x{1E943}"

static const char *const GPT2_LIST[] = {GPT2, NULL};
static const char *const LLAMA3_LIST[] = {LLAMA3, NULL};
static const char *const QWEN2_LIST[] = {QWEN2, NULL};
static const char *const QWEN35_LIST[] = {QWEN35, NULL};
static const char *const STARCODER_LIST[] = {"\\p{N}", GPT2, NULL};
static const char *const FALCON_LIST[] = {"[\\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]", NULL};
static const char *const DEFAULT_LIST[] = {"[\\p{P}$+<=>^~|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]",
                                           NULL};
static const char *const DEEPSEEK_LLM_LIST[] = {
    "[\\r\\n]",
    "\\s?[" DEEPSEEK_LETTERS "]+",
    "\\s?[!-/:-~\\x{FF01}-\\x{FF0F}\\x{FF1A}-\\x{FF5E}\\x{2018}-\\x{201F}\\x{3000}-\\x{3002}]+",
    "(?<!\\s)\\s++\\z",
    CJK,
    "\\p{N}+",
    NULL};
static const char *const DEEPSEEK_CODER_LIST[] = {"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+",
                                                  CJK,        "\\p{N}",      NULL};
static const char *const DEEPSEEK3_LIST[] = {"\\p{N}{1,3}", KANJI_KANA, DEEPSEEK3, NULL};
static const char *const GPT4O_LIST[] = {
    CASED(CONTRACTION "?") "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" SPACES, NULL};
static const char *const TEKKEN_LIST[] = {
    CASED("") "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" SPACES, NULL};
static const char *const BLOOM_LIST[] = {" ?[^(\\s|.,!?…。，、।۔،)]+", NULL};
static const char *const VIKING_LIST[] = {" ?[^(\\s|.,!?…。，、।۔،)]+", "\\p{N}", NULL};
static const char *const SEED_CODER_LIST[] = {
    CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}\\r\\n]+|" SPACES, NULL};

struct pre_row {
    const char *name;
    const char *const *expressions;
    bool ignore_merges; /* words that are tokens are taken whole */
    bool add_bos;       /* where the file does not say */
};

static const struct pre_row rows[] = {
    {"default", DEFAULT_LIST, false, false},
    {"gpt-2", GPT2_LIST, false, false},
    {"phi-2", GPT2_LIST, false, false},
    {"mpt", GPT2_LIST, false, false},
    {"olmo", GPT2_LIST, false, false},
    {"jais", GPT2_LIST, false, false},
    {"trillion", GPT2_LIST, false, false},
    {"exaone4", GPT2_LIST, false, false},
    {"granite-docling", GPT2_LIST, false, false},
    {"gigachat", GPT2_LIST, false, false},
    {"mellum", GPT2_LIST, false, false},
    {"modern-bert", GPT2_LIST, false, false},
    {"a.x-4.0", GPT2_LIST, false, false},
    {"llama-bpe", LLAMA3_LIST, true, true},
    {"llama3", LLAMA3_LIST, true, true},
    {"llama-v3", LLAMA3_LIST, true, true},
    {"falcon3", LLAMA3_LIST, true, true},
    {"falcon-h1", LLAMA3_LIST, true, true},
    {"pixtral", LLAMA3_LIST, true, true},
    {"midm-2.0", LLAMA3_LIST, true, true},
    {"lfm2", LLAMA3_LIST, true, true},
    {"dbrx", LLAMA3_LIST, false, false},
    {"smaug-bpe", LLAMA3_LIST, false, false},
    {"glm4", LLAMA3_LIST, false, false},
    {"chatglm-bpe", LLAMA3_LIST, false, false},
    {"qwen2", QWEN2_LIST, false, false},
    {"deepseek-r1-qwen", QWEN2_LIST, false, false},
    {"stablelm2", QWEN2_LIST, false, false},
    {"hunyuan", QWEN2_LIST, false, false},
    {"solar-open", QWEN2_LIST, false, false},
    {"megrez", QWEN2_LIST, false, false},
    {"kormo", QWEN2_LIST, false, false},
    {"grok-2", QWEN2_LIST, false, false},
    {"qwen35", QWEN35_LIST, false, false},
    {"starcoder", STARCODER_LIST, false, false},
    {"refact", STARCODER_LIST, false, false},
    {"command-r", STARCODER_LIST, false, false},
    {"smollm", STARCODER_LIST, false, false},
    {"codeshell", STARCODER_LIST, false, false},
    {"exaone", STARCODER_LIST, false, false},
    {"minerva-7b", STARCODER_LIST, false, false},
    {"mellum2", STARCODER_LIST, false, false},
    {"falcon", FALCON_LIST, false, false},
    {"deepseek-llm", DEEPSEEK_LLM_LIST, false, false},
    {"deepseek-coder", DEEPSEEK_CODER_LIST, false, false},
    {"deepseek-v3", DEEPSEEK3_LIST, false, false},
    {"hunyuan-dense", DEEPSEEK3_LIST, false, false},
    {"joyai-llm", DEEPSEEK3_LIST, false, false},
    {"gpt-4o", GPT4O_LIST, false, false},
    {"llama4", GPT4O_LIST, false, false},
    {"kanana2", GPT4O_LIST, false, false},
    {"minimax-m2", GPT4O_LIST, false, false},
    {"tekken", TEKKEN_LIST, true, true},
    {"bloom", BLOOM_LIST, false, false},
    {"poro-chat", BLOOM_LIST, false, false},
    {"gpt3-finnish", BLOOM_LIST, false, false},
    {"viking", VIKING_LIST, false, false},
    {"seed-coder", SEED_CODER_LIST, false, false},
};
#define N_ROWS (sizeof(rows) / sizeof(rows[0]))

struct pre_tokenizer {
    const struct pre_row *row;
    pcre2_code *code[MAX_EXPRESSIONS];
    size_t n;
};

struct ends {
    uint32_t *end;
    size_t n, capacity;
};

struct pre_scratch {
    pcre2_match_data *match;
    pcre2_match_context *context;
    struct ends from, to; /* an expression reads one list and writes the other */
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
    char known[1024];
    size_t used = 0;
    for (size_t i = 0; i < N_ROWS && used < sizeof(known); i++) {
        int n = snprintf(known + used, sizeof(known) - used, "%s%s", i ? " " : "", rows[i].name);
        used += n > 0 ? (size_t)n : 0;
    }
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

int pre_tokenizer_create(struct gguf_string name, struct pre_tokenizer **ret, struct fmt_error *err)
{
    const struct pre_row *row = NULL;
    for (size_t i = 0; i < N_ROWS; i++) {
        if (strlen(rows[i].name) == name.bytes &&
            memcmp(rows[i].name, name.data, name.bytes) == 0) {
            row = &rows[i];
        }
    }
    if (!row) {
        return unknown_name(name, err);
    }
    struct pre_tokenizer *p = calloc(1, sizeof(*p));
    if (!p) {
        return fmt_fail(err, -ENOMEM, "pre-tokeniser: out of memory");
    }
    p->row = row;
    for (; row->expressions[p->n]; p->n++) {
        int rc = compile(row->expressions[p->n], &p->code[p->n], err);
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

static int add_end(struct ends *list, uint32_t end)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 64;
        uint32_t *grown = reallocarray(list->end, capacity, sizeof(*grown));
        if (!grown) {
            return -ENOMEM;
        }
        list->end = grown;
        list->capacity = capacity;
    }
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

/* Cuts one piece by one expression; base is its offset in the whole text. */
static int cut_piece(const pcre2_code *code, struct pre_scratch *s, const char *piece, size_t bytes,
                     uint32_t base)
{
    size_t at = 0, start, end;
    while (at < bytes) {
        int rc = next_match(code, s, piece, bytes, at, &start, &end);
        if (rc < 0) {
            return rc;
        }
        if (rc == 0 || end == start) { /* no expression here matches nothing */
            return add_end(&s->to, base + (uint32_t)bytes);
        }
        if (start > at) {
            rc = add_end(&s->to, base + (uint32_t)start);
            if (rc < 0) {
                return rc;
            }
        }
        rc = add_end(&s->to, base + (uint32_t)end);
        if (rc < 0) {
            return rc;
        }
        at = end;
    }
    return 0;
}

int pre_tokenizer_split(const struct pre_tokenizer *p, struct pre_scratch *s, const char *text,
                        size_t bytes, const uint32_t **ret_ends, size_t *ret_count)
{
    s->from.n = 0;
    int rc = add_end(&s->from, (uint32_t)bytes);
    for (size_t i = 0; i < p->n && rc == 0; i++) {
        s->to.n = 0;
        uint32_t start = 0;
        for (size_t j = 0; j < s->from.n && rc == 0; j++) {
            uint32_t end = s->from.end[j];
            rc = cut_piece(p->code[i], s, text + start, end - start, start);
            start = end;
        }
        struct ends done = s->to;
        s->to = s->from;
        s->from = done;
    }
    if (rc < 0) {
        return rc;
    }
    *ret_ends = s->from.end;
    *ret_count = s->from.n;
    return 0;
}
