/* tests/cuda/plain/jansson.h - what tools/plugin-check/results.h needs of jansson, for machines
 * that have none: results are text there. */
#ifndef TESTS_CUDA_PLAIN_JANSSON_H
#define TESTS_CUDA_PLAIN_JANSSON_H

typedef struct json_t json_t;

#endif
