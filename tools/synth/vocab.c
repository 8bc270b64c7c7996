/* tools/synth/vocab.c - pieces for a vocabulary.
 *
 * Behind the characters come words of "ba", "be", ... syllables: first all of one syllable, then
 * all of two, and so on; word number w is w written in the base of the syllables. Every word can be
 * merged from pieces that come before it and thus score higher, as a merging tokenizer needs it. */
#include "tools/synth/vocab.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MARK            "\xe2\x96\x81" /* U+2581, what a space becomes */
#define PIECE_MAX_BYTES 32
#define FIRST_BYTE      3
#define FIRST_PIECE     (FIRST_BYTE + 256)

/* Values of tokenizer.ggml.token_type. */
enum token_kind {
    KIND_NORMAL = 1,
    KIND_UNKNOWN = 2,
    KIND_CONTROL = 3,
    KIND_BYTE = 6,
};

static const char consonants[] = "tnsrlhdcmpfgbvkwyjxz";
static const char vowels[] = "eaoiu";

#define N_VOWELS     (sizeof(vowels) - 1)
#define N_SYLLABLES  ((sizeof(consonants) - 1) * N_VOWELS)
#define N_CHARACTERS ('~' - '!' + 2) /* the mark, then all that is printable */

static void spell_word(uint32_t word, bool marked, char *dst)
{
    /* How many syllables, and which of the words of that many. */
    uint64_t n_words = N_SYLLABLES, rest = word;
    int n_syllables = 1;
    while (rest >= n_words) {
        rest -= n_words;
        n_words *= N_SYLLABLES;
        n_syllables++;
    }
    size_t mark_bytes = marked ? strlen(MARK) : 0;
    memcpy(dst, MARK, mark_bytes);
    char *end = dst + mark_bytes + 2 * n_syllables;
    *end = '\0';
    for (int i = 0; i < n_syllables; i++) {
        uint64_t syllable = rest % N_SYLLABLES;
        rest /= N_SYLLABLES;
        *--end = vowels[syllable % N_VOWELS];
        *--end = consonants[syllable / N_VOWELS];
    }
}

static enum token_kind spell_token(uint32_t id, char *dst)
{
    static const char *const control[FIRST_BYTE] = {"<unk>", "<s>", "</s>"};
    if (id < FIRST_BYTE) {
        strcpy(dst, control[id]);
        return id == 0 ? KIND_UNKNOWN : KIND_CONTROL;
    }
    if (id < FIRST_PIECE) {
        snprintf(dst, PIECE_MAX_BYTES, "<0x%02X>", id - FIRST_BYTE);
        return KIND_BYTE;
    }
    uint32_t piece = id - FIRST_PIECE;
    if (piece == 0) {
        strcpy(dst, MARK);
    } else if (piece < N_CHARACTERS) {
        dst[0] = (char)('!' + piece - 1);
        dst[1] = '\0';
    } else {
        piece -= N_CHARACTERS;
        spell_word(piece / 2, piece % 2 != 0, dst);
    }
    return KIND_NORMAL;
}

int synth_vocab_add(struct gguf_writer *w, uint32_t n_vocab)
{
    char(*pieces)[PIECE_MAX_BYTES] = calloc(n_vocab, PIECE_MAX_BYTES);
    struct gguf_string *tokens = calloc(n_vocab, sizeof(*tokens));
    float *scores = calloc(n_vocab, sizeof(*scores));
    int32_t *kinds = calloc(n_vocab, sizeof(*kinds));
    int rc = -ENOMEM;

    if (pieces == NULL || tokens == NULL || scores == NULL || kinds == NULL) {
        goto out;
    }
    for (uint32_t id = 0; id < n_vocab; id++) {
        kinds[id] = spell_token(id, pieces[id]);
        tokens[id] = (struct gguf_string){pieces[id], strlen(pieces[id])};
        scores[id] = id < FIRST_PIECE ? 0.0f : -(float)(id - FIRST_PIECE);
    }
    /* The writer's first error sticks: the last call reports it. */
    gguf_writer_add_string(w, "tokenizer.ggml.model", "llama");
    gguf_writer_add_string(w, "tokenizer.ggml.pre", "default");
    gguf_writer_add_strings(w, "tokenizer.ggml.tokens", tokens, n_vocab);
    gguf_writer_add_f32s(w, "tokenizer.ggml.scores", scores, n_vocab);
    gguf_writer_add_i32s(w, "tokenizer.ggml.token_type", kinds, n_vocab);
    gguf_writer_add_u32(w, "tokenizer.ggml.unknown_token_id", 0);
    gguf_writer_add_u32(w, "tokenizer.ggml.bos_token_id", 1);
    gguf_writer_add_u32(w, "tokenizer.ggml.eos_token_id", 2);
    gguf_writer_add_bool(w, "tokenizer.ggml.add_bos_token", true);
    rc = gguf_writer_add_bool(w, "tokenizer.ggml.add_eos_token", false);
out:
    free(pieces);
    free(tokens);
    free(scores);
    free(kinds);
    return rc;
}
