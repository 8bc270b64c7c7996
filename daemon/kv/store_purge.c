/* Removing for good. */
#include "daemon/kv/store_internal.h"

#include <errno.h>

/* The slot must still hold that block. */
static void drop_block(struct kv_store *s, const struct kv_store_block *b)
{
    if (b->layer_class < s->n_classes && b->slot < s->classes[b->layer_class].n_slots) {
        const struct store_slot *p = &s->classes[b->layer_class].slots[b->slot];
        if (p->state == SLOT_LIVE && kv_key_equal(p->key, b->key)) {
            store_drop_slot(s, b->layer_class, b->slot);
        }
    }
}

static void drop_all(struct kv_store *s)
{
    for (uint32_t i = 0; i < s->n_classes; i++) {
        struct store_class *c = &s->classes[i];
        for (uint32_t word = 0; word < (c->n_slots + 63) / 64; word++) {
            for (uint64_t bits = c->used[word]; bits != 0; bits &= bits - 1) {
                uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
                if (c->slots[slot].state == SLOT_LIVE) {
                    store_drop_slot(s, i, slot);
                }
            }
        }
    }
}

/* The data first: should a crash come before the new index, the old one still names what could not
 * be removed, so the purge can be asked for again; what is a hole fails its checksum until then.
 * Pauses do not count: whoever wants prompts gone wants to know now whether they are. */
int store_purge_run(struct kv_store *s, const struct kv_store_call *call)
{
    pthread_mutex_lock(&s->lock);
    store_take_drops(s);
    if (call->blocks == NULL) {
        drop_all(s);
    }
    for (uint32_t i = 0; i < call->n_blocks && call->blocks != NULL; i++) {
        drop_block(s, &call->blocks[i]);
    }
    pthread_mutex_unlock(&s->lock);
    int rc = store_punch_dead(s);
    rc = rc < 0 ? rc : store_index_rewrite(s);
    if (rc == 0 && call->blocks == NULL) {
        rc = store_aside_keep(s, 0);
        rc = rc < 0 ? rc : s->files.sync_folder(s->files.self, s->folder);
    }
    if (rc < 0) {
        store_pause(s, rc, "purge");
    }
    return rc;
}
