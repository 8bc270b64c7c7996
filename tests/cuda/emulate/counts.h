/* tests/cuda/emulate/counts.h - what the emulated driver was asked for: C, for tests, that find
 * emulated_cuda_counts() by dlsym() in the libcuda.so.1 that they run on. */
#ifndef TESTS_CUDA_EMULATE_COUNTS_H
#define TESTS_CUDA_EMULATE_COUNTS_H

struct emulated_counts {
    unsigned launches; /* of kernels, by themselves */
    unsigned captured; /* kernels that went into graphs */
    unsigned graphs;   /* launches of graphs */
    unsigned uploads, downloads, waits;
};

typedef const struct emulated_counts *emulated_counts_fn(void);

#endif
