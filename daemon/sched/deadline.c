#include "daemon/sched/deadline.h"

double deadline_needed_ms(const struct cost *c, const struct deadline_work *work)
{
    if (!cost_knows_prefill(c) || !cost_knows_decode(c)) {
        return 0;
    }
    double rows = (double)work->prompt_tokens, n_batch = work->n_batch;
    double depth = (double)work->cached_tokens;
    const struct cost_work one = {.decode_rows = 1, .depth_tokens = depth + rows};
    const struct cost_work nothing = {0};
    /* Rows of a prompt see half of it in the mean. */
    double prompt_ms =
        rows * cost_row_ms(c, depth + rows / 2) + rows / n_batch * cost_ms(c, &nothing);
    /* The first token comes with the prompt's last row. */
    double more = work->tokens_least > 1 ? (double)(work->tokens_least - 1) : 0;
    return prompt_ms + more * cost_ms(c, &one);
}
