/* daemon/model/pooling.h - how the rows of a text become one vector, and what length that gets. */
#ifndef DAEMON_MODEL_POOLING_H
#define DAEMON_MODEL_POOLING_H

#include <stddef.h>
#include <stdint.h>

/* As the key {arch}.pooling_type numbers them. */
enum pooling {
    POOLING_NONE = 0, /* every row by itself */
    POOLING_MEAN = 1,
    POOLING_CLS = 2, /* the first row */
    POOLING_LAST = 3,
    POOLING_RANK = 4 /* the scores that a classifier gives one row */
};
#define POOLING_COUNT 5u

const char *pooling_name(enum pooling pooling); /* "none", "mean", ... */
/* 0 and *ret, or -EINVAL. name need not be terminated. */
int pooling_by_name(const char *name, size_t bytes, enum pooling *ret);

/* Scales a vector in place. norm (as llama.cpp numbers them): -1: not at all; 0: the largest
 * magnitude becomes 32760; p >= 1: the p-norm (1: taxicab, 2: euclidean) becomes 1. A vector of
 * zeros stays one. Sums are float64 in ascending order. */
#define EMBEDDING_NORM_NONE (-1)
void embedding_normalise(float *x, size_t n, int32_t norm);

#endif
