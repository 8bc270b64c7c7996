/* tools/convert/calibration.h - K and V of a text, as the model itself computed them.
 *
 * Read from a file that `gqa kv export` wrote of a cache of float32 (docs/kv-layout.md draws it).
 * K is there after RoPE: alignment compares heads at equal positions only, where the rotation is
 * the same for all of them. */
#ifndef TOOLS_CONVERT_CALIBRATION_H
#define TOOLS_CONVERT_CALIBRATION_H

#include "tools/convert/checkpoint.h"

struct calibration;

/* -EINVAL: it is no such file, or not of a model of this shape; -ENOTSUP: other cache types, or
 * layers that see windows only. */
int calibration_open(const char *path, const struct ck_shape *shape, struct calibration **ret,
                     struct fmt_error *err);
void calibration_close(struct calibration *c); /* NULL is legal */

uint32_t calibration_n_tokens(const struct calibration *c);

/* role: CK_K or CK_V. ret: (n_tokens, k_dim or v_dim). */
void calibration_head(const struct calibration *c, uint32_t layer, enum ck_role role, uint32_t head,
                      float *ret);

#endif
