/* client/cli/json.c - messages to JSON and back. */
#include "client/cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define JSON_REAL_DIGITS 10 /* more is noise in what is measured; logits are floats */

static json_t *need(json_t *j)
{
    if (j == NULL) {
        exit(cli_error(EX_OSERR, "json: no memory"));
    }
    return j;
}

static json_t *real(double x)
{
    return isfinite(x) ? need(json_real(x)) : json_null();
}

/* Length of the valid UTF-8 sequence at s, or 0. */
static size_t utf8_length(const unsigned char *s, size_t bytes)
{
    static const struct {
        unsigned char mask, head;
        uint32_t least;
    } forms[] = {{0x80, 0x00, 0}, {0xe0, 0xc0, 0x80}, {0xf0, 0xe0, 0x800}, {0xf8, 0xf0, 0x10000}};
    for (size_t n = 0; n < 4; n++) {
        if ((s[0] & forms[n].mask) != forms[n].head) {
            continue;
        }
        uint32_t point = s[0] & (unsigned char)~forms[n].mask;
        for (size_t i = 1; i <= n; i++) {
            if (i >= bytes || (s[i] & 0xc0) != 0x80) {
                return 0;
            }
            point = point << 6 | (s[i] & 0x3f);
        }
        bool surrogate = point >= 0xd800 && point <= 0xdfff;
        return point < forms[n].least || point > 0x10ffff || surrogate ? 0 : n + 1;
    }
    return 0;
}

json_t *cli_json_text(const char *data, size_t bytes)
{
    json_t *j = json_stringn(data, bytes);
    if (j != NULL) {
        return j;
    }
    char *text = malloc(3 * bytes + 1);
    size_t n = 0;
    if (text == NULL) {
        return need(NULL);
    }
    for (size_t i = 0; i < bytes;) {
        size_t length = utf8_length((const unsigned char *)data + i, bytes - i);
        memcpy(text + n, length > 0 ? data + i : "\xef\xbf\xbd", length > 0 ? length : 3);
        n += length > 0 ? length : 3;
        i += length > 0 ? length : 1;
    }
    j = json_stringn(text, n);
    free(text);
    return need(j);
}

static json_t *base64(const unsigned char *data, size_t bytes)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *text = malloc((bytes + 2) / 3 * 4 + 1);
    char *to = text;
    if (text == NULL) {
        return need(NULL);
    }
    for (size_t i = 0; i < bytes; i += 3) {
        size_t left = bytes - i;
        uint32_t v = (uint32_t)data[i] << 16 | (left > 1 ? (uint32_t)data[i + 1] << 8 : 0) |
                     (left > 2 ? data[i + 2] : 0);
        *to++ = digits[v >> 18];
        *to++ = digits[v >> 12 & 63];
        *to++ = left > 1 ? digits[v >> 6 & 63] : '=';
        *to++ = left > 2 ? digits[v & 63] : '=';
    }
    json_t *j = json_pack("{s:s#}", "base64", text, (int)(to - text));
    free(text);
    return need(j);
}

static json_t *bytes_to_json(const struct gqa_value *v)
{
    const char *data = "";
    size_t bytes = 0;
    gqa_value_bytes(v, &data, &bytes);
    json_t *j = json_stringn(data, bytes);
    return j != NULL ? j : base64((const unsigned char *)data, bytes);
}

/* Data of a tensor as one flat array; its shape stands beside it. */
static json_t *tensor_to_json(const struct gqa_tensor_view *t)
{
    json_t *data = need(json_array());
    for (size_t i = 0; i < t->bytes / sizeof(float); i++) {
        float x;
        memcpy(&x, (const char *)t->data + i * sizeof(x), sizeof(x));
        json_array_append_new(data, real(x));
    }
    json_t *shape = need(json_array());
    for (size_t i = 0; i < t->n_dims; i++) {
        json_array_append_new(shape, need(json_integer((json_int_t)t->shape[i])));
    }
    return need(
        json_pack("{s:b, s:s, s:o, s:o}", "nd", 1, "type", "<f4", "shape", shape, "data", data));
}

static json_t *map_to_json(const struct gqa_value *map)
{
    struct gqa_tensor_view tensor;
    if (gqa_value_tensor_f32(map, &tensor) == 0) {
        return tensor_to_json(&tensor);
    }
    json_t *object = need(json_object());
    const struct gqa_value *key, *value;
    for (size_t i = 0; gqa_value_pair(map, i, &key, &value); i++) {
        const char *data;
        size_t bytes;
        char name[256];
        if (gqa_value_bytes(key, &data, &bytes) == 0 && bytes < sizeof(name)) {
            memcpy(name, data, bytes);
            name[bytes] = '\0';
            json_object_set_new(object, name, cli_json(value));
        }
    }
    return object;
}

