#include "tests/cuda/emulate/device.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

emulated_index threadIdx, blockIdx;

/* ---- fibers ------------------------------------------------------------------------------ */

#define THREADS_MAX 1024u
#define STACK_BYTES (128u << 10)
#define SHARED_MAX  (100u << 10)

struct fiber {
    void *stack_pointer;
    bool alive;
};

struct warp {
    uint32_t arrived, phase;
    emulated_post posts[2][32];
};

static struct {
    fiber fibers[THREADS_MAX];
    void *scheduler;
    uint32_t current, n_alive;
    uint32_t arrived, phase; /* at the block's barrier */
    uint64_t progress;       /* counts what lets a fiber go on */
    warp warps[THREADS_MAX / 32];
    const emulated_launch *launch;
    char *stacks;
    alignas(256) char shared[SHARED_MAX];
} block;

/* Saves the callee's registers on the stack, its pointer in *from, and takes up `to`. */
extern "C" void emulated_switch(void **from, void *to);
__asm__(".text\n"
        ".globl emulated_switch\n"
        ".hidden emulated_switch\n"
        ".type emulated_switch, @function\n"
        "emulated_switch:\n"
        "    push %rbp\n    push %rbx\n    push %r12\n"
        "    push %r13\n    push %r14\n    push %r15\n"
        "    mov %rsp, (%rdi)\n"
        "    mov %rsi, %rsp\n"
        "    pop %r15\n    pop %r14\n    pop %r13\n"
        "    pop %r12\n    pop %rbx\n    pop %rbp\n"
        "    ret\n"
        ".size emulated_switch, . - emulated_switch\n");

static void yield()
{
    uint32_t me = block.current;
    emulated_switch(&block.fibers[me].stack_pointer, block.scheduler);
    threadIdx = {me, 0};
}

static void fiber_main()
{
    block.launch->kernel(block.launch->args);
    block.fibers[block.current].alive = false;
    block.n_alive--;
    block.progress++;
    if (block.n_alive > 0 && block.arrived == block.n_alive) { /* the others wait for nobody now */
        block.arrived = 0;
        block.phase++;
    }
    yield();
    abort();
}

static void start_fiber(uint32_t i)
{
    char *top = block.stacks + (size_t)(i + 1) * STACK_BYTES;
    void **at = (void **)top - 2; /* so that the function starts as after a call */
    *at = (void *)fiber_main;
    at -= 6;
    memset(at, 0, 6 * sizeof(*at));
    block.fibers[i] = {at, true};
}

void __syncthreads()
{
    uint32_t phase = block.phase;
    if (++block.arrived == block.n_alive) {
        block.arrived = 0;
        block.phase++;
        block.progress++;
        return;
    }
    while (block.phase == phase) {
        yield();
    }
}

const emulated_post *emulated_warp(const emulated_post &mine, void (*work)(emulated_post *all))
{
    warp &w = block.warps[threadIdx.x / 32];
    uint32_t phase = w.phase;
    emulated_post *posts = w.posts[phase % 2];
    posts[threadIdx.x % 32] = mine;
    if (++w.arrived == 32) {
        if (work != nullptr) {
            work(posts);
        }
        w.arrived = 0;
        w.phase++;
        block.progress++;
        return posts;
    }
    while (w.phase == phase) {
        yield();
    }
    return posts;
}

void *emulated_shared()
{
    return block.shared;
}

void emulated_misaligned(const void *at, size_t bytes)
{
    fprintf(stderr, "emulated GPU: a load of %zu bytes from %p\n", bytes, at);
    abort();
}

/* GQAD_EMULATED_ORDER: a result must depend neither on which of the threads that may go on goes
 * first, nor on the blocks' order. What needs a barrier that is missing is right in one order by
 * chance, and wrong in the opposite one. */
enum emulated_order { ORDER_FORWARD, ORDER_REVERSE, ORDER_SCATTERED };

static emulated_order order_wanted()
{
    const char *name = getenv("GQAD_EMULATED_ORDER");

    if (name == NULL || strcmp(name, "forward") == 0) {
        return ORDER_FORWARD;
    }
    if (strcmp(name, "reverse") == 0) {
        return ORDER_REVERSE;
    }
    if (strcmp(name, "scattered") == 0) {
        return ORDER_SCATTERED;
    }
    fprintf(stderr, "emulated GPU: no order is called %s\n", name);
    abort();
}

/* The i-th of n: scattered, steps of a prime come by each once, unless it divides n. */
static uint32_t in_order(uint32_t i, uint32_t n)
{
    static const emulated_order order = order_wanted();

    if (order == ORDER_SCATTERED && n % 1009 != 0) {
        return (uint32_t)((uint64_t)i * 1009 % n);
    }
    return order == ORDER_FORWARD ? i : n - 1 - i;
}

static void run_block(const emulated_launch &l)
{
    memset(block.shared, 0xff, l.shared_bytes);
    memset(block.warps, 0, sizeof(block.warps));
    block.n_alive = l.threads;
    block.arrived = block.phase = 0;
    for (uint32_t i = 0; i < l.threads; i++) {
        start_fiber(i);
    }
    while (block.n_alive > 0) {
        uint64_t before = block.progress;
        for (uint32_t turn = 0; turn < l.threads; turn++) {
            uint32_t i = in_order(turn, l.threads);
            if (block.fibers[i].alive) {
                block.current = i;
                threadIdx = {i, 0};
                emulated_switch(&block.scheduler, block.fibers[i].stack_pointer);
            }
        }
        if (block.progress == before) {
            fprintf(stderr, "emulated GPU: block %u, %u waits for threads that never come\n",
                    blockIdx.x, blockIdx.y);
            abort();
        }
    }
}

