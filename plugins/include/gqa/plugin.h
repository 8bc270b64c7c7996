/* gqa/plugin.h - the ABI between gqad and its backends, version 1.0.
 *
 * A backend is a shared object that exports one constant, `gqa_plugin`, and repeats magic and ABI
 * version in an ELF note, so that a host can refuse it before any of its code runs. The host asks
 * for interfaces by name; each is a table of functions that only ever grows at its end and starts
 * with its own size. docs/plugin-abi.md tells the whole story; examples/minimal_plugin.c is a
 * complete plugin.
 *
 * Rules for a plugin: no constructors, no threads that outlive close(), no global mutable state,
 * no own thread pool (use host->parallel), no signal handlers. All calls on one context come from
 * one thread at a time, but for pack() (several at once, for disjoint ranges) and op_times() (at
 * any time). Functions return 0 or -errno and never exit.
 *
 * What may change within major version 1, and what may not, docs/plugin-abi.md says ("Versions").
 * In short: structs that begin with struct_size grow at their end only (but for gqa_probe), and
 * neither side reads past what the other one says; all others stay as they are for good, since
 * arrays of them have no stride. A new member that is zero means what it meant before there was
 * one. What must not be ignored by who does not know it has a bit in a word of flags, and unknown
 * bits are refused. */
#ifndef GQA_PLUGIN_H
#define GQA_PLUGIN_H

#include <gqa/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GQA_PLUGIN_MAGIC     0x47514131u /* "GQA1" */
#define GQA_PLUGIN_ABI_MAJOR 1u
#define GQA_PLUGIN_ABI_MINOR 0u
#define GQA_PLUGIN_SYMBOL    "gqa_plugin"
#define GQA_NOTE_NAME        "gqa"
#define GQA_NOTE_TYPE        1u
#define GQA_NONE             0xffffffffu

/* ---- structs that grow ------------------------------------------------------------------- */

/* Bytes of a struct up to a member, that one included: what struct_size is at least where it is
 * there. */
#define GQA_SIZE_TO(type, member) (offsetof(type, member) + sizeof(((type *)0)->member))

/* Whether the other side knows a member of what p points to. */
#define GQA_HAS(p, member) ((p)->struct_size >= GQA_SIZE_TO(__typeof__(*(p)), member))

/* Copies a struct that begins with struct_size as far as both sides know it; members that only this
 * side knows become zero. *to's struct_size is what was copied. */
static inline void gqa_take(void *to, size_t bytes, const void *from)
{
    uint32_t has;

    memcpy(&has, from, sizeof(has));
    has = has < bytes ? has : (uint32_t)bytes;
    memset(to, 0, bytes);
    memcpy(to, from, has);
    memcpy(to, &has, sizeof(has));
}

/* ---- services that the host lends -------------------------------------------------------- */

enum gqa_log_level { GQA_LOG_ERROR = 3, GQA_LOG_WARNING = 4, GQA_LOG_INFO = 6, GQA_LOG_DEBUG = 7 };

/* One piece of parallel work. index: 0..n_tasks-1, each exactly once, in any order; worker:
 * 0..n_threads-1, never the same for two pieces that run at one time (index for scratch memory).*/
typedef void (*gqa_task_fn)(void *arg, uint32_t index, uint32_t worker);

struct gqa_host {
    uint32_t struct_size;
    uint32_t n_threads; /* workers that parallel() uses, the caller included */
    void *data;         /* first argument of every function below */
    void (*log)(void *data, int level, const char *message);
    /* Runs fn for every index and returns when all are done. Not to be nested. */
    void (*parallel)(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks);
    /* Zeroed memory, aligned to 64 bytes at least, huge pages where large. NULL when there is none.
     * release takes the pointer and the size that was asked for. */
    void *(*allocate)(void *data, size_t bytes);
    void (*release)(void *data, void *memory, size_t bytes);
    /* The host's, for a plugin that cannot do without something newer: open() says -ENOTSUP then.
     */
    uint32_t abi_major, abi_minor;
};

