/* daemon/model/tokenizer_internal.h - what the tokenizer's files share.
 *
 *   text -> fragments (special tokens | plain text)           tokenizer_special.c
 *        -> words (pre-tokeniser, or at spaces)               tokenizer_pre.c, tokenizer_spm.c
 *        -> symbols, merged pair by pair -> ids               tokenizer_merge.c
 *        or pieces, longest first, or the likeliest           tokenizer_wordpiece.c, _unigram.c
 *
 * A tokenizer is written by tokenizer_create alone; a call's working memory is a struct scratch. */
#ifndef DAEMON_MODEL_TOKENIZER_INTERNAL_H
#define DAEMON_MODEL_TOKENIZER_INTERNAL_H

#include "daemon/model/tokenizer.h"

#define TOKENIZER_MAX_VOCAB      (1u << 22) /* tokens; the largest known vocabulary has 2^18 */
#define TOKENIZER_MAX_MERGES     (1u << 23)
#define TOKENIZER_MAX_TEXT_BYTES (1u << 30) /* symbols are counted in 32 bits */

/* Bytes to token id, open addressing; the bytes are pieces. Seeded, so that no file can choose its
 * collisions. */
struct piece_table {
    struct piece_slot {
        uint32_t tag;  /* the hash's other half: most mismatches end here */
        int32_t token; /* TOKEN_NONE: free */
    } * slots;
    uint32_t mask;
    uint64_t seed;
};

/* Pair of token ids to the merge's rank and the joined token; open addressing, seeded. */
struct merge_table {
    struct merge_slot {
        uint64_t pair; /* left << 32 | right; UINT64_MAX: free */
        uint32_t rank;
        int32_t token;
    } * slots;
    uint32_t mask;
    uint64_t seed, factor;
    struct short_merge { /* by two bytes */
        uint32_t rank;   /* UINT32_MAX: they do not merge */
        int32_t token;
    } * bytes;
};

struct token_entry {
    const char *piece; /* into tokenizer.pieces: the bytes that the token stands for */
    uint32_t bytes;
    uint8_t kind;  /* enum token_kind */
    uint8_t flags; /* TOKEN_FLAG_* */
};

enum {
    TOKEN_FLAG_EOG = 1,     /* generation ends here */
    TOKEN_FLAG_MERGES = 2,  /* plain text may become this token */
    TOKEN_FLAG_SPECIAL = 4, /* found as a whole in the text, before anything else */
    TOKEN_FLAG_RSTRIP = 8,  /* swallows the white space after it */
    TOKEN_FLAG_LSTRIP = 16, /* swallows the white space before it */
};

/* Tokens in the byte order of their pieces: a prefix comes before its extensions. */
struct sorted_pieces {
    int32_t *ids; /* (n) */
    uint32_t n;
    uint32_t first[257]; /* ids[first[b]..first[b + 1]) begin with byte b */
};

/* Tokens with TOKEN_FLAG_SPECIAL. */
struct special_set {
    struct sorted_pieces sorted;
    uint32_t *by_length; /* (n) indices into sorted.ids: longest first, then ascending id */
};

struct charsmap; /* normalisation rules, tokenizer_charsmap.c */

struct pre_tokenizer; /* compiled expressions, tokenizer_pre.c */
struct scratch;

/* A kind of tokenizer. */
struct tokenizer_model {
    const char *name; /* tokenizer.ggml.model */
    /* Fills kinds, flags and pieces from the file's texts; then whatever the kind needs once the
     * table of pieces stands. 0 or -errno with err. */
    int (*load_pieces)(struct tokenizer *t, const struct gguf_string *texts, struct fmt_error *err);
    int (*load)(struct tokenizer *t, const struct gguf *g, struct fmt_error *err);
    /* Encodes a fragment of plain text. after_special: nothing or a special token precedes it. */
    int (*encode)(const struct tokenizer *t, struct scratch *s, const char *text, size_t bytes,
                  bool after_special);
};

extern const struct tokenizer_model tokenizer_model_spm, tokenizer_model_bpe,
    tokenizer_model_wordpiece, tokenizer_model_unigram;

struct tokenizer {
    const struct tokenizer_model *model;
    uint32_t n_vocab;
    struct token_entry *tokens; /* (n_vocab) */
    char *pieces;
    size_t pieces_bytes;
    struct piece_table table; /* tokens with TOKEN_FLAG_MERGES */
    int32_t byte_token[256];  /* the token that stands for one byte, or TOKEN_NONE */
    struct special_set specials;
    int32_t bos, eos, unk, sep;
    bool add_bos, add_eos, add_sep;
    bool all_bytes; /* no byte_token is missing: UNKNOWN never stands for plain text */
    bool typed;     /* the file has token types */

