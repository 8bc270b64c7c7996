/* daemon/kv/view_select.c - policies as plain functions: sizes, and the choice by votes. */
#include "daemon/kv/view.h"

#include <errno.h>
#include <math.h>
#include <string.h>

static const char *const names[] = {
    [KV_POLICY_FULL] = "full",
    [KV_POLICY_WINDOW] = "window",
    [KV_POLICY_SNAPKV] = "snapkv",
    [KV_POLICY_SNAPSTREAM] = "snapstream",
};

const char *kv_policy_name(enum kv_policy_kind kind)
{
    return names[kind];
}

int kv_policy_by_name(const char *name, size_t bytes, enum kv_policy_kind *ret)
{
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strlen(names[i]) == bytes && memcmp(names[i], name, bytes) == 0) {
            *ret = (enum kv_policy_kind)i;
            return 0;
        }
    }
    return -EINVAL;
}

uint32_t kv_policy_caps(const struct kv_policy *p)
{
    bool votes = p->kind == KV_POLICY_SNAPKV || p->kind == KV_POLICY_SNAPSTREAM;
    return p->kind == KV_POLICY_FULL ? 0
                                     : GQA_ATTN_CAP_SPARSE | (votes ? GQA_ATTN_CAP_OBSERVE : 0u);
}

/* ---- sizes ------------------------------------------------------------------------------- */

uint32_t kv_policy_n_votes(const struct kv_policy *p, uint32_t n_prompt)
{
    if (p->kind == KV_POLICY_SNAPKV && n_prompt > p->budget) {
        return n_prompt - p->observed;
    }
    if (p->kind == KV_POLICY_SNAPSTREAM && n_prompt > (uint64_t)p->sinks + p->recent) {
        return n_prompt - p->observed;
    }
    return 0;
}

uint32_t kv_view_n_common(const struct kv_policy *p, uint32_t n_prompt)
{
    uint64_t before_gap = (uint64_t)p->sinks + p->recent;
    if (kv_policy_n_votes(p, n_prompt) > 0) {
        return n_prompt;
    }
    return kv_policy_is_endless(p) && before_gap < UINT32_MAX ? (uint32_t)before_gap : UINT32_MAX;
}

static uint64_t blocks_for(uint64_t n_tokens)
{
    return n_tokens / GQA_KV_BLOCK_TOKENS + (n_tokens % GQA_KV_BLOCK_TOKENS != 0);
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* A window and the rows of a step, each reaching into a block. */
static uint64_t blocks_of_window(uint64_t window, uint32_t step_rows)
{
    return blocks_for(window + step_rows) + 2;
}

uint64_t kv_policy_blocks(const struct kv_policy *p, uint32_t window, uint64_t n_prompt,
                          uint64_t n_tokens, uint32_t step_rows, bool begun)
{
    uint64_t all = blocks_for(n_tokens), voted = 0, kept;
    if (window > 0 || p->kind == KV_POLICY_FULL) {
        return window > 0 ? smaller(all, blocks_of_window(window, step_rows)) : all;
    }
    bool chooses = n_prompt <= UINT32_MAX && kv_policy_n_votes(p, (uint32_t)n_prompt) > 0;
    if (p->kind == KV_POLICY_SNAPKV) {
        if (!chooses || n_tokens < n_prompt) {
            return all;
        }
        kept = blocks_for(p->budget + n_tokens - n_prompt);
        voted = blocks_for(n_prompt) + blocks_for(p->budget);
    } else {
        uint64_t n_sinks = (uint64_t)p->sinks + (chooses ? p->topk : 0);
        kept = blocks_for(n_sinks) + blocks_of_window(p->recent, step_rows);
        if (!chooses) {
            return smaller(all, kept);
        }
        voted = smaller(all, blocks_for(n_prompt)) + blocks_for(n_sinks + p->recent);
    }
    return begun || kept > voted ? kept : voted;
}

/* ---- the choice -------------------------------------------------------------------------- */

static float joined(float a, float b, bool by_max)
{
    return by_max ? (b > a || isnan(a) ? b : a) : a + b;
}

/* ret[i] = mean or maximum of the kernel around i; what lies outside counts as zero, as in the
 * paper's pooling with padding. What is not a number, which a backend may give, has an order all
 * the same: below everything. rests: room for n.
 *
 * In time that does not depend on the kernel (van Herk 1992; Gil and Werman 1993): cut into parts
 * of the kernel's length, every window is the rest of one part and the beginning of the next.
 * Nothing is subtracted, so that one odd vote spoils its own windows alone. */
static void pool(const float *votes, uint32_t n, uint32_t kernel, bool by_max, float *rests,
                 float *ret)
{
    uint32_t reach = kernel / 2, last_part = (n - 1) / kernel * kernel;
    for (uint32_t part = 0; part < n; part += kernel) {
        uint32_t end = part < last_part ? part + kernel : n;
        rests[end - 1] = votes[end - 1];
        for (uint32_t i = end - 1; i-- > part;) {
            rests[i] = joined(votes[i], rests[i + 1], by_max);
        }
    }
    float beginning = 0; /* of the part in which the window ends: its votes up to there */
    uint32_t to = 0, n_of_part = 0, from_in_part = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t from = i > reach ? i - reach : 0, end = n - i > reach ? i + reach + 1 : n;
        for (; to < end; to++, n_of_part++) {
            n_of_part = n_of_part == kernel ? 0 : n_of_part;
            beginning = n_of_part == 0 ? votes[to] : joined(beginning, votes[to], by_max);
        }
        bool in_last_part = end == n && from >= last_part;
        float value = from_in_part == 0 ? beginning
                      : in_last_part    ? rests[from]
                                        : joined(rests[from], beginning, by_max);
        value = by_max ? value : value / (float)kernel;
        ret[i] = isnan(value) ? -INFINITY : value;
        from_in_part += i >= reach;
        from_in_part = from_in_part == kernel ? 0 : from_in_part;
    }
}

static void swap(float *a, float *b)
{
    float t = *a;
    *a = *b;
    *b = t;
}

/* The k-th largest (k >= 1) of n values, which are reordered: Hoare's selection. */
static float kth_largest(float *x, uint32_t n, uint32_t k)
{
    uint32_t low = 0, high = n - 1, wanted = k - 1;
    while (low < high) {
        float pivot = x[low + (high - low) / 2];
        uint32_t i = low, j = high;
        while (i <= j) {
            for (; x[i] > pivot; i++) {
            }
            for (; x[j] < pivot; j--) {
            }
            if (i <= j) {
                swap(&x[i++], &x[j]);
                if (j == 0) {
                    break;
                }
                j--;
            }
        }
        if (wanted <= j && j < i && j < high) {
            high = j;
        } else if (wanted >= i) {
            low = i;
        } else {
            break; /* between both: equal to the pivot */
        }
    }
    return x[wanted];
}

void kv_select(const float *votes, uint32_t n, const struct kv_policy *p, uint32_t k, float *room,
               uint32_t *ret)
{
    float *pooled = room, *order = room + n;
    if (k == 0) {
        return;
    }
    pool(votes, n, p->kernel, p->max_pool, order, pooled);
    memcpy(order, pooled, n * sizeof(*order));
    float least = kth_largest(order, n, k);
    uint32_t equal = k, count = 0;
    for (uint32_t i = 0; i < n; i++) {
        equal -= pooled[i] > least;
    }
    for (uint32_t i = 0; i < n && count < k; i++) {
        bool takes = pooled[i] > least || (pooled[i] == least && equal > 0);
        equal -= takes && pooled[i] == least;
        if (takes) {
            ret[count++] = i;
        }
    }
}
