/* daemon/model/grammar_schema.c - JSON Schema to GBNF: the words of a schema, and simple types. */
#include "daemon/model/grammar_schema_internal.h"

#include "daemon/model/grammar.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What every grammar has; unused rules do no harm. No value ends with white space, so that a
 * document ends with its last character. */
static const char preamble[] =
    "space ::= | \" \" | \"\\n\"{1,2} [ \\t]{0,20}\n"
    "comma ::= space \",\" space\n"
    "raw ::= [^\"\\\\\\x00-\\x1F\\x7F]\n"
    "char ::= raw | \"\\\\\" ([\"\\\\bfnrt] | \"u\" ([0-9a-cA-Ce-fE-F] [0-9a-fA-F]{3} | [dD] [0-7] "
    "[0-9a-fA-F]{2}))\n"
    "string ::= \"\\\"\" char* \"\\\"\"\n"
    "integral ::= \"0\" | [1-9] [0-9]{0,15}\n"
    "integer ::= \"-\"? integral\n"
    "number ::= integer (\".\" [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?\n"
    "boolean ::= \"true\" | \"false\"\n"
    "null ::= \"null\"\n"
    "object ::= \"{\" space (string space \":\" space value (comma string space \":\" space "
    "value)* "
    "space)? \"}\"\n"
    "array ::= \"[\" space (value (comma value)* space)? \"]\"\n"
    "value ::= object | array | string | number | boolean | null\n"
    "date ::= [0-9]{4} \"-\" (\"0\" [1-9] | \"1\" [0-2]) \"-\" (\"0\" [1-9] | [1-2] [0-9] | \"3\" "
    "[0-1])\n"
    "time ::= ([01] [0-9] | \"2\" [0-3]) \":\" [0-5] [0-9] \":\" [0-5] [0-9] (\".\" [0-9]{3})? "
    "(\"Z\" | [-+] ([01] [0-9] | \"2\" [0-3]) \":\" [0-5] [0-9])\n"
    "date-time ::= date \"T\" time\n"
    "uuid ::= [0-9a-fA-F]{8} (\"-\" [0-9a-fA-F]{4}){3} \"-\" [0-9a-fA-F]{12}\n";

/* ---- text -------------------------------------------------------------------------------- */

void schema_put_bytes(struct schema_text *t, const char *data, size_t bytes)
{
    if (t->failed || t->n + bytes + 1 > GRAMMAR_TEXT_BYTES_MAX) {
        t->failed = true;
        return;
    }
    if (t->n + bytes + 1 > t->capacity) {
        size_t capacity = 2 * (t->n + bytes) + 256;
        char *grown = realloc(t->data, capacity);
        if (grown == NULL) {
            t->failed = true;
            return;
        }
        t->data = grown;
        t->capacity = capacity;
    }
    memcpy(t->data + t->n, data, bytes);
    t->n += bytes;
    t->data[t->n] = '\0';
}

void schema_put(struct schema_text *t, const char *format, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, format);
    int n = vasprintf(&text, format, args);
    va_end(args);
    if (n < 0) {
        t->failed = true;
        return;
    }
    schema_put_bytes(t, text, (size_t)n);
    free(text);
}

void schema_put_literal(struct schema_text *t, const char *data, size_t bytes)
{
    schema_put_bytes(t, "\"", 1);
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)data[i];
        if (c < 0x20 || c == 0x7F) {
            schema_put(t, "\\x%02X", c);
        } else {
            schema_put_bytes(t, "\\", c == '"' || c == '\\');
            schema_put_bytes(t, data + i, 1);
        }
    }
    schema_put_bytes(t, "\"", 1);
}

void schema_text_finish(struct schema_text *t)
{
    free(t->data);
    *t = (struct schema_text){0};
}

int schema_refuse(struct schema_converter *c, const char *format, ...)
{
    char what[200];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    return fmt_fail(c->err, -EINVAL, "at %s: %s", c->path[0] != '\0' ? c->path : "the top", what);
}

