// One planted bug for each check; with -DFIXED the same kernels without it.
#include <cstdint>
#ifdef FIXED
#define BUG(wrong, right) right
#else
#define BUG(wrong, right) wrong
#endif
#define KERNEL extern "C" __global__ void
#define CP_ASYNC(shared, global)                                                                                \
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global))

KERNEL past_the_end(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (BUG(i <= n, i < n)) y[i] = x[i];
}
KERNEL before_the_start(const float* x, float* y, int n) {
    int i = threadIdx.x;
    y[i] = x[BUG(i, max(i, 1)) - 1] + (i < n ? 1.f : 0.f);
}
KERNEL past_shared(const float* x, float* y, int n) {
    __shared__ float s[128];
    s[BUG(threadIdx.x + (n == 128), threadIdx.x)] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x ^ 1];
}
KERNEL misaligned(const float* x, float* y, int n) {
    ((float2*)y)[threadIdx.x] = *(const float2*)(x + threadIdx.x * 2 % n + BUG(1, 0));
}
KERNEL uninitialised_shared(const float* x, float* y, int n) {
    __shared__ float s[128];
    if (BUG(threadIdx.x != 77, true)) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[n - 1 - threadIdx.x];
}
KERNEL uninitialised_output(const float* x, float* y, int n) {
    y[threadIdx.x] = x[threadIdx.x] + BUG(y[threadIdx.x], n);
}
KERNEL unwritten_output(const float* x, float* y, int n) {
    if (threadIdx.x < BUG(n - 1, n)) y[threadIdx.x] = x[threadIdx.x];
}
KERNEL missing_barrier(const float* x, float* y, int n) {  // read after write
    __shared__ float s[128];
    s[threadIdx.x] = x[threadIdx.x];
    BUG(, __syncthreads());
    y[threadIdx.x] = s[n - 1 - threadIdx.x];
}
KERNEL reused_buffer(const float* x, float* y, int n) {  // write after read
    __shared__ float s[128];
    for (int k = 0; k < 2; k++) {
        s[threadIdx.x] = x[threadIdx.x] * (k + 1);
        __syncthreads();
        y[k * n + threadIdx.x] = s[n - 1 - threadIdx.x];
        BUG(, __syncthreads());
    }
}
KERNEL two_writers(const float* x, float* y, int n) {  // write after write, by two warps
    __shared__ float s[128];
    s[BUG(threadIdx.x % 64, threadIdx.x)] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x % n];
}
KERNEL missing_syncwarp(const float* x, float* y, int n) {
    __shared__ float s[128];
    s[threadIdx.x] = x[threadIdx.x];
    BUG(, __syncwarp());
    y[threadIdx.x] = s[threadIdx.x ^ 1] + n;
}
KERNEL read_before_wait(const float* x, float* y, int n) {
    __shared__ float4 s[32];
    if (threadIdx.x < 32) CP_ASYNC(&s[threadIdx.x], x + threadIdx.x * 4);
    BUG(, asm volatile("cp.async.wait_all;" ::: "memory"));
    __syncthreads();
    y[threadIdx.x] = ((float*)s)[n - 1 - threadIdx.x];
}
KERNEL wait_for_too_few(const float* x, float* y, int n) {
    __shared__ float4 s[2][32];
    for (int k = 0; k < 2; k++) {
        if (threadIdx.x < 32) CP_ASYNC(&s[k][threadIdx.x], x + threadIdx.x * 4);
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group %0;" :: "n"(BUG(1, 0)) : "memory");
    __syncthreads();
    y[threadIdx.x] = ((float*)s[0])[n - 1 - threadIdx.x] + ((float*)s[1])[threadIdx.x];
}
KERNEL wait_without_barrier(const float* x, float* y, int n) {  // a wait is for the thread's own copies
    __shared__ float4 s[128];
    CP_ASYNC(&s[threadIdx.x], x + threadIdx.x % 32 * 4);
    asm volatile("cp.async.wait_all;" ::: "memory");
    BUG(, __syncthreads());
    y[threadIdx.x] = s[n - 1 - threadIdx.x].x;
}
KERNEL divergent_barrier(const float* x, float* y, int n) {
    __shared__ float s[128];
    s[threadIdx.x] = x[threadIdx.x];
    if (BUG(threadIdx.x & 1, n & 1)) asm volatile("bar.sync 0;" ::: "memory");
    else asm volatile("bar.sync 0; // the other one" ::: "memory");
    y[threadIdx.x] = s[n - 1 - threadIdx.x];
}
KERNEL exit_before_barrier(const float* x, float* y, int n) {  // part of a warp
    __shared__ float s[128];
    if (threadIdx.x >= BUG(100, n)) return;
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x ^ 1];
}
KERNEL deadlock(const float* x, float* y, int n) {
    if (threadIdx.x < 32) asm volatile("bar.sync 1, %0;" :: "r"(BUG(n, 32)) : "memory");
    y[threadIdx.x] = x[threadIdx.x];
}
KERNEL overlapping_blocks(const float* x, float* y, int n) {  // neighbours write the same elements, and differ
    for (int i = threadIdx.x; i < BUG(n + 32, n); i += blockDim.x) y[blockIdx.x * n + i] = x[i % n] + blockIdx.x;
}
KERNEL other_blocks_result(const float* x, float* y, int n) {
    y[blockIdx.x * n + threadIdx.x] = x[threadIdx.x];
    if (BUG(blockIdx.x == 1, false)) y[2 * n + threadIdx.x] = y[threadIdx.x];
}
KERNEL endless(const float* x, float* y, int n) {
    y[threadIdx.x] = x[threadIdx.x];
    while (BUG(*(volatile float*)y == *x, false)) {}
}
KERNEL failed_assertion(const float* x, float* y, int n) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 5 && BUG(n == 128, n == 0)) __trap();
}
