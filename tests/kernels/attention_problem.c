/* tests/kernels/attention_problem.c - random attention problems. */
#include "tests/kernels/attention_problem.h"
#include "tests/kernels/attention_stored.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- memory and random numbers ----------------------------------------------------------- */

void *attn_allocate(size_t bytes)
{
    void *memory = NULL;

    if (posix_memalign(&memory, 64, bytes != 0 ? bytes : 64) != 0) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return memory;
}

uint64_t attn_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

float attn_random_normal(uint64_t *state)
{
    float sum = 0.0f;

    for (int i = 0; i < 2; i++) {
        uint64_t z = attn_random(state);
        sum += (float)(z & 0xffffff) + (float)(z >> 40);
    }
    return (sum * 0x1p-24f - 2.0f) * 1.7320508f; /* four uniform ones: variance 4/12 */
}

static float *random_values(uint64_t *state, size_t n, float magnitude)
{
    float *values = attn_allocate(n * sizeof(*values));

    for (size_t i = 0; i < n; i++) {
        values[i] = attn_random_normal(state) * magnitude;
    }
    return values;
}

/* ---- the problem ------------------------------------------------------------------------- */

static size_t align_bytes(size_t n)
{
    return (n + 63) & ~(size_t)63;
}

static void init_layer(struct attn_problem *p)
{
    const struct attn_spec *s = &p->spec;
    struct gqa_attn_layer *l = &p->layer;

    *l = (struct gqa_attn_layer){
        .struct_size = sizeof(*l),
        .n_heads = s->n_heads,
        .n_kv_heads = s->n_kv_heads,
        .k_dim = s->k_dim,
        .v_dim = s->v_dim,
        .k_type = s->k_type,
        .v_type = s->v_type,
        .window = s->window,
        .scale = 1.0f / sqrtf((float)s->k_dim),
        .softcap = s->softcap,
        .sinks = p->sinks,
        .k_offset = 64, /* as if another layer came first */
    };
    l->k_head_bytes = align_bytes(GQA_KV_BLOCK_TOKENS * attn_token_bytes(s->k_type, s->k_dim));
    l->v_head_bytes = align_bytes(GQA_KV_BLOCK_TOKENS * attn_token_bytes(s->v_type, s->v_dim));
    l->v_offset = l->k_offset + s->n_kv_heads * l->k_head_bytes;
    p->page_bytes = l->v_offset + s->n_kv_heads * l->v_head_bytes;
}

