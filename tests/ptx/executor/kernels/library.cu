// CUB's block algorithms: code that others wrote, with shuffles, barriers and shared memory in their order.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

extern "C" __global__ void block_sum(const float* x, float* y) {
    using Reduce = cub::BlockReduce<float, 128>;
    __shared__ typename Reduce::TempStorage storage;
    float total = Reduce(storage).Sum(x[blockIdx.x * 128 + threadIdx.x]);
    if (threadIdx.x == 0) y[blockIdx.x] = total;
}
extern "C" __global__ void block_max_raking(const int* x, int* y) {
    using Reduce = cub::BlockReduce<int, 96, cub::BLOCK_REDUCE_RAKING>;
    __shared__ typename Reduce::TempStorage storage;
    int v[2] = {x[blockIdx.x * 192 + threadIdx.x], x[blockIdx.x * 192 + 96 + threadIdx.x]};
    int most = Reduce(storage).Reduce(v, [](int a, int b) { return a > b ? a : b; });
    if (threadIdx.x == 0) y[blockIdx.x] = most;
}
extern "C" __global__ void block_scan(const int* x, int* y) {
    using Scan = cub::BlockScan<int, 128, cub::BLOCK_SCAN_WARP_SCANS>;
    __shared__ typename Scan::TempStorage storage;
    int v[4];
    for (int k = 0; k < 4; k++) v[k] = x[blockIdx.x * 512 + threadIdx.x * 4 + k];
    Scan(storage).ExclusiveSum(v, v);
    for (int k = 0; k < 4; k++) y[blockIdx.x * 512 + threadIdx.x * 4 + k] = v[k];
}
extern "C" __global__ void block_sort(const int* x, int* y) {
    using Sort = cub::BlockRadixSort<int, 64, 4>;
    __shared__ typename Sort::TempStorage storage;
    int v[4];
    for (int k = 0; k < 4; k++) v[k] = x[threadIdx.x * 4 + k];
    Sort(storage).Sort(v);
    for (int k = 0; k < 4; k++) y[threadIdx.x * 4 + k] = v[k];
}
