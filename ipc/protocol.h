/* ipc/protocol.h - the protocol's one table: methods, their fields, their access, and errors.
 *
 * The table below drives dispatch, range checks, gqa.api_info, docs/protocol.md's tables, the
 * command line's completion and the fuzzers. A method is one row of GQA_METHODS and one list of
 * fields; from each list come a params struct (struct proto_text_generate ...) and the rows that
 * the decoder checks against. A field without a range does not build.
 *
 * docs/protocol.md tells how messages travel. Any change here changes GQA_PROTOCOL_VERSION (when
 * an old peer would misunderstand) or only adds. */
#ifndef IPC_PROTOCOL_H
#define IPC_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GQA_PROTOCOL_VERSION     1u
#define GQA_PROTOCOL_VERSION_MIN 1u

/* Limits of the wire, told to clients by gqa.hello. */
#define PROTO_FRAME_BYTES_MAX (16u << 20) /* of one message, either way */
#define PROTO_DEPTH_MAX       8u
#define PROTO_TOKENS_MAX      (1u << 20)
/* Values in one message, nested ones and keys counted. It bounds what parsing may allocate: 24
 * bytes a value, at most twice that with the allocator's rounding, so 53 MB. */
#define PROTO_ELEMENTS_MAX       (PROTO_TOKENS_MAX + (1u << 16))
#define PROTO_TEXT_BYTES_MAX     (8u << 20)
#define PROTO_NAME_BYTES_MAX     255u
#define PROTO_PATH_BYTES_MAX     4095u
#define PROTO_STOPS_MAX          16u
#define PROTO_STOP_BYTES_MAX     256u
#define PROTO_BIASES_MAX         1024u
#define PROTO_GRAMMAR_BYTES_MAX  (1u << 20)
#define PROTO_SCHEMA_BYTES_MAX   (1u << 18)
#define PROTO_SAMPLERS_MAX       16u
#define PROTO_BREAKERS_MAX       32u
#define PROTO_BREAKER_BYTES_MAX  40u
#define PROTO_PRIORITY_MAX       8
#define PROTO_INPUTS_MAX         2048u
#define PROTO_SAMPLES_MAX        64u
#define PROTO_KV_PIECE_BYTES_MAX (4u << 20) /* of a block that is exported or imported */

/* Who may call a method. OWN acts on the caller's realm only; ADMIN is uid 0, the daemon's own
 * uid and members of admin_group. */
enum proto_access { PROTO_ANY = 0, PROTO_OWN = 1, PROTO_ADMIN = 2 };

/* Bytes in a message; not terminated. */
struct proto_string {
    const char *data;
    size_t bytes;
};
struct proto_tokens {
    const int32_t *ids;
    size_t count;
};
struct proto_strings {
    const struct proto_string *items;
    size_t count;
};
struct proto_bias {
    int32_t token;
    float bias;
};
struct proto_biases {
    const struct proto_bias *items;
    size_t count;
};

/* Field types: (name, C type, what it is on the wire, what min and max bound). */
#define GQA_FIELD_TYPES(T)                                                 \
    T(BOOL, bool, "boolean", "value")                                      \
    T(U32, uint32_t, "integer", "value")                                   \
    T(I32, int32_t, "integer", "value")                                    \
    T(U64, uint64_t, "integer", "value")                                   \
    T(F32, float, "number", "value")                                       \
    T(NAME, struct proto_string, "string without NUL", "bytes")            \
    T(TEXT, struct proto_string, "string or binary", "bytes")              \
    T(TOKENS, struct proto_tokens, "array of integers or binary", "count") \
    T(STRINGS, struct proto_strings, "array of strings", "count")          \
    T(TEXTS, struct proto_strings, "array of texts", "count")              \
    T(BIASES, struct proto_biases, "array of [token, bias]", "count")

enum proto_field_type {
#define T(name, ctype, wire, bounds) PROTO_##name,
    GQA_FIELD_TYPES(T)
#undef T
};

/* ---- fields: F(TYPE, name, REQUIRED|OPTIONAL, min, max, default, doc) -------------------- */

