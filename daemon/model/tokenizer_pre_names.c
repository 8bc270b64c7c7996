/* daemon/model/tokenizer_pre_names.c - the names of pre-tokenisers and their expressions.
 *
 * tokenizer.ggml.pre names a list of expressions. Each cuts the pieces that the ones before it
 * left: matches become pieces, and so does what lies between them. A piece is a text of its own to
 * the next expression (no look-behind over its start). Names and lists are llama.cpp's; where its
 * way of matching gives an expression another meaning than its text has, the meaning is kept: there
 * \p{Lu} is any letter, \d and \b know ASCII only.
 *
 * Every expression here is linear in the text, also against an adversary: runs are consumed whole,
 * and "\s+$" is written so that it is tried once per run. Case-insensitive parts are spelled out,
 * because (?i:s) would also match U+017F. [^a-z\P{L}] is "a letter, but not a to z". */
#include "daemon/model/tokenizer_pre_internal.h"

#include <stdio.h>
#include <string.h>

#define CONTRACTION "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
#define SPACES      "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define LETTERS     "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
#define OTHERS      " ?[^\\s\\p{L}\\p{N}]+"
#define BREAKS      "[\\r\\n]*"
/* A word with capitals first, or in capitals; both may end in a contraction. */
#define CASED(tail)                                         \
    "[^\\r\\n\\p{L}\\p{N}]?[^a-z\\P{L}]*[^A-Z\\P{L}]+" tail \
    "|[^\\r\\n\\p{L}\\p{N}]?[^a-z\\P{L}]+[^A-Z\\P{L}]*" tail
/* The same with marks as letters: [\p{L}\p{M}], but not a to z, is (?![a-z])[\p{L}\p{M}]. */
#define UPPER_OR_MARK "(?:(?![a-z])[\\p{L}\\p{M}])"
#define LOWER_OR_MARK "(?:(?![A-Z])[\\p{L}\\p{M}])"
#define CASED_MARKS                                                          \
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER_OR_MARK "*" LOWER_OR_MARK "+" CONTRACTION \
    "?|[^\\r\\n\\p{L}\\p{N}]?" UPPER_OR_MARK "++" LOWER_OR_MARK "*+" CONTRACTION "?"
#define MARKED_WORD "[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+" CONTRACTION "?"
#define ASCII_SIGN  "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~]"
#define DEEPSEEK3(signs) \
    ASCII_SIGN "[A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+" signs
#define HAN                                                                            \
    "\\x{4E00}-\\x{9FFF}\\x{3400}-\\x{4DBF}\\x{20000}-\\x{2A6DF}\\x{2A700}-\\x{2EBEF}" \
    "\\x{F900}-\\x{FAFF}\\x{2F800}-\\x{2FA1F}"
#define BLOOM_WORD " ?[^(\\s|.,!?…。，、।۔،)]+"

#define EXPRESSION(name, ...) static const struct pre_expression name = {__VA_ARGS__}
#define LIST(name, ...)       static const struct pre_expression *const name[] = {__VA_ARGS__, NULL}

EXPRESSION(GPT2,
           "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
           pre_scan_gpt2);
EXPRESSION(LLAMA3, CONTRACTION "|" LETTERS "|\\p{N}{1,3}|" OTHERS BREAKS "|" SPACES,
           pre_scan_llama3);
EXPRESSION(QWEN2, CONTRACTION "|" LETTERS "|\\p{N}|" OTHERS BREAKS "|" SPACES, pre_scan_qwen2);
EXPRESSION(QWEN35,
           CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}|"
                       " ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|" SPACES,
           pre_scan_qwen35);
