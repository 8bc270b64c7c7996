/* tests/bench/tokenizer.c - how fast texts become tokens, per vocabulary, on one thread.
 *
 *   bench_tokenizer [-n runs] [-b max_bytes] [-t TEXT]... VOCAB.gguf...
 *
 * Each text (a file; without any, an invented one of several scripts) is encoded as one prompt,
 * once to warm up and then runs times. Printed are the best and the median run in megabytes (10^6
 * bytes) of text a second, and the bytes that a token stands for. Times are the thread's own, so a
 * busy neighbour costs caches and clock but not the waiting. */
#include "daemon/model/tokenizer.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RUNS_MAX      101
#define TEXTS_MAX     16
#define DEFAULT_BYTES (4u << 20)
#define MAX_TOKENS    (1u << 30)
#define N_WORDS       20000u
#define WORD_BYTES    48

struct text {
    const char *name;
    char *data;
    size_t bytes;
};

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static size_t put_character(char *to, uint32_t point)
{
    if (point < 0x80) {
        to[0] = (char)point;
        return 1;
    }
    if (point < 0x800) {
        to[0] = (char)(0xC0 | point >> 6);
        to[1] = (char)(0x80 | (point & 0x3F));
        return 2;
    }
    if (point < 0x10000) {
        to[0] = (char)(0xE0 | point >> 12);
        to[1] = (char)(0x80 | (point >> 6 & 0x3F));
        to[2] = (char)(0x80 | (point & 0x3F));
        return 3;
    }
    to[0] = (char)(0xF0 | point >> 18);
    to[1] = (char)(0x80 | (point >> 12 & 0x3F));
    to[2] = (char)(0x80 | (point >> 6 & 0x3F));
    to[3] = (char)(0x80 | (point & 0x3F));
    return 4;
}

/* Words of one script each, some often and most rarely, as words are (Zipf's law, by the square of
 * a uniform number). */
static void invent_text(struct text *t, size_t bytes)
{
    static const struct {
        uint32_t first, count;
    } scripts[] = {
        {'a', 26},      {'a', 26},      {0xE0, 23},    {0x3B1, 25}, {0x430, 32},
        {0x5D0, 27},    {0x627, 36},    {0x915, 37},   {0xE01, 46}, {0x3042, 80},
        {0x4E00, 2000}, {0xAC00, 2000}, {0x1F600, 64}, {'0', 10},   {0x21, 14},
    };
    static char words[N_WORDS][WORD_BYTES];
    static uint8_t lengths[N_WORDS];
    uint64_t state = 11;
    for (size_t i = 0; i < N_WORDS; i++) {
        size_t script = next_random(&state) % (sizeof(scripts) / sizeof(scripts[0]));
        size_t characters = 1 + next_random(&state) % 9, n = 0;
        for (size_t k = 0; k < characters; k++) {
            uint32_t at = (uint32_t)(next_random(&state) % scripts[script].count);
            n += put_character(&words[i][n], scripts[script].first + at);
        }
        lengths[i] = (uint8_t)n;
    }
    size_t n = 0;
    while (n + WORD_BYTES + 1 < bytes) {
        uint64_t u = next_random(&state) & 0xFFFF, rank = u * u >> 16; /* both below 2^16 */
        size_t word = (size_t)(rank * N_WORDS >> 16);
        memcpy(t->data + n, words[word], lengths[word]);
        n += lengths[word];
        t->data[n++] = next_random(&state) % 16 == 0 ? '\n' : ' ';
    }
    t->bytes = n;
}

static int read_text(struct text *t, const char *path, size_t bytes)
{
    t->name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    FILE *f = fopen(path, "rb");
    if (!f) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -errno;
    }
    t->bytes = fread(t->data, 1, bytes, f);
    fclose(f);
    return 0;
}

static double thread_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int measure(const struct tokenizer *t, const char *vocab, const struct text *text, int runs)
{
    double seconds[RUNS_MAX];
    size_t n_tokens = 0;
    for (int i = -1; i < runs; i++) {
        int32_t *ids;
        struct tokenize_options options = {false, false};
        double start = thread_seconds();
        int rc = tokenizer_encode(t, text->data, text->bytes, options, MAX_TOKENS, &ids, &n_tokens);
        if (rc < 0) {
            fprintf(stderr, "%s: %s: %s\n", vocab, text->name, strerror(-rc));
            return 1;
        }
        if (i >= 0) {
            seconds[i] = thread_seconds() - start;
        }
        free(ids);
    }
    qsort(seconds, (size_t)runs, sizeof(seconds[0]), compare);
    double megabytes = 1e-6 * (double)text->bytes;
    printf("| %-32s | %-20s | %6.1f | %6.1f | %5.2f |\n", vocab, text->name, megabytes / seconds[0],
           megabytes / seconds[runs / 2], n_tokens ? (double)text->bytes / (double)n_tokens : 0.0);
    return 0;
}

static int measure_vocab(const char *path, const struct text *texts, size_t n_texts, int runs)
{
    struct gguf *g;
    struct tokenizer *t;
    struct fmt_error err = {""};
    if (gguf_open(path, &g, &err) < 0) {
        fprintf(stderr, "%s: %s\n", path, err.text);
        return 1;
    }
    int failed = 1;
    if (tokenizer_create(g, &t, &err) < 0) {
        fprintf(stderr, "%s: %s\n", path, err.text);
    } else {
        const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
        failed = 0;
        for (size_t i = 0; i < n_texts; i++) {
            failed |= measure(t, name, &texts[i], runs);
        }
        tokenizer_destroy(t);
    }
    gguf_close(g);
    return failed;
}

static void usage(const char *self)
{
    fprintf(stderr, "usage: %s [-n runs] [-b max_bytes] [-t TEXT]... VOCAB.gguf...\n", self);
}

int main(int argc, char **argv)
{
    struct text texts[TEXTS_MAX];
    const char *paths[TEXTS_MAX];
    size_t n_texts = 0, bytes = DEFAULT_BYTES;
    int runs = 7, option, failed = 0;
    while ((option = getopt(argc, argv, "n:b:t:")) != -1) {
        if (option == 'n') {
            runs = atoi(optarg);
        } else if (option == 'b') {
            bytes = strtoul(optarg, NULL, 10);
        } else if (option == 't' && n_texts < TEXTS_MAX) {
            paths[n_texts++] = optarg;
        } else {
            usage(argv[0]);
            return 64;
        }
    }
    if (optind == argc || runs < 1 || runs > RUNS_MAX || bytes == 0) {
        usage(argv[0]);
        return 64;
    }
    size_t n = n_texts ? n_texts : 1;
    for (size_t i = 0; i < n && !failed; i++) {
        texts[i] = (struct text){"(invented)", malloc(bytes), 0};
        if (!texts[i].data) {
            failed = 1;
        } else if (n_texts == 0) {
            invent_text(&texts[i], bytes);
        } else {
            failed = read_text(&texts[i], paths[i], bytes) < 0;
        }
    }
    printf("| %-32s | %-20s | %6s | %6s | %5s |\n", "vocabulary", "text", "best", "median",
           "B/tok");
    printf(
        "|----------------------------------|----------------------|-------:|-------:|------:|\n");
    for (int i = optind; i < argc && !failed; i++) {
        failed = measure_vocab(argv[i], texts, n, runs);
    }
    for (size_t i = 0; i < n; i++) {
        free(texts[i].data);
    }
    return failed;
}