void emulated_run(const emulated_launch &l)
{
    if (l.threads == 0 || l.threads > THREADS_MAX || l.threads % 32 != 0 ||
        l.shared_bytes > SHARED_MAX) {
        fprintf(stderr, "emulated GPU: %u threads, %u bytes\n", l.threads, l.shared_bytes);
        abort();
    }
    if (block.stacks == NULL) {
        void *stacks = mmap(NULL, (size_t)THREADS_MAX * STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) {
            perror("emulated GPU: stacks");
            abort();
        }
        block.stacks = (char *)stacks;
    }
    block.launch = &l;
    for (uint32_t y = 0; y < l.grid_y; y++) {
        for (uint32_t x = 0; x < l.grid_x; x++) {
            blockIdx = {in_order(x, l.grid_x), in_order(y, l.grid_y)};
            run_block(l);
        }
    }
}

/* ---- tensor cores ------------------------------------------------------------------------ */

/* Posts: A in words 0..3, B in 4 and 5, C in 8..11. Where a lane's values stand is told by the
 * figures of the PTX ISA: of C, value i is row g + 8 (i / 2), column 2 t + i % 2. */
#define A_WORDS 0
#define B_WORDS 4
#define C_WORDS 8

static uint32_t c_row(uint32_t lane, int i)
{
    return lane / 4 + i / 2 * 8;
}

static uint32_t c_column(uint32_t lane, int i)
{
    return lane % 4 * 2 + i % 2;
}

/* int8: a register holds four k. A's registers 0 and 2 are rows 0..7, 2 and 3 k 16..31. */
static void multiply_s8(emulated_post *all, uint32_t n_k)
{
    int32_t a[16][32] = {}, b[32][8] = {};
    for (uint32_t k = 0; k < n_k; k++) {
        for (uint32_t row = 0; row < 16; row++) {
            const emulated_post &from = all[row % 8 * 4 + k % 16 / 4];
            a[row][k] = (int8_t)(from.words[A_WORDS + row / 8 + k / 16 * 2] >> 8 * (k % 4));
        }
        for (uint32_t column = 0; column < 8; column++) {
            const emulated_post &from = all[column * 4 + k % 16 / 4];
            b[k][column] = (int8_t)(from.words[B_WORDS + k / 16] >> 8 * (k % 4));
        }
    }
    for (uint32_t lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            uint32_t sum = all[lane].words[C_WORDS + i];
            for (uint32_t k = 0; k < n_k; k++) {
                sum += (uint32_t)(a[c_row(lane, i)][k] * b[k][c_column(lane, i)]);
            }
            all[lane].words[C_WORDS + i] = sum;
        }
    }
}

static void multiply_s8_32(emulated_post *all)
{
    multiply_s8(all, 32);
}

static void multiply_s8_16(emulated_post *all)
{
    multiply_s8(all, 16);
}

/* 16 bits: a register holds two k. A's registers 0 and 2 are rows 0..7, 2 and 3 k 8..15. How the
 * tensor core rounds its sums is not told: exact sums here, rounded once. */
static void multiply_halves(emulated_post *all, float (*widen)(uint32_t))
{
    double a[16][16] = {}, b[16][8] = {};
    for (uint32_t k = 0; k < 16; k++) {
        for (uint32_t row = 0; row < 16; row++) {
            const emulated_post &from = all[row % 8 * 4 + k % 8 / 2];
            uint32_t word = from.words[A_WORDS + row / 8 + k / 8 * 2];
            a[row][k] = widen(word >> 16 * (k % 2) & 0xffff);
        }
        for (uint32_t column = 0; column < 8; column++) {
            uint32_t word = all[column * 4 + k % 8 / 2].words[B_WORDS + k / 8];
            b[k][column] = widen(word >> 16 * (k % 2) & 0xffff);
        }
    }
    for (uint32_t lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            double sum = __uint_as_float(all[lane].words[C_WORDS + i]);
            for (uint32_t k = 0; k < 16; k++) {
                sum += a[c_row(lane, i)][k] * b[k][c_column(lane, i)];
            }
            all[lane].words[C_WORDS + i] = __float_as_uint((float)sum);
        }
    }
}

static float widen_f16(uint32_t h)
{
    return f16_to_float(h);
}

static float widen_bf16(uint32_t h)
{
    return __uint_as_float(h << 16);
}

static void multiply_f16(emulated_post *all)
{
    multiply_halves(all, widen_f16);
}

static void multiply_bf16(emulated_post *all)
{
    multiply_halves(all, widen_bf16);
}

/* c: four words of any type. */
static void multiply(void *c, const uint32_t a[4], uint32_t b0, uint32_t b1,
                     void (*work)(emulated_post *all))
{
    emulated_post post = {{a[0], a[1], a[2], a[3], b0, b1}};
    memcpy(post.words + C_WORDS, c, 16);
    memcpy(c, emulated_warp(post, work)[threadIdx.x % 32].words + C_WORDS, 16);
}

void mma_s8(int32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    multiply(c, a, b0, b1, multiply_s8_32);
}

void mma_s8_half(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t b)
{
    const uint32_t a[4] = {a0, a1, 0, 0};
    multiply(c, a, b, 0, multiply_s8_16);
}

void mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    multiply(c, a, b0, b1, multiply_f16);
}

void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    multiply(c, a, b0, b1, multiply_bf16);
}
