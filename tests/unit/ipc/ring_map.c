/* Shared memory: what the daemon made cannot be changed in size, gives its pages back, and a client
 * takes nothing else for it. */
#include "ipc/ring_map.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct ring_sizes sizes = {
    .ring_bytes = 8192, .in_bytes = 65536, .out_bytes = 1u << 20};

static struct ring_map daemon_map, client_map;
static int fds[2] = {-1, -1};

static void setup(void)
{
    cr_assert_eq(ring_map_create(&sizes, &daemon_map, fds), 0);
}

static void teardown(void)
{
    ring_map_finish(&client_map);
    ring_map_finish(&daemon_map);
    close(fds[0]);
    close(fds[1]);
}

TestSuite(ring_map, .init = setup, .fini = teardown);

static uint64_t pages_bytes(int fd)
{
    struct stat st;
    cr_assert_eq(fstat(fd, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

Test(ring_map, sizes)
{
    struct ring_sizes s = sizes;
    cr_expect(ring_sizes_are_sound(&s));
    cr_expect_eq(ring_sizes_total(&s), 4096 + 2 * 8192 + 65536 + (1u << 20));
    s.ring_bytes = 8191;
    cr_expect_not(ring_sizes_are_sound(&s));
    s.ring_bytes = 2048;
    cr_expect_not(ring_sizes_are_sound(&s));
    s.ring_bytes = RING_BYTES_MAX * 2;
    cr_expect_not(ring_sizes_are_sound(&s));
    s = sizes;
    s.in_bytes = 4095;
    cr_expect_not(ring_sizes_are_sound(&s));
    s.in_bytes = 0;
    cr_expect_not(ring_sizes_are_sound(&s));
    s = sizes;
    s.out_bytes = RING_AREA_PART_MAX + 4096;
    cr_expect_not(ring_sizes_are_sound(&s));
}

Test(ring_map, nobody_can_change_a_size)
{
    for (int i = 0; i < 2; i++) {
        struct stat st;
        cr_assert_eq(fstat(fds[i], &st), 0);
        cr_expect_eq(ftruncate(fds[i], 0), -1);
        cr_expect_eq(errno, EPERM);
        cr_expect_eq(ftruncate(fds[i], st.st_size * 2), -1);
        cr_expect_eq(fallocate(fds[i], 0, st.st_size, 4096), -1);
        cr_expect_eq(fcntl(fds[i], F_ADD_SEALS, F_SEAL_WRITE), -1, "no more seals");
        cr_expect_eq(fcntl(fds[i], F_ADD_SEALS, F_SEAL_FUTURE_WRITE), -1);
        cr_expect_neq(fcntl(fds[i], F_GETFD) & FD_CLOEXEC, 0);
    }
}

Test(ring_map, messages_pass_between_two_mappings)
{
    struct ring_in d_in, c_in;
    struct ring_out d_out, c_out;
    static uint8_t record[RING_RECORD_MAX];
    const uint8_t question[] = "question", answer[] = "answer";
    size_t bytes, done = 0;
    bool last;
    cr_assert_eq(ring_map_open(fds, &sizes, &client_map), 0);
    cr_assert_neq((void *)client_map.control, (void *)daemon_map.control);
    ring_map_daemon_ends(&daemon_map, &d_in, &d_out);
    ring_map_client_ends(&client_map, &c_in, &c_out);
    cr_assert_eq(ring_out_put(&c_out, question, sizeof(question), &done), 1);
    ring_out_publish(&c_out);
    cr_assert_eq(ring_in_take(&d_in, 1u << 20, record, &bytes, &last), 1);
    cr_assert_eq(memcmp(record, question, sizeof(question)), 0);
    done = 0;
    cr_assert_eq(ring_out_put(&d_out, answer, sizeof(answer), &done), 1);
    ring_out_publish(&d_out);
    cr_assert_eq(ring_in_take(&c_in, 1u << 20, record, &bytes, &last), 1);
    cr_assert_eq(memcmp(record, answer, sizeof(answer)), 0);
    strcpy((char *)daemon_map.data + sizes.in_bytes, "tensor");
    cr_assert_str_eq((const char *)client_map.data + sizes.in_bytes, "tensor");
}

Test(ring_map, what_is_discarded_pins_nothing_while_a_client_keeps_the_fds)
{
    cr_assert_eq(ring_map_open(fds, &sizes, &client_map), 0);
    memset(daemon_map.data, 1, sizes.in_bytes + sizes.out_bytes);
    memset(daemon_map.control, 1, RING_CONTROL_BYTES + 2 * sizes.ring_bytes);
    cr_assert_geq(pages_bytes(fds[0]) + pages_bytes(fds[1]), ring_sizes_total(&sizes));
    ring_map_discard(&daemon_map);
    cr_expect_eq(pages_bytes(fds[0]), 0);
    cr_expect_eq(pages_bytes(fds[1]), 0);
    cr_expect_eq(client_map.data[0], 0, "and no access faults");
}

Test(ring_map, a_punched_hole_is_zeros_not_a_fault)
{
    memset(daemon_map.data, 1, sizes.in_bytes);
    cr_assert_eq(fallocate(fds[1], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 65536), 0);
    cr_expect_eq(daemon_map.data[1000], 0);
    cr_assert_eq(fallocate(fds[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
    struct ring_in in;
    struct ring_out out;
    ring_map_daemon_ends(&daemon_map, &in, &out);
    cr_expect_not(ring_in_has_some(&in));
}

static int open_as(uint32_t ring_bytes, uint64_t in_bytes, uint64_t out_bytes)
{
    struct ring_sizes s = {ring_bytes, in_bytes, out_bytes};
    return ring_map_open(fds, &s, &client_map);
}

Test(ring_map, a_client_checks_what_it_was_told)
{
    cr_expect_eq(open_as(4096, sizes.in_bytes, sizes.out_bytes), -EPROTO);
    cr_expect_eq(open_as(16384, sizes.in_bytes, sizes.out_bytes), -EPROTO);
    cr_expect_eq(open_as(sizes.ring_bytes, sizes.in_bytes, sizes.out_bytes * 2), -EPROTO);
    cr_expect_eq(open_as(sizes.ring_bytes, 0, sizes.out_bytes), -EPROTO);
    daemon_map.control->version = RING_VERSION + 1;
    cr_expect_eq(open_as(sizes.ring_bytes, sizes.in_bytes, sizes.out_bytes), -EPROTO);
    daemon_map.control->version = RING_VERSION;
    daemon_map.control->magic = 0;
    cr_expect_eq(open_as(sizes.ring_bytes, sizes.in_bytes, sizes.out_bytes), -EPROTO);
    const int wrong[2] = {STDIN_FILENO, fds[1]};
    cr_expect_eq(ring_map_open(wrong, &sizes, &client_map), -EPROTO);
}

Test(ring_map, an_unsealed_memfd_is_refused)
{
    int loose[2] = {memfd_create("loose", MFD_CLOEXEC), fds[1]};
    cr_assert_eq(ftruncate(loose[0], RING_CONTROL_BYTES + 2 * sizes.ring_bytes), 0);
    cr_expect_eq(ring_map_open(loose, &sizes, &client_map), -EPROTO);
    close(loose[0]);
}
