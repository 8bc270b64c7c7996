/* daemon/model/pack.h - weights in the layout that a backend wants.
 *
 * Packed weights lie in one anonymous mapping, made at load (and, in time, in a file that later
 * starts map). Weights that a backend uses as they lie in the file are left there. */
#ifndef DAEMON_MODEL_PACK_H
#define DAEMON_MODEL_PACK_H

#include "daemon/backend/backend.h"
#include "daemon/model/program.h"

#include <stdatomic.h>

struct packed_weights {
    void *memory;
    uint64_t bytes;
};

/* Packs all weights of linear ops with n_threads threads of its own and sets their packed fields.
 * progress (may be NULL) is called on the calling thread. -ECANCELED when *cancel becomes true. */
int packed_weights_init(struct packed_weights *w, struct backend *backend,
                        struct model_program *program, uint32_t n_threads,
                        const atomic_bool *cancel,
                        void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg);
void packed_weights_finish(struct packed_weights *w);

#endif
