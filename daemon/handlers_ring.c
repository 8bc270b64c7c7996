/* ring.open, ring.close: what they ask for; the transport makes it. */
#include "daemon/handlers_internal.h"

#define PAGE_BYTES 4096u

static uint64_t whole_pages(uint64_t bytes)
{
    return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

void handle_ring_open(struct call *call)
{
    const struct proto_ring_open *p = &call->params.ring_open;
    const struct ring_sizes sizes = {.ring_bytes = p->ring_bytes,
                                     .in_bytes = whole_pages(p->in_bytes),
                                     .out_bytes = whole_pages(p->out_bytes)};
    struct ipc_error e;
    if (!ring_sizes_are_sound(&sizes)) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'ring_bytes' is %u, which is no power of two",
                  p->ring_bytes);
        return;
    }
    if (call->caller->sink->open_ring(call->caller, &sizes, &e) < 0) {
        call_fail_error(call, &e);
        return;
    }
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 4);
    pack_kv_u64(b, "version", RING_VERSION);
    pack_kv_u64(b, "ring_bytes", sizes.ring_bytes);
    pack_kv_u64(b, "in_bytes", sizes.in_bytes);
    pack_kv_u64(b, "out_bytes", sizes.out_bytes);
    call_end(call);
}

void handle_ring_close(struct call *call)
{
    struct ipc_error e;
    if (call->caller->sink->close_ring(call->caller, &e) < 0) {
        call_fail_error(call, &e);
        return;
    }
    call_end_empty(call);
}