    /* Vocabularies that write a space as U+2581 */
    bool add_space_prefix;    /* the encoder puts a space in front of a text: decoding drops it */
    bool words_end_at_spaces; /* no piece has a space after another character */
    uint32_t *priority;       /* SPM (n_vocab): order of merging, lower first */

    struct sorted_pieces sorted; /* WordPiece, unigram: tokens with TOKEN_FLAG_MERGES */

    /* WordPiece */
    bool lowercase, strip_accents;

    /* Unigram */
    float *scores; /* (n_vocab) */
    double unknown_score;
    struct charsmap *charsmap; /* NULL: none */
    bool prepend_space, merge_spaces;
    bool bytes_for_unknown; /* byte tokens stand for characters that no piece has */

    /* BPE */
    struct pre_tokenizer *pre;
    struct merge_table merges;
    bool ignore_merges; /* a word that is a token needs no merging */
};

/* tokenizer_vocab.c */
int tokenizer_load_vocab(struct tokenizer *t, const struct gguf *g, struct fmt_error *err);
/* The token with exactly these bytes as its piece, among those that plain text may become. */
int32_t tokenizer_find(const struct tokenizer *t, const char *bytes, size_t n);
uint64_t tokenizer_random_seed(void);
/* "<0xHH>" to its byte; -1 when the text is anything else. */
int tokenizer_parse_byte(struct gguf_string text);

/* tokenizer_special.c */
void tokenizer_mark_names(struct tokenizer *t, const struct gguf *g,
                          const struct gguf_string *texts);
int tokenizer_build_specials(struct tokenizer *t);
void tokenizer_free_specials(struct tokenizer *t);

#define FRAGMENT_END UINT32_MAX

struct fragment {
    size_t offset, bytes;
    int32_t token; /* TOKEN_NONE: plain text */
    uint32_t next; /* index, or FRAGMENT_END */
};

/* Cuts the text into *ret[0], its successors by next. The caller frees *ret. */
int tokenizer_partition(const struct tokenizer *t, const char *text, size_t bytes,
                        bool parse_special, struct fragment **ret);

/* tokenizer_pre.c */
struct pre_scratch;
/* by_hand: scan where an expression has been written by hand; without, PCRE2 does everything, which
 * gives the same words. */
int pre_tokenizer_create(struct gguf_string name, bool by_hand, struct pre_tokenizer **ret,
                         struct fmt_error *err);
void pre_tokenizer_destroy(struct pre_tokenizer *p);
const char *pre_tokenizer_name(const struct pre_tokenizer *p);
bool pre_tokenizer_ignores_merges(const struct pre_tokenizer *p);
bool pre_tokenizer_adds_bos(const struct pre_tokenizer *p);
int pre_scratch_create(const struct pre_tokenizer *p, struct pre_scratch **ret);
void pre_scratch_destroy(struct pre_scratch *s);
/* Splits well-formed UTF-8 into words: *ret_ends are their ends, ascending, the last is bytes. The
 * array is the scratch's, valid until the next call. */
int pre_tokenizer_split(const struct pre_tokenizer *p, struct pre_scratch *s, const char *text,
                        size_t bytes, const uint32_t **ret_ends, size_t *ret_count);

/* tokenizer_merge.c: the working memory of one call of tokenizer_encode. */
struct symbol {
    uint32_t start, bytes; /* in the word; bytes is 0 once the left neighbour has swallowed it */
    uint32_t prev, next;   /* SYMBOL_END */
    int32_t token;         /* TOKEN_NONE: only its bytes can be encoded */
};

#define SYMBOL_END UINT32_MAX

struct merge_candidate {
    uint32_t priority;
    uint32_t left, right;
    int32_t token;  /* of both together */
    uint32_t bytes; /* of both when this was queued: anything else now makes it stale */
};

#define WORD_SLOT_TOKENS 3

struct word_slot {
    uint64_t key[2];                  /* tokenizer_cache.c; key[1] is 0: free */
    int32_t tokens[WORD_SLOT_TOKENS]; /* where there are more: the first's index in kept */
    uint32_t count;
};

struct word_cache {
    struct word_slot *slots;
    uint32_t mask;
    int32_t *kept; /* tokens of words that have more than a slot holds */
    size_t n_kept, kept_capacity;
};

/* A position in a word, and the best way to it (tokenizer_unigram.c). */
struct lattice_node {
    double score;
    uint32_t start, next; /* of the piece that ends here; of the piece that begins here */
    int32_t token;
};

/* Memory that lives as long as the call. */
struct scratch_block {
    struct scratch_block *next;
    char data[];
};

