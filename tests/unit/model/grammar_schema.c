/* JSON Schemas as grammars: which documents they let through, and that whatever they let through
 * satisfies the schema, by a validator of this test's own. */
#include "daemon/model/grammar.h"
#include "daemon/model/grammar_schema.h"

#include <criterion/criterion.h>
#include <jansson.h>

#include <errno.h>
#include <locale.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct grammar *convert(const char *schema)
{
    struct grammar *g = NULL;
    struct fmt_error err = {""};
    char *text = NULL;
    cr_assert_eq(grammar_from_schema(schema, strlen(schema), &text, &err), 0, "%s\n%s", schema,
                 err.text);
    cr_assert_eq(grammar_compile(text, strlen(text), &g, &err), 0, "%s\n%s\n%s", schema, err.text,
                 text);
    free(text);
    return g;
}

static bool matches(const struct grammar *g, const char *text)
{
    struct grammar_state *s = NULL;
    cr_assert_eq(grammar_state_create(g, &s), 0);
    bool ok = grammar_state_accept(s, text, strlen(text)) == 0 && grammar_state_may_end(s);
    grammar_state_destroy(s);
    return ok;
}

/* ---- a validator ------------------------------------------------------------------------- */

static bool valid(json_t *root, json_t *schema, json_t *v);

static bool is_type(const char *type, json_t *v)
{
    return strcmp(type, "object") == 0    ? json_is_object(v)
           : strcmp(type, "array") == 0   ? json_is_array(v)
           : strcmp(type, "string") == 0  ? json_is_string(v)
           : strcmp(type, "integer") == 0 ? json_is_integer(v)
           : strcmp(type, "number") == 0  ? json_is_number(v)
           : strcmp(type, "boolean") == 0 ? json_is_boolean(v)
                                          : json_is_null(v);
}

static bool valid_type(json_t *types, json_t *v)
{
    size_t i;
    json_t *type;
    bool ok = types == NULL || (json_is_string(types) && is_type(json_string_value(types), v));
    json_array_foreach(types, i, type)
    {
        ok |= is_type(json_string_value(type), v);
    }
    return ok;
}

static bool valid_object(json_t *root, json_t *schema, json_t *v)
{
    json_t *properties = json_object_get(schema, "properties"), *item;
    json_t *more = json_object_get(schema, "additionalProperties");
    const char *key;
    size_t i;
    json_array_foreach(json_object_get(schema, "required"), i, item)
    {
        if (json_object_get(v, json_string_value(item)) == NULL) {
            return false;
        }
    }
    json_object_foreach(v, key, item)
    {
        json_t *property = json_object_get(properties, key);
        if (property != NULL ? !valid(root, property, item)
                             : more != NULL && !valid(root, more, item)) {
            return false;
        }
    }
    return true;
}

static bool valid_array(json_t *root, json_t *schema, json_t *v)
{
    json_t *prefix = json_object_get(schema, "prefixItems"),
           *items = json_object_get(schema, "items");
    json_t *least = json_object_get(schema, "minItems"),
           *most = json_object_get(schema, "maxItems"), *item;
    size_t i, n = json_array_size(v);
    if ((least && (json_int_t)n < json_integer_value(least)) ||
        (most && (json_int_t)n > json_integer_value(most))) {
        return false;
    }
    json_array_foreach(v, i, item)
    {
        json_t *s = i < json_array_size(prefix) ? json_array_get(prefix, i) : items;
        if (s != NULL && !valid(root, s, item)) {
            return false;
        }
    }
    return true;
}

