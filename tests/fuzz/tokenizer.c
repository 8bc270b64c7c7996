/* tests/fuzz/tokenizer.c - texts through small vocabularies and back; vocabularies that lie.
 *
 * Byte 0 chooses: below OWN_VOCABULARY, one of the built-in tokenizers, which must give the text
 * back byte for byte (bit 4: with control tokens parsed) and cut it by hand as PCRE2 does. From
 * there on, the input is first a vocabulary (one token a line, its first character the type, up to
 * an empty line), which may be refused, and then a text for it; bits 5 and 6 choose its kind. A
 * unigram vocabulary's normalisation rules are the bytes of its first token. */
#include "daemon/model/tokenizer_internal.h"
#include "daemon/model/utf8.h"
#include "tests/unit/model/vocab_image.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OWN_VOCABULARY 0x80
#define PARSE_SPECIAL  0x10
#define OWN_KIND_SHIFT 5 /* two bits */
#define N_BUILT_IN     8
#define MAX_OWN_TOKENS 200
#define MAX_TOKENS     (1u << 20)

static const char META_SPACE[] = "\xE2\x96\x81";

static const struct tokenizer *built_in(size_t i)
{
    static const char *const pre[N_BUILT_IN] = {NULL,           "default", "gpt-2",  "llama-bpe",
                                                "deepseek-llm", "qwen2",   "gpt-4o", "deepseek-v3"};
    static struct tokenizer *made[N_BUILT_IN];
    static struct vocab_image images[N_BUILT_IN];
    static struct gguf *files[N_BUILT_IN]; /* must outlive their tokenizers */
    if (!made[i]) {
        struct fmt_error err;
        if (pre[i]) {
            vocab_image_bpe(&images[i], pre[i]);
        } else {
            vocab_image_spm(&images[i]);
        }
        files[i] = vocab_image_open(&images[i]);
        if (tokenizer_create(files[i], &made[i], &err) < 0) {
            fprintf(stderr, "%s\n", err.text);
            abort();
        }
    }
    return made[i];
}

static void check_round_trip(const struct tokenizer *t, bool special, const char *text,
                             size_t bytes)
{
    int32_t *ids;
    size_t n, back_bytes;
    char *back;
    struct tokenize_options options = {.parse_special = special};
    if (tokenizer_encode(t, text, bytes, options, MAX_TOKENS, &ids, &n) < 0) {
        abort();
    }
    if (tokenizer_decode(t, ids, n, special, &back, &back_bytes) < 0) {
        abort();
    }
    bool spm = strcmp(tokenizer_kind(t), "llama") == 0;
    bool lossy = spm && bytes > 0 && memmem(text, bytes, META_SPACE, strlen(META_SPACE));
    if (!lossy && (back_bytes != bytes || (bytes > 0 && memcmp(back, text, bytes) != 0))) {
        fprintf(stderr, "%zu bytes came back as %zu\n", bytes, back_bytes);
        abort();
    }
    free(back);
    free(ids);
}

/* The i-th built-in's pre-tokeniser, by hand or all by PCRE2. */
static const struct pre_tokenizer *words_of(size_t i, const char *name, bool by_hand)
{
    static struct pre_tokenizer *made[N_BUILT_IN][2];
    struct gguf_string view = {name, strlen(name)};
    struct fmt_error err;
    if (!made[i][by_hand] && pre_tokenizer_create(view, by_hand, &made[i][by_hand], &err) < 0) {
        abort();
    }
    return made[i][by_hand];
}

/* The words of the well-formed text at the input's start, by hand and by PCRE2. */
static void check_words(size_t i, const char *name, const char *text, size_t bytes)
{
    size_t n = 0, step;
    while (n < bytes &&
           utf8_step((const unsigned char *)text + n, bytes - n, &step) == UTF8_VALID) {
        n += step;
    }
    struct pre_scratch *s[2];
    const uint32_t *ends[2];
    size_t count[2];
    for (int k = 0; k < 2; k++) {
        const struct pre_tokenizer *p = words_of(i, name, k == 0);
        if (pre_scratch_create(p, &s[k]) < 0 ||
            pre_tokenizer_split(p, s[k], text, n, &ends[k], &count[k]) < 0) {
            abort();
        }
    }
    if (count[0] != count[1] ||
        (count[0] > 0 && memcmp(ends[0], ends[1], count[0] * sizeof(uint32_t)) != 0)) {
        fprintf(stderr, "%s: %zu words by hand, %zu by PCRE2\n", name, count[0], count[1]);
        abort();
    }
    pre_scratch_destroy(s[0]);
    pre_scratch_destroy(s[1]);
}

