/* tests/cuda/bench.c - times against floors, on a machine with a GPU.
 *
 *   bench-cuda [--tiny] [--json FILE] [PART...]
 *   bench-cuda --probe          only says whether there is a GPU
 *
 * PART is floors, products, experts, attention or models; all but floors, which the others have in
 * them, where none is named. --tiny makes everything small and runs it once: its figures mean
 * nothing, and it ends in seconds on an emulated GPU.
 *
 * A floor is what the bytes take at the speed of a copy, measured in the same run, or the
 * operations at the tensor cores' peak (multiprocessors x clock x operations a clock), whichever is
 * longer. Times of kernels are the best of several runs of many launches, so that launches overlap;
 * operands are larger than the second-level cache where that is what a model's are. Where a share
 * of the floor is asked for, the line ends with it, and with "ok" or "MISSED".
 *
 * Exit status: 0 all was measured, whatever it was; 77 without a GPU; 1 else. */
#include "tests/cuda/bench.h"

#include "tools/plugin-check/hosts.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define POOL_BYTES      (1ull << 30)
#define TINY_POOL_BYTES (8ull << 20)
#define THREADS_MAX     8

void bench_check(int r, const char *what)
{
    if (r < 0) {
        fprintf(stderr, "bench-cuda: %s: %s\n", what, strerror(-r));
        exit(1);
    }
}

