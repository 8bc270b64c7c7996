/* daemon/model/grammar_schema_object.c - objects and arrays. */
#include "daemon/model/grammar_schema_internal.h"

#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- keys that are none of the properties ------------------------------------------------ */

struct names {
    const char **name; /* in the order of strcmp, no two equal */
    size_t n;
};

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static size_t character_bytes(const char *at)
{
    size_t bytes = 1;
    utf8_step((const unsigned char *)at, strlen(at), &bytes);
    return bytes;
}

static bool is_raw(const char *at)
{
    return (unsigned char)*at >= 0x20 && *at != '"' && *at != '\\' && *at != 0x7F;
}

/* A character inside of a class. */
static void put_class_char(struct schema_text *out, const char *at, size_t bytes)
{
    if (bytes == 1 && strchr("]-^[", *at) != NULL) {
        schema_put(out, "\\x%02X", (unsigned)*at);
    } else {
        schema_put_bytes(out, at, bytes);
    }
}

/* What may follow the first `from` bytes, which the names low to high - 1 share. */
static void put_other_keys(const struct names *names, size_t low, size_t high, size_t from,
                           struct schema_text *out)
{
    bool whole = false; /* one of the names ends here: something must follow */
    struct schema_text taken = {0};
    schema_put(out, "(");
    for (size_t i = low; i < high;) {
        const char *at = names->name[i] + from;
        size_t bytes = character_bytes(at), end = i + 1;
        whole |= *at == '\0';
        if (*at == '\0' || !is_raw(at)) { /* a raw key cannot go on like this one */
            i++;
            continue;
        }
        while (end < high && strncmp(names->name[end] + from, at, bytes) == 0) {
            end++;
        }
        schema_put_literal(out, at, bytes);
        schema_put(out, " ");
        put_other_keys(names, i, end, from + bytes, out);
        schema_put(out, " | ");
        put_class_char(&taken, at, bytes);
        i = end;
    }
    schema_put(out, "[^\"\\\\\\x00-\\x1F\\x7F%s] raw*)%s ", taken.data ? taken.data : "",
               whole ? "" : "?");
    out->failed |= taken.failed;
    schema_text_finish(&taken);
}

static int put_additional_key(json_t *properties, struct schema_text *out)
{
    const char *key;
    json_t *value;
    struct names names = {.n = 0};
    size_t n = json_object_size(properties);
    if (n == 0) {
        schema_put(out, "string ");
        return 0;
    }
    names.name = calloc(n, sizeof(*names.name));
    if (names.name == NULL) {
        return -ENOMEM;
    }
    json_object_foreach(properties, key, value)
    {
        names.name[names.n++] = key;
    }
    qsort(names.name, names.n, sizeof(*names.name), by_name);
    schema_put(out, "\"\\\"\" ");
    put_other_keys(&names, 0, names.n, 0, out);
    schema_put(out, "\"\\\"\" ");
    free(names.name);
    return 0;
}

/* ---- objects ----------------------------------------------------------------------------- */

static bool is_required(json_t *required, const char *key)
{
    size_t i;
    json_t *name;
    json_array_foreach(required, i, name)
    {
        if (strcmp(json_string_value(name), key) == 0) {
            return true;
        }
    }
    return false;
}

/* key: value, as a rule. */
static int put_pair(struct schema_converter *c, const char *key, json_t *schema, unsigned *ret)
{
    struct schema_text pair = {0};
    json_t *name = json_string(key);
    char *quoted = name ? json_dumps(name, JSON_ENCODE_ANY) : NULL;
    json_decref(name);
    if (quoted == NULL) {
        return -ENOMEM;
    }
    size_t before = strlen(c->path);
    snprintf(c->path + before, sizeof(c->path) - before, "/properties/%s", key);
    schema_put_literal(&pair, quoted, strlen(quoted));
    free(quoted);
    schema_put(&pair, " space \":\" space ");
    int rc = schema_visit(c, schema, &pair);
    c->path[before] = '\0';
    *ret = schema_add_rule(c, &pair);
    schema_text_finish(&pair);
    return rc;
}

