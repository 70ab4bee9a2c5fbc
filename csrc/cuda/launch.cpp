#include "launch.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "../checks.h"
#include "block_params.h"
#include "block_tiles.h"
#include "conv2d_params.h"
#include "conv2d_tiles.h"
#include "batch_norm_kernels.h"
#include "batch_norm_params.h"
#include "stem_params.h"
#include "stem_tiles.h"

#define RF_CONV2D_KERNELS(X) \
  RF_CONV2D_TILES(X)         \
  X(conv2d_stem_fwd_f16)     \
  X(conv2d_stem_fwd_bf16)    \
  X(conv2d_reduce_fwd_f16)   \
  X(conv2d_reduce_fwd_bf16)  \
  X(conv2d_reduce_fwd_f32)

#define RF_BLOCK_KERNELS(X)              \
  RF_BOTTLENECK_KERNELS(X, f16, float16) \
  RF_BOTTLENECK_KERNELS(X, bf16, bfloat16)

#define RF_ALL_NORM_KERNELS(X) RF_NORM_KERNELS(X) RF_NORM_FINISH_KERNELS(X)

// The host stubs that nvcc makes of the kernels.
extern "C" {
#define RF_DECLARE(NAME, ...) void NAME(resnet_fused::Conv2dParams);
RF_CONV2D_KERNELS(RF_DECLARE)
#undef RF_DECLARE
#define RF_DECLARE(NAME, ...) void NAME(resnet_fused::BlockParams);
RF_BLOCK_KERNELS(RF_DECLARE)
#undef RF_DECLARE
#define RF_DECLARE(NAME, ...) void NAME(resnet_fused::StemParams);
RF_STEM_KERNELS(RF_DECLARE)
#undef RF_DECLARE
#define RF_DECLARE(NAME, ...) void NAME(resnet_fused::BatchNormParams);
RF_ALL_NORM_KERNELS(RF_DECLARE)
#undef RF_DECLARE
#define RF_DECLARE(NAME, ...) void NAME(resnet_fused::AddReluParams);
RF_ADD_RELU_KERNELS(RF_DECLARE)
#undef RF_DECLARE
}

namespace resnet_fused {
namespace {

constexpr int MAX_DEVICES = 64;

struct Entry {
  const char* name;
  const void* function;
  std::atomic<uint64_t> prepared{0};  // bit per device on which it may use more than 48 KiB of shared memory
};

Entry ENTRIES[] = {
#define RF_ENTRY(NAME, ...) {#NAME, reinterpret_cast<const void*>(&NAME)},
    RF_CONV2D_KERNELS(RF_ENTRY) RF_BLOCK_KERNELS(RF_ENTRY) RF_STEM_KERNELS(RF_ENTRY) RF_ALL_NORM_KERNELS(RF_ENTRY)
        RF_ADD_RELU_KERNELS(RF_ENTRY)
#undef RF_ENTRY
};

Entry& find(const std::string& kernel) {
  for (Entry& entry : ENTRIES)
    if (kernel == entry.name) return entry;
  throw std::logic_error("the plan names a kernel that was not built: " + kernel);
}

std::string text(cudaError_t error) { return message(cudaGetErrorString(error), " (", cudaGetErrorName(error), ")"); }

void check_launch(cudaError_t error, const KernelLaunch& l) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(message("launching ", l.kernel, " on a grid of ", l.grid[0], "x", l.grid[1], "x", l.grid[2],
                                   " blocks of ", l.block, " threads with ", l.shared_bytes,
                                   " bytes of shared memory: ", text(error)));
}

int64_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess)
    throw std::runtime_error(message("reading the properties of CUDA device ", device, ": ", text(error)));
  return value;
}

}  // namespace

const DeviceProperties& device_properties(int32_t device) {
  static std::once_flag read[MAX_DEVICES];
  static DeviceProperties properties[MAX_DEVICES];
  RF_CHECK(device >= 0 && device < MAX_DEVICES, "CUDA device ", device, "; the extension serves devices 0 to ",
           MAX_DEVICES - 1);
  std::call_once(read[device], [device] {
    properties[device] = {
        10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device),
        attribute(cudaDevAttrMultiProcessorCount, device),
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
    };
  });
  return properties[device];
}

void launch(const KernelLaunch& launch, void* params, int32_t device) {
  Entry& entry = find(launch.kernel);
  const uint64_t bit = uint64_t{1} << device;
  constexpr uint32_t WITHOUT_OPT_IN = 48 << 10;
  if (launch.shared_bytes > WITHOUT_OPT_IN && (entry.prepared.load(std::memory_order_relaxed) & bit) == 0) {
    const auto which = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check_launch(cudaFuncSetAttribute(entry.function, which, int(launch.shared_bytes)), launch);
    entry.prepared.fetch_or(bit, std::memory_order_relaxed);
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("PyTorch gave no current stream of CUDA device " + std::to_string(device));
  void* arguments[] = {params};
  const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]);
  check_launch(cudaLaunchKernel(entry.function, grid, dim3(launch.block), arguments, launch.shared_bytes,
                                static_cast<cudaStream_t>(stream)),
               launch);
}

}  // namespace resnet_fused
