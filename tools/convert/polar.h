/* tools/convert/polar.h - the rotation that a matrix is nearest to. */
#ifndef TOOLS_CONVERT_POLAR_H
#define TOOLS_CONVERT_POLAR_H

#include <stdint.h>

/* The orthogonal q (n, n) that makes the trace of q^T a largest: with a = u s v^T it is u v^T
 * (orthogonal Procrustes problem). Returns that trace, the sum of a's singular values. Where a has
 * no full rank, some such q. One-sided Jacobi iteration; room: (3 n n) doubles. */
double polar_rotation(const double *a, uint32_t n, double *room, double *ret);

#endif