#define GQA_FIELDS_HELLO(F)                                                                      \
    F(NAME, client, OPTIONAL, 0, PROTO_NAME_BYTES_MAX, 0, "name and version of the program")     \
    F(U32, version_min, OPTIONAL, 1, 65535, 1, "lowest protocol version that the client speaks") \
    F(U32, version_max, OPTIONAL, 1, 65535, 1, "highest one")

#define GQA_FIELDS_NONE(F)

#define GQA_FIELDS_MODEL_LOAD(F)                                                                \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0,                                        \
      "name in the models folder; a path where the daemon runs as the caller")                  \
    F(NAME, name, OPTIONAL, 1, PROTO_NAME_BYTES_MAX, 0, "name to serve it under")               \
    F(U32, n_ctx, OPTIONAL, 0, 1u << 24, 0, "context length; 0: the model's own")               \
    F(NAME, cache_type_k, OPTIONAL, 1, 16, 0,                                                   \
      "type of K in the cache: f16, f32, bf16, q8_0, q4_0")                                     \
    F(NAME, cache_type_v, OPTIONAL, 1, 16, 0, "type of V in the cache")                         \
    F(NAME, backend, OPTIONAL, 1, 63, 0, "backend for the whole program, NAME or NAME:options") \
    F(NAME, attention, OPTIONAL, 1, 63, 0, "backend for attention alone, NAME or NAME:options")

#define GQA_FIELDS_MODEL(F) \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model")

#define GQA_FIELDS_SCHEDULING(F)                                           \
    F(I32, priority, OPTIONAL, -PROTO_PRIORITY_MAX, PROTO_PRIORITY_MAX, 0, \
      "higher goes first; above 0: administrators")                        \
    F(U32, deadline_ms, OPTIONAL, 0, 1u << 30, 0,                          \
      "refused, or ended, where waiting and work together take longer; 0: none")

#define GQA_FIELDS_KV_POLICY(F)                                                                   \
    F(NAME, kv_policy, OPTIONAL, 1, 16, 0,                                                        \
      "what is kept of the KV cache: full, window, snapkv, snapstream; absent: full")             \
    F(U32, kv_sinks, OPTIONAL, 0, 1u << 16, 64, "window, snapstream: first tokens kept")          \
    F(U32, kv_recent, OPTIONAL, 1, 1u << 20, 2048, "window, snapstream: last tokens kept")        \
    F(NAME, kv_positions, OPTIONAL, 1, 16, 0,                                                     \
      "window: original, or cache: the sinks keep their distance; absent: original")              \
    F(U32, kv_budget, OPTIONAL, 2, 1u << 20, 2048, "snapkv: tokens of the prompt kept per group") \
    F(U32, kv_topk, OPTIONAL, 1, 1u << 20, 1024,                                                  \
      "snapstream: tokens kept per group between sinks and last ones")                            \
    F(U32, kv_window, OPTIONAL, 1, 1024, 32, "snapkv, snapstream: last tokens of it that vote")   \
    F(U32, kv_kernel, OPTIONAL, 1, 63, 5, "snapkv, snapstream: neighbours pooled; odd")           \
    F(NAME, kv_pool, OPTIONAL, 1, 8, 0, "snapkv, snapstream: avg or max; absent: avg")

