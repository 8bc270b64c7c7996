/* daemon/model/rope.h - rotary frequencies of a model, with every scaling that it uses.
 *
 * Sources: RoFormer (2104.09864); linear: position interpolation (2306.15595); YaRN (2309.00071);
 * Llama 3 and LongRoPE: factors per frequency in the file's rope_freqs or rope_factors tensors. */
#ifndef DAEMON_MODEL_ROPE_H
#define DAEMON_MODEL_ROPE_H

#include "daemon/model/arch.h"

/* Fills a table (freqs malloc'ed, n_rot / 2 of them; the caller frees). local: the unscaled table
 * of windowed layers (ARCH_LOCAL_ROPE). n_ctx chooses between short and long factors. */
int rope_table_create(const struct gguf *g, const struct model_shape *s, bool local, uint32_t n_ctx,
                      struct gqa_rope_table *ret, struct fmt_error *err);

#endif
