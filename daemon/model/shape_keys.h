/* daemon/model/shape_keys.h - reading the keys of an architecture's prefix; private to shape*.c.
 *
 * A reader keeps the first failure and does nothing after it, so that callers check once. */
#ifndef DAEMON_MODEL_SHAPE_KEYS_H
#define DAEMON_MODEL_SHAPE_KEYS_H

#include "daemon/model/arch.h"

#define SHAPE_KEY_BYTES 128

struct shape_reader {
    const struct gguf *g;
    const struct arch *arch;
    struct fmt_error *err;
    int rc; /* the first failure; later reads do nothing */
};

/* "qwen3.block_count" */
void shape_key(const struct shape_reader *r, const char *suffix, char key[SHAPE_KEY_BYTES]);

/* An integer, or a finite number, in [min, max]. A missing key keeps *value when optional. */
void shape_read_u32(struct shape_reader *r, const char *suffix, bool required, uint32_t min,
                    uint32_t max, uint32_t *value);
void shape_read_f32(struct shape_reader *r, const char *suffix, bool required, float min, float max,
                    float *value);
/* Optional ones. */
void shape_read_bool(struct shape_reader *r, const char *suffix, bool *value);

/* One number, or an array with an equal one for every layer; optional. Layers that differ are
 * refused. */
void shape_read_u32_or_equal(struct shape_reader *r, const char *suffix, uint32_t n_layers,
                             uint32_t max, uint32_t *value);

/* Every key of the architecture's own prefix must be understood or known to be harmless: a key that
 * we would ignore could change what the model computes. -ENOTSUP names the first that is not. */
int shape_check_understood(const struct gguf *g, const struct arch *arch, struct fmt_error *err);

#endif
