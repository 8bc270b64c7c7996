#include "client/cli/cli.h"

#include <stdlib.h>

int cli_tokenise(struct cli *c, const char *model, const char *text, size_t bytes, bool add_special,
                 int32_t **ret_ids, size_t *ret_count)
{
    struct gqa_params *p = cli_model_params(model);
    json_t *result = NULL;
    gqa_params_text(p, "text", text, bytes);
    gqa_params_bool(p, "add_special", add_special);
    gqa_params_bool(p, "parse_special", false);
    int code = cli_call(c, "text.tokenize", p, NULL, NULL, &result);
    if (code != CLI_OK) {
        return code;
    }
    const json_t *tokens = json_object_get(result, "tokens");
    size_t n = json_array_size(tokens);
    int32_t *ids = calloc(n + 1, sizeof(*ids));
    for (size_t i = 0; ids != NULL && i < n; i++) {
        ids[i] = (int32_t)json_integer_value(json_array_get(tokens, i));
    }
    json_decref(result);
    if (ids == NULL) {
        return cli_error(EX_OSERR, "no memory for %zu tokens", n);
    }
    *ret_ids = ids;
    *ret_count = n;
    return CLI_OK;
}
