#include "tests/unit/model/vocab_image.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADER_BYTES 24 /* magic, version, tensor count, key count */
#define MAX_TOKENS   400

static void append(struct vocab_image *v, const void *p, size_t n)
{
    if (v->bytes + n > v->capacity) {
        v->capacity = (v->bytes + n) * 2;
        v->data = realloc(v->data, v->capacity);
        if (!v->data) {
            perror("vocab_image");
            exit(1);
        }
    }
    if (n > 0) {
        memcpy(v->data + v->bytes, p, n);
    }
    v->bytes += n;
}

static void append_u32(struct vocab_image *v, uint32_t value)
{
    append(v, &value, sizeof(value));
}

static void append_string(struct vocab_image *v, const char *data, uint64_t bytes)
{
    append(v, &bytes, sizeof(bytes));
    append(v, data, bytes);
}

static void set_key_count(struct vocab_image *v)
{
    memcpy(v->data + 16, &v->n_keys, sizeof(v->n_keys));
}

void vocab_image_init(struct vocab_image *v)
{
    *v = (struct vocab_image){0};
    unsigned char header[HEADER_BYTES] = {'G', 'G', 'U', 'F', 3};
    append(v, header, sizeof(header));
}

void vocab_image_finish(struct vocab_image *v)
{
    free(v->data);
}

static void begin(struct vocab_image *v, const char *key, enum gguf_value_type type)
{
    append_string(v, key, strlen(key));
    append_u32(v, type);
    v->n_keys++;
    set_key_count(v);
}

static void begin_array(struct vocab_image *v, const char *key, enum gguf_value_type type,
                        uint64_t count)
{
    begin(v, key, GGUF_ARRAY);
    append_u32(v, type);
    append(v, &count, sizeof(count));
}

void vocab_image_u32(struct vocab_image *v, const char *key, uint32_t value)
{
    begin(v, key, GGUF_U32);
    append_u32(v, value);
}

void vocab_image_bool(struct vocab_image *v, const char *key, bool value)
{
    begin(v, key, GGUF_BOOL);
    append(v, &(unsigned char){value}, 1);
}

void vocab_image_string(struct vocab_image *v, const char *key, const char *value)
{
    begin(v, key, GGUF_STRING);
    append_string(v, value, strlen(value));
}

void vocab_image_strings(struct vocab_image *v, const char *key, const struct gguf_string *values,
                         uint64_t count)
{
    begin_array(v, key, GGUF_STRING, count);
    for (uint64_t i = 0; i < count; i++) {
        append_string(v, values[i].data, values[i].bytes);
    }
}

void vocab_image_f32s(struct vocab_image *v, const char *key, const float *values, uint64_t count)
{
    begin_array(v, key, GGUF_F32, count);
    append(v, values, count * sizeof(*values));
}

void vocab_image_bytes(struct vocab_image *v, const char *key, const void *values, uint64_t count)
{
    begin_array(v, key, GGUF_U8, count);
    append(v, values, count);
}

void vocab_image_i32s(struct vocab_image *v, const char *key, const int32_t *values, uint64_t count)
{
    begin_array(v, key, GGUF_I32, count);
    append(v, values, count * sizeof(*values));
}

/* A vocabulary being collected. */
struct builder {
    char text[MAX_TOKENS][24];
    struct gguf_string view[MAX_TOKENS];
    float score[MAX_TOKENS];
    int32_t type[MAX_TOKENS];
    size_t n;
};

static void add(struct builder *b, const char *text, int32_t type, float score)
{
    snprintf(b->text[b->n], sizeof(b->text[0]), "%s", text);
    b->view[b->n] = (struct gguf_string){b->text[b->n], strlen(b->text[b->n])};
    b->type[b->n] = type;
    b->score[b->n++] = score;
}

static void store(struct vocab_image *v, const struct builder *b)
{
    vocab_image_strings(v, "tokenizer.ggml.tokens", b->view, b->n);
    vocab_image_i32s(v, "tokenizer.ggml.token_type", b->type, b->n);
}

