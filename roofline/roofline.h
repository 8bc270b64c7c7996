/* roofline/roofline.h - what this machine can do at best: the yardstick of the benches.
 *
 * Measured with threads of its own while nothing else runs; the best of several tries counts. */
#ifndef ROOFLINE_ROOFLINE_H
#define ROOFLINE_ROOFLINE_H

/* Bytes per second that n_threads read together from memory (not from caches). 0: no memory for
 * the measurement. */
double roofline_bandwidth(unsigned n_threads);

/* Operations per second (a multiply and an add are two) of the unit that a backend computes with:
 * "bf16-amx", "int8-vnni512", "int8-avx2", "f32-avx512", "f32-avx2", "f32". 0: a unit that is not
 * known or not there. */
double roofline_compute(const char *unit, unsigned n_threads);

#endif
