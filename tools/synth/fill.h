/* tools/synth/fill.h - random values of any type, made directly in their stored form. */
#ifndef TOOLS_SYNTH_FILL_H
#define TOOLS_SYNTH_FILL_H

#include <stddef.h>
#include <stdint.h>

struct synth_random {
    uint64_t state;
};

/* The stream of random numbers of one tensor: other tensors do not shift it. */
struct synth_random synth_random_of(uint64_t seed, uint64_t tensor_index);

/* Fills n_blocks blocks of a type (enum fmt_type, one that synth_plan uses). The mean is only for
 * F32, F16 and BF16; quantised values are centred on zero. */
void synth_fill(uint32_t type, float mean, float deviation, struct synth_random *random, void *dst,
                size_t n_blocks);

#endif