unsigned schema_add_rule(struct schema_converter *c, struct schema_text *body)
{
    schema_put(&c->rules, "r-%u ::= ", c->n_rules);
    schema_put_bytes(&c->rules, body->data ? body->data : "", body->n);
    schema_put(&c->rules, "\n");
    c->rules.failed |= body->failed;
    return c->n_rules++;
}

/* ---- words ------------------------------------------------------------------------------- */

static bool is_among(const char *word, const char *const *words)
{
    while (*words != NULL && strcmp(*words, word) != 0) {
        words++;
    }
    return *words != NULL;
}

/* That say nothing about the document. */
static const char *const describing[] = {
    "$schema", "$id",        "$comment", "$defs",     "definitions", "title",    "description",
    "default", "deprecated", "readOnly", "writeOnly", "example",     "examples", NULL,
};

static const char *const known[] = {
    "$ref",
    "const",
    "enum",
    "anyOf",
    "oneOf",
    "allOf",
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "pattern",
    "minLength",
    "maxLength",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    NULL,
};

/* How many words of the schema say something; refuses those that are not understood. */
static int count_words(struct schema_converter *c, json_t *schema, size_t *ret)
{
    const char *key;
    json_t *value;
    size_t n = 0;
    json_object_foreach(schema, key, value)
    {
        if (is_among(key, describing)) {
            continue;
        }
        if (!is_among(key, known)) {
            return schema_refuse(c, "'%.60s' is not supported", key);
        }
        n++;
    }
    *ret = n;
    return 0;
}

int schema_count(struct schema_converter *c, json_t *schema, const char *key, unsigned fallback,
                 unsigned *ret)
{
    json_t *value = json_object_get(schema, key);
    json_int_t n = json_integer_value(value);
    *ret = fallback;
    if (value == NULL) {
        return 0;
    }
    if (!json_is_integer(value) || n < 0 || n > (json_int_t)GRAMMAR_REPEAT_MAX) {
        return schema_refuse(c, "'%s' must be an integer from 0 to %u", key, GRAMMAR_REPEAT_MAX);
    }
    *ret = (unsigned)n;
    return 0;
}

/* ---- simple types ------------------------------------------------------------------------ */

static int visit_string(struct schema_converter *c, json_t *schema, struct schema_text *out)
{
    static const char *const formats[] = {"date", "time", "date-time", "uuid", NULL};
    json_t *pattern = json_object_get(schema, "pattern");
    const char *format = json_string_value(json_object_get(schema, "format"));
    unsigned least, most;
    int rc = schema_count(c, schema, "minLength", 0, &least);
    rc = rc < 0 ? rc : schema_count(c, schema, "maxLength", SCHEMA_ENDLESS, &most);
    if (rc < 0) {
        return rc;
    }
    if (most < least) {
        return schema_refuse(c, "'maxLength' is below 'minLength'");
    }
    bool bounded = least > 0 || most != SCHEMA_ENDLESS;
    bool formatted = format != NULL && is_among(format, formats);
    if ((pattern != NULL) + bounded + formatted > 1) {
        return schema_refuse(c, "'pattern', a 'format' and a length at once are not supported");
    }
    if (pattern != NULL && !json_is_string(pattern)) {
        return schema_refuse(c, "'pattern' must be a string");
    }
    schema_put(out, "\"\\\"\" ");
    if (pattern != NULL) {
        rc = schema_pattern(c, json_string_value(pattern), out);
    } else if (formatted) {
        schema_put(out, "%s", format);
    } else if (most == SCHEMA_ENDLESS) {
        schema_put(out, "char{%u,}", least);
    } else {
        schema_put(out, "char{%u,%u}", least, most);
    }
    schema_put(out, " \"\\\"\"");
    return rc;
}