void vocab_image_spm(struct vocab_image *v)
{
    static const char *const pieces[] = {
        "▁t", "he",   "▁the", "in",     "er",    "▁a", "▁w",   "or", "ld",   "▁wor", "▁world",
        "ll", "hell", "o,",   "▁hello", "hello", "▁▁", "▁▁▁▁", "é",  "日本", "▁",    "t",
        "h",  "e",    "i",    "n",      "r",     "a",  "w",    "o",  "l",    "d",    "s",
        ",",  ".",    "<",    ">",      "x",     "日", "本",   "\n",
    };
    struct builder b = {.n = 0};
    char text[8];
    add(&b, "<unk>", 2, 0);
    add(&b, "<s>", 3, 0);
    add(&b, "</s>", 3, 0);
    for (unsigned byte = 0; byte < 256; byte++) {
        snprintf(text, sizeof(text), "<0x%02X>", byte);
        add(&b, text, 6, 0);
    }
    for (size_t i = 0; i < sizeof(pieces) / sizeof(pieces[0]); i++) {
        add(&b, pieces[i], 1, -(float)i);
    }
    add(&b, "<|im_end|>", 3, 0);
    add(&b, "<tool>", 4, 0);
    vocab_image_init(v);
    vocab_image_string(v, "tokenizer.ggml.model", "llama");
    store(v, &b);
    vocab_image_f32s(v, "tokenizer.ggml.scores", b.score, b.n);
}

/* GPT-2's alphabet: the character that stands for a byte. */
static void alphabet_text(unsigned byte, char *text, size_t size)
{
    unsigned point = byte, next = 256;
    for (unsigned i = 0; i <= byte; i++) {
        bool prints = (i > 0x20 && i < 0x7F) || (i > 0xA0 && i != 0xAD);
        point = prints ? i : next++;
    }
    if (point < 0x80) {
        snprintf(text, size, "%c", (int)point);
    } else {
        snprintf(text, size, "%c%c", (int)(0xC0 | point >> 6), (int)(0x80 | (point & 0x3F)));
    }
}

void vocab_image_bpe(struct vocab_image *v, const char *pre)
{
    static const char *const lines[] = {
        "h e",   "l l", "he ll", "hell o", "Ġ w", "o r", "l d", "Ġw or",    "Ġwor ld", "Ġ t",
        "Ġt he", "Ġ Ġ", "ĠĠ ĠĠ", "1 2",    "Ã ©", "i n", "Ċ Ċ", "no space", "zz y",
    };
    enum { N_LINES = sizeof(lines) / sizeof(lines[0]), N_REAL = N_LINES - 2 };
    struct builder b = {.n = 0};
    struct gguf_string merges[N_LINES];
    char text[24];
    for (unsigned byte = 0; byte < 256; byte++) {
        alphabet_text(byte, text, sizeof(text));
        add(&b, text, 1, 0);
    }
    for (size_t i = 0; i < N_LINES; i++) {
        merges[i] = (struct gguf_string){lines[i], strlen(lines[i])};
        if (i < N_REAL) {
            const char *space = strchr(lines[i], ' ');
            snprintf(text, sizeof(text), "%.*s%s", (int)(space - lines[i]), lines[i], space + 1);
            add(&b, text, 1, 0);
        }
    }
    add(&b, "<|im_end|>", 3, 0);
    add(&b, "<tool>", 4, 0);
    vocab_image_init(v);
    vocab_image_string(v, "tokenizer.ggml.model", "gpt2");
    vocab_image_string(v, "tokenizer.ggml.pre", pre);
    store(v, &b);
    vocab_image_strings(v, "tokenizer.ggml.merges", merges, N_LINES);
    vocab_image_u32(v, "tokenizer.ggml.eos_token_id", (uint32_t)b.n - 2);
}

struct gguf *vocab_image_open(const struct vocab_image *v)
{
    struct gguf *g = NULL;
    struct fmt_error err = {""};
    if (gguf_open_memory(v->data, v->bytes, &g, &err) < 0) {
        fprintf(stderr, "vocab_image: %s\n", err.text);
        exit(1);
    }
    return g;
}
