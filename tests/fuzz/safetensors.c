/* Any bytes as a file of tensors: opening must refuse with a sentence, or accept and then all of
 * every tensor's bytes must be there. */
#include "tools/convert/safetensors.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct safetensors s;
    struct fmt_error err = {""};
    if (safetensors_open_memory(data, bytes, &s, &err) < 0) {
        if (err.text[0] == '\0') {
            abort();
        }
        return 0;
    }
    size_t sum = 0;
    for (size_t i = 0; i < s.n_tensors; i++) {
        const struct safetensor *t = &s.tensors[i];
        uint64_t n = safetensors_value_bytes(t->dtype);
        for (uint32_t d = 0; d < t->n_dims; d++) {
            n *= t->shape[d];
        }
        if (n != t->end - t->begin) {
            abort();
        }
        for (uint64_t at = t->begin; at < t->end; at++) {
            sum += s.base[s.data_offset + at];
        }
    }
    if (sum == SIZE_MAX) {
        abort(); /* cannot be; keeps the loop from being optimised away */
    }
    safetensors_close(&s);
    return 0;
}
