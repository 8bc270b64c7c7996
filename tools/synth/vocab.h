/* tools/synth/vocab.h - a made-up vocabulary of the SentencePiece kind, of any size. */
#ifndef TOOLS_SYNTH_VOCAB_H
#define TOOLS_SYNTH_VOCAB_H

#include "format/gguf_write.h"

/* Adds the tokenizer.ggml.* keys: <unk>, <s>, </s>, 256 byte tokens, then printable characters,
 * then syllables and words, each with and without the mark of a word's start. Any text can be
 * encoded: what no piece spells, bytes do. 0 or -errno. */
int synth_vocab_add(struct gguf_writer *w, uint32_t n_vocab);

#endif
