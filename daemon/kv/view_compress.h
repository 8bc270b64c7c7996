/* daemon/kv/view_compress.h - what SNAPKV and SNAPSTREAM make of a prompt. Engine thread only. */
#ifndef DAEMON_KV_VIEW_COMPRESS_H
#define DAEMON_KV_VIEW_COMPRESS_H

#include "daemon/kv/sequence.h"

/* Chooses by the view's votes what stays of the prompt in the classes that see everything, another
 * selection in every layer and group, and puts copies of it in the place of the sequence's blocks.
 * The sequence has computed its prompt and no more. The cache's pool takes part: the engine waits
 * for it between two steps. All of it or, with -ENOMEM, nothing. */
int kv_view_compress(struct kv_sequence *s);

#endif