/* A bound as an integer; step is what an exclusive one moves it by. */
static int integer_bound(struct schema_converter *c, json_t *schema, const char *key, int step,
                         int64_t *ret, bool *ret_given)
{
    json_t *value = json_object_get(schema, key);
    double real = json_real_value(value);
    int64_t n = json_is_real(value) ? 0 : (int64_t)json_integer_value(value);
    if (value == NULL) {
        return 0;
    }
    if (json_is_real(value) && real > -9e15 && real < 9e15 && real == (double)(int64_t)real) {
        n = (int64_t)real;
    } else if (!json_is_integer(value)) {
        return schema_refuse(c, "'%s' must be an integer", key);
    }
    if (n == INT64_MIN || (step > 0 && n == INT64_MAX) || (step < 0 && n == INT64_MIN + 1)) {
        return schema_refuse(c, "'%s' is too large", key);
    }
    n += step;
    *ret = n;
    *ret_given = true;
    return 0;
}

static int visit_integer(struct schema_converter *c, json_t *schema, struct schema_text *out)
{
    int64_t least = 0, most = 0, more = 0, less = 0;
    bool has_least = false, has_most = false, has_more = false, has_less = false;
    int rc = integer_bound(c, schema, "minimum", 0, &least, &has_least);
    rc = rc < 0 ? rc : integer_bound(c, schema, "exclusiveMinimum", 1, &more, &has_more);
    rc = rc < 0 ? rc : integer_bound(c, schema, "maximum", 0, &most, &has_most);
    rc = rc < 0 ? rc : integer_bound(c, schema, "exclusiveMaximum", -1, &less, &has_less);
    if (rc < 0) {
        return rc;
    }
    if (has_more && (!has_least || more > least)) {
        least = more;
        has_least = true;
    }
    if (has_less && (!has_most || less < most)) {
        most = less;
        has_most = true;
    }
    if (has_least && has_most && most < least) {
        return schema_refuse(c, "no integer lies between the bounds");
    }
    if (has_least || has_most) {
        schema_integers(has_least ? &least : NULL, has_most ? &most : NULL, out);
    } else {
        schema_put(out, "integer");
    }
    return 0;
}

static int visit_number(struct schema_converter *c, json_t *schema, struct schema_text *out)
{
    static const char *const bounds[] = {"minimum", "maximum", "exclusiveMinimum",
                                         "exclusiveMaximum"};
    for (size_t i = 0; i < 4; i++) {
        if (json_object_get(schema, bounds[i]) != NULL) {
            return schema_refuse(c, "'%s' is supported for integers only", bounds[i]);
        }
    }
    schema_put(out, "number");
    return 0;
}

static int visit_type(struct schema_converter *c, json_t *schema, const char *type,
                      struct schema_text *out)
{
    static const char *const of_objects[] = {"properties", "required", "additionalProperties"};
    static const char *const of_arrays[] = {"items", "prefixItems", "minItems", "maxItems"};
    bool plain = true;
    if (strcmp(type, "object") == 0) {
        for (size_t i = 0; i < 3; i++) {
            plain &= json_object_get(schema, of_objects[i]) == NULL;
        }
        schema_put(out, "%s", plain ? "object" : "");
        return plain ? 0 : schema_object(c, schema, out);
    }
    if (strcmp(type, "array") == 0) {
        for (size_t i = 0; i < 4; i++) {
            plain &= json_object_get(schema, of_arrays[i]) == NULL;
        }
        schema_put(out, "%s", plain ? "array" : "");
        return plain ? 0 : schema_array(c, schema, out);
    }
    if (strcmp(type, "string") == 0) {
        return visit_string(c, schema, out);
    }
    if (strcmp(type, "integer") == 0) {
        return visit_integer(c, schema, out);
    }
    if (strcmp(type, "number") == 0) {
        return visit_number(c, schema, out);
    }
    if (strcmp(type, "boolean") == 0 || strcmp(type, "null") == 0) {
        schema_put(out, "%s", type);
        return 0;
    }
    return schema_refuse(c, "there is no type '%.40s'", type);
}

