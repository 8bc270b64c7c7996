/* Views of a sequence: bounds that hold however long it gets, choices by votes, copies bit by bit.
 */
#include "daemon/backend/pool.h"
#include "daemon/kv/sequence.h"
#include "daemon/kv/view_gather.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW 100u
#define GROUPS 2u
#define DIM    40u

static struct kv_layout layout; /* class 0: two layers that see everything; class 1: a window */
static uint64_t state = 12345;

static uint32_t draw(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

static void setup_type(uint32_t type)
{
    const struct kv_layer_desc layers[] = {{0, GROUPS, DIM, DIM, type, type},
                                           {WINDOW, GROUPS, DIM, DIM, type, type},
                                           {0, GROUPS, DIM, DIM, type, type}};
    cr_assert(eq(int, kv_layout_init(&layout, layers, 3), 0));
}

static struct kv_cache *make_cache(uint64_t bytes_max)
{
    const struct kv_cache_options options = {.arena_bytes_max = bytes_max};
    struct kv_cache *made = NULL;
    cr_assert(eq(int, kv_cache_create(&options, &made), 0));
    return made;
}

static void begin(struct kv_sequence *s, struct kv_cache *cache, const struct kv_policy *p,
                  uint32_t n_prompt)
{
    kv_sequence_init(s, &layout, cache, NULL, false);
    s->view.policy = *p;
    s->view.n_prompt = n_prompt;
}

/* Up to n more tokens, as a step would add them; votes are random. Returns how many, or -ENOMEM. */
static int step(struct kv_sequence *s, uint32_t n)
{
    uint32_t voters;
    int rc = kv_view_begin(s);
    if (rc < 0) {
        return rc;
    }
    uint32_t most = kv_view_rows_max(s);
    n = n < most ? n : most;
    rc = kv_view_votes(s, n, &voters);
    rc = rc < 0 ? rc : kv_sequence_reserve(s, n);
    if (rc < 0) {
        return rc;
    }
    uint32_t n_votes = kv_policy_n_votes(&s->view.policy, s->view.n_prompt);
    for (uint32_t l = 0; voters > 0 && l < layout.n_layers; l++) {
        for (uint32_t i = 0; s->view.votes[l] != NULL && i < GROUPS * n_votes; i++) {
            s->view.votes[l][i] += (float)draw(1000);
        }
    }
    kv_sequence_commit(s, n, NULL);
    return (int)n;
}

static const struct kv_policy policies[] = {
    {.kind = KV_POLICY_WINDOW, .sinks = 4, .recent = 100, .observed = 1, .kernel = 1},
    {.kind = KV_POLICY_WINDOW, .sinks = 300, .recent = 1, .observed = 1, .kernel = 1},
    {.kind = KV_POLICY_SNAPSTREAM,
     .sinks = 64,
     .recent = 200,
     .topk = 90,
     .observed = 32,
     .kernel = 5},
    {.kind = KV_POLICY_SNAPKV, .budget = 128, .observed = 16, .kernel = 7, .max_pool = true},
};

/* As many blocks as the policy says, and not one more, in an arena of that size: for 100000 tokens
 * where that is bounded, with steps of any size. Tables stay small, and versions go with their
 * pages. */
Test(kv_view, holds_what_its_policy_says)
{
    setup_type(GQA_TYPE_F16);
    for (size_t i = 0; i < sizeof(policies) / sizeof(policies[0]); i++) {
        const struct kv_policy *p = &policies[i];
        bool endless = kv_policy_is_endless(p);
        uint32_t n_prompt = 700, n = endless ? 100000 : 1500, rows = 50;
        const struct kv_extent most = {p, n_prompt, n, rows, false};
        struct kv_cache *cache = make_cache(kv_sequence_bytes_for(&layout, &most));
        struct kv_sequence s;
        begin(&s, cache, p, n_prompt);
        while (s.n_tokens < n) {
            int done = step(&s, s.n_tokens < n_prompt ? rows : 1 + draw(3));
            cr_assert(lt(int, 0, done), "policy %zu at %u", i, s.n_tokens);
            const struct kv_extent now = {p, n_prompt, s.n_tokens, rows, s.view.begun};
            uint64_t held = 0;
            for (uint32_t c = 0; c < layout.n_classes; c++) {
                for (uint32_t b = 0; b < s.lists[c].n; b++) {
                    const struct kv_block *block = s.lists[c].blocks[b];
                    held += block != NULL ? layout.classes[c].block_bytes : 0;
                    cr_assert(block == NULL || s.tables[c].versions[b] == block->version,
                              "policy %zu at %u: block %u of class %u", i, s.n_tokens, b, c);
                }
                if (endless && s.view.begun) {
                    cr_assert(lt(u32, s.tables[c].n_pages, 24));
                }
            }
            cr_assert(le(u64, held, kv_sequence_block_bytes(&layout, &now)), "policy %zu, at %u", i,
                      s.n_tokens);
        }
        uint32_t kept = i == 0 ? 104 : i == 1 ? 301 : i == 2 ? 354 : 128 + s.n_tokens - n_prompt;
        cr_expect(eq(u32, kv_view_n_kept(&s), kept));
        kv_sequence_finish(&s);
        cr_expect(eq(u64, kv_arena_blocks_used(kv_cache_arena(cache)), 0));
        kv_cache_destroy(cache);
    }
    kv_layout_finish(&layout);
}

/* Without memory nothing is lost, and with it again the view begins. */
Test(kv_view, begins_when_there_is_memory)
{
    setup_type(GQA_TYPE_F32);
    struct kv_cache *cache = make_cache(64u << 20);
    struct kv_sequence s, other;
    const struct kv_policy full = {.kind = KV_POLICY_FULL};
    begin(&s, cache, &policies[3], 500);
    while (s.n_tokens < 500) {
        cr_assert(lt(int, 0, step(&s, 64)));
    }
    begin(&other, cache, &full, 0);
    while (kv_sequence_reserve(&other, 64) == 0) {
        kv_sequence_commit(&other, 64, NULL);
    }
    cr_assert(eq(int, step(&s, 1), -ENOMEM));
    cr_expect(not(s.view.begun));
    cr_expect(eq(u32, s.n_tokens, 500));
    kv_sequence_finish(&other);
    cr_assert(eq(int, step(&s, 1), 1));
    cr_expect(s.view.begun);
    kv_sequence_reset(&s);
    cr_expect(not(s.view.begun));
    cr_expect(eq(u64, kv_arena_blocks_used(kv_cache_arena(cache)), 0));
    /* Spoiled votes: it starts anew. */
    while (s.n_tokens < 500) {
        cr_assert(lt(int, 0, step(&s, 64)));
    }
    s.view.spoiled = true;
    cr_expect(eq(int, step(&s, 1), -EAGAIN));
    cr_expect(eq(u32, s.n_tokens, 0));
    kv_sequence_finish(&s);
    kv_cache_destroy(cache);
    kv_layout_finish(&layout);
}

/* ---- the choice -------------------------------------------------------------------------- */

struct ranked {
    double value;
    uint32_t index;
};

static int by_value(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    return x->value != y->value ? (x->value < y->value) - (x->value > y->value)
                                : (x->index > y->index) - (x->index < y->index);
}

Test(kv_view, chooses_as_a_sort_would)
{
    static float votes[1000], room[2000];
    static uint32_t got[1000];
    static struct ranked all[1000];
    static bool wanted[1000];
    for (uint32_t round = 0; round < 2000; round++) {
        uint32_t n = 1 + draw(round % 2 ? 30 : 1000), k = 1 + draw(n), values = 1 + draw(50);
        struct kv_policy p = {.kernel = 1 + 2 * draw(round % 3 ? 5 : 40), .max_pool = draw(2)};
        for (uint32_t i = 0; i < n; i++) {
            votes[i] = (float)draw(values); /* small integers: sums are exact, and many equal */
        }
        for (uint32_t i = 0; i < n; i++) {
            double sum = 0, max = 0;
            for (int64_t j = (int64_t)i - p.kernel / 2; j <= (int64_t)i + p.kernel / 2; j++) {
                double v = j >= 0 && j < n ? (double)votes[j] : 0;
                sum += v;
                max = v > max ? v : max;
            }
            all[i] = (struct ranked){p.max_pool ? max : sum, i};
            wanted[i] = false;
        }
        qsort(all, n, sizeof(*all), by_value);
        for (uint32_t i = 0; i < k; i++) {
            wanted[all[i].index] = true;
        }
        kv_select(votes, n, &p, k, room, got);
        for (uint32_t i = 0; i < k; i++) {
            cr_assert(wanted[got[i]], "round %u: %u of %u", round, got[i], n);
            cr_assert(i == 0 || got[i] > got[i - 1], "round %u: not ascending", round);
        }
    }
}

/* A vote that is no number spoils the means of its own windows and no others; of maxima none. */
Test(kv_view, a_spoiled_vote_spoils_its_neighbours_alone)
{
    float votes[200], room[400];
    uint32_t got[200];
    for (uint32_t i = 0; i < 200; i++) {
        votes[i] = i == 90 ? NAN : 1;
    }
    for (uint32_t by_max = 0; by_max < 2; by_max++) {
        struct kv_policy p = {.kernel = 21, .max_pool = by_max};
        kv_select(votes, 200, &p, by_max ? 200 : 179, room, got);
        for (uint32_t i = 0; i < (by_max ? 200 : 179); i++) {
            cr_expect(eq(u32, got[i], by_max || i < 80 ? i : i + 21));
        }
        for (uint32_t i = 0; i < 200; i++) {
            bool spoiled = !by_max && i >= 80 && i <= 100;
            cr_expect(eq(int, room[i] == -INFINITY, spoiled), "%u", i);
        }
    }
}

/* Votes that a backend has spoiled choose something all the same, and nothing twice. */
Test(kv_view, chooses_among_what_are_not_numbers)
{
    float votes[100], room[200];
    uint32_t got[100];
    for (uint32_t round = 0; round < 2000; round++) {
        uint32_t n = 1 + draw(100), k = 1 + draw(n);
        struct kv_policy p = {.kernel = 1 + 2 * draw(3), .max_pool = draw(2)};
        for (uint32_t i = 0; i < n; i++) {
            const float odd[] = {NAN, -NAN, INFINITY, -INFINITY};
            votes[i] = draw(2) ? odd[draw(4)] : (float)draw(9);
        }
        memset(got, 0xff, sizeof(got));
        kv_select(votes, n, &p, k, room, got);
        for (uint32_t i = 0; i < k; i++) {
            cr_assert(lt(u32, got[i], n), "round %u", round);
            cr_assert(i == 0 || got[i] > got[i - 1], "round %u: not ascending", round);
        }
    }
}

/* ---- copies ------------------------------------------------------------------------------ */

static float value_of(const struct gqa_attn_layer *a, const char *k, uint32_t token, uint32_t d)
{
    uint16_t scale;
    switch (a->k_type) {
    case GQA_TYPE_F32: {
        float x;
        memcpy(&x, k + 4 * gqa_k_index(DIM, token, d), 4);
        return x;
    }
    case GQA_TYPE_F16:
        memcpy(&scale, k + 2 * gqa_k_index(DIM, token, d), 2);
        return gqa_f16_to_f32(scale);
    default:
        memcpy(&scale, k + gqa_k_quant_scale(a->k_type, DIM, token, d), 2);
        return gqa_kv_quant_value(a->k_type, scale,
                                  (uint8_t)k[gqa_k_quant_byte(a->k_type, DIM, token, d)], d % 32);
    }
}

#define N_FROM 3u
#define N_TO   2u

/* Random bytes in blocks of ours and in those that tokens go to: afterwards these have every one of
 * the tokens, in order, and all else is what it was. */
static void gathers(uint32_t type, uint32_t n, uint32_t layer, uint32_t group)
{
    struct gqa_attn_layer a = {.layer = layer};
    setup_type(type);
    kv_layout_describe(&layout, layer, &a);
    size_t bytes = layout.classes[0].block_bytes, changed = 0;
    size_t k_offset = a.k_offset + group * a.k_head_bytes;
    size_t v_offset = a.v_offset + group * a.v_head_bytes, v_bytes = gqa_kv_token_bytes(type, DIM);
    char *from = malloc(N_FROM * bytes), *to = malloc(N_TO * bytes), *before = malloc(N_TO * bytes);
    void *pages[N_FROM] = {from, from + bytes, from + 2 * bytes};
    struct kv_block places[N_TO] = {{.data = to}, {.data = to + bytes}};
    struct kv_block *blocks[N_TO] = {&places[0], &places[1]};
    uint32_t tokens[N_TO * 64];
    for (size_t b = 0; b < N_FROM * bytes; b++) {
        from[b] = (char)draw(64); /* halves and floats of small exponents: no NaN */
    }
    for (size_t b = 0; b < N_TO * bytes; b++) {
        to[b] = before[b] = (char)(64 + draw(50));
    }
    for (uint32_t i = 0, left = N_FROM * 64, k = 0; k < n; i++, left--) { /* n of all, ascending */
        if (draw(left) < n - k) {
            tokens[k++] = i;
        }
    }
    kv_gather(&layout, layer, group, pages, tokens, n, blocks);
    for (uint32_t i = 0; i < n; i++) {
        const char *page = pages[tokens[i] / 64], *block = places[i / 64].data;
        uint32_t token = tokens[i] % 64, slot = i % 64;
        for (uint32_t d = 0; d < DIM; d++) {
            float x = value_of(&a, page + k_offset, token, d);
            float y = value_of(&a, block + k_offset, slot, d);
            cr_assert(x == y, "type %u, %u to %u, dim %u: %g is %g", type, tokens[i], i, d,
                      (double)x, (double)y);
        }
        cr_assert(eq(
            int,
            memcmp(block + v_offset + slot * v_bytes, page + v_offset + token * v_bytes, v_bytes),
            0));
    }
    for (size_t b = 0; b < N_TO * bytes; b++) {
        changed += to[b] != before[b];
    }
    cr_expect(eq(sz, changed, 2 * n * v_bytes)); /* K and V of a token take as many bytes */
    free(from);
    free(to);
    free(before);
    kv_layout_finish(&layout);
}

Test(kv_view, copies_tokens_and_nothing_else)
{
    const uint32_t types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0};
    const uint32_t counts[] = {1, 15, 16, 17, 64, 100, 128};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        for (size_t j = 0; j < sizeof(counts) / sizeof(counts[0]); j++) {
            gathers(types[i], counts[j], j % 2 ? 2 : 0, j % GROUPS);
        }
    }
}

