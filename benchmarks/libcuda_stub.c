/* Stands in for the CUDA driver where there is none: accepts what Triton's launcher asks for, and does nothing.

   With it the launcher's own code runs as it does on a GPU, so that the host's time for a launch can be measured up to the
   driver's door. What the driver itself takes, a few microseconds, is not in it. */

#include <cuda.h>

#define STUB(name, ...) CUresult CUDAAPI name(__VA_ARGS__)

static int object;

STUB(cuGetErrorString, CUresult error, const char **text) {
  *text = "stub";
  return CUDA_SUCCESS;
}
STUB(cuDriverGetVersion, int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
STUB(cuDeviceGet, CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
STUB(cuDeviceGetAttribute, int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 1024;
  if (attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) *value = 227 << 10;
  return CUDA_SUCCESS;
}
STUB(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device) {
  *context = (CUcontext)&object;
  return CUDA_SUCCESS;
}
STUB(cuCtxGetCurrent, CUcontext *context) {
  *context = (CUcontext)&object;
  return CUDA_SUCCESS;
}
STUB(cuCtxSetCurrent, CUcontext context) { return CUDA_SUCCESS; }
STUB(cuCtxGetDevice, CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
STUB(cuCtxGetLimit, size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
STUB(cuCtxSetLimit, CUlimit limit, size_t value) { return CUDA_SUCCESS; }
STUB(cuModuleLoadData, CUmodule *module, const void *image) {
  *module = (CUmodule)&object;
  return CUDA_SUCCESS;
}
STUB(cuModuleUnload, CUmodule module) { return CUDA_SUCCESS; }
STUB(cuModuleGetFunction, CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)&object;
  return CUDA_SUCCESS;
}
STUB(cuFuncGetAttribute, int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
STUB(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
STUB(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
STUB(cuPointerGetAttribute, void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
STUB(cuOccupancyMaxActiveClusters, int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
STUB(cuLaunchKernelEx, const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  return CUDA_SUCCESS;
}
