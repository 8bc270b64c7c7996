/* Token ids of real vocabularies, as two other engines produce them. */
#include "daemon/model/tokenizer.h"

#include <criterion/criterion.h>
#include <jansson.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SEPARATOR "\n__ggml_vocab_test__\n"
#define NO_LIMIT  1000000

static const char *golden(void)
{
    const char *folder = getenv("GQAD_TEST_GOLDEN");
    if (!folder || access(folder, R_OK) != 0) {
        fprintf(stderr, "SKIPPED: no golden data\n");
        cr_skip_test("no golden data");
    }
    return folder;
}

struct vocab {
    struct gguf *g;
    struct tokenizer *t;
};

static struct vocab open_vocab(const char *path)
{
    struct vocab v = {NULL, NULL};
    struct fmt_error err = {""};
    cr_assert_eq(gguf_open(path, &v.g, &err), 0, "%s: %s", path, err.text);
    cr_assert_eq(tokenizer_create(v.g, &v.t, &err), 0, "%s: %s", path, err.text);
    return v;
}

static void close_vocab(struct vocab v)
{
    tokenizer_destroy(v.t);
    gguf_close(v.g);
}

static char *read_file(const char *path, size_t *ret_bytes)
{
    FILE *f = fopen(path, "rb");
    cr_assert_not_null(f, "%s", path);
    char *text = NULL;
    size_t capacity = 0;
    ssize_t n = getdelim(&text, &capacity, EOF, f);
    fclose(f);
    *ret_bytes = n > 0 ? (size_t)n : 0;
    return text;
}

static void check_ids(const struct vocab *v, const char *text, size_t bytes, bool parse_special,
                      const int32_t *ids, size_t n_ids, const char *what)
{
    int32_t *got;
    size_t n;
    struct tokenize_options options = {.parse_special = parse_special};
    cr_assert_eq(tokenizer_encode(v->t, text, bytes, options, NO_LIMIT, &got, &n), 0);
    bool same = n == n_ids && (n == 0 || memcmp(got, ids, n * sizeof(*ids)) == 0);
    for (size_t i = 0; !same && i < n; i++) {
        fprintf(stderr, "%s: [%zu] got %d, expected %d\n", what, i, got[i],
                i < n_ids ? ids[i] : -1);
    }
    cr_expect(same, "%s: '%.*s': %zu ids, expected %zu", what, (int)bytes, text, n, n_ids);
    if (!parse_special) {
        char *back;
        size_t back_bytes;
        cr_assert_eq(tokenizer_decode(v->t, got, n, false, &back, &back_bytes), 0);
        cr_expect(back_bytes == bytes && memcmp(back, text, bytes) == 0,
                  "%s: '%.*s' came back as '%s'", what, (int)bytes, text, back);
        free(back);
    }
    free(got);
}

/* NAME.gguf.inp and .out: texts between separators, ids line by line. */
static void check_lines(const char *name)
{
    char path[512];
    size_t bytes, out_bytes;
    snprintf(path, sizeof(path), "%s/tokenizers/ggml-vocab-%s.gguf", golden(), name);
    struct vocab v = open_vocab(path);
    snprintf(path, sizeof(path), "%s/tokenizers/ggml-vocab-%s.gguf.inp", golden(), name);
    char *inp = read_file(path, &bytes);
    snprintf(path, sizeof(path), "%s/tokenizers/ggml-vocab-%s.gguf.out", golden(), name);
    char *out = read_file(path, &out_bytes);
    char *text = inp, *line = out;
    size_t checked = 0;
    while (line < out + out_bytes) {
        char *end = memmem(text, (size_t)(inp + bytes - text), SEPARATOR, strlen(SEPARATOR));
        cr_assert_not_null(end, "fewer texts than lines of ids");
        int32_t ids[1024];
        size_t n = 0;
        char *next = strchr(line, '\n');
        cr_assert_not_null(next);
        for (char *p = line; p < next && n < 1024;) {
            char *after;
            ids[n] = (int32_t)strtol(p, &after, 10);
            if (after == p || after > next) {
                break;
            }
            n++;
            p = after;
        }
        check_ids(&v, text, (size_t)(end - text), false, ids, n, name);
        text = end + strlen(SEPARATOR);
        line = next + 1;
        checked++;
    }
    cr_expect_geq(checked, 40);
    free(inp);
    free(out);
    close_vocab(v);
}

Test(tokenizer_golden, llama_spm)
{
    check_lines("llama-spm");
}

Test(tokenizer_golden, phi_3)
{
    check_lines("phi-3");
}

Test(tokenizer_golden, gpt_2)
{
    check_lines("gpt-2");
}

Test(tokenizer_golden, qwen2_5)
{
    check_lines("qwen2.5");
}

Test(tokenizer_golden, starcoder)
{
    check_lines("starcoder");
}

Test(tokenizer_golden, deepseek_llm)
{
    check_lines("deepseek-llm");
}

static json_t *load_json(const char *name)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/tokenizers/%s", golden(), name);
    json_t *root = json_load_file(path, 0, NULL);
    cr_assert_not_null(root, "%s", path);
    return root;
}

static size_t check_json(const struct vocab *v, const json_t *texts, const json_t *lists,
                         bool parse_special, const char *what)
{
    size_t checked = 0;
    for (size_t i = 0; i < json_array_size(texts); i++) {
        const json_t *list = json_array_get(lists, i);
        if (!json_is_array(list)) {
            continue; /* null: implementations differ */
        }
        int32_t ids[1024];
        size_t n = json_array_size(list);
        cr_assert_leq(n, 1024);
        for (size_t k = 0; k < n; k++) {
            ids[k] = (int32_t)json_integer_value(json_array_get(list, k));
        }
        const json_t *text = json_array_get(texts, i);
        check_ids(v, json_string_value(text), json_string_length(text), parse_special, ids, n,
                  what);
        checked++;
    }
    return checked;
}

Test(tokenizer_golden, control_tokens_in_the_text)
{
    json_t *root = load_json("special.json");
    const char *name;
    json_t *lists;
    size_t checked = 0;
    json_object_foreach(json_object_get(root, "ids"), name, lists)
    {
        char path[512];
        snprintf(path, sizeof(path), "%s/tokenizers/ggml-vocab-%s.gguf", golden(), name);
        struct vocab v = open_vocab(path);
        checked += check_json(&v, json_object_get(root, "texts"), lists, true, name);
        close_vocab(v);
    }
    cr_expect_geq(checked, 60);
    json_decref(root);
}

Test(tokenizer_golden, vocabulary_inside_the_models)
{
    static const char *const models[] = {"llama-gqa", "gemma3", "gpt-oss", "llama-q-Q4_K_M"};
    json_t *root = load_json("tiny.json");
    for (size_t i = 0; i < sizeof(models) / sizeof(models[0]); i++) {
        char path[512];
        snprintf(path, sizeof(path), "%s/models/%s/model.gguf", golden(), models[i]);
        struct vocab v = open_vocab(path);
        cr_expect_eq(tokenizer_bos(v.t), 1);
        cr_expect_eq(tokenizer_eos(v.t), 2);
        cr_expect(tokenizer_is_eog(v.t, 2));
        cr_expect_geq(check_json(&v, json_object_get(root, "texts"), json_object_get(root, "ids"),
                                 false, models[i]),
                      30);
        close_vocab(v);
    }
    json_decref(root);
}
