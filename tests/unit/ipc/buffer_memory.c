/* The buffer's sticky error, with a realloc that fails when told. */
#include "ipc/codec.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void *__real_realloc(void *p, size_t bytes);
void *__wrap_realloc(void *p, size_t bytes);

static bool failing;
static unsigned n_calls;

void *__wrap_realloc(void *p, size_t bytes)
{
    n_calls++;
    return failing ? NULL : __real_realloc(p, bytes);
}

Test(buffer, keeps_what_it_has_when_memory_runs_out)
{
    struct ipc_buffer b;
    char block[400];

    memset(block, 'x', sizeof(block));
    ipc_buffer_init(&b);
    ipc_pack_bin(&b, block, sizeof(block));
    cr_assert_eq(b.error, 0);
    cr_assert_eq(b.bytes, 403);
    failing = true;
    ipc_pack_bin(&b, block, sizeof(block));
    cr_assert_eq(b.error, -ENOMEM);
    cr_assert_leq(b.bytes, b.capacity);
    cr_assert_eq(b.data[403 - 1], 'x');
    ipc_buffer_finish(&b);
    cr_assert_null(b.data);
    cr_assert_eq(b.error, 0);
}

Test(buffer, the_error_sticks_and_packers_do_nothing)
{
    static const int32_t ids[2] = {1, 2};
    static const float values[2] = {1, 2};
    static const uint64_t shape[1] = {2};
    struct ipc_error e;
    struct ipc_buffer b;

    ipc_error_set(&e, PROTO_E_BUSY, "later");
    ipc_buffer_init(&b);
    failing = true;
    ipc_pack_nil(&b);
    cr_assert_eq(b.error, -ENOMEM);
    failing = false;
    unsigned before = n_calls;
    ipc_pack_bool(&b, true);
    ipc_pack_u64(&b, 1);
    ipc_pack_i64(&b, -1);
    ipc_pack_f32(&b, 1);
    ipc_pack_f64(&b, 1);
    ipc_pack_text(&b, "x", 1);
    ipc_pack_tokens(&b, ids, 2);
    ipc_pack_tensor_f32(&b, values, shape, 1);
    ipc_pack_raw(&b, "x", 1);
    ipc_pack_event(&b, 1, 1);
    ipc_pack_response_error(&b, 1, &e);
    ipc_pack_api_info(&b);
    cr_assert_eq(b.bytes, 0);
    cr_assert_eq(b.error, -ENOMEM);
    cr_assert_eq(n_calls, before);
    ipc_buffer_finish(&b);
}

Test(buffer, growth_is_geometric)
{
    struct ipc_buffer b;
    unsigned before = n_calls;
    ipc_buffer_init(&b);
    for (size_t i = 0; i < 1u << 20; i++) {
        ipc_pack_nil(&b);
    }
    cr_assert_eq(b.error, 0);
    cr_assert_eq(b.bytes, 1u << 20);
    cr_assert_leq(n_calls - before, 12);
    ipc_buffer_finish(&b);
}

Test(buffer, what_messagepack_cannot_count_is_an_error_of_its_own)
{
    static const float value = 1;
    static const uint64_t huge[3] = {UINT64_MAX / 2, UINT64_MAX / 2, 3};
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_array(&b, (size_t)UINT32_MAX + 1);
    cr_assert_eq(b.error, -EMSGSIZE);
    ipc_buffer_finish(&b);
    ipc_pack_tensor_f32(&b, &value, huge, 3);
    cr_assert_eq(b.error, -EMSGSIZE);
    ipc_buffer_finish(&b);
}
