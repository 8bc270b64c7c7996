#include "daemon/sched/publish.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROWS_EVENT_BYTES_MAX (4u << 20) /* far below the largest message */

/* One allocation: the event, then its token, then its text. */
static int emit_tokens(const struct publisher *p, struct sequence *s,
                       const struct sampled_token *token, const char *text, size_t text_bytes)
{
    if (token == NULL && text_bytes == 0) {
        return 0;
    }
    size_t token_bytes = token != NULL ? sizeof(*token) : 0;
    struct request_event *e = calloc(1, sizeof(*e) + token_bytes + text_bytes);
    if (e == NULL) {
        return -ENOMEM;
    }
    char *tail = (char *)(e + 1);
    e->kind = REQUEST_TOKENS;
    e->request = s->request;
    e->part = (uint32_t)s->part;
    if (token != NULL) {
        memcpy(tail, token, token_bytes);
        e->tokens = (const struct sampled_token *)tail;
        e->n_tokens = 1;
    }
    if (text_bytes > 0) {
        memcpy(tail + token_bytes, text, text_bytes);
    }
    e->text = tail + token_bytes;
    e->text_bytes = text_bytes;
    e->bytes = sizeof(*e) + token_bytes + text_bytes;
    atomic_fetch_add(&s->request->undelivered_bytes, e->bytes);
    p->emit(p->arg, e);
    return 0;
}

/* Limits that end a generation after this token. */
static void check_limits(struct sequence *s, uint64_t now_ns)
{
    const struct request *r = s->request;
    if (sequence_sample(s)->n_generated >= r->n_predict ||
        s->n_tokens >= sequence_positions_max(r)) {
        sequence_end_sample(s, FINISH_LENGTH);
    } else if (r->t_max_predict_ms > 0 &&
               now_ns - s->prompt_done_ns > (uint64_t)r->t_max_predict_ms * 1000000u) {
        sequence_end_sample(s, FINISH_TIME);
    }
}

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int publish_token(const struct publisher *p, struct sequence *s, const struct draw *draw,
                  uint64_t now_ns)
{
    struct request *r = s->request;
    int32_t token = draw->token.token;
    r->timings.sampling_ms += (double)draw->ns / 1e6;
    int rc = draw->rc < 0 ? draw->rc : sequence_append(s, token);
    if (rc < 0) {
        return rc;
    }
    r->n_generated++;
    sequence_sample(s)->n_generated++;
    s->last_token_ns = now_ns;
    const char *text = "";
    size_t text_bytes = 0;
    const struct tokenizer *tokenizer = model_tokenizer(r->model);
    if (tokenizer_is_eog(tokenizer, token)) {
        sequence_end_sample(s, FINISH_EOS);
    } else {
        struct gguf_string piece = {"", 0};
        int stop = -1;
        /* Embeddings may outnumber the vocabulary: such a token has no text. */
        tokenizer_piece(tokenizer, token, false, &piece);
        rc = text_stream_push(s->text, piece.data, piece.bytes, &text, &text_bytes, &stop);
        if (rc < 0) {
            return rc;
        }
        if (stop >= 0) {
            sequence_sample(s)->stop_index = stop;
            sequence_end_sample(s, FINISH_STOP);
        }
        if (sampler_is_complete(s->sampler)) {
            sequence_end_sample(
                s, FINISH_EOS); /* nothing but an end-of-generation token could follow */
        }
    }
    check_limits(s, now_ns);
    return emit_tokens(p, s, &draw->token, text, text_bytes);
}

int publish_rest(const struct publisher *p, struct sequence *s)
{
    const char *text = "";
    size_t text_bytes = 0;
    if (s->text == NULL || sequence_sample(s)->finish == FINISH_STOP) {
        return 0;
    }
    int rc = text_stream_flush(s->text, &text, &text_bytes);
    return rc < 0 ? rc : emit_tokens(p, s, NULL, text, text_bytes);
}

/* log p(token) under the softmax of one row of logits. */
static float logprob(const float *logits, uint32_t n_vocab, int32_t token)
{
    float max = logits[0];
    for (uint32_t i = 1; i < n_vocab; i++) {
        max = logits[i] > max ? logits[i] : max;
    }
    double sum = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        sum += exp((double)logits[i] - max);
    }
    return (float)((double)logits[token] - max - log(sum));
}