EXPRESSION(NEWLINE, "[\\r\\n]", pre_scan_newline, CLASS_NEWLINE);
EXPRESSION(NUMBER, "\\p{N}", pre_scan_number, CLASS_NUMBER);
EXPRESSION(NUMBERS, "\\p{N}+", pre_scan_numbers, CLASS_NUMBER);
EXPRESSION(NUMBERS_3, "\\p{N}{1,3}", pre_scan_numbers3, CLASS_NUMBER);
/* llama.cpp leaves what precedes a number with its first digits. */
EXPRESSION(NUMBERS_IN_THREES, "\\p{N}+", .in_threes = true, .glued = true);
EXPRESSION(DIGITS_IN_THREES, "[0-9]+", .in_threes = true);
/* A number that a letter follows is none; the look-behind keeps it from being tried again. */
EXPRESSION(WHOLE_NUMBERS_IN_THREES, "(?<![0-9])[0-9]++(?![A-Za-z_])", .in_threes = true);
EXPRESSION(THREE_DIGITS, "[0-9][0-9][0-9]", NULL);
EXPRESSION(LINES, "[^\\n]+|[\\n]+", NULL);
EXPRESSION(FALCON_SIGNS, "[\\p{P}$+<=>^~|`]+", NULL);
EXPRESSION(DEFAULT_SIGNS, "[\\p{P}$+<=>^~|]+", NULL);
EXPRESSION(SPACED_CASED, "\\s?" PRE_CASED_LETTERS "+", pre_scan_spaced_cased, CLASS_CASED);
EXPRESSION(SPACED_SIGNS, "\\s?" PRE_SIGNS "+", pre_scan_spaced_signs, CLASS_SIGN);
EXPRESSION(LAST_SPACES, "(?<!\\s)\\s++\\z", pre_scan_last_spaces);
EXPRESSION(CJK, PRE_CJK "+", pre_scan_cjk, CLASS_CJK);
EXPRESSION(KANJI_KANA, "[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{30FF}]+", NULL);
EXPRESSION(SPACED_LETTERS, "\\s?\\p{L}+", NULL);
EXPRESSION(SPACED_PUNCTUATION, "\\s?\\p{P}+", NULL);
EXPRESSION(DEEPSEEK3_WORDS, DEEPSEEK3(BREAKS) "|" SPACES, NULL);
EXPRESSION(SPARK_WORDS, DEEPSEEK3("") "|[\\r\\n]|\\s+(?!\\S)|\\s+", NULL);
EXPRESSION(GPT4O_WORDS, CASED(CONTRACTION "?") "|\\p{N}{1,3}|" OTHERS "[\\r\\n/]*|" SPACES, NULL);
EXPRESSION(GRANITE_EMBED_WORDS, CASED_MARKS "|\\p{N}{1,3}|" OTHERS "[\\r\\n/]*|" SPACES, NULL);
EXPRESSION(TEKKEN_WORDS, CASED("") "|\\p{N}|" OTHERS "[\\r\\n/]*|" SPACES, NULL);
EXPRESSION(TINY_AYA_WORDS, MARKED_WORD "|\\p{N}{1,3}|" OTHERS "[\\r\\n/]*|" SPACES, NULL);
EXPRESSION(YOUTU_WORDS, MARKED_WORD "|\\p{N}|" OTHERS "[\\r\\n/]*|" SPACES, NULL);
EXPRESSION(YOUTU_SCRIPTS,
           "[\\x{AC00}-\\x{D7A3}\\x{3131}-\\x{318E}]+|"
           "[！…“”‘’—：；，\\x{3001}-\\x{303F}\\x{FE30}-\\x{FE4F}]+|"
           "[\\x{3105}-\\x{312F}]+|[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{30FF}]+",
           NULL);
EXPRESSION(BLOOM, BLOOM_WORD, NULL);
EXPRESSION(SEED_CODER, CONTRACTION "|" LETTERS "|\\p{N}| ?[^\\s\\p{L}\\p{N}\\r\\n]+|" SPACES, NULL);
EXPRESSION(JAIS2,
           CONTRACTION "|" LETTERS "|\\p{N}{1,3}|" OTHERS BREAKS
                       "|\\s*[\\r\\n]+|\\s{512}(?!\\S)|\\s{256}(?!\\S)|\\s{128}(?!\\S)|"
                       "\\s{64}(?!\\S)|\\s{32}(?!\\S)|\\s{16}(?!\\S)|\\s{8}(?!\\S)|\\s{4}(?!\\S)|"
                       "\\s{1,2}(?!\\S)|\\s",
           NULL);
EXPRESSION(MINICPM5, CONTRACTION "|" LETTERS "|\\p{N}+|" OTHERS BREAKS "|" SPACES, NULL);
EXPRESSION(UFAKZEKA, LETTERS "|\\p{N}|" OTHERS BREAKS "|" SPACES, NULL);
EXPRESSION(BAILING,
           "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|" LETTERS "|\\p{N}|" OTHERS BREAKS
           "|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+",
           NULL);