/* A prompt of random bytes and votes, compressed: its pages' bytes (n_pages, bytes of a block). */
static char *compressed(const struct kv_policy *p, struct pool *pool, uint32_t *ret_pages)
{
    const struct kv_cache_options options = {.arena_bytes_max = 64u << 20, .pool = pool};
    const uint32_t n_prompt = 700;
    size_t bytes = layout.classes[0].block_bytes;
    struct kv_cache *cache = NULL;
    struct kv_sequence s;
    cr_assert(eq(int, kv_cache_create(&options, &cache), 0));
    begin(&s, cache, p, n_prompt);
    state = 99;
    while (s.n_tokens < n_prompt) {
        cr_assert(lt(int, 0, step(&s, 64)));
    }
    for (uint32_t i = 0; i < s.lists[0].n; i++) {
        for (size_t b = 0; b < bytes; b++) {
            ((char *)s.lists[0].pages[i])[b] = (char)draw(256);
        }
    }
    cr_assert(eq(int, kv_view_begin(&s), 0));
    uint32_t n = s.lists[0].n, in_last = kv_view_n_kept(&s) % GQA_KV_BLOCK_TOKENS;
    cr_assert(eq(u32, in_last, 0)); /* no byte of the blocks is undefined */
    char *all = malloc(n * bytes);
    for (uint32_t i = 0; i < n; i++) {
        memcpy(all + i * bytes, s.lists[0].pages[i], bytes);
    }
    kv_sequence_finish(&s);
    kv_cache_destroy(cache);
    *ret_pages = n;
    return all;
}