struct scratch {
    int32_t *out;
    size_t n_out, out_capacity, max_tokens;
    uint64_t n_steps; /* pairs, pieces and lattice ways looked at: tests hold it to be linear */
    struct symbol *symbols;
    struct merge_candidate *heap;
    size_t n_symbols, symbol_capacity, n_heap;
    struct word_cache cache;
    struct scratch_block *blocks;
    char *word; /* SPM: a word with a space put in front */
    size_t word_capacity;
    struct lattice_node *lattice;
    size_t lattice_capacity;
    struct pre_scratch *pre;
};

int scratch_init(struct scratch *s, const struct tokenizer *t, size_t text_bytes,
                 size_t max_tokens);
void scratch_finish(struct scratch *s);
int scratch_push_slowly(struct scratch *s, int32_t token);
/* Memory for the rest of the call, or NULL. */
char *scratch_keep(struct scratch *s, size_t bytes);

static inline int scratch_push(struct scratch *s, int32_t token)
{
    if (s->n_out == s->out_capacity || s->n_out == s->max_tokens) {
        return scratch_push_slowly(s, token);
    }
    s->out[s->n_out++] = token;
    return 0;
}

/* Fills symbols for a word: their count, all linked. Room for one symbol a byte was made. */
typedef size_t split_symbols_fn(const struct tokenizer *t, struct symbol *symbols, const char *word,
                                size_t bytes);
/* Whether two neighbours may merge; with which priority (lower is first) and into which token. */
typedef bool may_merge_fn(const struct tokenizer *t, const char *word, const struct symbol *left,
                          const struct symbol *right, uint32_t *ret_priority, int32_t *ret_token);

struct merge_rules {
    split_symbols_fn *split;
    may_merge_fn *may_merge;
};

/* Encodes one word by merging. */
int tokenizer_merge_word(const struct tokenizer *t, struct scratch *s,
                         const struct merge_rules *rules, const char *word, size_t bytes);
/* What stands for bytes that are in no token: their byte tokens, or one UNKNOWN when a byte has
 * none, or -EILSEQ. */
int tokenizer_push_bytes(const struct tokenizer *t, struct scratch *s, const char *bytes, size_t n);

/* tokenizer_cache.c */
typedef int encode_word_fn(const struct tokenizer *t, struct scratch *s, const char *word,
                           size_t bytes);
int word_cache_init(struct word_cache *c, size_t text_bytes);
void word_cache_finish(struct word_cache *c);
/* Encodes one word, by memory where the call has seen it before. stays: the word's memory outlives
 * the call. */
int tokenizer_encode_cached(const struct tokenizer *t, struct scratch *s, encode_word_fn *encode,
                            const char *word, size_t bytes, bool stays);

/* tokenizer_sorted.c */
int sorted_pieces_init(struct sorted_pieces *set, const struct tokenizer *t, uint8_t flag);
void sorted_pieces_finish(struct sorted_pieces *set);

/* The pieces that begin with the bytes stepped over so far: set->ids[low..high). */
struct piece_walk {
    uint32_t low, high;
    size_t depth;
};

static inline struct piece_walk sorted_pieces_begin(const struct sorted_pieces *set, char byte)
{
    unsigned b = (unsigned char)byte;
    return (struct piece_walk){set->first[b], set->first[b + 1], 1};
}

/* Narrows to the pieces whose next byte this is. */
void sorted_pieces_step(const struct tokenizer *t, const struct sorted_pieces *set,
                        struct piece_walk *w, char byte);
/* The token whose piece is exactly the bytes stepped over (of several, the lowest), or TOKEN_NONE.
 */
static inline int32_t sorted_pieces_here(const struct tokenizer *t, const struct sorted_pieces *set,
                                         const struct piece_walk *w)
{
    bool whole = w->low < w->high && t->tokens[set->ids[w->low]].bytes == w->depth;
    return whole ? set->ids[w->low] : TOKEN_NONE;
}

/* tokenizer_spm.c, for unigram and WordPiece vocabularies too */
int tokenizer_load_meta_pieces(struct tokenizer *t, const struct gguf_string *texts,
                               struct fmt_error *err);
int tokenizer_read_scores(const struct tokenizer *t, const struct gguf *g, float **ret,
                          struct fmt_error *err);
bool tokenizer_words_end_at_spaces(const struct tokenizer *t);
/* The end of the word at the text's start: before the first space that follows something else. */
size_t tokenizer_word_end(const struct tokenizer *t, const char *text, size_t bytes);

/* tokenizer_charsmap.c */
int charsmap_load(const struct gguf *g, struct charsmap **ret, struct fmt_error *err);
void charsmap_destroy(struct charsmap *map);
/* The longest rule that text begins with: its length and what replaces it; 0 for none. map may be
 * NULL. */
size_t charsmap_find(const struct charsmap *map, const char *text, size_t bytes,
                     struct gguf_string *ret);

#endif