/* ---- combinations ------------------------------------------------------------------------ */

static int put_constant(struct schema_text *out, json_t *value)
{
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    if (text == NULL) {
        return -ENOMEM;
    }
    schema_put_literal(out, text, strlen(text));
    free(text);
    return 0;
}

static int visit_enum(struct schema_converter *c, json_t *values, struct schema_text *out)
{
    size_t i;
    json_t *value;
    int rc = 0;
    if (json_array_size(values) == 0) {
        return schema_refuse(c, "'enum' must be an array of at least one value");
    }
    schema_put(out, "(");
    json_array_foreach(values, i, value)
    {
        schema_put(out, "%s", i > 0 ? " | " : "");
        rc = rc < 0 ? rc : put_constant(out, value);
    }
    schema_put(out, ")");
    return rc;
}

static int visit_alternatives(struct schema_converter *c, json_t *schemas, const char *word,
                              struct schema_text *out)
{
    size_t i;
    json_t *schema;
    if (json_array_size(schemas) == 0) {
        return schema_refuse(c, "'%s' must be an array of at least one schema", word);
    }
    schema_put(out, "(");
    json_array_foreach(schemas, i, schema)
    {
        size_t before = strlen(c->path);
        snprintf(c->path + before, sizeof(c->path) - before, "/%s/%zu", word, i);
        schema_put(out, "%s", i > 0 ? " | " : "");
        int rc = schema_visit(c, schema, out);
        c->path[before] = '\0';
        if (rc < 0) {
            return rc;
        }
    }
    schema_put(out, ")");
    return 0;
}

static int visit_types(struct schema_converter *c, json_t *schema, json_t *types,
                       struct schema_text *out)
{
    size_t i;
    json_t *type;
    if (json_array_size(types) == 0) {
        return schema_refuse(c, "'type' must be a name or an array of names");
    }
    schema_put(out, "(");
    json_array_foreach(types, i, type)
    {
        schema_put(out, "%s", i > 0 ? " | " : "");
        int rc = json_is_string(type) ? visit_type(c, schema, json_string_value(type), out)
                                      : schema_refuse(c, "'type' must hold names");
        if (rc < 0) {
            return rc;
        }
    }
    schema_put(out, ")");
    return 0;
}

/* The schema that a pointer names, with ~0 and ~1 undone; NULL when there is none. */
static json_t *find_pointer(json_t *root, const char *pointer)
{
    json_t *at = root;
    if (pointer[0] != '#' || (pointer[1] != '\0' && pointer[1] != '/')) {
        return NULL;
    }
    for (const char *p = pointer + 1; *p == '/' && at != NULL;) {
        char name[256];
        size_t n = 0;
        for (p++; *p != '\0' && *p != '/' && n + 1 < sizeof(name); p++) {
            bool escaped = *p == '~' && (p[1] == '0' || p[1] == '1');
            name[n++] = escaped ? (p[1] == '0' ? '~' : '/') : *p;
            p += escaped;
        }
        name[n] = '\0';
        at = json_is_array(at) ? json_array_get(at, strtoul(name, NULL, 10))
                               : json_object_get(at, name);
        at = *p == '\0' || *p == '/' ? at : NULL;
    }
    return at;
}