/* The rule of an additional pair; false in *ret_any when there is none. */
static int put_additional(struct schema_converter *c, json_t *schema, bool *ret_any, unsigned *ret)
{
    json_t *properties = json_object_get(schema, "properties");
    json_t *more = json_object_get(schema, "additionalProperties");
    *ret_any = !json_is_false(more) && (more != NULL || json_object_size(properties) == 0);
    if (!*ret_any) {
        return 0;
    }
    struct schema_text pair = {0};
    int rc = put_additional_key(properties, &pair);
    schema_put(&pair, "space \":\" space ");
    if (more == NULL || json_is_true(more)) {
        schema_put(&pair, "value");
    } else if (rc == 0) {
        rc = schema_visit(c, more, &pair);
    }
    *ret = schema_add_rule(c, &pair);
    schema_text_finish(&pair);
    return rc;
}

static int check_object(struct schema_converter *c, json_t *schema)
{
    json_t *properties = json_object_get(schema, "properties");
    json_t *required = json_object_get(schema, "required");
    json_t *more = json_object_get(schema, "additionalProperties"), *name;
    size_t i;
    if (properties != NULL && !json_is_object(properties)) {
        return schema_refuse(c, "'properties' must be an object");
    }
    if (required != NULL && !json_is_array(required)) {
        return schema_refuse(c, "'required' must be an array of names");
    }
    json_array_foreach(required, i, name)
    {
        if (!json_is_string(name)) {
            return schema_refuse(c, "'required' must be an array of names");
        }
        if (json_object_get(properties, json_string_value(name)) == NULL) {
            return schema_refuse(c, "'required' names '%.60s', which is not among the properties",
                                 json_string_value(name));
        }
    }
    if (more != NULL && !json_is_boolean(more) && !json_is_object(more)) {
        return schema_refuse(c, "'additionalProperties' must be a boolean or a schema");
    }
    return 0;
}

/* Pairs with rules[i]; those that may be left out follow the required ones. Tail i is what may
 * follow when pair i - 1 was possible last. */
struct pairs {
    unsigned *rule;
    size_t n, n_required;
    bool any;            /* additional ones */
    unsigned additional; /* their rule */
};

static void put_pairs(struct schema_converter *c, const struct pairs *p, struct schema_text *out)
{
    struct schema_text tail = {0};
    unsigned *tails = calloc(p->n + 1, sizeof(*tails));
    if (tails == NULL) {
        out->failed = true;
        return;
    }
    if (p->any) {
        schema_put(&tail, "(comma r-%u)*", p->additional);
    }
    schema_put(&tail, "%s", p->any ? "" : "\"\""); /* an empty rule would take in the next line */
    tails[p->n] = schema_add_rule(c, &tail);
    for (size_t i = p->n; i-- > p->n_required;) {
        schema_text_finish(&tail);
        schema_put(&tail, "(comma r-%u)? r-%u", p->rule[i], tails[i + 1]);
        tails[i] = schema_add_rule(c, &tail);
    }
    schema_text_finish(&tail);
    schema_put(out, "\"{\" space ");
    for (size_t i = 0; i < p->n_required; i++) {
        schema_put(out, "%sr-%u ", i > 0 ? "comma " : "", p->rule[i]);
    }
    if (p->n_required > 0) {
        schema_put(out, "r-%u space ", tails[p->n_required]);
    } else if (p->n > 0 || p->any) {
        schema_put(out, "(("); /* without a comma before the first of them */
        for (size_t i = 0; i < p->n; i++) {
            schema_put(out, "%sr-%u r-%u", i > 0 ? " | " : "", p->rule[i], tails[i + 1]);
        }
        if (p->any) {
            schema_put(out, "%sr-%u r-%u", p->n > 0 ? " | " : "", p->additional, tails[p->n]);
        }
        schema_put(out, ") space)? ");
    }
    schema_put(out, "\"}\"");
    free(tails);
}

