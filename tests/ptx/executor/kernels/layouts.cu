// Shared-memory layouts whose bank conflicts are known, and global access patterns whose sectors are.
#include <cstdint>

enum Layout { PLAIN, PADDED, SWIZZLED };

// A 32 x 32 float tile, written by rows and read by columns.
template <Layout layout>
__device__ void transpose(const float* x, float* y, int n) {
    __shared__ float tile[32 * 33];
    auto at = [](int row, int column) {
        return layout == PADDED ? row * 33 + column : row * 32 + (layout == SWIZZLED ? column ^ row : column);
    };
    int column = threadIdx.x, x0 = blockIdx.x * 32, y0 = blockIdx.y * 32;
    for (int row = threadIdx.y; row < 32; row += 8) tile[at(row, column)] = x[(y0 + row) * n + x0 + column];
    __syncthreads();
    for (int row = threadIdx.y; row < 32; row += 8) y[(x0 + row) * n + y0 + column] = tile[at(column, row)];
}
extern "C" __global__ void transpose_plain(const float* x, float* y, int n) { transpose<PLAIN>(x, y, n); }
extern "C" __global__ void transpose_padded(const float* x, float* y, int n) { transpose<PADDED>(x, y, n); }
extern "C" __global__ void transpose_swizzled(const float* x, float* y, int n) { transpose<SWIZZLED>(x, y, n); }

// One warp copies a 32 x 64 half tile to shared memory and reads it by ldmatrix.x4, eight rows to a matrix.
template <int pitch, bool swizzle>
__device__ void load_matrices(const uint4* x, uint32_t* y) {
    __shared__ __align__(128) uint4 tile[32 * pitch];
    int lane = threadIdx.x;
    auto at = [](int row, int chunk) { return row * pitch + (swizzle ? chunk ^ (row & 7) : chunk); };
    for (int k = lane; k < 256; k += 32) tile[at(k / 8, k % 8)] = x[k];
    __syncthreads();
    for (int chunk = 0; chunk < 8; chunk++) {
        uint32_t r[4], address = (uint32_t)__cvta_generic_to_shared(&tile[at(lane, chunk)]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
        for (int m = 0; m < 4; m++) y[(chunk * 4 + m) * 32 + lane] = r[m];
    }
}
extern "C" __global__ void ldmatrix_plain(const uint4* x, uint32_t* y) { load_matrices<8, false>(x, y); }
extern "C" __global__ void ldmatrix_padded(const uint4* x, uint32_t* y) { load_matrices<9, false>(x, y); }
extern "C" __global__ void ldmatrix_swizzled(const uint4* x, uint32_t* y) { load_matrices<8, true>(x, y); }

// Copies of 4, 8 and 16 bytes a lane at a stride; the offset shifts them across sectors.
template <typename T>
__device__ void copy(const char* x, T* y, int stride, int offset) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = *(const T*)(x + offset + (long long)i * stride);
}
extern "C" __global__ void copy4(const char* x, uint32_t* y, int stride, int offset) { copy(x, y, stride, offset); }
extern "C" __global__ void copy8(const char* x, uint2* y, int stride, int offset) { copy(x, y, stride, offset); }
extern "C" __global__ void copy16(const char* x, uint4* y, int stride, int offset) { copy(x, y, stride, offset); }

// A shared array of 4 KiB, read with 4, 8 or 16 bytes a lane at a stride (in bytes) that wraps.
template <typename T>
__device__ void stride_read(T* y, int stride) {
    __shared__ __align__(128) char bytes[4096];
    for (int k = threadIdx.x; k < 256; k += 32) ((uint4*)bytes)[k] = make_uint4(k, k, k, k);
    __syncthreads();
    y[threadIdx.x] = *(T*)(bytes + threadIdx.x * stride % 4096);
}
extern "C" __global__ void read2(unsigned short* y, int stride) { stride_read(y, stride); }
extern "C" __global__ void read4(uint32_t* y, int stride) { stride_read(y, stride); }
extern "C" __global__ void read8(uint2* y, int stride) { stride_read(y, stride); }
extern "C" __global__ void read16(uint4* y, int stride) { stride_read(y, stride); }

// n floats by cp.async in two groups of 16-byte copies, the part past the end filled with zeros.
extern "C" __global__ void async_copy(const float* x, float4* y, int n) {
    __shared__ float4 buffer[2][128];
    for (int stage = 0; stage < 2; stage++) {
        int first = (stage * 128 + threadIdx.x) * 4, have = max(0, min(16, (n - first) * 4));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::
                     "r"((uint32_t)__cvta_generic_to_shared(&buffer[stage][threadIdx.x])), "l"(x + first), "r"(have));
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    y[threadIdx.x] = buffer[0][threadIdx.x];
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    y[128 + threadIdx.x] = buffer[1][threadIdx.x];
}
