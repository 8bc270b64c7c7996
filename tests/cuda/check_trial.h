/* tests/cuda/check_trial.h - trials of tools/plugin-check on the sides that the checks compare. */
#ifndef TESTS_CUDA_CHECK_TRIAL_H
#define TESTS_CUDA_CHECK_TRIAL_H

#include "tests/cuda/check_util.h"
#include "tools/plugin-check/trial.h"

/* All rows in steps of a chunk (0: at once): the result, to be freed; NULL when it failed, and it
 * said why. */
float *trial_results(struct trial *t, const struct side *s, uint32_t chunk);

#endif