static bool valid_string(json_t *schema, json_t *v)
{
    const char *text = json_string_value(v),
               *pattern = json_string_value(json_object_get(schema, "pattern"));
    json_t *least = json_object_get(schema, "minLength"),
           *most = json_object_get(schema, "maxLength");
    json_int_t n = 0;
    for (const char *c = text; *c != '\0'; c++) {
        n += (*c & 0xC0) != 0x80;
    }
    if ((least && n < json_integer_value(least)) || (most && n > json_integer_value(most))) {
        return false;
    }
    regex_t regex;
    if (pattern == NULL) {
        return true;
    }
    cr_assert_not_null(setlocale(LC_ALL, "C.UTF-8")); /* characters, not bytes */
    cr_assert_eq(regcomp(&regex, pattern, REG_EXTENDED | REG_NOSUB), 0, "%s", pattern);
    bool ok = regexec(&regex, text, 0, NULL, 0) == 0;
    regfree(&regex);
    return ok;
}

static bool within(json_t *schema, json_t *v)
{
    static const char *const words[] = {"minimum", "exclusiveMinimum", "maximum",
                                        "exclusiveMaximum"};
    for (int i = 0; i < 4; i++) {
        json_t *bound = json_object_get(schema, words[i]);
        json_int_t x = json_integer_value(v), b = json_integer_value(bound);
        if (bound != NULL && !(i == 0 ? x >= b : i == 1 ? x > b : i == 2 ? x <= b : x < b)) {
            return false;
        }
    }
    return true;
}

static bool any_valid(json_t *root, json_t *schemas, json_t *v, bool all)
{
    size_t i;
    json_t *s;
    json_array_foreach(schemas, i, s)
    {
        if (valid(root, s, v) != all) {
            return !all;
        }
    }
    return all;
}

static bool valid(json_t *root, json_t *schema, json_t *v)
{
    json_t *values = json_object_get(schema, "enum"), *one = json_object_get(schema, "const");
    const char *ref = json_string_value(json_object_get(schema, "$ref"));
    if (json_is_boolean(schema)) {
        return json_is_true(schema);
    }
    if (ref != NULL) { /* this test's refer to #, or to #/$defs/NAME */
        json_t *to =
            ref[1] == '\0' ? root : json_object_get(json_object_get(root, "$defs"), ref + 8);
        return valid(root, to, v);
    }
    bool among = values == NULL;
    for (size_t i = 0; i < json_array_size(values); i++) {
        among |= json_equal(json_array_get(values, i), v);
    }
    json_t *any = json_object_get(schema, "anyOf"), *of = json_object_get(schema, "oneOf");
    return among && (one == NULL || json_equal(one, v)) &&
           (!any || any_valid(root, any, v, false)) && (!of || any_valid(root, of, v, false)) &&
           any_valid(root, json_object_get(schema, "allOf"), v, true) &&
           valid_type(json_object_get(schema, "type"), v) &&
           (!json_is_object(v) || valid_object(root, schema, v)) &&
           (!json_is_array(v) || valid_array(root, schema, v)) &&
           (!json_is_string(v) || valid_string(schema, v)) &&
           (!json_is_integer(v) || within(schema, v));
}

/* ---- the suite --------------------------------------------------------------------------- */