/* Where a function wants to say why: the host owns the buffer. */
struct gqa_reason {
    char text[256];
};

/* ---- the plugin -------------------------------------------------------------------------- */

struct gqa_probe {
    uint32_t struct_size;
    uint32_t usable;    /* 0: reason says why not, in the driver's words where there is one */
    uint32_t score;     /* among usable ones the host prefers the highest */
    uint32_t n_devices; /* 0 for host memory */
    char isa[64];       /* best level here: "avx512", "avx2", "c", "sm_90", ... */
    char isas[192];     /* all levels that work here, comma-separated, best first */
    char device[128];   /* a name for people */
    char reason[256];
};

struct gqa_plugin {
    uint32_t magic;
    uint16_t abi_major, abi_minor;
    uint32_t struct_size;
    const char *name;    /* [a-z0-9_-]{1,31}, unique among plugins */
    const char *version; /* the plugin's own */
    const char *build;   /* compiler, flags, revision: for people */
    /* Cheap and without side effects; fills ret (struct_size is set by the host). */
    int (*probe)(struct gqa_probe *ret);
    /* options: "key=value,..." or ""; cpu knows isa=LEVEL, which must be one of probe's isas.
     * -EINVAL with a reason for an unknown option, -ENOTSUP for a level that cannot run here.
     * host outlives the context. */
    int (*open)(const struct gqa_host *host, const char *options, void **ret_context,
                struct gqa_reason *reason);
    /* A table by its name, or NULL when this plugin has none. Lives as long as the context. */
    const void *(*get_interface)(void *context, const char *name);
    void (*close)(void *context);
};

struct gqa_note_desc {
    uint32_t magic;
    uint16_t abi_major, abi_minor;
    uint32_t plugin_struct_size;
};

#define GQA_PLUGIN_EXPORT __attribute__((visibility("default")))

/* The first members of gqa_plugin, which say what the note says. */
#define GQA_PLUGIN_HEADER \
    GQA_PLUGIN_MAGIC, GQA_PLUGIN_ABI_MAJOR, GQA_PLUGIN_ABI_MINOR, sizeof(struct gqa_plugin)

/* Emits the ELF note; write it once, beside the definition of gqa_plugin. */
#define GQA_PLUGIN_NOTE                                                           \
    __attribute__((section(".note.gqa"), used, aligned(4))) static const struct { \
        uint32_t name_bytes, desc_bytes, type;                                    \
        char name[4];                                                             \
        struct gqa_note_desc desc;                                                \
    } gqa_plugin_note = {                                                         \
        sizeof(GQA_NOTE_NAME),                                                    \
        sizeof(struct gqa_note_desc),                                             \
        GQA_NOTE_TYPE,                                                            \
        GQA_NOTE_NAME,                                                            \
        {GQA_PLUGIN_MAGIC, GQA_PLUGIN_ABI_MAJOR, GQA_PLUGIN_ABI_MINOR, sizeof(struct gqa_plugin)}}

/* ---- gqa.attention.0: every backend has it ----------------------------------------------- */

#define GQA_ATTENTION_0 "gqa.attention.0"

/* One layer's attention. Query head h reads group h / (n_heads / n_kv_heads). */
struct gqa_attn_layer {
    uint32_t struct_size;
    uint32_t layer;       /* index in the model, for messages */
    uint32_t layer_class; /* which page table of a sequence holds this layer's blocks */
    uint32_t n_heads, n_kv_heads;
    uint32_t k_dim, v_dim;   /* per head */
    uint32_t k_type, v_type; /* enum gqa_type: F32, F16, BF16, Q8_0, Q4_0 */
    uint32_t window;         /* 0: all; else position p sees positions t with p - window < t;
                                with gqa_attn_seq.mutual also t < p + window */
    float scale;             /* of the scores, usually 1/sqrt(k_dim) */
    float softcap;           /* 0: none; else score = softcap * tanh(score / softcap) */
    const float *sinks;      /* (n_heads) logits that join the denominator only, or NULL */
    uint64_t k_offset;       /* bytes from a block's start to group 0's K of this layer */
    uint64_t v_offset;
    uint64_t k_head_bytes; /* bytes from one group's K to the next */
    uint64_t v_head_bytes;
    /* How q and k were rotated, for views that turn queries again; rope NULL: they were not. */
    const struct gqa_rope_table *rope;
    uint32_t rope_kind; /* enum gqa_rope_kind */
    uint32_t flags;     /* none is defined: 0. supports() refuses what it does not know */
};

