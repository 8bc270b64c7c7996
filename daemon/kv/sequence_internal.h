/* daemon/kv/sequence_internal.h - shared by sequence.c, sequence_prefix.c and sequence_fork.c;
 * private to them. */
#ifndef DAEMON_KV_SEQUENCE_INTERNAL_H
#define DAEMON_KV_SEQUENCE_INTERNAL_H

#include "daemon/kv/sequence.h"

int kv_list_grow(struct kv_block_list *list, uint32_t n); /* -ENOMEM */
/* Room for so many nodes; false without memory. */
bool kv_sequence_grow_nodes(struct kv_sequence *s, uint32_t n);
/* The page tables, after the lists have changed. */
void kv_sequence_set_tables(struct kv_sequence *s);
/* Gives back the class's blocks from the first live one up to first_live of later. */
void kv_list_give_back(struct kv_sequence *s, uint32_t layer_class, uint32_t first_live);
/* Gives back blocks that no later token can see. */
void kv_sequence_leave_windows(struct kv_sequence *s);
/* Puts the blocks that have become full into the tree. */
void kv_sequence_seal(struct kv_sequence *s, const struct kv_text *text);

#endif
