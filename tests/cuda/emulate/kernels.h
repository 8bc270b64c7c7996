#ifndef TESTS_CUDA_EMULATE_KERNELS_H
#define TESTS_CUDA_EMULATE_KERNELS_H

#include <cstddef>

struct emulated_kernel {
    const char *name;
    size_t args_bytes;
    void (*run)(const void *args);
};

const emulated_kernel *emulated_kernel_find(const char *name);

#endif