/* The blocks of one sequence in one layer class: pages[i] holds slots [64 i, 64 i + 64). Slot s is
 * position s, unless it is a view. Entries that no row of the batch sees a slot of may be NULL.
 *
 * A view (GQA_ATTN_CAP_SPARSE) has let go of positions for good, so that slots are fewer: new row i
 * has the position n_past + i and the slot n_past - n_dropped + i. With recent > 0 a row of slot s
 * sees of the slots t <= s only
 *
 *     0          n_sinks           s - recent + 1          s
 *     | sees     | does not see    | sees                  |
 *
 * which is all of them up to slot n_sinks + recent - 1. What a slot holds is the host's affair:
 * positions differ by group and layer where each has its own selection, and a kept key is rotated
 * by the position that it had.
 *
 * turned: rows behind slot n_sinks + recent - 1 see the sinks as if nothing lay between these and
 * the recent ones (StreamingLLM's positions in the cache): the query meets the sinks turned back
 * from position p to n_sinks + recent - 1, by the layer's rope, and the others as it is. */
struct gqa_page_table {
    uint32_t n_pages;
    uint32_t flags; /* none is defined: 0. A host sets what caps promise only */
    void *const *pages;
    uint32_t n_dropped;       /* at most n_past */
    uint32_t n_sinks, recent; /* recent 0: every slot is seen. Not in a layer with a window */
    uint32_t turned;          /* 1: see above; recent > 0 */
    /* For backends that keep copies: (n_pages), or NULL. A copy of what lies at pages[i] may be
     * used again as long as versions[i] is what it was when the copy was taken; it holds the tokens
     * that were there then and those that the backend itself has appended since. 0: never. */
    const uint64_t *versions;
};

/* One sequence's rows of a batch: rows [first_row, first_row + n_rows) are its new tokens. Row i of
 * them has the place n_past + i in the page table (in a view, n_dropped less), which has room for
 * it already; with commit = 0 the table need hold n_past tokens only, and tables may be NULL where
 * n_past is 0. Views are for causal rows alone.
 *
 * What a row sees, of the past and of the new rows:
 *
 *                  past t < n_past        new row j               position p of row i
 *     causal       all                    j <= i                  n_past + i
 *     mutual       all                    all                     n_past + i
 *     new_mask     all                    bit j of row i          n_past + new rows j != i it sees
 *
 * and of these, with a window, only positions above p - window; mutual: and below p + window. In a
 * tree a row sees its ancestors and itself, so that its position is its depth's: every path has
 * the window that it would have alone. docs/plugin-abi.md draws it. */
struct gqa_attn_seq {
    uint32_t first_row, n_rows;
    uint32_t n_past;
    uint32_t mutual; /* 1: the new rows all see each other (GQA_ATTN_CAP_MUTUAL); no new_mask */
    const struct gqa_page_table *tables; /* by layer class */
    /* Trees of new tokens (GQA_ATTN_CAP_TREE): bit j % 64 of word j / 64 of row i says whether new
     * row i sees new row j, itself included; (n_rows, (n_rows + 63) / 64) words. NULL: causal. */
    const uint64_t *new_mask;
};

/* Sequences [seq_first, seq_last] share their first n_tokens (GQA_ATTN_CAP_SHARED): their page
 * tables begin with the same pages. Segments nest. A hint: results do not depend on it. */
struct gqa_attn_shared {
    uint32_t n_tokens;
    uint32_t seq_first, seq_last;
};