/* An event, and where its rows are to be written: in the client's data area while there is room,
 * else behind the event. Its bytes are what the daemon's own memory has of it. */
static struct request_event *rows_event(struct sequence *s, uint32_t first_row, uint32_t n_rows,
                                        uint32_t width, float **ret_rows)
{
    struct area *area = s->request->area;
    size_t bytes = (size_t)n_rows * width * sizeof(float);
    uint64_t place = 0;
    void *rows = NULL;
    bool is_placed = area_take(area, bytes, &place, &rows) == 0;
    size_t event_bytes = sizeof(struct request_event) + (is_placed ? 0 : bytes);
    struct request_event *e = malloc(event_bytes);
    if (e == NULL) {
        if (is_placed) {
            area_give(area, place);
        }
        return NULL;
    }
    rows = is_placed ? rows : e + 1;
    *e = (struct request_event){.kind = REQUEST_ROWS,
                                .request = s->request,
                                .made_ns = clock_ns(),
                                .part = (uint32_t)s->part,
                                .first_row = first_row,
                                .n_rows = n_rows,
                                .rows = rows,
                                .is_placed = is_placed,
                                .place = place,
                                .bytes = event_bytes};
    *ret_rows = rows;
    return e;
}

static void emit_rows(const struct publisher *p, struct request_event *e)
{
    atomic_fetch_add(&e->request->undelivered_bytes, e->bytes);
    p->emit(p->arg, e);
}

static uint32_t rows_per_event(uint32_t width)
{
    uint32_t n = ROWS_EVENT_BYTES_MAX / ((uint32_t)sizeof(float) * width);
    return n > 0 ? n : 1;
}

int publish_rows(const struct publisher *p, struct sequence *s, const float *logits)
{
    const struct request *r = s->request;
    uint32_t n_vocab = model_shape(r->model)->n_vocab;
    uint32_t width = r->logprobs ? 1 : n_vocab;
    uint32_t per_event = rows_per_event(width);
    /* The step's rows are committed: the first of them is at n_tokens - step_rows. */
    uint32_t first = s->kv.n_tokens - s->step_rows;
    first = first > r->first_row ? first : r->first_row;
    first = first > s->n_taken ? first : (uint32_t)s->n_taken; /* computed again after a fault */
    for (uint32_t done = 0; done < s->step_outs;) {
        uint32_t n = s->step_outs - done < per_event ? s->step_outs - done : per_event;
        float *rows = NULL;
        struct request_event *e = rows_event(s, first + done, n, width, &rows);
        if (e == NULL) {
            return -ENOMEM;
        }
        const float *src = logits + (size_t)done * n_vocab;
        for (uint32_t i = 0; r->logprobs && i < n; i++) {
            rows[i] = logprob(src + (size_t)i * n_vocab, n_vocab, s->tokens[first + done + i + 1]);
        }
        if (!r->logprobs) {
            memcpy(rows, src, (size_t)n * n_vocab * sizeof(float));
        }
        emit_rows(p, e);
        done += n;
    }
    s->n_taken = s->kv.n_tokens;
    return 0;
}

int publish_embeddings(const struct publisher *p, struct sequence *s, const float *rows,
                       uint32_t n_embd)
{
    const struct request_embed *embed = &s->request->embed;
    uint32_t per_event = rows_per_event(embed->width);
    /* The outputs are the step's last rows. */
    uint32_t first = s->kv.n_tokens - s->step_outs;
    for (uint32_t done = 0; done < s->step_outs;) {
        uint32_t n = s->step_outs - done < per_event ? s->step_outs - done : per_event;
        float *to = NULL;
        struct request_event *e = rows_event(s, first + done, n, embed->width, &to);
        if (e == NULL) {
            return -ENOMEM;
        }
        for (uint32_t i = 0; i < n; i++, to += embed->width) {
            memcpy(to, rows + (size_t)(done + i) * n_embd, embed->width * sizeof(*to));
            embedding_normalise(to, embed->width, embed->norm);
        }
        emit_rows(p, e);
        done += n;
    }
    return 0;
}

void publish_done(const struct publisher *p, struct request *r, struct request_event *done)
{
    done->kind = REQUEST_DONE;
    done->request = r;
    p->emit(p->arg, done);
}