/* Words with single spaces between them are one piece here. */
EXPRESSION(EXAONE_MOE,
           CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}\\p{M}*+(?: ?\\p{L}\\p{M}*+)*+|\\p{N}|" OTHERS
                       "[\\r\\n/]?|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+",
           NULL);
EXPRESSION(KIMI_K2,
           "[" HAN "]+|[^\\r\\n\\p{L}\\p{N}]?(?:(?![" HAN "])\\p{L})++" CONTRACTION
           "?|\\p{N}{1,3}|" OTHERS BREAKS "|" SPACES,
           NULL);
EXPRESSION(AFMOE_SCRIPTS,
           "[\\x{4E00}-\\x{9FFF}\\x{3400}-\\x{4DBF}\\x{F900}-\\x{FAFF}\\x{3040}-\\x{30FF}"
           "\\x{FF65}-\\x{FF9F}\\x{2F00}-\\x{2FDF}\\x{0E40}-\\x{0E7F}\\x{0E80}-\\x{0EFF}"
           "\\x{1780}-\\x{17FF}\\x{1000}-\\x{109F}\\x{AA60}-\\x{AA7F}\\x{A9E0}-\\x{A9FF}"
           "\\x{AC00}-\\x{D7AF}\\x{1100}-\\x{11FF}]+",
           NULL);
EXPRESSION(SENTINEL, "<sentinel:[0-9]+>", NULL);
EXPRESSION(IMAGE, "IMGIMG[A-I]{1,4}Z", NULL);
EXPRESSION(BLANKS, "[\\t\\n]|    |  ", NULL);
EXPRESSION(ONE_SIGN, "[\\p{P}!-/:-@\\[-`{-~]", NULL);

LIST(GPT2_LIST, &GPT2);
LIST(LLAMA3_LIST, &LLAMA3);
LIST(QWEN2_LIST, &QWEN2);
LIST(QWEN35_LIST, &QWEN35);
LIST(STARCODER_LIST, &NUMBER, &GPT2);
LIST(FALCON_LIST, &FALCON_SIGNS, &GPT2, &THREE_DIGITS);
LIST(DEFAULT_LIST, &DEFAULT_SIGNS, &GPT2, &NUMBERS, &THREE_DIGITS);
LIST(DEEPSEEK_LLM_LIST, &NEWLINE, &SPACED_CASED, &SPACED_SIGNS, &LAST_SPACES, &CJK, &NUMBERS);
LIST(DEEPSEEK_CODER_LIST, &NEWLINE, &SPACED_LETTERS, &SPACED_PUNCTUATION, &CJK, &NUMBER);
LIST(DEEPSEEK3_LIST, &NUMBERS_3, &KANJI_KANA, &DEEPSEEK3_WORDS);
LIST(SPARK_LIST, &NUMBERS_3, &KANJI_KANA, &SPARK_WORDS, &NUMBER);
LIST(GPT4O_LIST, &GPT4O_WORDS);
LIST(GRANITE_EMBED_LIST, &GRANITE_EMBED_WORDS);
LIST(TEKKEN_LIST, &TEKKEN_WORDS);
LIST(TINY_AYA_LIST, &WHOLE_NUMBERS_IN_THREES, &TINY_AYA_WORDS);
LIST(YOUTU_LIST, &YOUTU_SCRIPTS, &YOUTU_WORDS);
LIST(BLOOM_LIST, &BLOOM);
LIST(VIKING_LIST, &BLOOM, &NUMBER);
LIST(SEED_CODER_LIST, &SEED_CODER);
LIST(JAIS2_LIST, &JAIS2);
LIST(MINICPM5_LIST, &NUMBERS_3, &MINICPM5);
LIST(UFAKZEKA_LIST, &UFAKZEKA);
LIST(BAILING_LIST, &BAILING);
LIST(EXAONE_MOE_LIST, &EXAONE_MOE);
LIST(KIMI_K2_LIST, &KIMI_K2);
LIST(AFMOE_LIST, &NUMBERS_IN_THREES, &AFMOE_SCRIPTS, &DEEPSEEK3_WORDS);
LIST(SUPERBPE_LIST, &NUMBERS, &DIGITS_IN_THREES);
LIST(LAGUNA_LIST, &LINES, &QWEN2);
LIST(CHAMELEON_LIST, &SENTINEL, &IMAGE, &BLANKS, &NUMBER, &ONE_SIGN, &GPT2);