#define GQA_FIELDS_GENERATE(F)                                                                    \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model")                     \
    F(TEXT, prompt, OPTIONAL, 0, PROTO_TEXT_BYTES_MAX, 0, "text; or give tokens")                 \
    F(TOKENS, tokens, OPTIONAL, 0, PROTO_TOKENS_MAX, 0, "token ids, used as they are")            \
    F(BOOL, add_special, OPTIONAL, 0, 1, 1, "add the tokenizer's BOS or EOS to a text prompt")    \
    F(BOOL, parse_special, OPTIONAL, 0, 1, 1, "control tokens written in the prompt count")       \
    F(U32, n_predict, OPTIONAL, 0, 1u << 24, 128, "most tokens to generate")                      \
    F(U32, max_tokens, OPTIONAL, 0, 1u << 24, 128, "another name of n_predict")                   \
    F(U32, n, OPTIONAL, 1, PROTO_SAMPLES_MAX, 1, "samples: continuations of the prompt")          \
    F(STRINGS, samplers, OPTIONAL, 0, PROTO_SAMPLERS_MAX, 0,                                      \
      "the chain, in order; absent: the usual one")                                               \
    F(F32, temperature, OPTIONAL, 0, 1000, 0.8, "0: greedy")                                      \
    F(F32, dynatemp_range, OPTIONAL, 0, 1000, 0,                                                  \
      "the entropy moves the temperature by up to it; 0: off")                                    \
    F(F32, dynatemp_exponent, OPTIONAL, 0, 100, 1, "power of the normalised entropy")             \
    F(I32, top_k, OPTIONAL, -1, 1 << 24, 40, "best candidates kept; 0 or less: all")              \
    F(F32, top_p, OPTIONAL, 0, 1, 0.95, "nucleus; 1: off")                                        \
    F(F32, min_p, OPTIONAL, 0, 1, 0.05, "share of the best one's probability; 0: off")            \
    F(F32, typical_p, OPTIONAL, 0, 1, 1, "share of the locally typical candidates; 1: off")       \
    F(F32, top_n_sigma, OPTIONAL, -1, 1000, -1,                                                   \
      "standard deviations below the best; 0 or less: off")                                       \
    F(F32, xtc_probability, OPTIONAL, 0, 1, 0, "of excluding the top choices; 0: off")            \
    F(F32, xtc_threshold, OPTIONAL, 0, 1, 0.1, "probability of a top choice; above 0.5: off")     \
    F(U32, min_keep, OPTIONAL, 0, 1 << 20, 0, "candidates that every sampler leaves")             \
    F(F32, repeat_penalty, OPTIONAL, 0.01, 100, 1, "1: off")                                      \
    F(I32, repeat_last_n, OPTIONAL, -1, 1 << 24, 64, "tokens looked back; -1: the context")       \
    F(F32, presence_penalty, OPTIONAL, -100, 100, 0, "0: off")                                    \
    F(F32, frequency_penalty, OPTIONAL, -100, 100, 0, "0: off")                                   \
    F(F32, dry_multiplier, OPTIONAL, 0, 100, 0, "penalty for going on with a repetition; 0: off") \
    F(F32, dry_base, OPTIONAL, 0, 100, 1.75, "its growth per token; below 1: off")                \
    F(I32, dry_allowed_length, OPTIONAL, 0, 1 << 24, 2, "repeated tokens without a penalty")      \
    F(I32, dry_penalty_last_n, OPTIONAL, -1, 1 << 24, -1, "tokens looked back; -1: the context")  \
    F(STRINGS, dry_sequence_breakers, OPTIONAL, 0, PROTO_BREAKERS_MAX, 0,                         \
      "texts that end a repetition")                                                              \
    F(U32, mirostat, OPTIONAL, 0, 2, 0, "1, 2: that version in the samplers' place; 0: off")      \
    F(F32, mirostat_tau, OPTIONAL, 0, 100, 5, "surprise that it aims at, in bits")                \
    F(F32, mirostat_eta, OPTIONAL, 0, 100, 0.1, "its learning rate")                              \
    F(BIASES, logit_bias, OPTIONAL, 0, PROTO_BIASES_MAX, 0, "added to logits; -inf forbids")      \
    F(TEXT, grammar, OPTIONAL, 0, PROTO_GRAMMAR_BYTES_MAX, 0, "GBNF that the text follows")       \
    F(TEXT, json_schema, OPTIONAL, 0, PROTO_SCHEMA_BYTES_MAX, 0,                                  \
      "JSON Schema that the text satisfies")                                                      \
    F(U64, seed, OPTIONAL, 0, UINT64_MAX, 0, "of the draws; absent: a random one, reported")      \
    F(STRINGS, stop, OPTIONAL, 0, PROTO_STOPS_MAX, 0, "texts that end the generation")            \
    F(BOOL, ignore_eos, OPTIONAL, 0, 1, 0, "end-of-generation tokens are never chosen")           \
    F(U32, n_probs, OPTIONAL, 0, 32, 0, "report the logprobs of so many best candidates")         \
    F(BOOL, stream, OPTIONAL, 0, 1, 1, "send an event per step; else all with the result")        \
    F(U32, t_max_predict_ms, OPTIONAL, 0, 1u << 30, 0, "stop after so long; 0: no limit")         \
    F(BOOL, cache_prompt, OPTIONAL, 0, 1, 1, "take cached KV blocks, and leave one's own")        \
    F(BOOL, cache_exact, OPTIONAL, 0, 1, 0, "only blocks that give the bits of a cold start")     \
    F(NAME, numerics, OPTIONAL, 1, 16, 0, "strict: prompts are computed as generated tokens are") \
    GQA_FIELDS_KV_POLICY(F)                                                                       \
    F(BOOL, kv_kept, OPTIONAL, 0, 1, 0, "report which of the prompt's tokens are kept")           \
    GQA_FIELDS_SCHEDULING(F)