static const struct {
    const char *schema;
    const char *good[6], *bad[6]; /* bad ones that satisfy the schema are narrowed out on purpose */
} suite[] = {
    {"{}", {"1", "{\"a\": [null]}", "\"x\"", "[]"}, {"", "{", "01", "[1,]", "tru"}},
    {"true", {"false"}, {"x"}},
    {"{\"type\": \"object\"}", {"{}", "{\"a\":1, \"b\": {}}"}, {"[]", "{\"a\"}", "1"}},
    {"{\"type\": [\"integer\", \"null\"], \"title\": \"t\"}",
     {"-3", "null", "0"},
     {"1.5", "\"1\"", "-", "00"}},
    {"{\"type\": \"number\"}", {"-1.5e3", "0", "7"}, {".5", "1.", "-", "1e"}},
    {"{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\"}, \"b\": {\"type\": "
     "\"string\"}, "
     "\"c\": {\"type\": \"boolean\"}}, \"required\": [\"b\"]}",
     {"{\"b\":\"x\"}", "{\"b\": \"x\", \"a\": 1, \"c\": true}", "{ \"b\": \"\",\n\"c\": false }"},
     {"{}", "{\"a\":1}", "{\"b\":1}", "{\"b\":\"x\",\"d\":1}", "{\"b\":\"x\",}", "{,\"b\":\"x\"}"}},
    {"{\"properties\": {\"a\": {\"type\": \"null\"}, \"b\": {}}}",
     {"{}", "{\"a\":null}", "{\"b\":[1]}", "{\"a\":null,\"b\":2}"},
     {"{\"b\":1,\"a\":null}", "{\"a\":1}", "{\"c\":1}", "{\"b\":1,\"b\":2}"}},
    {"{\"properties\": {\"ab\": {\"const\": 1}, \"a\\\"\": {\"const\": 2}, \"é\": {\"const\": 3}}, "
     "\"additionalProperties\": {\"type\": \"string\"}}",
     {"{\"a\":\"x\"}", "{\"ab\":1,\"abc\":\"\",\"\":\"y\"}", "{\"a\\\"\":2}",
      "{\"é\":3,\"éa\":\"\"}", "{\"è\":\"\"}"},
     {"{\"ab\":\"x\"}", "{\"a\":1}", "{\"\\u0061b\":\"x\"}", "{\"é\":\"x\"}", "{\"a\\\"\":\"x\"}"}},
    {"{\"type\": \"object\", \"additionalProperties\": {\"type\": \"boolean\"}}",
     {"{}", "{\"x\":true}"},
     {"{\"x\":1}"}},
    {"{\"type\": \"object\", \"properties\": {}, \"additionalProperties\": false}",
     {"{}", "{ }"},
     {"{\"x\":1}"}},
    {"{\"type\": \"array\", \"items\": {\"type\": \"integer\", \"minimum\": 0}, \"minItems\": 1, "
     "\"maxItems\": 3}",
     {"[1]", "[1, 2,3]", "[\n 1 ]"},
     {"[]", "[1,2,3,4]", "[-1]", "[1,]", "[\"1\"]"}},
    {"{\"type\": \"array\", \"prefixItems\": [{\"const\": \"x\"}, {\"type\": \"integer\"}]}",
     {"[\"x\", 1]"},
     {"[]", "[\"x\"]", "[1,\"x\"]", "[\"x\",1,2]"}},
    {"{\"type\": \"array\", \"prefixItems\": [{\"const\": \"x\"}], \"items\": {\"type\": "
     "\"null\"}, \"maxItems\": 3}",
     {"[\"x\"]", "[\"x\",null,null]"},
     {"[]", "[null]", "[\"x\",1]", "[\"x\",null,null,null]"}},
    {"{\"items\": {\"type\": \"boolean\"}}", {"[]", "[true]", "[true,false,true]"}, {"[1]", "{}"}},
    {"{\"type\": \"string\", \"minLength\": 2, \"maxLength\": 3}",
     {"\"ab\"", "\"日本é\"", "\"a\\n\""},
     {"\"a\"", "\"abcd\"", "ab", "\"a\nb\""}},
    {"{\"type\": \"string\", \"pattern\": \"^[a-c]+(x|yz)?[^a-z]{2}$\"}",
     {"\"ab12\"", "\"cyzÉ\\\"\"", "\"ax\\\\.\""},
     {"\"12\"", "\"a1\"", "\"ay12\"", "\"a\"12\""}},
    {"{\"type\": \"string\", \"pattern\": \"[0-9]\"}", {"\"a1b\"", "\"7\""}, {"\"\"", "\"ab\""}},
    {"{\"type\": \"string\", \"format\": \"date\"}",
     {"\"2024-02-29\""},
     {"\"2024-13-01\"", "\"24-01-01\"", "\"2024-01-32\""}},
    {"{\"type\": \"string\", \"format\": \"date-time\"}",
     {"\"2024-02-29T23:59:00Z\"", "\"2024-02-29T00:00:00.123+01:30\""},
     {"\"2024-02-29\"", "\"2024-02-29T24:00:00Z\""}},
    {"{\"format\": \"time\"}", {"\"12:00:59Z\""}, {"\"12:60:00Z\"", "\"12:00\""}},
    {"{\"format\": \"uuid\"}", {"\"123e4567-e89b-12d3-a456-426614174000\""}, {"\"123e4567\""}},
    {"{\"enum\": [\"a\\n\", 1, null, {\"x\": [1]}]}",
     {"\"a\\n\"", "1", "null", "{\"x\":[1]}"},
     {"2", "\"a\"", "{}"}},
    {"{\"const\": \"x\\\"y\", \"type\": \"string\"}", {"\"x\\\"y\""}, {"\"x\"", "1"}},
    {"{\"anyOf\": [{\"type\": \"integer\"}, {\"type\": \"array\", \"items\": {\"const\": 1}}]}",
     {"5", "[1,1]", "[]"},
     {"[5]", "\"5\""}},
    {"{\"oneOf\": [{\"const\": \"a\"}, {\"$ref\": \"#/$defs/b\"}], \"$defs\": {\"b\": {\"const\": "
     "\"b\"}}}",
     {"\"a\"", "\"b\""},
     {"\"c\""}},
    {"{\"$ref\": \"#/$defs/tree\", \"$defs\": {\"tree\": {\"type\": \"object\", \"properties\": "
     "{\"v\": {\"type\": "
     "\"integer\"}, \"kids\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/tree\"}}}, "
     "\"required\": [\"v\"]}}}",
     {"{\"v\":1}", "{\"v\":1,\"kids\":[{\"v\":2,\"kids\":[]},{\"v\":3}]}"},
     {"{}", "{\"v\":1,\"kids\":[1]}"}},
    {"{\"type\": \"object\", \"properties\": {\"next\": {\"anyOf\": [{\"$ref\": \"#\"}, {\"type\": "
     "\"null\"}]}}, "
     "\"required\": [\"next\"]}",
     {"{\"next\":{\"next\":null}}"},
     {"{\"next\":1}", "{\"next\":{}}"}},
    {"{\"allOf\": [{\"type\": \"object\", \"properties\": {\"a\": {\"const\": 1}}, \"required\": "
     "[\"a\"]}, {\"$ref\": "
     "\"#/$defs/b\"}], \"$defs\": {\"b\": {\"properties\": {\"b\": {\"const\": 2}}, \"required\": "
     "[\"b\"]}}}",
     {"{\"a\":1,\"b\":2}"},
     {"{\"a\":1}", "{\"b\":2}"}},
};
#define N_SUITE (sizeof(suite) / sizeof(suite[0]))

