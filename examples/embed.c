/* embed.c - how much texts mean the same: embeds several at once, prints their cosines.
 *
 *   cc embed.c $(pkg-config --cflags --libs libgqa) -o embed
 *   ./embed MODEL "a cat" "a kitten" "the stock exchange"
 */
#include <gqa/client.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Vectors have length 1, so that their product is the cosine of their angle. */
static double cosine(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

static void print_table(const float *values, size_t n_texts, size_t n_dims, char **texts)
{
    for (size_t i = 0; i < n_texts; i++) {
        for (size_t j = 0; j < n_texts; j++) {
            printf("%7.4f", cosine(values + i * n_dims, values + j * n_dims, n_dims));
        }
        printf("  %s\n", texts[i]);
    }
}

static int embed(struct gqa *g, const char *model, char **texts, size_t n_texts,
                 struct gqa_error *error)
{
    struct gqa_params *params;
    int r = gqa_params_create(&params);
    if (r < 0) {
        snprintf(error->name, sizeof(error->name), "ENOMEM");
        snprintf(error->message, sizeof(error->message), "%s", strerror(-r));
        return r;
    }
    /* Failures of these stick to params and are what gqa_embed() returns. */
    gqa_params_str(params, "model", model);
    gqa_params_strings(params, "inputs", (const char *const *)texts, n_texts);

    float *values;
    size_t n_rows, n_dims;
    r = gqa_embed(g, params, NULL, &values, &n_rows, &n_dims, NULL, error);
    gqa_params_destroy(params);
    if (r < 0) {
        return r;
    }
    print_table(values, n_rows, n_dims, texts);
    free(values);
    return 0;
}

int main(int argc, char **argv)
{
    struct gqa_connect_options options = {.struct_size = sizeof(options), .client = "embed/1"};
    struct gqa_error error = {0};
    struct gqa *g;
    if (argc < 3) {
        fprintf(stderr, "usage: embed MODEL TEXT...\n");
        return 64;
    }
    int r = gqa_connect(&options, &g, &error);
    if (r == 0) {
        r = embed(g, argv[1], argv + 2, (size_t)argc - 2, &error);
        gqa_close(g);
    }
    if (r < 0) {
        fprintf(stderr, "embed: %s: %s\n", error.name, error.message);
        return 1;
    }
    return 0;
}