static int visit_ref(struct schema_converter *c, json_t *ref, struct schema_text *out)
{
    const char *pointer = json_string_value(ref);
    if (pointer == NULL || find_pointer(c->root, pointer) == NULL) {
        return schema_refuse(c, "'$ref' names nothing inside of the schema: %.80s",
                             pointer ? pointer : "it is no string");
    }
    for (size_t i = 0; i < c->n_refs; i++) {
        if (strcmp(c->refs[i], pointer) == 0) {
            schema_put(out, "ref-%zu", i);
            return 0;
        }
    }
    int rc = 0;
    if (c->n_refs == c->refs_capacity) {
        size_t capacity = c->refs_capacity > 0 ? 2 * c->refs_capacity : 16;
        char **refs = reallocarray(c->refs, capacity, sizeof(*refs));
        rc = refs == NULL ? -ENOMEM : 0;
        c->refs = refs ? refs : c->refs;
        c->refs_capacity = refs ? capacity : c->refs_capacity;
    }
    char *copy = rc == 0 ? strdup(pointer) : NULL;
    if (copy == NULL) {
        return -ENOMEM;
    }
    schema_put(out, "ref-%zu", c->n_refs);
    c->refs[c->n_refs++] = copy;
    return 0;
}

/* Adds the words of a member of allOf to the merged schema. */
static int merge(struct schema_converter *c, json_t *into, json_t *from)
{
    const char *key;
    json_t *value;
    const char *pointer = json_string_value(json_object_get(from, "$ref"));
    from = pointer ? find_pointer(c->root, pointer) : from;
    if (!json_is_object(from)) {
        return schema_refuse(c, "'allOf' must hold objects' schemas");
    }
    json_object_foreach(from, key, value)
    {
        json_t *there = json_object_get(into, key);
        int rc = 0;
        if (is_among(key, describing) || strcmp(key, "allOf") == 0) {
            continue;
        }
        if (there == NULL) {
            json_t *copy = json_deep_copy(value);
            rc = json_object_set_new(into, key, copy);
        } else if (strcmp(key, "properties") == 0 && json_is_object(there)) {
            const char *name;
            json_t *property;
            json_object_foreach(value, name, property)
            {
                json_t *other = json_object_get(there, name);
                if (other != NULL && !json_equal(other, property)) {
                    return schema_refuse(c, "'allOf' has the property '%.60s' twice", name);
                }
            }
            rc = json_object_update(there, value);
        } else if (strcmp(key, "required") == 0 && json_is_array(there)) {
            rc = json_array_extend(there, value);
        } else if (!json_equal(there, value)) {
            return schema_refuse(c, "'allOf' has '%.60s' twice", key);
        }
        if (rc < 0) {
            return -ENOMEM;
        }
    }
    return 0;
}

static int visit_all(struct schema_converter *c, json_t *schema, struct schema_text *out)
{
    json_t *members = json_object_get(schema, "allOf"), *member;
    json_t *merged = json_object();
    size_t i;
    int rc = merged == NULL ? -ENOMEM : merge(c, merged, schema);
    if (rc == 0 && json_array_size(members) == 0) {
        rc = schema_refuse(c, "'allOf' must be an array of at least one schema");
    }
    json_array_foreach(members, i, member)
    {
        rc = rc < 0 ? rc : merge(c, merged, member);
    }
    rc = rc < 0 ? rc : schema_visit(c, merged, out);
    json_decref(merged);
    return rc;
}

/* Without a type, the words tell it. */
static const char *type_of_words(json_t *schema)
{
    static const char *const words[][2] = {
        {"properties", "object"},
        {"required", "object"},
        {"additionalProperties", "object"},
        {"items", "array"},
        {"prefixItems", "array"},
        {"minItems", "array"},
        {"maxItems", "array"},
        {"pattern", "string"},
        {"minLength", "string"},
        {"maxLength", "string"},
        {"format", "string"},
        {"minimum", "number"},
        {"maximum", "number"},
        {"exclusiveMinimum", "number"},
        {"exclusiveMaximum", "number"},
    };
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        if (json_object_get(schema, words[i][0]) != NULL) {
            return words[i][1];
        }
    }
    return NULL;
}

