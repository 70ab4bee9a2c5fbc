#include "stem.cuh"

extern __shared__ __align__(128) unsigned char rf_shared[];

// The planner launches these from sm_80 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RF_STEM_BODY(ELEMENT, INPUT)
#else
#define RF_STEM_BODY(ELEMENT, INPUT) \
  Stem<ElementOf<ElementType::ELEMENT>::T, StemInput::INPUT>(p, ptx::shared_address(rf_shared)).run()
#endif

#define RF_STEM_KERNEL(NAME, ELEMENT, INPUT)                                                                            \
  extern "C" __global__ void __launch_bounds__(resnet_fused::StemPoolTile::THREADS, resnet_fused::StemPoolTile::BLOCKS) \
      NAME(const __grid_constant__ resnet_fused::StemParams p) {                                                        \
    using namespace resnet_fused;                                                                                       \
    RF_STEM_BODY(ELEMENT, INPUT);                                                                                       \
  }

RF_STEM_KERNELS(RF_STEM_KERNEL)