#define GQA_FIELDS_TOKENIZE(F)                                                \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model") \
    F(TEXT, text, REQUIRED, 0, PROTO_TEXT_BYTES_MAX, 0, "what to encode")     \
    F(BOOL, add_special, OPTIONAL, 0, 1, 1, "add the tokenizer's BOS or EOS") \
    F(BOOL, parse_special, OPTIONAL, 0, 1, 1, "control tokens written in the text count")

#define GQA_FIELDS_DETOKENIZE(F)                                              \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model") \
    F(TOKENS, tokens, REQUIRED, 0, PROTO_TOKENS_MAX, 0, "token ids")          \
    F(BOOL, special, OPTIONAL, 0, 1, 0, "write control tokens out")

#define GQA_FIELDS_LOGITS(F)                                                                   \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model")                  \
    F(TEXT, prompt, OPTIONAL, 0, PROTO_TEXT_BYTES_MAX, 0, "text; or give tokens")              \
    F(TOKENS, tokens, OPTIONAL, 0, PROTO_TOKENS_MAX, 0, "token ids, used as they are")         \
    F(BOOL, add_special, OPTIONAL, 0, 1, 1, "add the tokenizer's BOS or EOS to a text prompt") \
    F(BOOL, parse_special, OPTIONAL, 0, 1, 1, "control tokens written in the prompt count")    \
    F(U32, first_row, OPTIONAL, 0, PROTO_TOKENS_MAX, 0, "first position reported")             \
    F(BOOL, logprobs, OPTIONAL, 0, 1, 0, "only the log-probability of each next token")        \
    F(BOOL, cache_prompt, OPTIONAL, 0, 1, 1, "take cached KV blocks, and leave one's own")     \
    GQA_FIELDS_KV_POLICY(F)                                                                    \
    GQA_FIELDS_SCHEDULING(F)

#define GQA_FIELDS_KV_LIST(F) F(BOOL, all, OPTIONAL, 0, 1, 0, "every realm: administrators")

#define GQA_FIELDS_KV_PIN(F)                                                                   \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model")                  \
    F(TEXT, prompt, OPTIONAL, 0, PROTO_TEXT_BYTES_MAX, 0, "text; or give tokens")              \
    F(TOKENS, tokens, OPTIONAL, 0, PROTO_TOKENS_MAX, 0, "token ids, used as they are")         \
    F(BOOL, add_special, OPTIONAL, 0, 1, 1, "add the tokenizer's BOS or EOS to a text prompt") \
    F(BOOL, parse_special, OPTIONAL, 0, 1, 1, "control tokens written in the prompt count")    \
    F(BOOL, pinned, OPTIONAL, 0, 1, 1, "false: it may be evicted again")

#define GQA_FIELDS_KV_DROP(F)                                                                    \
    F(NAME, model, OPTIONAL, 1, PROTO_PATH_BYTES_MAX, 0, "of this loaded model; absent: of all") \
    F(BOOL, all, OPTIONAL, 0, 1, 0, "every realm: administrators")

