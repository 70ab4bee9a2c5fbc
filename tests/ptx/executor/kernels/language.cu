// What C++ compiles to: calls, structures by value, local arrays, divergence, atomics, votes, barriers, printf.
#include <cstdint>
#include <cstdio>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KERNEL extern "C" __global__ void

struct Options {
    int scale;
    float shift;
    const float* x;
    short table[5];
};
__constant__ float lookup[8];
__device__ unsigned counter;

__device__ __noinline__ float helper(float v, int* out) {
    *out = (int)v;
    return v * 2.f + lookup[*out & 7];
}
KERNEL structures(Options o, float* y, int k) {
    int whole;
    float v = helper(o.x[threadIdx.x], &whole);
    y[threadIdx.x] = v * o.scale + o.shift + o.table[k] + whole;
    atomicAdd(&counter, 1);
    if (threadIdx.x == 3) printf("thread %d of %s: %.2f\n", threadIdx.x, "block", v);
}
KERNEL collatz(const int* x, int* steps, int* odd, int n) {  // a loop of different length for each thread
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int count = 0;
    for (long long v = x[i]; v != 1; count++) v = v & 1 ? 3 * v + 1 : v >> 1;
    switch (count & 3) {
        case 0: count += 1000; break;
        case 1: count *= 3; break;
        case 2: count ^= 0x55; break;
        default: count -= 7;
    }
    steps[i] = count;
    odd[i] = __ballot_sync(__activemask(), count & 1);
}
KERNEL sort_local(const int* x, int* y) {  // an array indexed at run time lies in local memory
    int v[8];
    for (int k = 0; k < 8; k++) v[k] = x[threadIdx.x * 8 + k];
#pragma unroll 1
    for (int a = 1; a < 8; a++)
#pragma unroll 1
        for (int b = a; b > 0 && v[b - 1] > v[b]; b--) { int t = v[b]; v[b] = v[b - 1]; v[b - 1] = t; }
    for (int k = 0; k < 8; k++) y[threadIdx.x * 8 + k] = v[k];
}
KERNEL atomic_mix(const int* x, int* bins, float* sum, int* most, unsigned long long* packed, __half2* pair) {
    __shared__ int local[8];
    if (threadIdx.x < 8) local[threadIdx.x] = 0;
    __syncthreads();
    int v = x[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(&local[v & 7], 1);
    __syncthreads();
    if (threadIdx.x < 8) atomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
    atomicAdd(sum, 0.5f * v);
    atomicMax(most, v);
    atomicAdd(packed, 1ull << 40);
    atomicAdd(pair, __floats2half2_rn(1.f, 2.f));
    while (atomicCAS(most + 1, 0, 1)) {}  // a lock, taken by one thread after the other
    most[2] = most[2] + 1;
    __threadfence();
    atomicExch(most + 1, 0);
}
KERNEL producer_consumer(const int* x, int* y, int rounds) {  // two warps produce, two consume, through named barriers
    __shared__ int buffer[64];
    int lane = threadIdx.x & 63;
    for (int r = 0; r < rounds; r++) {
        if (threadIdx.x < 64) {
            if (r) asm volatile("bar.sync 2, 128;" ::: "memory");
            buffer[lane] = x[r * 64 + lane] * 2;
            asm volatile("bar.arrive 1, 128;" ::: "memory");
        } else {
            asm volatile("bar.sync 1, 128;" ::: "memory");
            y[r * 64 + lane] = buffer[63 - lane] + 1;
            if (r + 1 < rounds) asm volatile("bar.arrive 2, 128;" ::: "memory");
        }
    }
}
KERNEL block_votes(const int* x, int* y) {
    int v = x[threadIdx.x];
    y[threadIdx.x * 3] = __syncthreads_count(v > 3);
    y[threadIdx.x * 3 + 1] = __syncthreads_and(v < 10);
    y[threadIdx.x * 3 + 2] = __syncthreads_or(v == 7);
}
KERNEL flag(const float* x, float* y) {  // one warp hands data to another through a release and an acquire
    __shared__ float data[32];
    __shared__ int ready;
    if (threadIdx.x == 0) ready = 0;
    __syncthreads();
    uint32_t address = (uint32_t)__cvta_generic_to_shared(&ready);
    if (threadIdx.x < 32) {
        data[threadIdx.x] = x[threadIdx.x];
        __syncwarp();
        if (threadIdx.x == 0) asm volatile("st.release.cta.shared.u32 [%0], 1;" :: "r"(address) : "memory");
    } else {
        int seen;
        do asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(seen) : "r"(address) : "memory"); while (!seen);
        y[threadIdx.x - 32] = data[63 - threadIdx.x];
    }
}
KERNEL syncwarp_in_branches(const int* x, int* y) {  // the halves of a warp meet at two different __syncwarp()
    __shared__ int s[32];
    int lane = threadIdx.x;
    if (lane & 1) {
        s[lane] = x[lane] * 2;
        asm volatile("bar.warp.sync -1;" ::: "memory");
        y[lane] = s[lane ^ 1];
    } else {
        s[lane] = x[lane] + 100;
        asm volatile("bar.warp.sync -1; // the other one" ::: "memory");
        y[lane] = s[lane ^ 1] + 1;
    }
}
KERNEL indices(int* y) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
KERNEL float_functions(const float* a, const float* b, float* y) {
    int i = threadIdx.x;
    float v[10] = {a[i] * b[i] + 1.f, a[i] / b[i], sqrtf(fabsf(a[i])), expf(a[i]), logf(fabsf(a[i])), sinf(a[i] * 100.f),
                   tanhf(a[i]), __fadd_rz(a[i], b[i]), rintf(a[i]), powf(fabsf(a[i]), b[i])};
    for (int k = 0; k < 10; k++) y[i * 10 + k] = v[k];
}
KERNEL half_vectors(const uint4* x, uint4* y, __half scale) {
    int i = threadIdx.x;
    uint4 a = x[i], b = y[i];
    __half2 *p = (__half2*)&a, *q = (__half2*)&b;
    for (int k = 0; k < 4; k++) q[k] = __hmax2(__hfma2(p[k], __half2half2(scale), q[k]), __float2half2_rn(0.f));
    y[i] = b;
}
#if __CUDA_ARCH__ >= 800
KERNEL bfloat_vectors(const uint4* x, uint4* y, float scale) {
    int i = threadIdx.x;
    uint4 a = x[i], b = y[i];
    __nv_bfloat162 *p = (__nv_bfloat162*)&a, *q = (__nv_bfloat162*)&b;
    for (int k = 0; k < 4; k++) q[k] = __hfma2(p[k], __float2bfloat162_rn(scale), q[k]);
    y[i] = b;
}
#endif
