/* tests/unit/engine/parts.h - pool, io thread, catalogue with the cpu backend, and models over
 * them.
 *
 * Errors end the process: these are the test's own bugs. */
#ifndef TESTS_UNIT_ENGINE_PARTS_H
#define TESTS_UNIT_ENGINE_PARTS_H

#include "daemon/model/registry.h"
#include "tests/unit/engine/folder.h"
#include "tests/unit/engine/tiny.h"

#define PARTS_BATCH 64u /* most rows of a step */

struct parts {
    struct folder folder; /* models, and cpu.so */
    struct pool *pool;
    struct io *io;
    struct backend_catalogue *catalogue;
};

void parts_init(struct parts *p, uint32_t n_threads);
void parts_finish(struct parts *p);

/* What a model is loaded with here. */
struct model_options parts_model_options(void);

/* Writes the tiny model under that name and loads it; or only tries to. */
struct model *parts_load(struct parts *p, const struct tiny *t, const char *name);
/* With a cache of that type. */
struct model *parts_load_kv(struct parts *p, const struct tiny *t, const char *name,
                            uint32_t kv_type);
int parts_try_load(struct parts *p, const struct tiny *t, struct model **ret,
                   struct fmt_error *err);

/* Loads by name and waits; a reference. */
struct model *parts_registry_load(struct registry *r, const char *name);

#endif
