/* plugins/cuda/kernels.cu - all kernels as one translation unit, and so one fatbin. */
#include "plugins/cuda/adapters.cu"
#include "plugins/cuda/attention.cu"
#include "plugins/cuda/attention_observe.cu"
#include "plugins/cuda/cublaslt.cu"
#include "plugins/cuda/experts.cu"
#include "plugins/cuda/ops.cu"
#include "plugins/cuda/product.cu"