json_t *cli_json(const struct gqa_value *v)
{
    bool truth = false;
    uint64_t u = 0;
    int64_t i = 0;
    double x = 0;
    switch (gqa_value_type(v)) {
    case GQA_VALUE_BOOL:
        gqa_value_bool(v, &truth);
        return json_boolean(truth);
    case GQA_VALUE_UINT:
        /* JSON's integers here are signed; a larger one (a seed) keeps its digits as text. */
        gqa_value_u64(v, &u);
        if (u > INT64_MAX) {
            return need(json_sprintf("%llu", (unsigned long long)u));
        }
        return need(json_integer((json_int_t)u));
    case GQA_VALUE_INT:
        gqa_value_i64(v, &i);
        return need(json_integer(i));
    case GQA_VALUE_FLOAT:
        gqa_value_f64(v, &x);
        return real(x);
    case GQA_VALUE_STR:
    case GQA_VALUE_BIN:
        return bytes_to_json(v);
    case GQA_VALUE_MAP:
        return map_to_json(v);
    case GQA_VALUE_ARRAY: {
        json_t *array = need(json_array());
        for (size_t k = 0; k < gqa_value_count(v); k++) {
            json_array_append_new(array, cli_json(gqa_value_at(v, k)));
        }
        return array;
    }
    case GQA_VALUE_NIL:
    case GQA_VALUE_OTHER:
        break;
    }
    return json_null();
}

/* A failed write sticks to stdout, and cli_flush() tells it at the end. */
static int print(json_t *j, size_t flags)
{
    int r = json_dumpf(j, stdout, flags | JSON_ENCODE_ANY | JSON_REAL_PRECISION(JSON_REAL_DIGITS));
    json_decref(j);
    putchar('\n');
    return r < 0 && !ferror(stdout) ? cli_error(EX_OSERR, "json: no memory") : CLI_OK;
}

int cli_print_json(json_t *j)
{
    return print(j, isatty(STDOUT_FILENO) ? JSON_INDENT(2) : 0);
}

int cli_print_json_line(json_t *j)
{
    return print(j, JSON_COMPACT);
}

/* "-inf" is how JSON says that a token is forbidden; it has no such number. */
static bool bias_of(const json_t *j, float *ret)
{
    if (json_is_string(j) && strcmp(json_string_value(j), "-inf") == 0) {
        *ret = -INFINITY;
        return true;
    }
    *ret = (float)json_number_value(j);
    return json_is_number(j);
}

static int array_param(struct gqa_params *p, const char *key, const json_t *array)
{
    size_t n = json_array_size(array);
    int32_t *ids = calloc(n + 1, sizeof(*ids));
    float *biases = calloc(n + 1, sizeof(*biases));
    const char **texts = calloc(n + 1, sizeof(*texts));
    size_t n_ids = 0, n_texts = 0, n_pairs = 0;
    if (ids == NULL || biases == NULL || texts == NULL) {
        exit(cli_error(EX_OSERR, "json: no memory"));
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *j = json_array_get(array, i);
        const json_t *id = json_array_size(j) == 2 ? json_array_get(j, 0) : j;
        json_int_t value = json_integer_value(id);
        bool in_range = json_is_integer(id) && value >= INT32_MIN && value <= INT32_MAX;
        ids[i] = in_range ? (int32_t)value : 0;
        n_ids += in_range && id == j;
        n_pairs += in_range && id != j && bias_of(json_array_get(j, 1), &biases[i]);
        texts[i] = json_string_value(j);
        n_texts += texts[i] != NULL;
    }
    int code = CLI_OK;
    if (n_ids == n) {
        gqa_params_tokens(p, key, ids, n);
    } else if (n_texts == n) {
        gqa_params_strings(p, key, texts, n);
    } else if (n_pairs == n) {
        gqa_params_biases(p, key, ids, biases, n);
    } else {
        code = cli_error(EX_DATAERR,
                         "params: %s: an array holds token ids, strings, or pairs of a "
                         "token id and a bias",
                         key);
    }
    free(ids);
    free(biases);
    free(texts);
    return code;
}

int cli_json_params(json_t *object, struct gqa_params *params)
{
    const char *key;
    json_t *value;
    int code = CLI_OK;
    json_object_foreach(object, key, value)
    {
        if (json_is_boolean(value)) {
            gqa_params_bool(params, key, json_is_true(value));
        } else if (json_is_integer(value)) {
            gqa_params_i64(params, key, json_integer_value(value));
        } else if (json_is_real(value)) {
            gqa_params_f64(params, key, json_real_value(value));
        } else if (json_is_string(value)) {
            gqa_params_text(params, key, json_string_value(value), json_string_length(value));
        } else if (json_is_array(value)) {
            code = array_param(params, key, value);
        } else if (!json_is_null(value)) {
            code = cli_error(EX_DATAERR, "params: %s: no method takes an object there", key);
        }
        if (code != CLI_OK) {
            return code;
        }
    }
    return CLI_OK;
}

const char *cli_str(const json_t *object, const char *key, const char *fallback)
{
    const char *s = json_string_value(json_object_get(object, key));
    return s != NULL ? s : fallback;
}

double cli_num(const json_t *object, const char *key, double fallback)
{
    const json_t *j = json_object_get(object, key);
    return json_is_number(j) ? json_number_value(j) : fallback;
}
