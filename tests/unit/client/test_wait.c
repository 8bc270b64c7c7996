/* Waiting: how long a wait looks before it sleeps, told by the time that it takes of its core. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define ANSWER_MS    5u
#define N_CALLS      40u
#define ASLEEP_US    20000.0 /* of CPU time that all calls may take which sleep: 500 us each */
#define LONG_SPIN_US 50000u

/* The daemon computes on every core: each answer takes a while. */
static void slow(int fd, void *arg)
{
    const struct timespec t = {.tv_nsec = ANSWER_MS * 1000000L};
    peer_hello(fd, GQA_PROTOCOL_VERSION);
    for (;;) {
        uint32_t id = peer_expect(fd, "gqa.ping");
        nanosleep(&t, NULL);
        peer_answer(fd, id);
    }
}

static void quick(int fd, void *arg)
{
    peer_hello(fd, GQA_PROTOCOL_VERSION);
    for (;;) {
        peer_answer(fd, peer_expect(fd, "gqa.ping"));
    }
}

static struct gqa *connect_to(peer_script script, uint32_t spin_us, pid_t *ret_pid)
{
    struct gqa *g = NULL;
    int fd;
    struct gqa_connect_options o = {
        .struct_size = sizeof(o), .flags = GQA_CONNECT_FD, .timeout_ms = 20000, .spin_us = spin_us};
    *ret_pid = peer_start(script, NULL, &fd);
    o.fd = fd;
    cr_assert_eq(gqa_connect(&o, &g, NULL), 0);
    return g;
}

/* Of this thread, for all calls. */
static double cpu_us_of_calls(struct gqa *g)
{
    struct timespec t[2];
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t[0]);
    for (unsigned i = 0; i < N_CALLS; i++) {
        cr_assert_eq(gqa_ping(g, NULL), 0);
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t[1]);
    return (double)(t[1].tv_sec - t[0].tv_sec) * 1e6 + (double)(t[1].tv_nsec - t[0].tv_nsec) / 1e3;
}

static void expect_sleep(uint32_t spin_us)
{
    pid_t pid;
    struct gqa *g = connect_to(slow, spin_us, &pid);
    cr_expect_lt(cpu_us_of_calls(g), ASLEEP_US);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

Test(wait, slow_answers_are_slept_for)
{
    expect_sleep(0);
    expect_sleep(GQA_SPIN_NEVER);
}

Test(wait, who_asks_for_it_looks_all_the_time)
{
    pid_t pid;
    struct gqa *g = connect_to(slow, LONG_SPIN_US, &pid);
    /* A tenth of it, for others may have had the core. */
    cr_expect_gt(cpu_us_of_calls(g), N_CALLS * ANSWER_MS * 100.0);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

Test(wait, quick_answers_come_however_a_wait_waits)
{
    static const uint32_t spins[] = {0, 1, LONG_SPIN_US, GQA_SPIN_NEVER};
    for (size_t i = 0; i < sizeof(spins) / sizeof(spins[0]); i++) {
        pid_t pid;
        struct gqa *g = connect_to(quick, spins[i], &pid);
        cpu_us_of_calls(g);
        gqa_close(g);
        cr_expect_eq(peer_finish(pid), 0);
    }
}

Test(wait, the_environment_decides_where_the_program_does_not)
{
    setenv("GQA_SPIN_US", "50000", 1);
    pid_t pid;
    struct gqa *g = connect_to(slow, 0, &pid);
    cr_expect_gt(cpu_us_of_calls(g), N_CALLS * ANSWER_MS * 100.0);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
    expect_sleep(GQA_SPIN_NEVER);
    setenv("GQA_SPIN_US", "0", 1);
    expect_sleep(0);
}

Test(wait, an_environment_that_makes_no_sense_is_told)
{
    static const char *const wrong[] = {"-1", "much", "10us", "4294967295", "99999999999999999999"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct gqa *g = NULL;
        struct gqa_error e;
        const struct gqa_connect_options o = {
            .struct_size = sizeof(o), .flags = GQA_CONNECT_FD, .fd = -1};
        setenv("GQA_SPIN_US", wrong[i], 1);
        cr_expect_eq(gqa_connect(&o, &g, &e), -EINVAL);
        cr_expect_not_null(strstr(e.message, "GQA_SPIN_US"));
    }
}
