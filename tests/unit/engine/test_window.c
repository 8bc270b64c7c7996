/* Sliding windows: layers that have them see no more, keep no more KV than that, and give the same
 * bits however a prompt is cut into steps. */
#include "tests/unit/engine/arch_check.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST 300u

TestSuite(window, .init = arch_setup, .fini = arch_teardown, .timeout = 300);

/* Three layers, by the file's own pattern: windowed, everything, windowed. */
static void add_mixed_pattern(struct gguf_writer *w)
{
    const int32_t pattern[] = {1, 0, 1};
    gguf_writer_add_i32s(w, "llama.attention.sliding_window_pattern", pattern, 3);
}

static struct reference_spec mixed_spec(uint32_t window)
{
    struct reference_spec s = arch_spec("llama");
    s.n_layers = 3;
    s.n_embd = 16;
    s.n_heads = 2;
    s.n_kv_heads = 1;
    s.head_dim = s.n_rot = 8;
    s.n_ff = 16;
    s.untied = true;
    s.window = window;
    s.windowed[0] = s.windowed[2] = true;
    s.add_keys = add_mixed_pattern;
    return s;
}

static struct model *load_spec(const struct reference_spec *s)
{
    struct reference r;
    char path[128];
    snprintf(path, sizeof(path), "%s", arch_path("window.gguf"));
    reference_init(&r, s);
    reference_write(&r, path);
    reference_finish(&r);
    return arch_load(path, NULL);
}

static void fill_tokens(int32_t *tokens)
{
    for (uint32_t i = 0; i < LONGEST; i++) {
        tokens[i] = (int32_t)((i * 7919u + 13) % TINY_VOCAB);
    }
}

/* What a windowed layer's class may keep: the blocks of the next token's window, and no block
 * before it. */
static void check_kept(const struct model *m, const struct kv_sequence *kv)
{
    const struct kv_layout *layout = model_kv_layout(m);
    cr_assert(eq(u32, layout->n_classes, 2));
    for (uint32_t c = 0; c < 2; c++) {
        const struct kv_block_list *list = &kv->lists[c];
        uint32_t window = layout->classes[c].desc.window, live = 0;
        uint32_t seen = window > 0 && kv->n_tokens >= window ? kv->n_tokens - window + 1 : 0;
        for (uint32_t i = 0; i < list->n; i++) {
            bool needed = i >= seen / GQA_KV_BLOCK_TOKENS;
            cr_assert(eq(int, list->blocks[i] != NULL, needed), "window %u, %u tokens, block %u",
                      window, kv->n_tokens, i);
            live += needed;
        }
        if (window > 0) {
            cr_expect(le(u32, live, window / GQA_KV_BLOCK_TOKENS + 2));
        }
    }
}

/* Prompts of every length, in steps of chunk rows: the bits of feeding token by token. A step that
 * is cut short is the only thing that a length changes. */
static void check_lengths(struct model *m, const int32_t *tokens, uint32_t chunk,
                          const float *truth)
{
    size_t width = model_shape(m)->n_vocab;
    float *logits = calloc(LONGEST * width, sizeof(*logits));
    for (uint32_t n = 1; n <= LONGEST; n++) {
        const struct kv_cache_options options = {.arena_bytes_max = 64u << 20};
        struct kv_cache *cache;
        struct kv_sequence kv;
        cr_assert(eq(int, kv_cache_create(&options, &cache), 0));
        kv_sequence_init(&kv, model_kv_layout(m), cache, NULL, false);
        cr_assert(eq(int, feed_tokens(m, &kv, tokens, n, chunk, logits), 0));
        check_kept(m, &kv);
        cr_assert(eq(int, memcmp(logits, truth, n * width * sizeof(*logits)), 0),
                  "%u tokens in steps of %u give other bits", n, chunk);
        kv_sequence_finish(&kv);
        kv_cache_destroy(cache);
    }
    free(logits);
}

static void check_window(uint32_t window)
{
    static const uint32_t chunks[] = {7, 64, 100};
    struct reference_spec s = mixed_spec(window);
    struct model *m = load_spec(&s);
    int32_t tokens[LONGEST];
    float *truth = calloc((size_t)LONGEST * TINY_VOCAB, sizeof(*truth));
    fill_tokens(tokens);
    cr_assert(eq(int, feed_all(m, tokens, LONGEST, 1, truth), 0));
    for (size_t c = 0; c < 3; c++) {
        check_lengths(m, tokens, chunks[c], truth);
    }
    free(truth);
    model_unref(m);
}

/* In steps of one token, every shorter prompt is the start of the longest. */
Test(window, of_one_token)
{
    check_window(1);
}

Test(window, of_less_than_a_block)
{
    check_window(16);
}

Test(window, about_a_block)
{
    check_window(63);
    check_window(64);
    check_window(65);
}

Test(window, over_several_blocks)
{
    check_window(100);
    check_window(129);
}

Test(window, larger_than_the_context)
{
    check_window(1000);
}

/* Token by token is right to begin with: against the reference, at every window. */
Test(window, agrees_with_the_reference)
{
    static const uint32_t windows[] = {1, 2, 16, 63, 64, 65, 100, 255, 300};
    int32_t tokens[LONGEST];
    size_t n = (size_t)LONGEST * TINY_VOCAB;
    double *truth = calloc(n, sizeof(*truth));
    float *logits = calloc(n, sizeof(*logits));
    fill_tokens(tokens);
    for (size_t i = 0; i < sizeof(windows) / sizeof(windows[0]); i++) {
        struct reference_spec s = mixed_spec(windows[i]);
        struct reference r;
        struct model *m = load_spec(&s);
        reference_init(&r, &s);
        reference_logits(&r, &s, tokens, LONGEST, truth);
        cr_assert(eq(int, feed_all(m, tokens, LONGEST, 100, logits), 0));
        double worst = 0;
        for (size_t v = 0; v < n; v++) {
            double error = truth[v] - (double)logits[v];
            worst = error * error > worst * worst ? error : worst;
        }
        /* Logits reach 5; float32 keeps them to 1e-5. */
        cr_expect(lt(dbl, worst * worst, 1e-8), "window %u: off by %g", windows[i], worst);
        model_unref(m);
        reference_finish(&r);
    }
    free(truth);
    free(logits);
}
