/* generate.c - the shortest useful client: connects, continues a prompt, prints as it comes.
 *
 *   cc generate.c $(pkg-config --cflags --libs libgqa) -o generate
 *   ./generate MODEL "Once upon a time"
 */
#include <gqa/client.h>

#include <inttypes.h>
#include <stdio.h>

/* Called for every step. Returning anything but 0 would stop the generation. */
static int print_text(void *arg, const char *text, size_t bytes, const int32_t *ids, size_t n_ids)
{
    size_t *n_tokens = arg;
    *n_tokens += n_ids;
    fwrite(text, 1, bytes, stdout);
    return fflush(stdout);
}

static int generate(struct gqa *g, const char *model, const char *prompt, struct gqa_error *error)
{
    struct gqa_params *params;
    int r = gqa_params_create(&params);
    if (r < 0) {
        return r;
    }
    /* Failures of these stick to params and are what gqa_generate() returns. */
    gqa_params_str(params, "model", model);
    gqa_params_str(params, "prompt", prompt);
    gqa_params_u64(params, "n_predict", 64);
    gqa_params_f64(params, "temperature", 0.7);

    struct gqa_reply *reply;
    size_t n_tokens = 0;
    r = gqa_generate(g, params, NULL, print_text, &n_tokens, &reply, error);
    gqa_params_destroy(params);
    if (r < 0) {
        return r;
    }
    uint64_t n_prompt = 0, n_cached = 0;
    double speed = 0;
    const struct gqa_value *result = gqa_reply_value(reply);
    gqa_value_u64(gqa_value_get(result, "n_prompt"), &n_prompt);
    gqa_value_u64(gqa_value_get(result, "n_cached"), &n_cached);
    gqa_value_f64(gqa_value_get(gqa_value_get(result, "timings"), "predicted_per_second"), &speed);
    printf("\n");
    fprintf(stderr,
            "%zu tokens at %.1f a second; %" PRIu64 " of %" PRIu64 " prompt tokens cached\n",
            n_tokens, speed, n_cached, n_prompt);
    gqa_reply_destroy(reply);
    return 0;
}

int main(int argc, char **argv)
{
    struct gqa_connect_options options = {.struct_size = sizeof(options), .client = "generate/1"};
    struct gqa_error error = {0};
    struct gqa *g;
    if (argc != 3) {
        fprintf(stderr, "usage: generate MODEL PROMPT\n");
        return 64;
    }
    int r = gqa_connect(&options, &g, &error);
    if (r == 0) {
        r = generate(g, argv[1], argv[2], &error);
        gqa_close(g);
    }
    if (r < 0) {
        fprintf(stderr, "generate: %s: %s\n", error.name, error.message);
        return 1;
    }
    return 0;
}