int schema_object(struct schema_converter *c, json_t *schema, struct schema_text *out)
{
    json_t *properties = json_object_get(schema, "properties");
    json_t *required = json_object_get(schema, "required"), *value;
    const char *key;
    struct pairs p = {.n = 0};
    int rc = check_object(c, schema);
    if (rc < 0) {
        return rc;
    }
    p.rule = calloc(json_object_size(properties) + 1, sizeof(*p.rule));
    if (p.rule == NULL) {
        return -ENOMEM;
    }
    for (int optional = 0; optional < 2 && rc == 0; optional++) {
        json_object_foreach(properties, key, value)
        {
            if (rc == 0 && is_required(required, key) != (optional == 1)) {
                rc = put_pair(c, key, value, &p.rule[p.n++]);
            }
        }
        p.n_required = optional == 0 ? p.n : p.n_required;
    }
    rc = rc < 0 ? rc : put_additional(c, schema, &p.any, &p.additional);
    if (rc == 0) {
        put_pairs(c, &p, out);
    }
    free(p.rule);
    return rc;
}

/* ---- arrays ------------------------------------------------------------------------------ */

/* least to most of a rule, with commas; leading: also before the first. */
static void put_list(struct schema_text *out, unsigned rule, unsigned least, unsigned most,
                     bool leading)
{
    if (most == 0) {
        return;
    }
    bool optional = least == 0 && !leading;
    if (!leading) {
        schema_put(out, "%sr-%u ", optional ? "(" : "", rule);
        least -= least > 0;
        most -= most != SCHEMA_ENDLESS;
    }
    schema_put(out, "(comma r-%u){%u,", rule, least);
    if (most != SCHEMA_ENDLESS) {
        schema_put(out, "%u", most);
    }
    schema_put(out, "}%s ", optional ? ")?" : "");
}

static int put_prefix(struct schema_converter *c, json_t *prefix, struct schema_text *out)
{
    size_t i;
    json_t *item;
    json_array_foreach(prefix, i, item)
    {
        size_t before = strlen(c->path);
        snprintf(c->path + before, sizeof(c->path) - before, "/prefixItems/%zu", i);
        schema_put(out, "%s", i > 0 ? "comma " : "");
        int rc = schema_visit(c, item, out);
        c->path[before] = '\0';
        schema_put(out, " ");
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* Where items is an array, it is what later drafts call prefixItems. */
int schema_array(struct schema_converter *c, json_t *schema, struct schema_text *out)
{
    json_t *items = json_object_get(schema, "items");
    json_t *prefix = json_object_get(schema, "prefixItems");
    unsigned least, most, rule;
    int rc = schema_count(c, schema, "minItems", 0, &least);
    rc = rc < 0 ? rc : schema_count(c, schema, "maxItems", SCHEMA_ENDLESS, &most);
    if (rc < 0) {
        return rc;
    }
    if (json_is_array(items)) {
        prefix = items;
        items = NULL;
    }
    if (prefix != NULL && !json_is_array(prefix)) {
        return schema_refuse(c, "'prefixItems' must be an array");
    }
    unsigned n = (unsigned)json_array_size(prefix);
    if (json_is_false(items) || (n > 0 && items == NULL && least <= n)) {
        most = most < n ? most : n; /* no more than the prefix */
    }
    if (most < n || most < least) {
        return schema_refuse(c, "no array has so few and so many items");
    }
    struct schema_text item = {0};
    schema_put(out, "\"[\" space ");
    rc = put_prefix(c, prefix, out);
    if (rc == 0 && items != NULL && !json_is_false(items)) {
        size_t before = strlen(c->path);
        snprintf(c->path + before, sizeof(c->path) - before, "/items");
        rc = schema_visit(c, items, &item);
        c->path[before] = '\0';
    } else {
        schema_put(&item, "value");
    }
    rule = schema_add_rule(c, &item);
    schema_text_finish(&item);
    put_list(out, rule, least > n ? least - n : 0, most == SCHEMA_ENDLESS ? most : most - n, n > 0);
    schema_put(out, "space \"]\"");
    return rc;
}