static const struct pre_row rows[] = {
    {"default", DEFAULT_LIST, false, false},
    {"gpt-2", GPT2_LIST, false, false},
    {"phi-2", GPT2_LIST, false, false},
    {"mpt", GPT2_LIST, false, false},
    {"olmo", GPT2_LIST, false, false},
    {"jais", GPT2_LIST, false, false},
    {"jina-es", GPT2_LIST, false, false},
    {"jina-de", GPT2_LIST, false, false},
    {"jina-v2-es", GPT2_LIST, false, false},
    {"jina-v2-de", GPT2_LIST, false, false},
    {"jina-v1-en", GPT2_LIST, false, false},
    {"jina-v2-code", GPT2_LIST, false, false},
    {"roberta-bpe", GPT2_LIST, false, false},
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
    {"jina-v5-nano", LLAMA3_LIST, true, true},
    {"dbrx", LLAMA3_LIST, false, false},
    {"smaug-bpe", LLAMA3_LIST, false, false},
    {"glm4", LLAMA3_LIST, false, false},
    {"chatglm-bpe", LLAMA3_LIST, false, false},
    {"qwen2", QWEN2_LIST, false, false},
    {"deepseek-r1-qwen", QWEN2_LIST, false, false},
    {"f2llmv2", QWEN2_LIST, false, false},
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
    {"hy_v4", DEEPSEEK3_LIST, false, false},
    {"spark2_5", SPARK_LIST, false, false},
    {"gpt-4o", GPT4O_LIST, false, false},
    {"llama4", GPT4O_LIST, false, false},
    {"kanana2", GPT4O_LIST, false, false},
    {"talkie", GPT4O_LIST, false, false},
    {"minimax-m2", GPT4O_LIST, false, false},
    {"granite-embed-multi-97m", GRANITE_EMBED_LIST, true, false},
    {"tekken", TEKKEN_LIST, true, true},
    {"tiny_aya", TINY_AYA_LIST, false, false},
    {"cohere2moe", TINY_AYA_LIST, false, false},
    {"youtu", YOUTU_LIST, true, false},
    {"bloom", BLOOM_LIST, false, false},
    {"poro-chat", BLOOM_LIST, false, false},
    {"gpt3-finnish", BLOOM_LIST, false, false},
    {"viking", VIKING_LIST, false, false},
    {"seed-coder", SEED_CODER_LIST, false, false},
    {"jais-2", JAIS2_LIST, false, false},
    {"minicpm5", MINICPM5_LIST, true, false},
    {"ufakzeka", UFAKZEKA_LIST, false, false},
    {"bailingmoe", BAILING_LIST, false, false},
    {"bailingmoe2", BAILING_LIST, false, false},
    {"llada-moe", BAILING_LIST, false, false},
    {"exaone-moe", EXAONE_MOE_LIST, false, false},
    {"kimi-k2", KIMI_K2_LIST, false, false},
    {"afmoe", AFMOE_LIST, false, false},
    {"superbpe", SUPERBPE_LIST, false, false},
    {"laguna", LAGUNA_LIST, false, false},
    {"chameleon", CHAMELEON_LIST, false, true},
};
#define N_ROWS (sizeof(rows) / sizeof(rows[0]))

const struct pre_row *pre_row_at(size_t i)
{
    return i < N_ROWS ? &rows[i] : NULL;
}

const struct pre_row *pre_find_row(struct gguf_string name)
{
    for (size_t i = 0; i < N_ROWS; i++) {
        if (strlen(rows[i].name) == name.bytes &&
            memcmp(rows[i].name, name.data, name.bytes) == 0) {
            return &rows[i];
        }
    }
    return NULL;
}

void pre_list_names(char *text, size_t size)
{
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; i < N_ROWS && used < size; i++) {
        int n = snprintf(text + used, size - used, "%s%s", i ? " " : "", rows[i].name);
        used += n > 0 ? (size_t)n : 0;
    }
}
