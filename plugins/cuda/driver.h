/* plugins/cuda/driver.h - the CUDA driver, loaded when it is wanted.
 *
 * The plugin links against nothing of CUDA, so that it can be asked anywhere. libcuda.so.1 is
 * opened with RTLD_NODELETE: it keeps threads and handlers of its own, and does not survive
 * dlclose. */
#ifndef PLUGINS_CUDA_DRIVER_H
#define PLUGINS_CUDA_DRIVER_H

#include <cuda.h>
#include <gqa/plugin.h>

/* Every function that is used. cuda.h maps some names to versioned ones: both are meant. */
#define CUDA_FUNCTIONS(X)          \
    X(cuInit)                      \
    X(cuGetErrorString)            \
    X(cuDriverGetVersion)          \
    X(cuDeviceGetCount)            \
    X(cuDeviceGet)                 \
    X(cuDeviceGetName)             \
    X(cuDeviceGetAttribute)        \
    X(cuDevicePrimaryCtxRetain)    \
    X(cuDevicePrimaryCtxRelease)   \
    X(cuCtxPushCurrent)            \
    X(cuCtxPopCurrent)             \
    X(cuModuleLoadData)            \
    X(cuModuleUnload)              \
    X(cuModuleGetFunction)         \
    X(cuFuncSetAttribute)          \
    X(cuMemAlloc)                  \
    X(cuMemFree)                   \
    X(cuMemGetInfo)                \
    X(cuMemHostAlloc)              \
    X(cuMemFreeHost)               \
    X(cuMemsetD8Async)             \
    X(cuMemcpyHtoDAsync)           \
    X(cuMemcpyDtoHAsync)           \
    X(cuMemcpyDtoDAsync)           \
    X(cuStreamCreate)              \
    X(cuStreamDestroy)             \
    X(cuStreamSynchronize)         \
    X(cuLaunchKernel)              \
    X(cuStreamBeginCapture)        \
    X(cuStreamEndCapture)          \
    X(cuGraphInstantiateWithFlags) \
    X(cuGraphLaunch)               \
    X(cuGraphExecDestroy)          \
    X(cuGraphDestroy)              \
    X(cuEventCreate)               \
    X(cuEventDestroy)              \
    X(cuEventRecord)               \
    X(cuEventRecordWithFlags)      \
    X(cuEventElapsedTime)

struct cuda_driver {
#define CUDA_MEMBER(name) __typeof__(name) *name##_;
    CUDA_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
};

/* Calls a function of the driver: CUDA(d, cuInit)(0). */
#define CUDA(driver, name) ((driver)->name##_)

/* Loads the driver and initialises it. -ENODEV with the reason in the driver's or the linker's
 * words where there is none, or no device. */
int cuda_driver_load(struct cuda_driver *ret, char *reason, size_t reason_bytes);

/* What the driver says about a result, or the number. Never NULL. */
const char *cuda_error_text(const struct cuda_driver *d, CUresult result);

/* -ENOMEM, -EIO ... for a result; 0 for success. */
int cuda_errno(CUresult result);

struct cuda_device {
    CUdevice device;
    char name[96];
    int major, minor, n_multiprocessors;
};

/* The first device, or the index-th. Older than sm_80: -ENOTSUP with a reason. */
int cuda_device_find(const struct cuda_driver *d, uint32_t index, struct cuda_device *ret,
                     char *reason, size_t reason_bytes);

#endif
