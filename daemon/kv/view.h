/* daemon/kv/view.h - what a sequence keeps of its tokens: all of them, or a view.
 *
 * A view is private and of full-attention classes only; windowed ones keep their windows. Until it
 * begins, a sequence is like any other: it adopts blocks and gives them to the tree, where they
 * stay, so that a later turn finds them and compresses anew. Then it leaves the tree, with pages of
 * its own.
 *
 *     WINDOW       sinks, then a gap that grows, then the recent ones: whole blocks go
 *     SNAPKV       the prompt's best by group and layer, copied together, then all that follows
 *     SNAPSTREAM   sinks and the prompt's best, then as WINDOW: the number of blocks is constant
 *
 * Sources: StreamingLLM (arXiv 2309.17453), SnapKV (2404.14469), SnapStream (2511.03092). Votes are
 * summed over the heads of a group, which keeps one selection for all of them. docs/sparse-kv.md.
 * Engine thread only. */
#ifndef DAEMON_KV_VIEW_H
#define DAEMON_KV_VIEW_H

#include "daemon/kv/layout.h"

enum kv_policy_kind { KV_POLICY_FULL, KV_POLICY_WINDOW, KV_POLICY_SNAPKV, KV_POLICY_SNAPSTREAM };

struct kv_policy {
    enum kv_policy_kind kind;
    uint32_t sinks, recent; /* WINDOW, SNAPSTREAM: tokens; recent >= 1 */
    bool cache_positions;   /* WINDOW: the sinks are met by their places in the cache */
    uint32_t budget;        /* SNAPKV: of the prompt, the observed ones among them */
    uint32_t topk;          /* SNAPSTREAM: of the prompt between sinks and recent ones */
    uint32_t observed;      /* the prompt's last tokens, which vote; fewer than what is kept */
    uint32_t kernel;        /* votes are pooled over so many neighbours; odd */
    bool max_pool;          /* by their maximum, else by their mean */
};

const char *kv_policy_name(enum kv_policy_kind kind);                            /* "full", ... */
int kv_policy_by_name(const char *name, size_t bytes, enum kv_policy_kind *ret); /* -EINVAL */

/* What a backend must be able to do for it: enum gqa_attn_caps. */
uint32_t kv_policy_caps(const struct kv_policy *p);

/* Whether generation may go on past the context: what is seen is bounded. */
static inline bool kv_policy_is_endless(const struct kv_policy *p)
{
    return p->kind == KV_POLICY_WINDOW || p->kind == KV_POLICY_SNAPSTREAM;
}

/* Of the prompt's tokens votes are counted for the first so many; 0: none are needed, since it is
 * kept whole. */
uint32_t kv_policy_n_votes(const struct kv_policy *p, uint32_t n_prompt);

/* Blocks of a class that a sequence of so many tokens holds at most. begun: its view has. */
uint64_t kv_policy_blocks(const struct kv_policy *p, uint32_t window, uint64_t n_prompt,
                          uint64_t n_tokens, uint32_t step_rows, bool begun);

/* Chooses k of the n votes by their pooled values, of equals the first: ret (k), ascending. room (2
 * n) is scratch. */
void kv_select(const float *votes, uint32_t n, const struct kv_policy *p, uint32_t k, float *room,
               uint32_t *ret);

struct kv_sequence;

/* What a sequence has of it. */
struct kv_view {
    struct kv_policy policy;
    uint32_t n_prompt; /* SNAPKV, SNAPSTREAM: of which to choose */
    bool begun;
    uint32_t n_sinks, recent; /* of slots, once begun: see gqa_page_table */
    float **votes;        /* (n_layers) of (n_kv_heads, kv_policy_n_votes()); or NULL: none yet */
    uint64_t votes_bytes; /* of the arena's bound, set aside for them */
    bool spoiled;         /* a step that voted was repeated: they count for nothing */
};

/* So many tokens at most may come before its next step ends; 0: the view has to begin. */
uint32_t kv_view_rows_max(const struct kv_sequence *s);
/* Begins the view where it has to. -ENOMEM: nothing has changed, and it may be called again;
 * -EAGAIN: the votes were spoiled, and the sequence starts anew. */
int kv_view_begin(struct kv_sequence *s);
/* Sets memory for the votes aside, where there are to be some and it has none. Before the first
 * block, or what is left of the arena may be in pieces. -ENOMEM. */
int kv_view_prepare(struct kv_sequence *s);
/* What the votes of such a prompt take. */
uint64_t kv_view_votes_bytes(const struct kv_layout *layout, const struct kv_policy *p,
                             uint64_t n_prompt);
/* Of the next n_new rows, the last so many vote, into s->view.votes. -ENOMEM. */
int kv_view_votes(struct kv_sequence *s, uint32_t n_new, uint32_t *ret_rows);
/* Its blocks behind the sinks that no later token sees go back, and whole segments leave its
 * tables.
 */
void kv_view_slide(struct kv_sequence *s);
/* Nothing is kept, and nobody has voted. */
void kv_view_reset(struct kv_sequence *s);
/* Tokens that its next one can see in full-attention layers. */
uint32_t kv_view_n_kept(const struct kv_sequence *s);
/* Of the prompt's tokens, which are computed, the share of layers and groups that are going to keep
 * each, windowed ones not counted: ret (view.n_prompt). -ENOMEM; -ENODATA: the votes were spoiled,
 * so that it will be computed anew. */
int kv_view_shares(const struct kv_sequence *s, float *ret);
/* Tokens that it shares with a sequence that keeps all, bit for bit. */
uint32_t kv_view_n_common(const struct kv_policy *p, uint32_t n_prompt);

#endif
