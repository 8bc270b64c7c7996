/* roofline/roofline.h - what this machine can do at best: the yardstick of the benches.
 *
 * Measured with threads of its own while nothing else runs; the best of several tries counts. */
#ifndef ROOFLINE_ROOFLINE_H
#define ROOFLINE_ROOFLINE_H

/* Bytes per second that n_threads read together from memory (not from caches). 0: no memory for
 * the measurement. */
double roofline_bandwidth(unsigned n_threads);

/* Operations per second (a multiply and an add are two) of the unit that a backend computes with:
 * "bf16-amx", "int8-vnni512", "int8-avxvnni", "int8-avx2", "f32-avx512", "f32-avx2", "f32". 0: a
 * unit that is not known or not there. Each is what the unit's multiplying instruction does with
 * all operands in registers; of int8-avx2 that is VPMADDUBSW alone, 32 multiplies and the adding of
 * pairs, counted as 64: a product adds its 16-bit results too, in units that do not multiply. */
double roofline_compute(const char *unit, unsigned n_threads);

/* What one thread of that measurement runs, for callers with threads of their own, and the
 * operations of a call (some milliseconds). NULL: a unit that is not known or not there. */
typedef void (*roofline_kernel_fn)(void);
roofline_kernel_fn roofline_kernel(const char *unit, double *ret_ops);

#endif