struct gqa_attn_batch {
    uint32_t struct_size;
    uint32_t n_rows; /* of all sequences together; rows are contiguous and in order */
    uint32_t n_seqs;
    uint32_t commit; /* 0: append writes nothing, and attend takes the new rows' K and V from io,
                        rounded as if they had been stored (GQA_ATTN_CAP_NO_COMMIT) */
    const struct gqa_attn_seq *seqs;
    const uint8_t *row_class; /* (n_rows) enum gqa_row_class */
    uint32_t n_shared;
    const struct gqa_attn_shared *shared;
};

/* A row's numerics class follows its place in the sequence, never the batch: P for complete
 * 64-token blocks of a prompt, D for the rest. */
enum gqa_row_class { GQA_ROW_D = 0, GQA_ROW_P = 1 };

/* Activations, float32; row i of a starts at a + i * a_stride. Row = row of the batch. */
struct gqa_attn_io {
    const float *q;                                  /* (n_rows, n_heads, k_dim) */
    const float *k;                                  /* (n_rows, n_kv_heads, k_dim), after RoPE */
    const float *v;                                  /* (n_rows, n_kv_heads, v_dim) */
    float *out;                                      /* (n_rows, n_heads, v_dim) */
    size_t q_stride, k_stride, v_stride, out_stride; /* in floats */
};

enum gqa_attn_caps {
    GQA_ATTN_CAP_SHARED = 1u << 0,
    GQA_ATTN_CAP_SPARSE = 1u << 1, /* views: gqa_page_table */
    GQA_ATTN_CAP_TREE = 1u << 2,
    GQA_ATTN_CAP_NO_COMMIT = 1u << 3,
    GQA_ATTN_CAP_OBSERVE = 1u << 4,
    GQA_ATTN_CAP_MUTUAL = 1u << 5
};

/* Numerics: softmax in f32 with a running maximum; partial results over fixed segments of
 * GQA_ATTN_SEGMENT_TOKENS positions (aligned to position 0), merged in ascending order, so that a
 * row's result never depends on threads, chunking or neighbours. Rows that see nothing (all masked,
 * no sinks) give zeros. */
#define GQA_ATTN_SEGMENT_TOKENS 256u

struct gqa_attention {
    uint32_t struct_size;
    uint32_t caps;     /* enum gqa_attn_caps */
    uint32_t numerics; /* version of the results: changes whenever bits may change */
    /* 0, or -ENOTSUP with a reason (types, dimensions, caps). */
    int (*supports)(void *context, const struct gqa_attn_layer *layer, struct gqa_reason *reason);
    /* Stores the rows' K and V in the sequences' pages, converted to the layer's types. */
    int (*append)(void *context, const struct gqa_attn_layer *layer,
                  const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);
    /* out = attention of every row over its sequence's pages (which append has filled). Each K and
     * V is read once per group, for all query heads of the group together. */
    int (*attend)(void *context, const struct gqa_attn_layer *layer,
                  const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);
    /* SnapKV's votes (GQA_ATTN_CAP_OBSERVE), else NULL. After append: for slots t < n_votes, which
     * lie before the observed rows, votes (n_kv_heads, n_votes) += the weights that attend gives
     * them, of the last n_observed rows of sequence seq and of the group's heads: row after row,
     * head after head, so that votes do not depend on how rows were cut into batches. */
    int (*observe)(void *context, const struct gqa_attn_layer *layer,
                   const struct gqa_attn_batch *batch, const struct gqa_attn_io *io, uint32_t seq,
                   uint32_t n_observed, uint32_t n_votes, float *votes);
};

/* ---- gqa.program.0: the rest of a model (optional) --------------------------------------- */

#define GQA_PROGRAM_0 "gqa.program.0"

/* A program is a list of ops over registers. A register is a float32 matrix with one row per row of
 * the batch (or per output row, with GQA_REG_OUT); ops work on column ranges of registers. */
struct gqa_reg {
    uint32_t width; /* floats per row */
    uint32_t flags; /* GQA_REG_OUT */
};
#define GQA_REG_OUT 1u /* rows are the batch's out_rows, not all rows */

struct gqa_view {
    uint32_t reg, first, width; /* columns [first, first + width); reg GQA_NONE: absent */
};

