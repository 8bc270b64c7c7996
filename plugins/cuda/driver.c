#include "plugins/cuda/driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define DRIVER_FILE "libcuda.so.1"
/* mma.sync on bf16 and int8 with 32 k. */
#define SM_MIN 80

#define TEXT_OF(x) #x
#define TEXT(x)    TEXT_OF(x) /* after cuda.h's renaming */

static int find_symbol(void *library, const char *name, void *ret, char *reason, size_t bytes)
{
    void *symbol = dlsym(library, name);

    if (symbol == NULL) {
        snprintf(reason, bytes, "%s has no %s: the driver is too old", DRIVER_FILE, name);
        return -ENODEV;
    }
    memcpy(ret, &symbol, sizeof(symbol)); /* a function's address, as POSIX allows */
    return 0;
}

/* The message of the linker, without what everybody knows. */
static void say_missing(char *reason, size_t bytes)
{
    const char *why = dlerror();

    if (why != NULL && strstr(why, "No such file") != NULL) {
        snprintf(reason, bytes, "%s is not there: no NVIDIA driver is installed", DRIVER_FILE);
    } else {
        snprintf(reason, bytes, "%s", why != NULL ? why : "libcuda.so.1 cannot be loaded");
    }
}

int cuda_driver_load(struct cuda_driver *ret, char *reason, size_t reason_bytes)
{
    struct cuda_driver d;
    int n_devices = 0;

    void *library = dlopen(DRIVER_FILE, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == NULL) {
        say_missing(reason, reason_bytes);
        return -ENODEV;
    }
#define CUDA_FIND(name)                                                             \
    {                                                                               \
        int r = find_symbol(library, TEXT(name), &d.name##_, reason, reason_bytes); \
        if (r < 0) {                                                                \
            return r;                                                               \
        }                                                                           \
    }
    CUDA_FUNCTIONS(CUDA_FIND)
#undef CUDA_FIND
    CUresult result = CUDA(&d, cuInit)(0);
    if (result == CUDA_SUCCESS) {
        result = CUDA(&d, cuDeviceGetCount)(&n_devices);
    }
    if (result != CUDA_SUCCESS) {
        snprintf(reason, reason_bytes, "the CUDA driver says: %s", cuda_error_text(&d, result));
        return -ENODEV;
    }
    if (n_devices == 0) {
        snprintf(reason, reason_bytes, "the CUDA driver knows no device");
        return -ENODEV;
    }
    *ret = d;
    return 0;
}

const char *cuda_error_text(const struct cuda_driver *d, CUresult result)
{
    const char *text = NULL;

    CUDA(d, cuGetErrorString)(result, &text);
    return text != NULL ? text : "an error that it has no words for";
}

int cuda_errno(CUresult result)
{
    switch (result) {
    case CUDA_SUCCESS:
        return 0;
    case CUDA_ERROR_OUT_OF_MEMORY:
        return -ENOMEM;
    case CUDA_ERROR_INVALID_VALUE:
        return -EINVAL;
    default:
        return -EIO;
    }
}

int cuda_device_find(const struct cuda_driver *d, uint32_t index, struct cuda_device *ret,
                     char *reason, size_t reason_bytes)
{
    struct cuda_device found = {0};
    int n = 0;

    CUDA(d, cuDeviceGetCount)(&n);
    if (index >= (uint32_t)n) {
        snprintf(reason, reason_bytes, "device=%u: there are %d", index, n);
        return -ENODEV;
    }
    CUresult result = CUDA(d, cuDeviceGet)(&found.device, (int)index);
    if (result == CUDA_SUCCESS) {
        result = CUDA(d, cuDeviceGetName)(found.name, sizeof(found.name), found.device);
    }
    const struct {
        CUdevice_attribute attribute;
        int *ret;
    } wanted[] = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &found.major},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &found.minor},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &found.n_multiprocessors},
    };
    for (size_t i = 0; result == CUDA_SUCCESS && i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        result = CUDA(d, cuDeviceGetAttribute)(wanted[i].ret, wanted[i].attribute, found.device);
    }
    if (result != CUDA_SUCCESS) {
        snprintf(reason, reason_bytes, "the CUDA driver says: %s", cuda_error_text(d, result));
        return -ENODEV;
    }
    if (found.major * 10 + found.minor < SM_MIN) {
        snprintf(reason, reason_bytes, "%s is sm_%d%d: sm_%d or newer is needed", found.name,
                 found.major, found.minor, SM_MIN);
        return -ENOTSUP;
    }
    *ret = found;
    return 0;
}
