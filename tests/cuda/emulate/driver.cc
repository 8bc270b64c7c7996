/* tests/cuda/emulate/driver.cc - a libcuda.so.1 whose only device is the emulated one.
 *
 * It lets the plugin itself, gqa-plugin-check and the daemon run without a GPU: found before the
 * system's by LD_LIBRARY_PATH. Memory is the host's, every call is done when it returns.
 * EMULATED_CUDA=error makes cuInit fail as where a driver has no device. */
#include <cuda.h>

#include "tests/cuda/emulate/counts.h"
#include "tests/cuda/emulate/device.h"
#include "tests/cuda/emulate/kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) CUresult

static int something; /* handles point at it */

/* For tests: what was called since the process began. */
static emulated_counts counts;

extern "C" __attribute__((visibility("default"))) const emulated_counts *emulated_cuda_counts()
{
    return &counts;
}

API cuInit(unsigned int)
{
    const char *mood = getenv("EMULATED_CUDA");
    return mood != NULL && strcmp(mood, "error") == 0 ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}

API cuGetErrorString(CUresult error, const char **text)
{
    switch (error) {
    case CUDA_SUCCESS:
        *text = "no error";
        break;
    case CUDA_ERROR_NO_DEVICE:
        *text = "no CUDA-capable device is detected";
        break;
    case CUDA_ERROR_OUT_OF_MEMORY:
        *text = "out of memory";
        break;
    case CUDA_ERROR_NOT_FOUND:
        *text = "named symbol not found";
        break;
    default:
        *text = "invalid argument";
        break;
    }
    return CUDA_SUCCESS;
}

API cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

API cuDeviceGetCount(int *count)
{
    *count = 1;
    return CUDA_SUCCESS;
}

API cuDeviceGet(CUdevice *device, int)
{
    *device = 0;
    return CUDA_SUCCESS;
}

API cuDeviceGetName(char *name, int bytes, CUdevice)
{
    snprintf(name, (size_t)bytes, "emulated GPU");
    return CUDA_SUCCESS;
}

API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = 8;
        break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = 2;
        break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
        *value = 1000; /* kHz */
        break;
    default:
        *value = 0;
        break;
    }
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice)
{
    *context = (CUcontext)&something;
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxRelease(CUdevice)
{
    return CUDA_SUCCESS;
}

API cuCtxPushCurrent(CUcontext)
{
    return CUDA_SUCCESS;
}

API cuCtxPopCurrent(CUcontext *context)
{
    *context = (CUcontext)&something;
    return CUDA_SUCCESS;
}

API cuModuleLoadData(CUmodule *module, const void *)
{
    *module = (CUmodule)&something;
    return CUDA_SUCCESS;
}

API cuModuleUnload(CUmodule)
{
    return CUDA_SUCCESS;
}

API cuModuleGetFunction(CUfunction *function, CUmodule, const char *name)
{
    const emulated_kernel *kernel = emulated_kernel_find(name);
    *function = (CUfunction)kernel;
    return kernel != NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API cuFuncSetAttribute(CUfunction, CUfunction_attribute, int)
{
    return CUDA_SUCCESS;
}

/* Rounded up and dirty, as a GPU's is. */
API cuMemAlloc(CUdeviceptr *at, size_t bytes)
{
    size_t rounded = (bytes + 255) & ~(size_t)255;
    void *memory = aligned_alloc(256, rounded);
    if (memory == NULL) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memset(memory, 0xff, rounded);
    *at = (CUdeviceptr)(uintptr_t)memory;
    return CUDA_SUCCESS;
}

API cuMemFree(CUdeviceptr at)
{
    free((void *)(uintptr_t)at);
    return CUDA_SUCCESS;
}

API cuMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = (size_t)1 << 30;
    return CUDA_SUCCESS;
}

API cuMemHostAlloc(void **at, size_t bytes, unsigned int)
{
    *at = aligned_alloc(256, (bytes + 255) & ~(size_t)255);
    return *at != NULL ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API cuMemFreeHost(void *at)
{
    free(at);
    return CUDA_SUCCESS;
}

API cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream)
{
    memset((void *)(uintptr_t)at, value, bytes);
    return CUDA_SUCCESS;
}

API cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream)
{
    counts.uploads++;
    memcpy((void *)(uintptr_t)to, from, bytes);
    return CUDA_SUCCESS;
}

API cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream)
{
    counts.downloads++;
    memcpy(to, (const void *)(uintptr_t)from, bytes);
    return CUDA_SUCCESS;
}

API cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream)
{
    memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)from, bytes);
    return CUDA_SUCCESS;
}

API cuStreamCreate(CUstream *stream, unsigned int)
{
    *stream = (CUstream)&something;
    return CUDA_SUCCESS;
}

API cuStreamDestroy(CUstream)
{
    return CUDA_SUCCESS;
}

API cuStreamSynchronize(CUstream)
{
    counts.waits++;
    return CUDA_SUCCESS;
}

/* An event, which is recorded when the call that says so returns; 0: never. */
struct emulated_event {
    double ms;
};

static double now_ms()
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* A captured launch, or event, and a graph of them. What is captured does not run. */
struct captured {
    emulated_launch launch;
    std::vector<uint64_t> args;
    emulated_event *event;
};
using graph_of = std::vector<captured>;
static graph_of *capturing;

API cuStreamBeginCapture(CUstream, CUstreamCaptureMode)
{
    capturing = new graph_of;
    return CUDA_SUCCESS;
}

API cuStreamEndCapture(CUstream, CUgraph *graph)
{
    *graph = (CUgraph)capturing;
    capturing = nullptr;
    return CUDA_SUCCESS;
}

API cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long)
{
    *exec = (CUgraphExec) new graph_of(*(graph_of *)graph);
    return CUDA_SUCCESS;
}

API cuGraphLaunch(CUgraphExec exec, CUstream)
{
    counts.graphs++;
    for (captured &c : *(graph_of *)exec) {
        if (c.event != nullptr) {
            c.event->ms = now_ms();
            continue;
        }
        emulated_launch launch = c.launch;
        launch.args = c.args.data();
        emulated_run(launch);
    }
    return CUDA_SUCCESS;
}

API cuGraphExecDestroy(CUgraphExec exec)
{
    delete (graph_of *)exec;
    return CUDA_SUCCESS;
}

API cuGraphDestroy(CUgraph graph)
{
    delete (graph_of *)graph;
    return CUDA_SUCCESS;
}

API cuLaunchKernel(CUfunction f, unsigned int grid_x, unsigned int grid_y, unsigned int,
                   unsigned int threads, unsigned int, unsigned int, unsigned int shared_bytes,
                   CUstream, void **params, void **)
{
    const emulated_kernel *kernel = (const emulated_kernel *)f;
    emulated_launch launch = {grid_x, grid_y, threads, shared_bytes, kernel->run, params[0]};
    if (capturing == nullptr) {
        counts.launches++;
        emulated_run(launch);
        return CUDA_SUCCESS;
    }
    counts.captured++;
    capturing->push_back({launch, std::vector<uint64_t>((kernel->args_bytes + 7) / 8), nullptr});
    memcpy(capturing->back().args.data(), params[0], kernel->args_bytes);
    return CUDA_SUCCESS;
}

API cuEventCreate(CUevent *event, unsigned int)
{
    *event = (CUevent) new emulated_event{0};
    return CUDA_SUCCESS;
}

API cuEventDestroy(CUevent event)
{
    delete (emulated_event *)event;
    return CUDA_SUCCESS;
}

/* As the driver has it: an external one only while a stream is captured, where any other is a
 * dependency within the graph and never recorded. */
API cuEventRecordWithFlags(CUevent event, CUstream, unsigned int flags)
{
    bool external = flags == CU_EVENT_RECORD_EXTERNAL;
    if (external != (capturing != nullptr)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (external) {
        capturing->push_back({{}, {}, (emulated_event *)event});
    } else {
        ((emulated_event *)event)->ms = now_ms();
    }
    return CUDA_SUCCESS;
}

API cuEventRecord(CUevent event, CUstream stream)
{
    return cuEventRecordWithFlags(event, stream, CU_EVENT_RECORD_DEFAULT);
}

API cuEventElapsedTime(float *ms, CUevent first, CUevent last)
{
    double from = ((emulated_event *)first)->ms, to = ((emulated_event *)last)->ms;
    if (from == 0 || to == 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    *ms = (float)(to - from);
    return CUDA_SUCCESS;
}