/* A tensor of the model, in host memory (usually a mapped file), rows of ne[0] values. */
struct gqa_weight {
    const char *name;
    uint32_t type; /* enum gqa_type */
    uint32_t n_dims;
    uint64_t ne[4];
    const void *data;
    /* As pack() laid it out for this backend, or NULL when pack_bytes() was 0. */
    const void *packed;
    uint64_t packed_bytes;
};

enum gqa_op_kind {
    GQA_OP_EMBED = 1,  /* dst = scale * a row of weight: enum gqa_embed_row */
    GQA_OP_NORM = 2,   /* dst = norm(src) * weight (+ bias), over every group of norm.dim values */
    GQA_OP_LINEAR = 3, /* dst = src x weight^T (+ bias): weight (ne[1] outputs, ne[0] inputs) */
    GQA_OP_ROPE = 4,   /* dst = src (same view), each head rotated by its row's position */
    GQA_OP_ATTENTION = 5, /* src = q, src2 = k, src3 = v: append, then attend; dst = out */
    GQA_OP_GLU = 6,       /* dst = act(src) * src2; src2 absent: act(src) */
    GQA_OP_ADD = 7,       /* dst = src + scale * src2 */
    GQA_OP_SCALE = 8,     /* dst = scale * src */
    GQA_OP_SOFTCAP = 9,   /* dst = scale * tanh(src / scale) */
    GQA_OP_GATHER = 10,   /* dst (GQA_REG_OUT) = src's rows batch.out_rows */
    GQA_OP_EXPERTS = 11   /* dst = sum over chosen experts; see struct gqa_op_experts */
};

/* Which row of its table an EMBED takes. gqa_batch.embeddings stand for the tokens' rows alone. */
enum gqa_embed_row {
    GQA_EMBED_TOKEN = 0,
    GQA_EMBED_POSITION = 1, /* learned positions */
    GQA_EMBED_FIRST = 2     /* row 0, whatever the token: the type of a text's tokens */
};
enum gqa_norm_kind { GQA_NORM_RMS = 0, GQA_NORM_LAYER = 1 };
enum gqa_rope_kind {
    GQA_ROPE_NEIGHBOUR = 0, /* pairs (2i, 2i + 1) */
    GQA_ROPE_HALF = 1       /* pairs (i, i + n_rot / 2) */
};
enum gqa_act_kind {
    GQA_ACT_SILU = 0,
    GQA_ACT_GELU_TANH = 1,
    GQA_ACT_GELU = 2,
    GQA_ACT_SWIGLU_OAI = 3,
    GQA_ACT_RELU = 4
};

/* How a row's router logits become scores, and its chosen experts' scores weights. */
enum gqa_gating_kind {
    GQA_GATING_SOFTMAX = 0,       /* scores: softmax over all logits */
    GQA_GATING_SIGMOID = 1,       /* scores: 1 / (1 + exp(-logit)) */
    GQA_GATING_SOFTMAX_CHOSEN = 2 /* scores: the logits; weights: softmax over the chosen ones */
};

/* A mixture of experts, for each row x of src (n_in values; dst has n_out, clear of src):
 *
 *   logits = router x + router_bias
 *   chosen = the n_used experts with the highest score + selection_bias; of equals the lowest id
 *   weight = score of the chosen (without selection_bias), divided by their sum if renormalise,
 *            times weight_scale
 *   h_e    = act(gate_e x + gate_bias_e) * (up_e x + up_bias_e), without gate act(up_e x + ...)
 *   dst    = sum over the chosen e of weight_e * (down_e h_e + down_bias_e)
 *
 * Matrices of all experts lie in one weight each, ne = {inputs, outputs, n_experts}; their biases
 * too, ne = {outputs, n_experts}. docs/plugin-abi.md says the rest. */
