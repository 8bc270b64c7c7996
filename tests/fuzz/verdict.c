/* Any bytes as a remembered verdict: taken or not, and never read beyond their end. The checksum is
 * put right first, so that the report behind it is reached; then the file as it came. */
#include "daemon/backend/verdict.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void check(const char *file, size_t bytes, const struct verdict_key *key)
{
    struct plugin_report report;
    if (verdict_parse(file, bytes, key, &report) &&
        (!verdict_may_be_kept(&report) || !report.remembered ||
         strnlen(report.name, sizeof(report.name)) == sizeof(report.name) ||
         report.n_cases > PLUGIN_CASES_MAX)) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const struct verdict_key key = {"0123456789abcdef0123456789abcdef"};
    char head[VERDICT_HEAD_BYTES + 1];
    char *file = malloc(VERDICT_HEAD_BYTES + bytes);
    if (file == NULL) {
        return 0;
    }
    snprintf(head, sizeof(head), "gqad verdict 1 %s %016" PRIx64 "\n", key.text,
             (uint64_t)XXH3_64bits(data, bytes));
    memcpy(file, head, VERDICT_HEAD_BYTES);
    memcpy(file + VERDICT_HEAD_BYTES, data, bytes);
    check(file, VERDICT_HEAD_BYTES + bytes, &key);
    free(file);
    char *exact = malloc(bytes > 0 ? bytes : 1);
    if (exact != NULL && bytes > 0) {
        memcpy(exact, data, bytes);
        check(exact, bytes, &key);
    }
    free(exact);
    return 0;
}
