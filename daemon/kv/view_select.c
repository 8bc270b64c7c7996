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

/* ret[i] = mean or maximum of the kernel around i; what lies outside counts as zero, as in the
 * paper's pooling with padding. What is not a number, which a backend may give, has an order all
 * the same: below everything. */
static void pool(const float *votes, uint32_t n, uint32_t kernel, bool by_max, float *ret)
{
    uint32_t reach = kernel / 2;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t from = i > reach ? i - reach : 0, to = n - i > reach ? i + reach + 1 : n;
        float sum = 0, max = votes[from];
        for (uint32_t j = from; j < to; j++) {
            sum += votes[j];
            max = votes[j] > max ? votes[j] : max;
        }
        float value = by_max ? max : sum / (float)kernel;
        ret[i] = isnan(value) ? -INFINITY : value;
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
    pool(votes, n, p->kernel, p->max_pool, pooled);
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