struct gqa_op_experts {
    uint32_t n_experts, n_used;
    uint32_t gating;         /* enum gqa_gating_kind */
    uint32_t renormalise;    /* 1: weights of the chosen sum to weight_scale */
    float weight_scale;      /* above 0; 1: none */
    uint32_t router;         /* weight, ne = {n_in, n_experts} */
    uint32_t router_bias;    /* weight, ne = {n_experts}, or GQA_NONE */
    uint32_t selection_bias; /* weight, ne = {n_experts}, or GQA_NONE: moves the choice only */
    uint32_t act;            /* enum gqa_act_kind */
    float alpha, limit;      /* SWIGLU_OAI */
    uint32_t gate, up, down; /* weights with ne[2] = n_experts; gate GQA_NONE: none */
    uint32_t gate_bias, up_bias, down_bias; /* weights with ne[1] = n_experts, or GQA_NONE */
    /* 1: up holds both, each expert's gate outputs in front of its up outputs (and up_bias too);
     * gate and gate_bias are GQA_NONE. */
    uint32_t fused;
};

struct gqa_op {
    uint32_t kind;  /* enum gqa_op_kind */
    uint32_t layer; /* index into attn_layers for ATTENTION; else for messages; GQA_NONE: none */
    struct gqa_view src, src2, src3, dst; /* dst may equal src, but not overlap it otherwise */
    uint32_t weight, bias;                /* indices into weights, or GQA_NONE */
    float scale;                          /* EMBED, ADD, SCALE, SOFTCAP */
    uint32_t flags; /* none is defined: 0. prepare() refuses what it does not know */
    union {
        uint64_t room[16]; /* what a kind does not use is 0 */
        struct {
            uint32_t row; /* enum gqa_embed_row */
        } embed;
        struct {
            uint32_t kind; /* enum gqa_norm_kind */
            uint32_t dim;  /* group width: the view's for a layer norm, head_dim for qk-norm */
            float eps;
        } norm;
        struct {
            uint32_t kind; /* enum gqa_rope_kind */
            uint32_t head_dim, n_rot;
            uint32_t table; /* index into rope_tables */
        } rope;
        struct {
            uint32_t kind;      /* enum gqa_act_kind */
            float alpha, limit; /* SWIGLU_OAI */
        } glu;
        struct {
            uint32_t adapters; /* 1: rows may carry adapter ids; see struct gqa_adapter */
        } linear;
        struct gqa_op_experts experts;
    } u;
};

/* Angles of a rotary embedding: pair i of a row at position p turns by p * freqs[i]; the result is
 * multiplied by magnitude. Every scaling scheme (linear, YaRN, Llama 3, LongRoPE) is such a
 * table.*/
struct gqa_rope_table {
    uint32_t n_freqs; /* n_rot / 2 */
    const double *freqs;
    float magnitude;
    uint32_t flags; /* none is defined: 0. prepare() refuses what it does not know */
};

/* What an adapter (LoRA) changes in one matrix: LINEAR ops of that weight with linear.adapters = 1
 * add scale * (b (a x)) to the result of each row that carries the id in gqa_batch.adapters. An
 * adapter is as many of these as it changes matrices; rows of other ids, or GQA_NONE, are left
 * alone. There is one at most for an id and a weight. */
struct gqa_adapter {
    uint32_t id;     /* any but GQA_NONE */
    uint32_t weight; /* the matrix that it changes, index into weights: ne = {n_in, n_out} */
    uint32_t a;      /* weight of type F32, F16 or BF16, ne = {n_in, rank} */
    uint32_t b;      /* weight of type F32, F16 or BF16, ne = {rank, n_out} */
    float scale;     /* usually alpha / rank */
};

struct gqa_program_desc {
    uint32_t struct_size;
    uint32_t max_rows, max_out_rows; /* of any batch */
    uint32_t n_ops, n_regs, n_weights, n_attn_layers, n_rope_tables;
    const struct gqa_op *ops;
    const struct gqa_reg *regs;
    const struct gqa_weight *weights;
    const struct gqa_attn_layer *attn_layers; /* gqa_layer_at(): they are struct_size apart */
    const struct gqa_rope_table *rope_tables;
    uint32_t n_adapters;
    uint32_t flags; /* none is defined: 0. prepare() refuses what it does not know */
    const struct gqa_adapter *adapters;
};

