#include "daemon/model/pack.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define PIECE_BYTES (4u << 20) /* of source, per piece of work */
#define MAX_PACKERS 64u

/* A piece: some rows of one weight. Threads take pieces in order. */
struct piece {
    struct gqa_weight *weight;
    uint64_t first_row, n_rows;
    uint64_t bytes; /* of packed data, for progress */
};

struct job {
    const struct gqa_program *iface;
    void *context;
    struct piece *pieces;
    size_t n_pieces;
    atomic_size_t next;
    atomic_int rc; /* the first failure */
    const atomic_bool *cancel;
    _Atomic uint64_t done_bytes;
};

/* Takes one piece; false when none are left or the job has failed. */
static bool pack_one(struct job *job)
{
    size_t i = atomic_fetch_add(&job->next, 1);
    if (i >= job->n_pieces || atomic_load(&job->rc) != 0) {
        return false;
    }
    struct piece *p = &job->pieces[i];
    int rc = job->cancel != NULL && *job->cancel
                 ? -ECANCELED
                 : job->iface->pack(job->context, p->weight, p->first_row, p->n_rows,
                                    (void *)p->weight->packed);
    if (rc < 0) {
        atomic_store(&job->rc, rc);
        return false;
    }
    atomic_fetch_add(&job->done_bytes, p->bytes);
    return true;
}

static void *packer_main(void *arg)
{
    while (pack_one(arg)) {
    }
    return NULL;
}

static size_t rows_per_piece(const struct gqa_program *iface, const struct gqa_weight *w)
{
    uint64_t all_rows = w->ne[1] * w->ne[2] * w->ne[3];
    uint64_t row_bytes = w->packed_bytes / (all_rows > 0 ? all_rows : 1) + 1;
    uint64_t rows = PIECE_BYTES / row_bytes;
    uint64_t unit = iface->pack_rows > 0 ? iface->pack_rows : 1;
    rows = rows / unit * unit;
    return rows > 0 ? rows : unit;
}

/* Cuts the weights that are packed into pieces. Only the first n_max are stored. */
static size_t cut_pieces(const struct gqa_program *iface, struct model_program *program,
                         struct piece *pieces, size_t n_max)
{
    size_t n = 0;
    for (uint32_t i = 0; i < program->n_weights; i++) {
        struct gqa_weight *w = &program->weights[i];
        if (w->packed_bytes == 0) {
            continue;
        }
        uint64_t rows = w->ne[1] * w->ne[2] * w->ne[3];
        uint64_t step = rows_per_piece(iface, w);
        for (uint64_t row = 0; row < rows; row += step, n++) {
            uint64_t n_rows = rows - row < step ? rows - row : step;
            if (n < n_max) {
                pieces[n] = (struct piece){w, row, n_rows, w->packed_bytes / rows * n_rows};
            }
        }
    }
    return n;
}

static int run_job(struct job *job, uint32_t n_threads, uint64_t total,
                   void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg)
{
    pthread_t threads[MAX_PACKERS];
    uint32_t started = 0;
    uint32_t wanted = n_threads > 0 ? n_threads - 1 : 0;
    while (started < wanted && started < MAX_PACKERS &&
           pthread_create(&threads[started], NULL, packer_main, job) == 0) {
        started++;
    }
    while (pack_one(job)) {
        if (progress != NULL) {
            progress(arg, atomic_load(&job->done_bytes), total);
        }
    }
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(threads[i], NULL);
    }
    return atomic_load(&job->rc);
}

int pack_run(struct backend *backend, struct model_program *program, uint64_t total,
             uint32_t n_threads, const atomic_bool *cancel,
             void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg)
{
    const struct gqa_program *iface = backend_program(backend);
    struct job job = {.iface = iface, .context = backend_context(backend), .cancel = cancel};
    job.n_pieces = cut_pieces(iface, program, NULL, 0);
    job.pieces = calloc(job.n_pieces, sizeof(*job.pieces));
    if (job.pieces == NULL) {
        return -ENOMEM;
    }
    cut_pieces(iface, program, job.pieces, job.n_pieces);
    int rc = run_job(&job, n_threads, total, progress, arg);
    free(job.pieces);
    return rc;
}
