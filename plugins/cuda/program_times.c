#include "plugins/cuda/program_times.h"

#include "plugins/cuda/program.h"

#include <stdatomic.h>
#include <stdlib.h>

static CUevent *event_before(const struct cuda_times *t, uint32_t op)
{
    return &t->events[2 * (size_t)op];
}

static CUevent *event_behind(const struct cuda_times *t, uint32_t end)
{
    return &t->events[2 * (size_t)end + 1];
}

/* All events at once, when the first timed step begins. */
static bool make_events(struct cuda_program *p)
{
    struct cuda_times *t = &p->times;
    uint32_t n = 2 * (p->n_ops + 1);

    if (t->events != NULL) {
        return t->n_events == n;
    }
    t->events = calloc(n, sizeof(*t->events));
    t->spans = calloc(p->n_ops + 1, sizeof(*t->spans));
    if (t->events == NULL || t->spans == NULL) {
        return false;
    }
    while (t->n_events < n) {
        CUresult result =
            CUDA(&p->context->driver, cuEventCreate)(&t->events[t->n_events], CU_EVENT_DEFAULT);
        if (cuda_check(p->context, result, "an event") < 0) {
            return false;
        }
        t->n_events++;
    }
    return true;
}

void cuda_times_begin(struct cuda_program *p)
{
    struct cuda_times *t = &p->times;
    uint64_t asked = atomic_load_explicit(&t->asked_ns, memory_order_relaxed);

    t->n_spans = 0;
    t->on = asked != 0 && plugin_now_ns() - asked < CUDA_TIMES_KEEP_NS && make_events(p);
}

/* In a graph an event has to be said to be one of whoever launches it. */
static int record(struct cuda_program *p, CUevent event)
{
    unsigned int flags = p->graphs.capturing ? CU_EVENT_RECORD_EXTERNAL : CU_EVENT_RECORD_DEFAULT;
    CUresult result =
        CUDA(&p->context->driver, cuEventRecordWithFlags)(event, p->context->stream, flags);

    return cuda_check(p->context, result, "recording an event");
}

int cuda_times_mark(struct cuda_program *p, uint32_t first, uint32_t i)
{
    if (!p->times.on || (i > first && p->ops[i].op.kind == p->ops[i - 1].op.kind)) {
        return 0;
    }
    return record(p, *event_before(&p->times, i));
}

int cuda_times_close(struct cuda_program *p, uint32_t end)
{
    return p->times.on ? record(p, *event_behind(&p->times, end)) : 0;
}

static uint64_t matrix_bytes(const struct cuda_matrix *m)
{
    return (uint64_t)((m->n_outputs + CUDA_STRIP - 1) / CUDA_STRIP) *
           ((m->n_inputs + CUDA_BLOCK - 1) / CUDA_BLOCK) * cuda_block_bytes(m->type);
}

/* Which experts rows have chosen stays on the device: each has chosen so many, all the same ones
 * at the least. */
static uint64_t mixture_bytes(const struct cuda_mixture *m, uint32_t n_used)
{
    uint64_t gate = m->gate.weight != 0 ? matrix_bytes(&m->gate) : 0;

    return matrix_bytes(&m->router) +
           n_used * (gate + matrix_bytes(&m->up) + matrix_bytes(&m->down));
}

/* What an op has to read at least. */
static uint64_t bytes_of(const struct cuda_program *p, const struct cuda_op *op)
{
    switch (op->op.kind) {
    case GQA_OP_LINEAR:
        return matrix_bytes(&op->matrix);
    case GQA_OP_EXPERTS:
        return mixture_bytes(op->mixture, op->op.u.experts.n_used);
    case GQA_OP_ATTENTION:
        return plugin_attention_bytes(&p->layers[op->op.layer].host, p->step.batch->attention);
    default:
        return 0;
    }
}

void cuda_times_note(struct cuda_program *p, uint32_t first, uint32_t end)
{
    struct cuda_times *t = &p->times;

    for (uint32_t i = first; t->on && i < end; i++) {
        const struct cuda_op *op = &p->ops[i];
        uint64_t rows = cuda_view_rows(p, &op->op.dst);

        if (i == first || op->op.kind != p->ops[i - 1].op.kind) {
            if (t->n_spans == p->n_ops) { /* a range was run again: there is room for once */
                return;
            }
            t->spans[t->n_spans++] = (struct cuda_span){.first = i, .kind = op->op.kind};
        }
        struct cuda_span *span = &t->spans[t->n_spans - 1];
        span->end = i + 1;
        span->closes = i + 1 == end;
        span->rows += rows;
        span->bytes += rows > 0 ? bytes_of(p, op) : 0;
    }
}

void cuda_times_end(struct cuda_program *p)
{
    struct cuda_times *t = &p->times;

    for (uint32_t i = 0; t->on && i < t->n_spans; i++) {
        const struct cuda_span *s = &t->spans[i];
        CUevent end = s->closes ? *event_behind(t, s->end) : *event_before(t, s->end);
        float ms = 0;
        CUresult result =
            CUDA(&p->context->driver, cuEventElapsedTime)(&ms, *event_before(t, s->first), end);
        if (cuda_check(p->context, result, "reading an event") < 0) {
            break; /* once in the log, and the rest of the step is not counted */
        }
        plugin_op_times_count(&t->counted, s->kind, s->end - s->first, s->rows,
                              (uint64_t)((double)ms * 1e6), s->bytes);
    }
    t->n_spans = 0;
}

void cuda_times_finish(struct cuda_program *p)
{
    struct cuda_times *t = &p->times;

    for (uint32_t i = 0; i < t->n_events; i++) {
        CUDA(&p->context->driver, cuEventDestroy)(t->events[i]);
    }
    free(t->events);
    free(t->spans);
    t->events = NULL;
    t->spans = NULL;
    t->n_events = 0;
}

uint32_t cuda_times_read(struct cuda_program *p, struct gqa_op_time *ret, uint32_t max)
{
    atomic_store_explicit(&p->times.asked_ns, plugin_now_ns(), memory_order_relaxed);
    return plugin_op_times_read(&p->times.counted, ret, max);
}
