/* tests/unit/engine/arch_check.h - comparing models with the reference, for the tests of
 * architectures. Each test of criterion runs in a process of its own, with its own parts. */
#ifndef TESTS_UNIT_ENGINE_ARCH_CHECK_H
#define TESTS_UNIT_ENGINE_ARCH_CHECK_H

#include "tests/unit/engine/feed.h"
#include "tests/unit/engine/parts.h"
#include "tests/unit/engine/reference.h"

extern struct parts arch_parts;
void arch_setup(void);
void arch_teardown(void);

/* A model of two layers, 48 wide, 4 heads of 16 over 2 groups: heads apart from the width. */
struct reference_spec arch_spec(const char *arch);
/* Granite's scales, under the name granitemoe. */
struct reference_spec arch_granite_spec(void);
void arch_add_granite_keys(struct gguf_writer *w);
/* Windows in all layers but every pattern-th (1: in all). */
void arch_set_windows(struct reference_spec *s, uint32_t window, uint32_t pattern);

/* A path in the parts' folder; the text lives until the next call. */
const char *arch_path(const char *name);
/* Loads with float32 KV, or tries to. */
struct model *arch_load(const char *path, const char *backend);
int arch_try_load(const char *path, const char *backend, struct model **ret, struct fmt_error *err);

/* The model at path computes what r does, on every level of the cpu backend. */
void arch_compare(const struct reference *r, const char *path);
/* The reference as changed has it is far from the reference as it is: a model that did so would be
 * caught. */
void arch_notices(const struct reference *r, const struct reference_spec *changed,
                  const char *what);
/* Writes, compares, and turns everything that the spec has the other way, one by one. */
void arch_check(const struct reference_spec *spec);

#endif
