/* Pairs of a map, so that the handlers read like the maps they answer with. */
#include "daemon/handlers_internal.h"

void pack_kv_str(struct ipc_buffer *b, const char *key, const char *value)
{
    ipc_pack_str(b, key);
    ipc_pack_str(b, value ? value : "");
}

void pack_kv_u64(struct ipc_buffer *b, const char *key, uint64_t value)
{
    ipc_pack_str(b, key);
    ipc_pack_u64(b, value);
}

void pack_kv_i64(struct ipc_buffer *b, const char *key, int64_t value)
{
    ipc_pack_str(b, key);
    ipc_pack_i64(b, value);
}

void pack_kv_f64(struct ipc_buffer *b, const char *key, double value)
{
    ipc_pack_str(b, key);
    ipc_pack_f64(b, value);
}

void pack_kv_bool(struct ipc_buffer *b, const char *key, bool value)
{
    ipc_pack_str(b, key);
    ipc_pack_bool(b, value);
}

void pack_kv_map(struct ipc_buffer *b, const char *key, size_t count)
{
    ipc_pack_str(b, key);
    ipc_pack_map(b, count);
}

void pack_kv_array(struct ipc_buffer *b, const char *key, size_t count)
{
    ipc_pack_str(b, key);
    ipc_pack_array(b, count);
}

void pack_kv_list(struct ipc_buffer *b, const char *key, const char *comma_separated)
{
    size_t count = comma_separated[0] ? 1 : 0;
    for (const char *c = comma_separated; *c; c++) {
        count += *c == ',';
    }
    pack_kv_array(b, key, count);
    const char *start = comma_separated;
    for (size_t i = 0; i < count; i++) {
        const char *end = start;
        while (*end && *end != ',') {
            end++;
        }
        ipc_pack_text(b, start, (size_t)(end - start));
        start = end + 1;
    }
}