/* Threads share the copying, and what comes of it is the same. */
Test(kv_view, is_the_same_with_a_pool)
{
    static const struct kv_policy whole_blocks[] = {
        {.kind = KV_POLICY_SNAPKV, .budget = 128, .observed = 16, .kernel = 7, .max_pool = true},
        {.kind = KV_POLICY_SNAPSTREAM,
         .sinks = 30,
         .recent = 200,
         .topk = 90,
         .observed = 32,
         .kernel = 5},
    };
    struct pool *pool;
    cr_assert(eq(int, pool_create(3, 0, &pool), 0));
    setup_type(GQA_TYPE_F16);
    for (size_t i = 0; i < sizeof(whole_blocks) / sizeof(whole_blocks[0]); i++) {
        uint32_t n_alone, n_shared;
        char *alone = compressed(&whole_blocks[i], NULL, &n_alone);
        char *shared = compressed(&whole_blocks[i], pool, &n_shared);
        cr_assert(eq(u32, n_shared, n_alone));
        cr_expect(eq(int, memcmp(shared, alone, n_alone * layout.classes[0].block_bytes), 0));
        free(alone);
        free(shared);
    }
    kv_layout_finish(&layout);
    pool_destroy(pool);
}

/* What is told of the prompt's tokens, before its view begins. */
Test(kv_view, tells_what_it_keeps)
{
    const uint32_t n_prompt = 700;
    setup_type(GQA_TYPE_F16);
    struct kv_cache *cache = make_cache(64u << 20);
    for (size_t i = 0; i < sizeof(policies) / sizeof(policies[0]); i++) {
        const struct kv_policy *p = &policies[i];
        bool chooses = kv_policy_n_votes(p, n_prompt) > 0;
        float shares[700], sum = 0;
        struct kv_sequence s;
        begin(&s, cache, p, n_prompt);
        while (s.n_tokens < n_prompt) {
            cr_assert(lt(int, 0, step(&s, 64)));
        }
        cr_assert(eq(int, kv_view_shares(&s, shares), 0));
        for (uint32_t t = 0; t < n_prompt; t++) {
            bool surely = t < p->sinks || n_prompt - t <= (p->recent > 0 ? p->recent : p->observed);
            cr_assert(ge(flt, shares[t], surely ? 1 : 0), "policy %zu, token %u", i, t);
            cr_assert(le(flt, shares[t], chooses || surely ? 1 : 0), "policy %zu, token %u", i, t);
            sum += shares[t] * 2 * GROUPS; /* a whole number: two layers see everything */
        }
        cr_assert(ge(int, step(&s, 1), 1));
        uint32_t kept = kv_view_n_kept(&s) - (p->recent == 0); /* the step's token is one of them */
        cr_expect(eq(u32, (uint32_t)(sum + 0.5f), kept * 2 * GROUPS), "policy %zu", i);
        kv_sequence_reset(&s);
        s.view.spoiled = true;
        cr_expect(eq(int, kv_view_shares(&s, shares), chooses ? -ENODATA : 0));
        kv_sequence_finish(&s);
    }
    kv_cache_destroy(cache);
    kv_layout_finish(&layout);
}
