/* client/cli/eval.h - what verbs that score tokens share: gqa eval, its needle and longgen, and gqa
 * perplexity. */
#ifndef CLI_EVAL_H
#define CLI_EVAL_H

#include "client/cli/cli.h"

/* Model, KV policy, and what is read. */
struct eval_input {
    const char *needed; /* what -f FILE gives, where it must be there: "text"; or NULL */
    struct cli_load load;
    struct cli_policy policy;
    const char *file; /* or NULL */
};
/* An argp child with all of their options; its input is a struct eval_input. */
extern const struct argp eval_input_argp;

/* Connects and sees to it that the model is there; *ret_info (may be NULL): model.info. Prints and
 * returns an exit code, as all of these. */
int eval_open(struct cli *c, struct eval_input *in, json_t **ret_info);

/* The file's ids, with the special tokens that the model wants; *ret_ids is the caller's (free). */
int eval_read_tokens(struct cli *c, const struct eval_input *in, int32_t **ret_ids,
                     size_t *ret_count);

/* Sums over scored tokens. */
struct eval_score {
    double logprob, squares;
    uint64_t n_tokens;
};

/* Adds the log-probabilities of tokens [first, n), each after all before it; first is at least 1.
 * What comes before first is the prompt, to the policy (NULL: full). */
int eval_score(struct cli *c, const char *model, const struct cli_policy *policy,
               const int32_t *ids, size_t n, size_t first, struct eval_score *sum);

/* Verbs of gqa eval. */
int cli_eval_longgen(struct cli *c, int argc, char **argv);
int cli_eval_needle(struct cli *c, int argc, char **argv);

#endif
