/* daemon/kv/numbers.h - whether a block of somebody else's making holds numbers that can be
 * computed with. Pure; any thread. */
#ifndef DAEMON_KV_NUMBERS_H
#define DAEMON_KV_NUMBERS_H

#include "daemon/kv/layout.h"

/* Larger values overflow what is computed with them: attention, the products after it. F16 holds
 * none. */
#define KV_NUMBER_BITS_MAX 16u /* below 2^16 */

/* block (block_bytes of that class): every value, or scale of quants, is finite and below
 * 2^KV_NUMBER_BITS_MAX. */
bool kv_numbers_are_sound(const struct kv_layout *l, uint32_t layer_class, const void *block);

#endif
