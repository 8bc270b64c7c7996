/* tests/unit/model/vocab_image.h - GGUF images of small vocabularies, made in memory.
 *
 * Errors end the process: these are tests' own bugs or a machine without memory. */
#ifndef TESTS_UNIT_MODEL_VOCAB_IMAGE_H
#define TESTS_UNIT_MODEL_VOCAB_IMAGE_H

#include "format/gguf.h"

struct vocab_image {
    unsigned char *data;
    size_t bytes, capacity;
    uint64_t n_keys;
};

void vocab_image_init(struct vocab_image *v);
void vocab_image_finish(struct vocab_image *v);

void vocab_image_u32(struct vocab_image *v, const char *key, uint32_t value);
void vocab_image_bool(struct vocab_image *v, const char *key, bool value);
void vocab_image_string(struct vocab_image *v, const char *key, const char *value);
void vocab_image_strings(struct vocab_image *v, const char *key, const struct gguf_string *values,
                         uint64_t count);
void vocab_image_f32s(struct vocab_image *v, const char *key, const float *values, uint64_t count);
void vocab_image_bytes(struct vocab_image *v, const char *key, const void *values, uint64_t count);
void vocab_image_i32s(struct vocab_image *v, const char *key, const int32_t *values,
                      uint64_t count);

/* Whole vocabularies. The SentencePiece one: <unk> 0, <s> 1, </s> 2, byte tokens 3..258, then
 * pieces; the byte-level one: the 256 bytes in the alphabet's order, then merged tokens. Both have
 * a control token <|im_end|> and a user-defined <tool>. */
void vocab_image_spm(struct vocab_image *v);
void vocab_image_bpe(struct vocab_image *v, const char *pre);

/* The image must outlive the object. */
struct gguf *vocab_image_open(const struct vocab_image *v);

#endif