#define GQA_FIELDS_EMBED(F)                                                                      \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model")                    \
    F(TEXT, prompt, OPTIONAL, 0, PROTO_TEXT_BYTES_MAX, 0, "one text; or give tokens or inputs")  \
    F(TOKENS, tokens, OPTIONAL, 0, PROTO_TOKENS_MAX, 0, "token ids, used as they are")           \
    F(TEXTS, inputs, OPTIONAL, 0, PROTO_INPUTS_MAX, 0, "texts, each embedded by itself")         \
    F(BOOL, add_special, OPTIONAL, 0, 1, 1, "add the tokenizer's BOS, EOS, CLS or SEP to texts") \
    F(BOOL, parse_special, OPTIONAL, 0, 1, 1, "control tokens written in a text count")          \
    F(NAME, pooling, OPTIONAL, 1, 16, 0, "none, mean, cls, last, rank; absent: the model's own") \
    F(BOOL, normalize, OPTIONAL, 0, 1, 1, "scale every vector to length 1")                      \
    F(I32, embd_normalize, OPTIONAL, -1, 64, 2,                                                  \
      "by which norm: -1 none, 0 largest value to 32760, 1 taxicab, 2 euclidean, p")             \
    F(TEXT, query, OPTIONAL, 0, PROTO_TEXT_BYTES_MAX, 0, "rank: what the texts are to answer")   \
    F(U32, n_dims, OPTIONAL, 0, 1u << 17, 0, "only the first so many dimensions; 0: all")        \
    F(NAME, kv_policy, OPTIONAL, 1, 16, 0, "full: a vector is of the whole text")                \
    F(BOOL, cache_prompt, OPTIONAL, 0, 1, 1, "take cached KV blocks, and leave one's own")       \
    GQA_FIELDS_SCHEDULING(F)

#define GQA_FIELDS_KV_EXPORT(F)                                                                \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model")                  \
    F(TEXT, prompt, OPTIONAL, 0, PROTO_TEXT_BYTES_MAX, 0, "text; or give tokens")              \
    F(TOKENS, tokens, OPTIONAL, 0, PROTO_TOKENS_MAX, 0, "token ids, used as they are")         \
    F(BOOL, add_special, OPTIONAL, 0, 1, 1, "add the tokenizer's BOS or EOS to a text prompt") \
    F(BOOL, parse_special, OPTIONAL, 0, 1, 1, "control tokens written in the prompt count")

#define GQA_FIELDS_KV_IMPORT(F)                                                                 \
    F(NAME, model, REQUIRED, 1, PROTO_PATH_BYTES_MAX, 0, "name of the model")                   \
    F(NAME, id, REQUIRED, 32, 32, 0, "identity of the blocks, hexadecimal")                     \
    F(NAME, about, OPTIONAL, 0, 127, 0, "what kv.export said of that identity, for messages")   \
    F(U32, layout_version, REQUIRED, 0, UINT32_MAX, 0, "of the blocks' bytes")                  \
    F(U32, layer_class, REQUIRED, 0, 7, 0, "which of the model's layer classes")                \
    F(U32, position, REQUIRED, 0, (1u << 18) - 1, 0, "of the block in the prefix, from 0")      \
    F(U32, flags, OPTIONAL, 0, 1, 0, "1: a generation made it")                                 \
    F(TOKENS, tokens, REQUIRED, 64, 64, 0, "of this position")                                  \
    F(U64, bytes, REQUIRED, 0, 1ull << 40, 0, "of the whole block; 0: no class needs one here") \
    F(U64, checksum, REQUIRED, 0, UINT64_MAX, 0, "XXH3-64 of the whole block")                  \
    F(U64, offset, OPTIONAL, 0, 1ull << 40, 0, "of data in the block")                          \
    F(TEXT, data, REQUIRED, 0, PROTO_KV_PIECE_BYTES_MAX, 0, "the bytes from offset on")         \
    F(BOOL, last, OPTIONAL, 0, 1, 0, "all has come: keep it")