float bench_random(void)
{
    static uint32_t state = 1;

    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

double bench_seconds(struct bench *b, int (*fn)(struct bench *b, void *arg, int i), void *arg)
{
    const struct cuda_driver *d = &b->c->driver;
    CUevent first, last;
    double best = 1e9;

    CUDA(d, cuEventCreate)(&first, CU_EVENT_DEFAULT);
    CUDA(d, cuEventCreate)(&last, CU_EVENT_DEFAULT);
    for (int run = 0; run <= b->runs; run++) {
        float ms = 0;
        CUDA(d, cuEventRecord)(first, b->c->stream);
        for (int i = 0; i < b->launches; i++) {
            bench_check(fn(b, arg, i), "a launch");
        }
        CUDA(d, cuEventRecord)(last, b->c->stream);
        bench_check(cuda_synchronise(b->c), "waiting");
        CUDA(d, cuEventElapsedTime)(&ms, first, last);
        double s = (double)ms / 1e3 / b->launches;
        best = run > 0 && s < best ? s : best; /* the first one warms up */
    }
    CUDA(d, cuEventDestroy)(first);
    CUDA(d, cuEventDestroy)(last);
    return best;
}

/* ---- lines ------------------------------------------------------------------------------- */

#define JSON_END "\n]}\n"

static void open_json(struct bench *b, const char *path)
{
    b->json = path != NULL ? fopen(path, "w") : NULL;
    if (path != NULL && b->json == NULL) {
        perror(path);
        exit(1);
    }
    if (b->json != NULL) {
        fprintf(b->json,
                "{\"device\": \"%s\", \"copy_bytes_per_s\": %.0f, \"half_flops_per_s\": %.0f,\n"
                "\"lines\": [" JSON_END,
                b->c->device.name, b->copy_bytes_per_s, b->half_flops_per_s);
        fflush(b->json);
    }
}

/* Over the end of what is there, and with the same end: what was measured is kept by whatever ends
 * the process. */
static void add_json(struct bench *b, const char *name, const struct bench_line *l, double floor)
{
    fseek(b->json, -(long)strlen(JSON_END), SEEK_END);
    fprintf(b->json,
            "%s\n    {\"name\": \"%s\", \"us\": %.3f, \"bytes\": %.0f, \"flops\": %.0f, "
            "\"floor_us\": %.3f, \"share\": %.4f, \"wanted\": %.2f}" JSON_END,
            b->n_lines > 0 ? "," : "", name, l->seconds * 1e6, l->bytes, l->flops, floor * 1e6,
            floor / l->seconds, l->wanted);
    fflush(b->json);
}

void bench_report(struct bench *b, const char *name, const struct bench_line *l)
{
    double by_bytes = l->bytes / b->copy_bytes_per_s;
    double by_flops = l->peak > 0 ? l->flops / l->peak : 0; /* 0: the driver tells no clock */
    double floor = by_bytes > by_flops ? by_bytes : by_flops, share = floor / l->seconds;

    printf("%-52s %11.1f us  %7.0f GB/s  %7.1f Tflop/s  floor %9.1f us (%s)  %5.1f %%", name,
           l->seconds * 1e6, l->bytes / l->seconds / 1e9, l->flops / l->seconds / 1e12, floor * 1e6,
           by_bytes > by_flops ? "bytes" : "flops", 100 * share);
    if (l->wanted > 0) {
        printf("  wanted %.0f %%: %s", 100 * l->wanted, share >= l->wanted ? "ok" : "MISSED");
        b->n_missed += share < l->wanted;
    }
    printf("\n");
    fflush(stdout);
    if (b->json != NULL) {
        add_json(b, name, l, floor);
    }
    b->n_lines++;
}

/* ---- the machine ------------------------------------------------------------------------- */

static int copy(struct bench *b, void *arg, int i)
{
    uint64_t half = b->pool_bytes / 2;
    CUresult result =
        CUDA(&b->c->driver, cuMemcpyDtoDAsync)(b->pool + half, b->pool, half, b->c->stream);

    return cuda_check(b->c, result, "copy");
}

/* Dense operations a clock of one multiprocessor: A100 312 Tflop/s, H100 989 Tflop/s of f16. */
static void find_peaks(struct bench *b)
{
    const struct cuda_device *device = &b->c->device;
    int khz = 0;

    CUDA(&b->c->driver, cuDeviceGetAttribute)(&khz, CU_DEVICE_ATTRIBUTE_CLOCK_RATE, device->device);
    double a_clock = device->major >= 9 ? 4096 : device->minor == 0 ? 2048 : 1024;
    b->half_flops_per_s = a_clock * device->n_multiprocessors * khz * 1e3;
    b->int8_flops_per_s = 2 * b->half_flops_per_s;
    b->copy_bytes_per_s = (double)b->pool_bytes / bench_seconds(b, copy, NULL); /* read, written */
    printf("%s, sm_%d%d, %d multiprocessors at %.0f MHz; copies %.0f GB/s; peak f16 %.0f, int8 "
           "%.0f Tflop/s\n",
           device->name, device->major, device->minor, device->n_multiprocessors, khz / 1e3,
           b->copy_bytes_per_s / 1e9, b->half_flops_per_s / 1e12, b->int8_flops_per_s / 1e12);
    fflush(stdout);
}

/* ---- all of it --------------------------------------------------------------------------- */

void bench_floors(struct bench *b)
{
    bench_attention_floors(b);
    bench_model_floors(b);
}

static const struct part {
    const char *name;
    void (*run)(struct bench *b);
    bool always; /* where none is named */
} parts[] = {
    {"floors", bench_floors, false},  {"products", bench_products, true},
    {"experts", bench_experts, true}, {"attention", bench_attention, true},
    {"models", bench_models, true},
};
#define N_PARTS (sizeof(parts) / sizeof(parts[0]))

/* What the command line asks for. */
struct asked {
    bool probe, tiny, any;
    bool part[N_PARTS];
    const char *json;
};

static bool parse(int argc, char **argv, struct asked *ret)
{
    for (int i = 1; i < argc; i++) {
        size_t part = 0;
        if (strcmp(argv[i], "--probe") == 0) {
            ret->probe = true;
            continue;
        }
        if (strcmp(argv[i], "--tiny") == 0) {
            ret->tiny = true;
            continue;
        }
        if (strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
            ret->json = argv[++i];
            continue;
        }
        while (part < N_PARTS && strcmp(argv[i], parts[part].name) != 0) {
            part++;
        }
        if (part == N_PARTS) {
            fprintf(stderr, "usage: bench-cuda [--tiny] [--json FILE] [PART...]\n"
                            "       bench-cuda --probe\n");
            return false;
        }
        ret->part[part] = ret->any = true;
    }
    return true;
}

static void run(struct bench *b, const struct asked *asked)
{
    struct cuda_buffer pool = {0};

    bench_check(cuda_enter(b->c), "the device");
    bench_check(cuda_buffer_reserve(b->c, &pool, b->pool_bytes), "memory");
    b->pool = pool.at;
    find_peaks(b);
    open_json(b, asked->json);
    for (size_t i = 0; i < N_PARTS; i++) {
        if (asked->any ? asked->part[i] : parts[i].always) {
            parts[i].run(b);
        }
    }
    if (b->json != NULL) {
        fclose(b->json);
    }
    cuda_buffer_finish(b->c, &pool);
    cuda_leave(b->c);
}

int main(int argc, char **argv)
{
    struct gqa_reason reason = {""};
    struct asked asked = {0};
    struct host_team *team;
    long n_cores = sysconf(_SC_NPROCESSORS_ONLN);

    if (!parse(argc, argv, &asked)) {
        return 1;
    }
    bool one = asked.tiny || n_cores < 2;
    bench_check(host_team_create(one                     ? 1
                                 : n_cores > THREADS_MAX ? THREADS_MAX
                                                         : (uint32_t)n_cores,
                                 &team),
                "threads");
    struct bench b = {.host = host_team_host(team),
                      .tiny = asked.tiny,
                      .runs = asked.tiny ? 1 : 5,
                      .launches = asked.tiny ? 1 : 20,
                      .pool_bytes = asked.tiny ? TINY_POOL_BYTES : POOL_BYTES};
    int r = cuda_context_create(b.host, "", &b.c, &reason);
    if (r < 0) {
        printf("SKIPPED: NO GPU HERE, NOTHING WAS MEASURED: %s\n", reason.text);
        return 77;
    }
    if (!asked.probe) {
        run(&b, &asked);
    } else {
        printf("%s, sm_%d%d\n", b.c->device.name, b.c->device.major, b.c->device.minor);
    }
    cuda_context_destroy(b.c);
    host_team_destroy(team);
    if (b.n_missed > 0) {
        printf("%d of the shares that are asked for MISSED\n", b.n_missed);
    }
    return 0;
}
