/* ipc/codec_internal.h - what the codec's files share. */
#ifndef IPC_CODEC_INTERNAL_H
#define IPC_CODEC_INTERNAL_H

#include "ipc/codec.h"

/* How many bytes from the start are well-formed UTF-8; all of them when the text is. */
size_t ipc_utf8_valid_bytes(const char *text, size_t bytes);

/* Memory that lives as long as the message, aligned for any of the params' items; NULL without
 * memory. */
void *ipc_message_alloc(struct ipc_message *m, size_t bytes);

/* A binary value, in the message's memory; the bytes stay the caller's. NULL without memory. */
const struct ipc_value *ipc_message_make_bin(struct ipc_message *m, const void *data,
                                             uint32_t bytes);

/* A field being decoded: where its memory comes from, its row, and where its sentence goes. */
struct field_decoder {
    struct ipc_message *message;
    const struct proto_field *field;
    struct ipc_error *error;
};

/* Checks v against the row and stores it in the params struct's member, which is of the row's C
 * type. 0, -EINVAL or -ENOMEM, both told in d->error; the member is untouched then. */
int ipc_field_decode(const struct field_decoder *d, const struct ipc_value *v, void *ret_member);

#endif