/* Any ids, in any order, decode to a text that can be encoded and comes back. */
static void check_decode(const struct tokenizer *t, const uint8_t *data, size_t size)
{
    int32_t *ids = malloc((size + 1) * sizeof(*ids));
    char *text;
    size_t bytes;
    if (!ids) {
        return;
    }
    for (size_t i = 0; i < size; i++) {
        ids[i] = (int32_t)((data[i] * 7u + (uint32_t)i) % tokenizer_n_vocab(t));
    }
    if (tokenizer_decode(t, ids, size, size % 2 == 0, &text, &bytes) < 0) {
        abort();
    }
    check_round_trip(t, false, text, bytes);
    free(text);
    free(ids);
}

/* Makes an image of the lines; returns the offset of the text behind them. */
static size_t make_own(struct vocab_image *v, unsigned kind, const char *data, size_t size)
{
    struct gguf_string texts[MAX_OWN_TOKENS], merges[MAX_OWN_TOKENS];
    int32_t types[MAX_OWN_TOKENS];
    float scores[MAX_OWN_TOKENS];
    size_t at = 0, n = 0, n_merges = 0;
    while (at < size && n < MAX_OWN_TOKENS) {
        const char *end = memchr(data + at, '\n', size - at);
        size_t bytes = end ? (size_t)(end - data) - at : size - at;
        if (bytes == 0) {
            break;
        }
        types[n] = data[at] - '0';
        scores[n] = -(float)(n % 7);
        texts[n] = (struct gguf_string){data + at + 1, bytes - 1};
        if (memchr(texts[n].data, ' ', texts[n].bytes)) {
            merges[n_merges++] = texts[n];
        }
        n++;
        at += bytes + (end != NULL);
    }
    vocab_image_init(v);
    static const char *const kinds[] = {"gpt2", "bert", "llama", "t5"};
    vocab_image_string(v, "tokenizer.ggml.model", kinds[kind]);
    if (kind == 1 && n > 1) {
        vocab_image_u32(v, "tokenizer.ggml.bos_token_id", 0);
        vocab_image_u32(v, "tokenizer.ggml.seperator_token_id", 1);
        vocab_image_u32(v, "tokenizer.ggml.unknown_token_id", 0);
    }
    if (kind == 3 && n > 0) {
        vocab_image_bool(v, "tokenizer.ggml.remove_extra_whitespaces", types[0] % 2);
        vocab_image_bool(v, "tokenizer.ggml.add_eos_token", false);
        vocab_image_bytes(v, "tokenizer.ggml.precompiled_charsmap", texts[0].data, texts[0].bytes);
    }
    vocab_image_strings(v, "tokenizer.ggml.tokens", texts, n);
    vocab_image_i32s(v, "tokenizer.ggml.token_type", types, n);
    vocab_image_f32s(v, "tokenizer.ggml.scores", scores, n);
    vocab_image_strings(v, "tokenizer.ggml.merges", merges, n_merges);
    return at;
}

static void check_own(unsigned kind, bool special, const char *data, size_t size)
{
    struct vocab_image v;
    struct tokenizer *t;
    struct fmt_error err = {""};
    size_t at = make_own(&v, kind, data, size);
    struct gguf *g = vocab_image_open(&v);
    if (tokenizer_create(g, &t, &err) == 0) {
        int32_t *ids;
        size_t n, bytes;
        char *text;
        struct tokenize_options options = {true, special};
        if (tokenizer_encode(t, data + at, size - at, options, MAX_TOKENS, &ids, &n) == 0) {
            if (tokenizer_decode(t, ids, n, true, &text, &bytes) < 0) {
                abort();
            }
            free(text);
            free(ids);
        }
        tokenizer_destroy(t);
    } else if (err.text[0] == '\0') {
        abort(); /* a refusal says why */
    }
    gguf_close(g);
    vocab_image_finish(&v);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return 0;
    }
    bool special = data[0] & PARSE_SPECIAL;
    const char *text = (const char *)data + 1;
    if (data[0] & OWN_VOCABULARY) {
        check_own(data[0] >> OWN_KIND_SHIFT & 3, special, text, size - 1);
        return 0;
    }
    const struct tokenizer *t = built_in(data[0] % N_BUILT_IN);
    check_round_trip(t, special, text, size - 1);
    check_decode(t, data, size);
    if (tokenizer_pre(t)[0]) {
        check_words(data[0] % N_BUILT_IN, tokenizer_pre(t), text, size - 1);
    }
    return 0;
}
