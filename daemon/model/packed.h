/* daemon/model/packed.h - a model's weights in the layout that a backend wants.
 *
 * They come from the cache's folder (weights_cache.h), mapped, or are packed into memory; then a
 * thread of their own writes the file meanwhile, and maps it where the memory was. They are
 * constant and shared: by processes through the file, inside one by references, also between
 * backends that want the same layout. Weights that a backend uses as they lie in the model's file
 * are left there.
 */
#ifndef DAEMON_MODEL_PACKED_H
#define DAEMON_MODEL_PACKED_H

#include "daemon/backend/backend.h"
#include "daemon/model/digest.h"
#include "daemon/model/program.h"
#include "daemon/model/weights_cache.h"

#include <stdatomic.h>

struct packed_weights;

struct packed_request {
    struct weights_cache *cache;       /* outlives what is made; NULL: nothing is kept */
    const struct digest_value *digest; /* of the model's weights */
    struct backend *backend;           /* used during the calls alone */
    struct model_program *program;     /* packed and packed_bytes of its weights are set */
    uint32_t n_threads;                /* that pack, made for it */
    const atomic_bool *cancel;         /* or NULL */
    /* On the calling thread; stage "check": a file, at its first use since the machine started;
     * "pack". Or NULL. */
    void (*progress)(void *arg, const char *stage, uint64_t done, uint64_t total);
    void *arg;
};

/* From the cache. -ENOENT: it has no good file of them; -ECANCELED, -ENOMEM, -EOVERFLOW. */
int packed_weights_find(const struct packed_request *r, struct packed_weights **ret);

/* Packs them, and begins to write them where there is a cache. -ECANCELED, -ENOMEM, or what the
 * backend gave. */
int packed_weights_make(const struct packed_request *r, struct packed_weights **ret);

/* The same weights for another backend over a program of the same model: a new reference when that
 * wants exactly these bytes (program's weights are set), else NULL. */
struct packed_weights *packed_weights_share(struct packed_weights *w, struct backend *backend,
                                            struct model_program *program);

struct packed_weights *packed_weights_ref(struct packed_weights *w);
/* The last one waits for a file that is being written, for a while, and removes one that was found
 * damaged. NULL is legal. Never the loop. */
void packed_weights_unref(struct packed_weights *w);

enum packed_source { PACKED_NONE, PACKED_FILE, PACKED_NOW };
struct packed_facts {
    uint64_t bytes;            /* 0: the backend wants no weight in another layout */
    enum packed_source source; /* as they came: none, from a file, packed by this load */
    bool in_file;              /* and are now: a mapped file, shared with others */
};
void packed_weights_facts(const struct packed_weights *w, struct packed_facts *ret);

/* Whether zeros may have been read in place of them: the file was cut, or the disk failed. */
bool packed_weights_are_damaged(const struct packed_weights *w);

#endif