static int visit_words(struct schema_converter *c, json_t *schema, size_t n_words,
                       struct schema_text *out)
{
    static const char *const alone[] = {"$ref", "const", "enum", "anyOf", "oneOf"};
    json_t *type = json_object_get(schema, "type");
    if (json_object_get(schema, "allOf") != NULL) {
        return visit_all(c, schema, out);
    }
    for (size_t i = 0; i < sizeof(alone) / sizeof(alone[0]); i++) {
        json_t *value = json_object_get(schema, alone[i]);
        if (value == NULL) {
            continue;
        }
        /* A type beside constants is theirs. */
        if (n_words > 1 && !(n_words == 2 && type != NULL && (i == 1 || i == 2))) {
            return schema_refuse(c, "'%s' together with other words is not supported", alone[i]);
        }
        return i == 0   ? visit_ref(c, value, out)
               : i == 1 ? put_constant(out, value)
               : i == 2 ? visit_enum(c, value, out)
                        : visit_alternatives(c, value, alone[i], out);
    }
    if (json_is_string(type)) {
        return visit_type(c, schema, json_string_value(type), out);
    }
    if (type != NULL) {
        return visit_types(c, schema, type, out);
    }
    const char *meant = type_of_words(schema);
    return meant ? visit_type(c, schema, meant, out) : (schema_put(out, "value"), 0);
}

int schema_visit(struct schema_converter *c, json_t *schema, struct schema_text *out)
{
    size_t n_words = 0;
    if (json_is_true(schema)) {
        schema_put(out, "value");
        return 0;
    }
    if (!json_is_object(schema)) {
        return schema_refuse(c, json_is_false(schema) ? "nothing satisfies the schema false"
                                                      : "a schema must be an object or a boolean");
    }
    if (c->depth == SCHEMA_DEPTH_MAX) {
        return schema_refuse(c, "schemas more than %u deep", SCHEMA_DEPTH_MAX);
    }
    c->depth++;
    int rc = count_words(c, schema, &n_words);
    rc = rc < 0 ? rc : visit_words(c, schema, n_words, out);
    c->depth--;
    return rc;
}

/* ---- the whole --------------------------------------------------------------------------- */

static int convert(struct schema_converter *c)
{
    struct schema_text body = {0};
    int rc = schema_visit(c, c->root, &body);
    schema_put(&c->rules, "%sroot ::= %s\n", preamble, body.data ? body.data : "");
    c->rules.failed |= body.failed;
    for (size_t i = 0; i < c->n_refs && rc == 0; i++) { /* which may find more */
        schema_text_finish(&body);
        snprintf(c->path, sizeof(c->path), "%s", c->refs[i] + 1);
        rc = schema_visit(c, find_pointer(c->root, c->refs[i]), &body);
        schema_put(&c->rules, "ref-%zu ::= %s\n", i, body.data ? body.data : "");
        c->rules.failed |= body.failed;
    }
    schema_text_finish(&body);
    if (rc == 0 && c->rules.failed) {
        c->path[0] = '\0';
        rc = schema_refuse(c, "the grammar would have more than %u bytes", GRAMMAR_TEXT_BYTES_MAX);
    }
    return rc;
}

int grammar_from_schema(const char *json, size_t bytes, char **ret_gbnf, struct fmt_error *err)
{
    json_error_t e;
    if (bytes > SCHEMA_TEXT_BYTES_MAX) {
        return fmt_fail(err, -EINVAL, "the schema has %zu bytes; at most %u are taken", bytes,
                        SCHEMA_TEXT_BYTES_MAX);
    }
    struct schema_converter c = {.err = err};
    c.root = json_loadb(json, bytes, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, &e);
    if (c.root == NULL) {
        return fmt_fail(err, -EINVAL, "line %d, column %d: %s", e.line, e.column, e.text);
    }
    int rc = convert(&c);
    json_decref(c.root);
    for (size_t i = 0; i < c.n_refs; i++) {
        free(c.refs[i]);
    }
    free(c.refs);
    if (rc < 0) {
        schema_text_finish(&c.rules);
        return rc;
    }
    *ret_gbnf = c.rules.data;
    return 0;
}