void attn_problem_init(struct attn_problem *p, const struct attn_spec *spec)
{
    uint64_t state = spec->seed;

    *p = (struct attn_problem){.spec = *spec};
    if (spec->sinks) {
        p->sinks = random_values(&state, spec->n_heads, 2.0f);
    }
    init_layer(p);
    for (uint32_t i = 0; i < spec->n_seqs; i++) {
        struct attn_problem_seq *s = &p->seqs[i];

        s->n_tokens = spec->seqs[i].n_past + spec->seqs[i].n_rows;
        s->q = random_values(&state, (size_t)s->n_tokens * spec->n_heads * spec->k_dim,
                             spec->magnitude);
        s->k = random_values(&state, (size_t)s->n_tokens * spec->n_kv_heads * spec->k_dim, 1.0f);
        s->v = random_values(&state, (size_t)s->n_tokens * spec->n_kv_heads * spec->v_dim, 1.0f);
        s->n_pages = (s->n_tokens + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS;
        s->pages = calloc(s->n_pages + 1, sizeof(*s->pages));
        p->n_rows += spec->seqs[i].n_rows;
    }
    attn_problem_forget(p);
}

void attn_problem_forget(struct attn_problem *p)
{
    for (uint32_t i = 0; i < p->spec.n_seqs; i++) {
        for (uint32_t b = 0; b < p->seqs[i].n_pages; b++) {
            if (p->seqs[i].pages[b] == NULL) {
                p->seqs[i].pages[b] = attn_allocate(p->page_bytes);
            }
            memset(p->seqs[i].pages[b], 0xff, p->page_bytes); /* NaN in every type */
        }
    }
}

void attn_problem_finish(struct attn_problem *p)
{
    for (uint32_t i = 0; i < p->spec.n_seqs; i++) {
        for (uint32_t b = 0; b < p->seqs[i].n_pages; b++) {
            free(p->seqs[i].pages[b]);
        }
        free(p->seqs[i].pages);
        free(p->seqs[i].q);
        free(p->seqs[i].k);
        free(p->seqs[i].v);
    }
    free(p->sinks);
}

/* ---- running it -------------------------------------------------------------------------- */

/* One step's rows of all sequences, gathered with strides that are wider than the rows. */
struct step {
    struct gqa_attn_seq seqs[ATTN_SEQS_MAX];
    struct gqa_page_table tables[ATTN_SEQS_MAX];
    uint32_t problem_seq[ATTN_SEQS_MAX];
    int history; /* causal and committed, whatever the spec says */
    struct gqa_attn_batch batch;
    struct gqa_attn_io io;
    float *q, *k, *v, *out;
};

static void gather(const struct attn_problem *p, struct step *step)
{
    const struct attn_spec *spec = &p->spec;
    size_t q_row = (size_t)spec->n_heads * spec->k_dim,
           k_row = (size_t)spec->n_kv_heads * spec->k_dim;
    size_t v_row = (size_t)spec->n_kv_heads * spec->v_dim;
    struct gqa_attn_io *io = &step->io;

    io->q_stride = q_row + 3;
    io->k_stride = k_row + 1;
    io->v_stride = v_row;
    io->out_stride = (size_t)spec->n_heads * spec->v_dim + 5;
    io->q = step->q = attn_allocate(step->batch.n_rows * io->q_stride * sizeof(float));
    io->k = step->k = attn_allocate(step->batch.n_rows * io->k_stride * sizeof(float));
    io->v = step->v = attn_allocate(step->batch.n_rows * io->v_stride * sizeof(float));
    io->out = step->out = attn_allocate(step->batch.n_rows * io->out_stride * sizeof(float));
    memset(io->out, 0xff, step->batch.n_rows * io->out_stride * sizeof(float));
    for (uint32_t i = 0; i < step->batch.n_seqs; i++) {
        const struct gqa_attn_seq *seq = &step->seqs[i];
        const struct attn_problem_seq *s = &p->seqs[step->problem_seq[i]];

        for (uint32_t j = 0; j < seq->n_rows; j++) {
            size_t row = seq->first_row + j, token = seq->n_past + j;
            memcpy(step->q + row * io->q_stride, s->q + token * q_row, q_row * sizeof(float));
            memcpy(step->k + row * io->k_stride, s->k + token * k_row, k_row * sizeof(float));
            memcpy(step->v + row * io->v_stride, s->v + token * v_row, v_row * sizeof(float));
        }
    }
}

/* Adds rows [n_past, n_past + n_rows) of the problem's sequence to the step. */
static void add_rows(const struct attn_problem *p, struct step *step, uint32_t seq, uint32_t n_past,
                     uint32_t n_rows)
{
    uint32_t i = step->batch.n_seqs;
    int bare = p->spec.no_commit && !step->history;

    if (n_rows == 0) {
        return;
    }
    step->tables[i].n_pages =
        bare ? (n_past + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS : p->seqs[seq].n_pages;
    step->tables[i].pages = p->seqs[seq].pages;
    step->problem_seq[i] = seq;
    step->seqs[i] = (struct gqa_attn_seq){
        .first_row = step->batch.n_rows,
        .n_rows = n_rows,
        .n_past = n_past,
        .tables = bare && n_past == 0 ? NULL : &step->tables[i],
        .mutual = step->history ? 0 : p->spec.seqs[seq].mutual,
        .new_mask = step->history ? NULL : p->spec.seqs[seq].mask,
    };
    step->batch.n_rows += n_rows;
    step->batch.n_seqs++;
}

/* out_rows[i]: where step sequence i's rows go, or NULL: append only. */
static int run_step(const struct attn_problem *p, struct step *step,
                    const struct attn_backend *backend, float *const *out_rows)
{
    size_t out_row = (size_t)p->spec.n_heads * p->spec.v_dim;
    int rc;

    step->batch.struct_size = sizeof(step->batch);
    step->batch.commit = step->history || !p->spec.no_commit;
    step->batch.seqs = step->seqs;
    uint8_t *row_class = calloc(step->batch.n_rows + 1, 1);
    step->batch.row_class = row_class;
    gather(p, step);
    rc = backend->append(backend->context, &p->layer, &step->batch, &step->io);
    if (rc == 0 && out_rows != NULL) {
        rc = backend->attend(backend->context, &p->layer, &step->batch, &step->io);
    }
    for (uint32_t i = 0; rc == 0 && out_rows != NULL && i < step->batch.n_seqs; i++) {
        for (uint32_t j = 0; j < step->seqs[i].n_rows; j++) {
            const float *from = step->out + (step->seqs[i].first_row + j) * step->io.out_stride;
            memcpy(out_rows[i] + j * out_row, from, out_row * sizeof(float));
            for (uint32_t pad = 0; pad < 5; pad++) {
                rc = isnan(from[out_row + pad]) ? rc : -1; /* wrote past the row */
            }
        }
    }
    free(row_class);
    free(step->q);
    free(step->k);
    free(step->v);
    free(step->out);
    return rc;
}

/* A caller may let go of blocks that no coming row can see. */
static void free_before_window(struct attn_problem *p, uint32_t seq, uint32_t next_position)
{
    uint32_t window = p->layer.window;

    for (uint32_t b = 0; window != 0 && b < p->seqs[seq].n_pages; b++) {
        if ((b + 1) * GQA_KV_BLOCK_TOKENS + window <= next_position + 1) {
            free(p->seqs[seq].pages[b]);
            p->seqs[seq].pages[b] = NULL;
        }
    }
}

int attn_problem_run(struct attn_problem *p, const struct attn_backend *backend, uint32_t chunk,
                     float *out)
{
    const struct attn_spec *spec = &p->spec;
    struct step history = {.history = 1};
    int rc;

    for (uint32_t i = 0; i < spec->n_seqs; i++) {
        add_rows(p, &history, i, 0, spec->seqs[i].n_past);
    }
    if (history.batch.n_seqs > 0) {
        rc = run_step(p, &history, backend, NULL);
        if (rc != 0) {
            return rc;
        }
    }
    for (uint32_t done = 0, more = 1; more; done += chunk) {
        struct step step = {0};
        float *out_rows[ATTN_SEQS_MAX], *first = out;

        more = 0;
        for (uint32_t i = 0; i < spec->n_seqs; i++) {
            uint32_t n_rows = spec->seqs[i].n_rows, n_past = spec->seqs[i].n_past;
            uint32_t left = done < n_rows ? n_rows - done : 0;

            free_before_window(p, i, n_past + done);
            out_rows[step.batch.n_seqs] = first + (size_t)done * spec->n_heads * spec->v_dim;
            add_rows(p, &step, i, n_past + done, left < chunk ? left : chunk);
            first += (size_t)n_rows * spec->n_heads * spec->v_dim;
            more |= left > chunk;
        }
        rc = step.batch.n_seqs > 0 ? run_step(p, &step, backend, out_rows) : 0;
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

/* ---- hosts ------------------------------------------------------------------------------- */

static void host_log(void *data, int level, const char *message)
{
    fprintf(stderr, "<%d>%s\n", level, message);
}

static void *host_allocate(void *data, size_t bytes)
{
    void *memory = NULL;

    if (posix_memalign(&memory, 64, bytes) != 0) {
        return NULL;
    }
    return memset(memory, 0, bytes);
}

static void host_release(void *data, void *memory, size_t bytes)
{
    free(memory);
}

static void backwards(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    const struct gqa_host *host = data;

    for (uint32_t i = n_tasks; i-- > 0;) {
        fn(arg, i, i % host->n_threads);
    }
}

struct crew {
    gqa_task_fn fn;
    void *arg;
    uint32_t n_tasks;
    atomic_uint next;
};

struct hand {
    struct crew *crew;
    uint32_t worker;
    pthread_t thread;
};

static void *work(void *arg)
{
    struct hand *hand = arg;
    uint32_t i;

    while ((i = atomic_fetch_add(&hand->crew->next, 1)) < hand->crew->n_tasks) {
        hand->crew->fn(hand->crew->arg, i, hand->worker);
    }
    return NULL;
}

static void on_threads(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    const struct gqa_host *host = data;
    struct crew crew = {.fn = fn, .arg = arg, .n_tasks = n_tasks};
    struct hand hands[64];

    for (uint32_t i = 1; i < host->n_threads; i++) {
        hands[i] = (struct hand){.crew = &crew, .worker = i};
        if (pthread_create(&hands[i].thread, NULL, work, &hands[i]) != 0) {
            fprintf(stderr, "no more threads\n");
            exit(1);
        }
    }
    hands[0] = (struct hand){.crew = &crew};
    work(&hands[0]);
    for (uint32_t i = 1; i < host->n_threads; i++) {
        pthread_join(hands[i].thread, NULL);
    }
}

void attn_host_init(struct gqa_host *host, enum attn_host_kind kind, uint32_t n_threads)
{
    *host = (struct gqa_host){
        .struct_size = sizeof(*host),
        .abi_major = GQA_PLUGIN_ABI_MAJOR,
        .abi_minor = GQA_PLUGIN_ABI_MINOR,
        .n_threads = n_threads,
        .data = host,
        .log = host_log,
        .parallel = kind == ATTN_HOST_THREADS ? on_threads : backwards,
        .allocate = host_allocate,
        .release = host_release,
    };
}
