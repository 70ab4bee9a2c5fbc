// Matrix products through nvcuda::wmma: C[M][N] = A[M][K] B[K][N], one warp for 16 x 16 elements of C.
#include <cuda_bf16.h>
#include <mma.h>
using namespace nvcuda::wmma;

template <typename In, typename Element, typename Sum, int depth>
__device__ void product(const In* a, const In* b, Sum* c, int n, int k) {
    int row = blockIdx.y * 16, column = (blockIdx.x * 2 + threadIdx.y) * 16;
    fragment<accumulator, 16, 16, depth, Sum> sum;
    fill_fragment(sum, Sum(0));
    for (int i = 0; i < k; i += depth) {
        fragment<matrix_a, 16, 16, depth, Element, row_major> fa;
        fragment<matrix_b, 16, 16, depth, Element, row_major> fb;
        load_matrix_sync(fa, a + row * k + i, k);
        load_matrix_sync(fb, b + i * n + column, n);
        mma_sync(sum, fa, fb, sum);
    }
    store_matrix_sync(c + row * n + column, sum, n, mem_row_major);
}
#define PRODUCT(name, In, Element, Sum, depth)                                                                   \
    extern "C" __global__ void name(const In* a, const In* b, Sum* c, int n, int k) {                            \
        product<In, Element, Sum, depth>(a, b, c, n, k);                                                         \
    }
PRODUCT(wmma_float16, half, half, float, 16)
PRODUCT(wmma_int8, signed char, signed char, int, 16)
#if __CUDA_ARCH__ >= 800
PRODUCT(wmma_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 16)
PRODUCT(wmma_tf32, float, precision::tf32, float, 8)
#endif

// B transposed in memory, both operands and the sum staged in shared memory, the sum in half.
extern "C" __global__ void wmma_shared(const half* a, const half* b, half* c, int n, int k) {
    __shared__ __align__(32) half sa[256], sb[256], sc[256];
    int row = blockIdx.y * 16, column = blockIdx.x * 16;
    fragment<accumulator, 16, 16, 16, half> sum;
    fill_fragment(sum, __float2half(0.f));
    for (int i = 0; i < k; i += 16) {
        for (int e = threadIdx.x; e < 256; e += 32) {
            sa[e] = a[(row + e / 16) * k + i + e % 16];
            sb[e] = b[(column + e / 16) * k + i + e % 16];
        }
        __syncwarp();
        fragment<matrix_a, 16, 16, 16, half, row_major> fa;
        fragment<matrix_b, 16, 16, 16, half, col_major> fb;
        load_matrix_sync(fa, sa, 16);
        load_matrix_sync(fb, sb, 16);
        mma_sync(sum, fa, fb, sum);
        __syncwarp();
    }
    store_matrix_sync(sc, sum, 16, mem_row_major);
    __syncwarp();
    for (int e = threadIdx.x; e < 256; e += 32) c[(row + e / 16) * n + column + e % 16] = sc[e];
}
