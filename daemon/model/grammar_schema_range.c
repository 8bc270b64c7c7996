/* daemon/model/grammar_schema_range.c - the decimal numbers between two bounds. */
#include "daemon/model/grammar_schema_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define DIGITS_MAX 19 /* of an int64_t */

/* n digits of any kind. */
static void put_any(struct schema_text *out, size_t n)
{
    if (n > 0) {
        schema_put(out, " [0-9]{%zu}", n);
    }
}

/* Numbers of the same length from low to high; both have n digits. The digits that they share come
 * first; then three cases: on the lower bound, free, and on the upper bound. */
static void put_same_length(struct schema_text *out, const char *low, const char *high, size_t n)
{
    static const char zeros[] = "0000000000000000000", nines[] = "9999999999999999999";
    size_t same = 0;
    while (same < n && low[same] == high[same]) {
        same++;
    }
    if (same > 0) {
        schema_put(out, "\"%.*s\" ", (int)same, low);
    }
    if (same == n) {
        return;
    }
    low += same;
    high += same;
    n -= same;
    bool whole_low = memcmp(low + 1, zeros, n - 1) == 0;
    bool whole_high = memcmp(high + 1, nines, n - 1) == 0;
    char from = (char)(low[0] + !whole_low), to = (char)(high[0] - !whole_high);
    const char * or = "";
    schema_put(out, "(");
    if (!whole_low) {
        schema_put(out, "\"%c\" ", low[0]);
        put_same_length(out, low + 1, nines, n - 1);
        or = " | ";
    }
    if (from <= to) {
        schema_put(out, "%s[%c-%c]", or, from, to);
        put_any(out, n - 1);
        or = " | ";
    }
    if (!whole_high) {
        schema_put(out, "%s\"%c\" ", or, high[0]);
        put_same_length(out, zeros, high + 1, n - 1);
    }
    schema_put(out, ")");
}

/* low <= high, without a sign. */
static void put_range(struct schema_text *out, uint64_t low, uint64_t high)
{
    char from[24], to[24], all[24];
    snprintf(from, sizeof(from), "%" PRIu64, low);
    snprintf(to, sizeof(to), "%" PRIu64, high);
    size_t last = strlen(to);
    for (size_t n = strlen(from); n <= last; n++) {
        memset(all, '9', n);
        all[n] = '\0';
        put_same_length(out, from, n == last ? to : all, n);
        schema_put(out, n < last ? " | " : "");
        memset(from, '0', n + 1);
        from[0] = '1';
        from[n + 1] = '\0';
    }
}

/* Numbers from low on, with up to 16 digits, or as many as low has. */
static void put_from(struct schema_text *out, uint64_t low)
{
    uint64_t high = 9999999999999999;
    put_range(out, low, low <= high ? high : UINT64_C(9223372036854775807));
}

static uint64_t magnitude(int64_t x)
{
    return x < 0 ? -(uint64_t)x : (uint64_t)x;
}

void schema_integers(const int64_t *least, const int64_t *most, struct schema_text *out)
{
    schema_put(out, "(");
    if (!least || *least < 0) { /* -high to -low, but no -0 */
        uint64_t low = most && *most < 0 ? magnitude(*most) : 1;
        schema_put(out, "\"-\" (");
        if (least) {
            put_range(out, low, magnitude(*least));
        } else {
            put_from(out, low);
        }
        schema_put(out, ")%s", !most || *most >= 0 ? " | " : "");
    }
    if (!most) {
        put_from(out, least && *least > 0 ? (uint64_t)*least : 0);
    } else if (*most >= 0) {
        put_range(out, least && *least > 0 ? (uint64_t)*least : 0, (uint64_t)*most);
    }
    schema_put(out, ")");
}