static json_t *parse(const char *text, size_t bytes)
{
    return json_loadb(text, bytes, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
}

Test(grammar_schema, documents)
{
    for (size_t i = 0; i < N_SUITE; i++) {
        struct grammar *g = convert(suite[i].schema);
        json_t *schema = parse(suite[i].schema, strlen(suite[i].schema));
        for (size_t k = 0; k < 6; k++) {
            const char *good = suite[i].good[k], *bad = suite[i].bad[k];
            if (good != NULL) {
                json_t *v = parse(good, strlen(good));
                cr_expect(valid(schema, schema, v), "the validator: %s %s", suite[i].schema, good);
                cr_expect(matches(g, good), "%s must let %s through", suite[i].schema, good);
                json_decref(v);
            }
            if (bad != NULL) {
                cr_expect_not(matches(g, bad), "%s must refuse %s", suite[i].schema, bad);
            }
        }
        json_decref(schema);
        grammar_destroy(g);
    }
}

/* A document, one byte after the other, at random; what closes is preferred as it grows. */
static size_t write_document(const struct grammar *g, uint64_t *state, char *text, size_t room)
{
    struct grammar_state *s = NULL;
    cr_assert_eq(grammar_state_create(g, &s), 0);
    size_t n = 0;
    while (n < room && !(grammar_state_may_end(s) && (!grammar_state_may_go_on(s) || n % 3 == 0))) {
        bool first[256];
        unsigned char possible[256];
        size_t n_possible = 0;
        grammar_state_first_bytes(s, first);
        for (unsigned b = 0; b < 256; b++) {
            if (first[b]) {
                possible[n_possible++] = (unsigned char)b;
            }
        }
        cr_assert_gt(n_possible, 0, "nowhere to go after %.*s", (int)n, text);
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        char c = (char)possible[(*state >> 33) % n_possible];
        bool close = (*state >> 60) * 40 < n * 8 + 100;
        for (const char *closing = "\"]}10"; close && *closing != '\0'; closing++) {
            c = first[(unsigned char)*closing] ? *closing : c;
            close = c != *closing;
        }
        cr_assert_eq(grammar_state_accept(s, &c, 1), 0, "%.*s", (int)n, text);
        text[n++] = c;
    }
    bool ended = grammar_state_may_end(s);
    grammar_state_destroy(s);
    return ended ? n : 0;
}

Test(grammar_schema, whatever_comes_out_is_valid)
{
    uint64_t state = 2;
    char text[3000];
    for (size_t i = 0; i < N_SUITE; i++) {
        struct grammar *g = convert(suite[i].schema);
        json_t *schema = parse(suite[i].schema, strlen(suite[i].schema));
        size_t whole = 0;
        for (int round = 0; round < 100; round++) {
            size_t n = write_document(g, &state, text, sizeof(text));
            json_t *v = n > 0 ? parse(text, n) : NULL;
            if (n > 0) {
                cr_assert_not_null(v, "%s: no JSON: %.*s", suite[i].schema, (int)n, text);
                cr_assert(valid(schema, schema, v), "%s: %.*s", suite[i].schema, (int)n, text);
                whole++;
            }
            json_decref(v);
        }
        cr_expect_gt(whole, 10, "%s: %zu of 100 came to an end", suite[i].schema, whole);
        json_decref(schema);
        grammar_destroy(g);
    }
}

Test(grammar_schema, every_integer_of_a_range_and_no_other)
{
    uint64_t state = 7;
    for (int round = 0; round < 120; round++) {
        long bounds[2];
        char schema[200], text[32];
        for (int i = 0; i < 2; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            bounds[i] =
                (long)((state >> 33) % (round % 3 == 0 ? 31 : 4001)) - (round % 3 == 0 ? 15 : 2000);
        }
        long low = bounds[0] < bounds[1] ? bounds[0] : bounds[1],
             high = bounds[0] + bounds[1] - low;
        bool has_low = round % 4 != 1, has_high = round % 4 != 2;
        snprintf(schema, sizeof(schema), "{\"type\": \"integer\", \"%s\": %ld, \"%s\": %ld}",
                 has_low ? round % 5 ? "minimum" : "exclusiveMinimum" : "title",
                 has_low && round % 5 == 0 ? low - 1 : low,
                 has_high ? round % 7 ? "maximum" : "exclusiveMaximum" : "description",
                 has_high && round % 7 == 0 ? high + 1 : high);
        struct grammar *g = convert(schema);
        for (long x = -2500; x <= 2500; x++) {
            snprintf(text, sizeof(text), "%ld", x);
            bool in = (!has_low || x >= low) && (!has_high || x <= high);
            cr_assert_eq(matches(g, text), in, "%s: %s", schema, text);
        }
        cr_expect_not(matches(g, "-0"));
        cr_expect_not(matches(g, "007"));
        cr_expect_eq(matches(g, "1234567890123456"), !has_high);
        cr_expect_eq(matches(g, "-1234567890123456"), !has_low);
        grammar_destroy(g);
    }
}

Test(grammar_schema, what_is_refused_is_told_with_its_path)
{
    static const struct {
        const char *schema, *words;
    } cases[] = {
        {"", "line 1"},
        {"{\"a\": 1,\n \"b\": }", "line 2, column"},
        {"{\"type\": \"integer\", \"type\": \"null\"}", "duplicate"},
        {"[]", "a schema must be an object or a boolean"},
        {"false", "nothing satisfies"},
        {"{\"not\": {}}", "at the top: 'not' is not supported"},
        {"{\"properties\": {\"a\": {\"items\": {\"uniqueItems\": true}}}}",
         "at /properties/a/items: 'uniqueItems' is not supported"},
        {"{\"type\": \"text\"}", "there is no type 'text'"},
        {"{\"type\": 5}", "'type' must be"},
        {"{\"anyOf\": [{}, {\"multipleOf\": 2}]}", "at /anyOf/1: 'multipleOf'"},
        {"{\"anyOf\": []}", "'anyOf' must be an array"},
        {"{\"enum\": []}", "'enum' must be an array"},
        {"{\"enum\": [1], \"minimum\": 0}", "'enum' together with other words"},
        {"{\"$ref\": \"#/$defs/none\"}", "names nothing"},
        {"{\"$ref\": \"http://example.com\"}", "names nothing"},
        {"{\"properties\": {}, \"required\": [\"a\"]}", "'a', which is not among"},
        {"{\"type\": \"number\", \"minimum\": 1}", "'minimum' is supported for integers only"},
        {"{\"type\": \"integer\", \"minimum\": 1.5}", "'minimum' must be an integer"},
        {"{\"type\": \"integer\", \"minimum\": 5, \"maximum\": 4}", "no integer lies between"},
        {"{\"minLength\": -1}", "'minLength' must be"},
        {"{\"maxItems\": 20001}", "'maxItems' must be"},
        {"{\"minItems\": 3, \"maxItems\": 2}", "no array has"},
        {"{\"pattern\": \"a\", \"minLength\": 2}", "at once"},
        {"{\"pattern\": \"(?=a)\"}", "a group that is not supported at"},
        {"{\"pattern\": \"[a\"}", "a class has no end"},
        {"{\"pattern\": \"\\\\bx\"}", "an escape that is not supported"},
        {"{\"pattern\": \"a|b$\"}", "need parentheses"},
        {"{\"pattern\": \"a{1,2,3}\"}", "bounds of a repetition that are none"},
        {"{\"pattern\": \"a{2,1}\"}", "the wrong way round"},
        {"{\"pattern\": \"[ü-é]\"}", "a range that runs backwards"},
        {"{\"pattern\": \"a)\"}", "a parenthesis too many"},
        {"{\"pattern\": \"*\"}", "there is nothing to repeat"},
        {"{\"allOf\": [{\"properties\": {\"a\": {\"const\": 1}}}, {\"properties\": {\"a\": "
         "{\"const\": 2}}}]}",
         "the property 'a' twice"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct fmt_error err = {""};
        char *text = NULL;
        cr_expect_eq(grammar_from_schema(cases[i].schema, strlen(cases[i].schema), &text, &err),
                     -EINVAL, "%s", cases[i].schema);
        cr_expect(strstr(err.text, cases[i].words), "%s\n  %s, not %s", cases[i].schema, err.text,
                  cases[i].words);
        free(text);
    }
    char deep[4000] = "";
    for (int i = 0; i < 70; i++) {
        strcat(deep, "{\"items\":");
    }
    strcat(deep, "{}");
    for (int i = 0; i < 70; i++) {
        strcat(deep, "}");
    }
    struct fmt_error err = {""};
    char *text = NULL;
    cr_expect_eq(grammar_from_schema(deep, strlen(deep), &text, &err), -EINVAL);
    cr_expect(strstr(err.text, "64 deep"), "%s", err.text);
}