/* A layer of the description, whose host may know a longer struct than the plugin, or a shorter. */
static inline const struct gqa_attn_layer *gqa_layer_at(const struct gqa_program_desc *desc,
                                                        uint32_t index)
{
    const char *first = (const char *)desc->attn_layers;

    return (const struct gqa_attn_layer *)(first + (size_t)index * desc->attn_layers->struct_size);
}

struct gqa_batch {
    uint32_t struct_size;
    uint32_t n_rows, n_out;
    const int32_t *tokens;     /* (n_rows), each checked against the vocabulary by the host */
    const uint32_t *positions; /* (n_rows), for RoPE and learned positions */
    const uint32_t *out_rows;  /* (n_out), ascending */
    const float *embeddings;   /* (n_rows, width) instead of tokens, or NULL */
    const uint32_t *adapters;  /* (n_rows) ids that desc has, GQA_NONE: none; or NULL */
    const struct gqa_attn_batch *attention;
};

/* What all ops of a kind took since prepare(). A sum of a step's ns is its time, but for what lies
 * between ops; bytes are those that had to be read at least: weights once, and K and V. */
struct gqa_op_time {
    uint32_t kind;   /* enum gqa_op_kind */
    uint32_t unused; /* 0 */
    uint64_t calls, rows, ns, bytes;
};

/* All data that desc points to stays where it is until release(). A row's results depend on its own
 * inputs only: never on how many rows, which chunk, which threads or which other sequences. */
struct gqa_program {
    uint32_t struct_size;
    uint32_t numerics; /* version of the results: changes whenever bits may change */
    /* Bytes that a weight takes in this backend's own layout for ops of that kind; 0: used as it
     * lies in the file. pack_id names the layout (for caches of packed weights). */
    const char *pack_id;
    uint64_t (*pack_bytes)(void *context, const struct gqa_weight *weight);
    /* Packs rows [first_row, first_row + n_rows) of the weight (a range that is a multiple of
     * pack_rows, or reaches the end) into dst, the start of the whole packed tensor. Rows of a
     * weight of several matrices (ne[2] > 1) count on from one matrix to the next. Thread-safe on
     * disjoint ranges. */
    uint32_t pack_rows;
    uint32_t caps; /* none is defined: 0 */
    int (*pack)(void *context, const struct gqa_weight *weight, uint64_t first_row, uint64_t n_rows,
                void *dst);
    /* Copies desc's arrays (not the weights). -ENOTSUP with a reason naming op, tensor and type. */
    int (*prepare)(void *context, const struct gqa_program_desc *desc, void **ret_program,
                   struct gqa_reason *reason);
    void (*release)(void *context, void *program);
    /* One step: begin, then run over all ops in order (in as many ranges as the host likes), then
     * end. The batch stays valid until end. */
    int (*begin)(void *context, void *program, const struct gqa_batch *batch);
    int (*run)(void *context, void *program, uint32_t first_op,
               uint32_t last_op); /* [first, last) */
    int (*end)(void *context, void *program);
    /* A register's rows in host memory, width floats apart: valid between begin and the next begin.
     * For host-memory backends; others give NULL except for registers that were downloaded. */
    float *(*data)(void *context, void *program, uint32_t reg);
    /* Fills up to max entries, one for each kind of op that has run, and returns how many there
     * are. Any thread, also while steps run; of a step in progress some ops are counted. NULL: the
     * plugin keeps no times. */
    uint32_t (*op_times)(void *context, void *program, struct gqa_op_time *ret, uint32_t max);
    /* gqa_attention.observe for programs whose registers the host cannot see
     * (GQA_ATTN_CAP_OBSERVE); NULL: it hands over the registers that data() gives. After run() of
     * ATTENTION op and before the next run() or end(), of that op's rows; votes is host memory, and
     * complete when this returns. */
    int (*observe)(void *context, void *program, uint32_t op, uint32_t seq, uint32_t n_observed,
                   uint32_t n_votes, float *votes);
};

#ifdef __cplusplus
}
#endif

#endif
