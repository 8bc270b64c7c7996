/* client/cli/policy.c - the options --kv-*: what a request keeps of its tokens. */
#include "client/cli/cli.h"

#include <string.h>

enum { KEY_POLICY = 0x600 };

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "What is kept of the KV cache:", 8},
    {"kv-policy", KEY_POLICY, "NAME", 0, "full, window, snapkv or snapstream", 8},
    {"kv-positions", KEY_POLICY + 1, "WHERE", 0, "window: original or cache", 8},
    {"kv-pool", KEY_POLICY + 2, "HOW", 0, "snapkv, snapstream: avg or max", 8},
    {"kv-sinks", KEY_POLICY + 3, "N", 0, "window, snapstream: first tokens kept", 8},
    {"kv-recent", KEY_POLICY + 4, "N", 0, "window, snapstream: last tokens kept", 8},
    {"kv-budget", KEY_POLICY + 5, "N", 0, "snapkv: tokens of the prompt kept", 8},
    {"kv-topk", KEY_POLICY + 6, "N", 0, "snapstream: tokens kept between first and last", 8},
    {"kv-window", KEY_POLICY + 7, "N", 0, "snapkv, snapstream: tokens that vote", 8},
    {"kv-kernel", KEY_POLICY + 8, "N", 0, "snapkv, snapstream: neighbours pooled", 8},
    {0},
};

/* The protocol's fields, in the order of the options. */
static const char *const fields[CLI_POLICY_FIELDS] = {
    "kv_policy", "kv_positions", "kv_pool",   "kv_sinks",  "kv_recent",
    "kv_budget", "kv_topk",      "kv_window", "kv_kernel",
};
#define N_NAMES 3 /* of them the first */

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct cli_policy *p = state->input;
    int i = key - KEY_POLICY;
    if (i < 0 || i >= CLI_POLICY_FIELDS) {
        return ARGP_ERR_UNKNOWN;
    }
    p->given[i] = arg;
    if (i >= N_NAMES) {
        p->numbers[i] = cli_number(state, fields[i], arg, 0, UINT32_MAX);
    }
    return 0;
}

const struct argp cli_policy_argp = {.options = options, .parser = parse};

void cli_policy_params(const struct cli_policy *p, struct gqa_params *params)
{
    for (int i = 0; i < CLI_POLICY_FIELDS; i++) {
        if (p->given[i] != NULL && i < N_NAMES) {
            gqa_params_str(params, fields[i], p->given[i]);
        } else if (p->given[i] != NULL) {
            gqa_params_u64(params, fields[i], p->numbers[i]);
        }
    }
}

const char *cli_policy_name(const struct cli_policy *p)
{
    return p->given[0] != NULL ? p->given[0] : "full";
}
