/* daemon/config_weights.c - the users' shares: NAME=WEIGHT, or UID=WEIGHT. */
#include "daemon/config_internal.h"

#include <errno.h>
#include <limits.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>

static int find_uid(const char *name, uid_t *ret)
{
    char *end;
    errno = 0;
    unsigned long uid = strtoul(name, &end, 10);
    if (name[0] >= '0' && name[0] <= '9' && *end == '\0') {
        *ret = (uid_t)uid;
        return errno == 0 && uid < UINT_MAX ? 0 : -ERANGE;
    }
    const struct passwd *pw = getpwnam(name);
    if (!pw) {
        return -ENOENT;
    }
    *ret = pw->pw_uid;
    return 0;
}

static int parse(const char *text, struct config_weight *ret, struct config_error *err)
{
    char name[256];
    const char *sign = strrchr(text, '=');
    size_t bytes = sign ? (size_t)(sign - text) : 0;
    char *end;
    if (bytes == 0 || bytes >= sizeof(name)) {
        return config_fail(err, -EINVAL, "user_weight: '%s' is not NAME=WEIGHT", text);
    }
    memcpy(name, text, bytes);
    name[bytes] = '\0';
    unsigned long weight = strtoul(sign + 1, &end, 10);
    if (sign[1] < '0' || sign[1] > '9' || *end != '\0' || weight < 1 ||
        weight > CONFIG_WEIGHT_MAX) {
        return config_fail(err, -EINVAL, "user_weight: '%s': the weight is not between 1 and %u",
                           text, CONFIG_WEIGHT_MAX);
    }
    ret->weight = (uint32_t)weight;
    return find_uid(name, &ret->uid) < 0
               ? config_fail(err, -EINVAL, "user_weight: '%s': there is no such user", text)
               : 0;
}

int config_weights(const struct config *c, struct config_weight **ret, struct config_error *err)
{
    struct config_weight *weights = calloc(c->user_weight.count + 1, sizeof(*weights));
    if (!weights) {
        return config_fail(err, -ENOMEM, "no memory for the configuration");
    }
    for (size_t i = 0; i < c->user_weight.count; i++) {
        int rc = parse(c->user_weight.items[i], &weights[i], err);
        if (rc < 0) {
            free(weights);
            return rc;
        }
    }
    *ret = weights;
    return 0;
}
