/* daemon/model/grammar_schema.h - JSON Schema to a grammar for the documents that satisfy it.
 *
 * Understood: type (one or several), properties, required, additionalProperties, items,
 * prefixItems, minItems, maxItems, minLength, maxLength, pattern, format (date, time, date-time,
 * uuid; others say nothing), enum, const, minimum, maximum and their exclusive forms for integers,
 * anyOf, oneOf (as anyOf), allOf of objects, $ref inside the document. Words that only describe
 * (title, description, ...) are passed over; every other word is refused by name, because the
 * grammar would let through what the schema forbids.
 *
 * As with llama.cpp the grammar is narrower than the schema where that helps a model: properties
 * come in the order in which the schema lists them, required ones first; objects with properties
 * have no others unless additionalProperties says so; white space is bounded; numbers have up to 16
 * digits; an array with prefixItems has all of those. A schema {} is any JSON. */
#ifndef DAEMON_MODEL_GRAMMAR_SCHEMA_H
#define DAEMON_MODEL_GRAMMAR_SCHEMA_H

#include "format/error.h"

#include <stddef.h>

#define SCHEMA_TEXT_BYTES_MAX (1u << 18)
#define SCHEMA_DEPTH_MAX      64u

/* 0 and *ret_gbnf, terminated, malloc'ed. -EINVAL with err: not JSON (with line and column), or
 * what of the schema is wrong or not understood, with its path; -ENOMEM. */
int grammar_from_schema(const char *json, size_t bytes, char **ret_gbnf, struct fmt_error *err);

#endif