#define GQA_FIELDS_BACKEND_SELFTEST(F)                                                   \
    F(NAME, backend, REQUIRED, 1, 31, 0, "name of the plugin, as backend.list tells it") \
    F(NAME, isa, OPTIONAL, 1, 31, 0, "one of its levels; absent: the best")

#define GQA_FIELDS_BACKEND_USE(F)                                                               \
    GQA_FIELDS_BACKEND_SELFTEST(F)                                                              \
    F(NAME, model, OPTIONAL, 1, PROTO_PATH_BYTES_MAX, 0, "absent: the only one that is loaded") \
    F(BOOL, attention_only, OPTIONAL, 0, 1, 0, "the program stays where it is")                 \
    F(BOOL, require, OPTIONAL, 0, 1, 0, "a step that it fails is an error: nothing stands in")  \
    F(BOOL, shadow, OPTIONAL, 0, 1, 0, "only compares; the backend 'off' ends it")              \
    F(U32, every, OPTIONAL, 1, 1u << 20, 16, "shadow: so many steps of which one is compared")

#define GQA_FIELDS_RING_OPEN(F)                                                 \
    F(U32, ring_bytes, OPTIONAL, 1u << 12, 1u << 20, 1u << 16,                  \
      "of each of the two rings: a power of two")                               \
    F(U64, in_bytes, OPTIONAL, 1u << 12, 1u << 30, 1u << 20,                    \
      "of the part of the data area that the client fills; rounded up to 4096") \
    F(U64, out_bytes, OPTIONAL, 1u << 12, 1u << 30, 1u << 24,                   \
      "of the part that the daemon fills, likewise")

#define GQA_FIELDS_REQUESTS(F) F(BOOL, all, OPTIONAL, 0, 1, 0, "every user's: administrators")

#define GQA_FIELDS_DRAIN(F) \
    F(U32, timeout_ms, OPTIONAL, 0, 1u << 30, 30000, "running requests are cut after this")

/* ---- methods: M(ID, id, "name", access, FIELDS, doc) ------------------------------------- */

