/* tests/abi/witness.c - a library that mentions every struct of the plugin ABI, so that its debug
 * information has them all: built with the headers of ABI 1.0 and with today's, for abidiff. */
#include <gqa/plugin.h>

__attribute__((visibility("default"))) void gqa_abi_witness(const struct gqa_plugin *plugin,
                                                            const struct gqa_note_desc *note,
                                                            const struct gqa_attention *attention,
                                                            const struct gqa_program *program,
                                                            const struct gqa_op_experts *experts,
                                                            const struct gqa_kv_quant *quant);

/* Enums that no member has the type of, since their values travel as uint32_t. */
__attribute__((visibility("default"))) void gqa_abi_witness_of_enums(
    enum gqa_type type, enum gqa_log_level level, enum gqa_row_class row_class,
    enum gqa_attn_caps caps, enum gqa_op_kind op, enum gqa_embed_row row, enum gqa_norm_kind norm,
    enum gqa_rope_kind rope, enum gqa_act_kind act, enum gqa_gating_kind gating);

void gqa_abi_witness(const struct gqa_plugin *plugin, const struct gqa_note_desc *note,
                     const struct gqa_attention *attention, const struct gqa_program *program,
                     const struct gqa_op_experts *experts, const struct gqa_kv_quant *quant)
{
}

void gqa_abi_witness_of_enums(enum gqa_type type, enum gqa_log_level level,
                              enum gqa_row_class row_class, enum gqa_attn_caps caps,
                              enum gqa_op_kind op, enum gqa_embed_row row, enum gqa_norm_kind norm,
                              enum gqa_rope_kind rope, enum gqa_act_kind act,
                              enum gqa_gating_kind gating)
{
}
