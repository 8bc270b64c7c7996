/* daemon/model/pack.h - packing: the rows of all weights, by several threads. */
#ifndef DAEMON_MODEL_PACK_H
#define DAEMON_MODEL_PACK_H

#include "daemon/backend/backend.h"
#include "daemon/model/program.h"

#include <stdatomic.h>

/* Packs every weight that has packed_bytes to where its packed points, with n_threads threads, the
 * caller's among them. progress (may be NULL) is called on the calling thread, with total for what
 * there is to do. -ECANCELED when *cancel (or NULL) becomes true, or the backend's error. */
int pack_run(struct backend *backend, struct model_program *program, uint64_t total,
             uint32_t n_threads, const atomic_bool *cancel,
             void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg);

#endif