#define GQA_METHODS(M)                                                                       \
    M(HELLO, hello, "gqa.hello", PROTO_ANY, GQA_FIELDS_HELLO,                                \
      "agrees on the version; tells features, limits and who the caller is")                 \
    M(PING, ping, "gqa.ping", PROTO_ANY, GQA_FIELDS_NONE, "answers at once")                 \
    M(API_INFO, api_info, "gqa.api_info", PROTO_ANY, GQA_FIELDS_NONE, "tells this table")    \
    M(MODEL_LOAD, model_load, "model.load", PROTO_ADMIN, GQA_FIELDS_MODEL_LOAD,              \
      "loads a model; events tell the progress")                                             \
    M(MODEL_UNLOAD, model_unload, "model.unload", PROTO_ADMIN, GQA_FIELDS_MODEL,             \
      "unloads a model when its requests have ended")                                        \
    M(MODEL_LIST, model_list, "model.list", PROTO_ANY, GQA_FIELDS_NONE,                      \
      "models that are loaded or lie in the models folder")                                  \
    M(MODEL_INFO, model_info, "model.info", PROTO_ANY, GQA_FIELDS_MODEL,                     \
      "shape, types, tokenizer and backends of a loaded model")                              \
    M(MODEL_OPS, model_ops, "model.ops", PROTO_ADMIN, GQA_FIELDS_MODEL,                      \
      "what a loaded model's ops took since it was loaded, by kind")                         \
    M(TEXT_GENERATE, text_generate, "text.generate", PROTO_OWN, GQA_FIELDS_GENERATE,         \
      "continues a prompt; events carry the text as it comes")                               \
    M(TEXT_TOKENIZE, text_tokenize, "text.tokenize", PROTO_ANY, GQA_FIELDS_TOKENIZE,         \
      "text to token ids")                                                                   \
    M(TEXT_DETOKENIZE, text_detokenize, "text.detokenize", PROTO_ANY, GQA_FIELDS_DETOKENIZE, \
      "token ids to text, byte for byte")                                                    \
    M(TEXT_LOGITS, text_logits, "text.logits", PROTO_OWN, GQA_FIELDS_LOGITS,                 \
      "logits after every token; events carry them as tensors")                              \
    M(KV_STATS, kv_stats, "kv.stats", PROTO_ANY, GQA_FIELDS_NONE,                            \
      "the KV cache in numbers: memory, store, hits")                                        \
    M(KV_LIST, kv_list, "kv.list", PROTO_OWN, GQA_FIELDS_KV_LIST,                            \
      "what is kept of the caller's prompts, by model")                                      \
    M(KV_PIN, kv_pin, "kv.pin", PROTO_OWN, GQA_FIELDS_KV_PIN,                                \
      "computes a prompt's blocks and keeps them from eviction")                             \
    M(KV_DROP, kv_drop, "kv.drop", PROTO_OWN, GQA_FIELDS_KV_DROP,                            \
      "lets go of what is kept, but for pinned blocks")                                      \
    M(KV_PURGE, kv_purge, "kv.purge", PROTO_OWN, GQA_FIELDS_KV_LIST,                         \
      "removes all that is kept, from memory and disk, for good")                            \
    M(TEXT_EMBED, text_embed, "text.embed", PROTO_OWN, GQA_FIELDS_EMBED,                     \
      "texts as vectors, or their tokens; or how well they answer a query")                  \
    M(KV_EXPORT, kv_export, "kv.export", PROTO_OWN, GQA_FIELDS_KV_EXPORT,                    \
      "tells the cached blocks of a prompt, to be carried elsewhere; events have the bytes") \
    M(KV_IMPORT, kv_import, "kv.import", PROTO_OWN, GQA_FIELDS_KV_IMPORT,                    \
      "takes in one piece of what kv.export told")                                           \
    M(BACKEND_LIST, backend_list, "backend.list", PROTO_ANY, GQA_FIELDS_NONE,                \
      "plugins, what they can do here, who uses them")                                       \
    M(BACKEND_USE, backend_use, "backend.use", PROTO_ADMIN, GQA_FIELDS_BACKEND_USE,          \
      "another backend for a loaded model, between two steps of what runs")                  \
    M(BACKEND_SELFTEST, backend_selftest, "backend.selftest", PROTO_ADMIN,                   \
      GQA_FIELDS_BACKEND_SELFTEST, "compares a backend with the reference, in a child")      \
    M(RING_OPEN, ring_open, "ring.open", PROTO_ANY, GQA_FIELDS_RING_OPEN,                    \
      "rings in shared memory: the messages travel in them from then on")                    \
    M(RING_CLOSE, ring_close, "ring.close", PROTO_ANY, GQA_FIELDS_NONE,                      \
      "back to the socket; its answer is the last message in the ring")                      \
    M(SERVER_STATS, server_stats, "server.stats", PROTO_ANY, GQA_FIELDS_NONE,                \
      "counters, queues, memory and step times")                                             \
    M(SERVER_REQUESTS, server_requests, "server.requests", PROTO_OWN, GQA_FIELDS_REQUESTS,   \
      "the open requests, and how far they are")                                             \
    M(SERVER_DRAIN, server_drain, "server.drain", PROTO_ADMIN, GQA_FIELDS_DRAIN,             \
      "refuses new work, ends the running, then exits")                                      \
    M(SERVER_RELOAD, server_reload, "server.reload", PROTO_ADMIN, GQA_FIELDS_NONE,           \
      "reads the configuration again")

enum proto_method {
#define M(ID, id, name, access, FIELDS, doc) PROTO_##ID,
    GQA_METHODS(M)
#undef M
        PROTO_METHOD_COUNT
};

/* Params structs: one member per field, holding the default where the field was absent, and
 * has_FIELD, which tells whether it was given. Pointers are into the message or its arena and live
 * as long as the message. */
#define PROTO_CTYPE_BOOL    bool
#define PROTO_CTYPE_U32     uint32_t
#define PROTO_CTYPE_I32     int32_t
#define PROTO_CTYPE_U64     uint64_t
#define PROTO_CTYPE_F32     float
#define PROTO_CTYPE_NAME    struct proto_string
#define PROTO_CTYPE_TEXT    struct proto_string
#define PROTO_CTYPE_TOKENS  struct proto_tokens
#define PROTO_CTYPE_STRINGS struct proto_strings
#define PROTO_CTYPE_TEXTS   struct proto_strings
#define PROTO_CTYPE_BIASES  struct proto_biases

