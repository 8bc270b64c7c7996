/* daemon/model/grammar_schema_internal.h - what the converter's files share. */
#ifndef DAEMON_MODEL_GRAMMAR_SCHEMA_INTERNAL_H
#define DAEMON_MODEL_GRAMMAR_SCHEMA_INTERNAL_H

#include "daemon/model/grammar_schema.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* Text that grows. Without memory, or above the limit of a grammar, it stays failed. */
struct schema_text {
    char *data;
    size_t n, capacity;
    bool failed;
};
void schema_put(struct schema_text *t, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void schema_put_bytes(struct schema_text *t, const char *data, size_t bytes);
/* A literal of these characters. */
void schema_put_literal(struct schema_text *t, const char *data, size_t bytes);
void schema_text_finish(struct schema_text *t);

struct schema_converter {
    json_t *root;
    struct schema_text rules; /* finished ones */
    unsigned n_rules;
    char **refs; /* pointers that were met; ref number i is rule ref-i */
    size_t n_refs, refs_capacity;
    unsigned depth;
    char path[200];
    struct fmt_error *err;
};

int schema_refuse(struct schema_converter *c, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* A new rule of that body, which is finished: its number, rule r-N. */
unsigned schema_add_rule(struct schema_converter *c, struct schema_text *body);

/* Each appends an expression that can stand in a sequence. 0 or -EINVAL, -ENOMEM. */
int schema_visit(struct schema_converter *c, json_t *schema, struct schema_text *out);
/* What is inside the quotes of a string that the expression matches. */
int schema_pattern(struct schema_converter *c, const char *pattern, struct schema_text *out);
/* least or most NULL: open. */
void schema_integers(const int64_t *least, const int64_t *most, struct schema_text *out);

/* A member that is a count; fallback where it is absent. -EINVAL. */
int schema_count(struct schema_converter *c, json_t *schema, const char *key, unsigned fallback,
                 unsigned *ret);
#define SCHEMA_ENDLESS UINT32_MAX

int schema_object(struct schema_converter *c, json_t *schema, struct schema_text *out);
int schema_array(struct schema_converter *c, json_t *schema, struct schema_text *out);

#endif