#define PROTO_MEMBER(TYPE, name, req, min, max, def, doc) \
    PROTO_CTYPE_##TYPE name;                              \
    bool has_##name;
#define M(ID, id, name, access, FIELDS, doc)                                        \
    struct proto_##id {                                                             \
        uint32_t n_fields; /* of the table; keeps structs without fields legal C */ \
        FIELDS(PROTO_MEMBER)                                                        \
    };
GQA_METHODS(M)
#undef M
#undef PROTO_MEMBER

union proto_params {
#define M(ID, id, name, access, FIELDS, doc) struct proto_##id id;
    GQA_METHODS(M)
#undef M
};

/* A bound or a default, exact: i for I32, f for F32, u for all others. */
union proto_bound {
    uint64_t u;
    int64_t i;
    double f;
};

/* The rows as data. */
struct proto_field {
    const char *name;
    enum proto_field_type type;
    bool required;
    union proto_bound min, max, fallback; /* by type: value, bytes or count */
    const char *doc;
    size_t offset, has_offset; /* in the params struct */
};
struct proto_method_info {
    const char *name; /* "text.generate" */
    enum proto_access access;
    const struct proto_field *fields;
    size_t n_fields;
    const char *doc;
};

const struct proto_method_info *proto_method_info(enum proto_method method);
/* 0 and *ret, or -ENOENT. name need not be terminated. */
int proto_method_by_name(const char *name, size_t bytes, enum proto_method *ret);
const char *proto_field_type_name(enum proto_field_type type);   /* "array of integers" */
const char *proto_field_type_bounds(enum proto_field_type type); /* "value", "bytes", "count" */
const char *proto_access_name(enum proto_access access);         /* "any", "own", "admin" */
/* Whether rows of this type have a default that means something: numbers and booleans do. */
bool proto_field_type_is_scalar(enum proto_field_type type);

/* ---- errors: E(NAME, code, doc) ---------------------------------------------------------- */

#define GQA_ERRORS(E)                                                                \
    E(INVALID_REQUEST, 1, "the message is not a request of this protocol")           \
    E(METHOD_NOT_FOUND, 2, "no such method")                                         \
    E(INVALID_PARAMS, 3, "a field is missing, of a wrong type, or out of its range") \
    E(ACCESS_DENIED, 4, "the caller may not do this")                                \
    E(VERSION, 5, "no common protocol version")                                      \
    E(NOT_FOUND, 6, "no such model, backend or request")                             \
    E(EXISTS, 7, "the name is taken")                                                \
    E(MODEL_REFUSED, 8, "the model file cannot be used; the message says why")       \
    E(CONTEXT_EXCEEDED, 9, "the prompt does not fit the context")                    \
    E(BUSY, 10, "a queue is full; try again after retry_after_ms")                   \
    E(CANCELLED, 11, "the caller cancelled")                                         \
    E(DEADLINE, 12, "the time was up")                                               \
    E(DRAINING, 13, "the daemon is about to end, or the model to be unloaded")       \
    E(NO_MEMORY, 14, "memory or a bound of it is exhausted")                         \
    E(BACKEND, 15, "a backend failed or is not usable here")                         \
    E(IO, 16, "the operating system refused to read or write")                       \
    E(INTERNAL, 17, "a fault of the daemon")

enum proto_error_code {
    PROTO_OK = 0,
#define E(name, code, doc) PROTO_E_##name = code,
    GQA_ERRORS(E)
#undef E
};

const char *proto_error_name(enum proto_error_code code); /* "INVALID_PARAMS"; else "UNKNOWN" */
const char *proto_error_doc(enum proto_error_code code);

/* All errors in the order of their codes: the index-th code, or PROTO_OK past the end. */
enum proto_error_code proto_error_at(size_t index);

#endif
