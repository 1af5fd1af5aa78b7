// Steps 1 and 2 of the backward pass: a counting sort of the sampling points by bins.
//
// Points between columns k - 1 and k and between rows j - 1 and j of a level are in its bin (j, k),
// with k = 0..width and j = 0..height. A row of bins is stored as width + 2 ints: [0] is the index
// of the first entry, [k + 1] the end of bin k. While the lists are filled, [k + 1] is the index of
// the next entry of bin k; when all are filled, this is its end.
#pragma once

#include "geometry.cuh"

namespace deform_attn::tuned {
namespace {

// A sampling point in the list of its bin. x and y are the fractions of its position.
template <typename acc_t> struct alignas(4 * sizeof(acc_t)) Entry {
    int query;
    acc_t weight, x, y;
};

__host__ __device__ int count_bin_rows(const Layout& p) {
    int rows = 0;
    for (int level = 0; level < p.levels; level++) rows += p.height[level] + 1;
    return rows;
}

__device__ int* bin_row(const Layout& p, int* bins, int image, int head, int level, int row) {
    return bins + (int64_t(image) * p.heads + head) * p.bins + p.bins_start[level]
           + row * (p.width[level] + 2);
}

template <typename acc_t>
__device__ int* bin_of(const Layout& p, int* bins, int image, int head, int level,
                       const Point<acc_t>& point) {
    return bin_row(p, bins, image, head, level, point.y.pixel + 1) + point.x.pixel + 2;
}

// A thread counts the points of one query on one level; a block, those of one head of a region.
template <typename scalar_t, bool FUSED>
__global__ void __launch_bounds__(THREADS)
    count_kernel(const Layout p, const scalar_t* __restrict__ points, int* __restrict__ bins) {
    using acc_t = accumulator<scalar_t>;
    __shared__ Area areas[MAX_LEVELS];
    const BlockWork work(count_regions(p), p.heads, 1);
    const int tasks = load_queries<FUSED>(p, work.region, areas) * p.levels;
    for (int task = threadIdx.x; task < tasks; task += THREADS) {
        const int level = task % p.levels;
        const Query<acc_t, FUSED> query(p, work.region, areas, task / p.levels);
        const int64_t list =
            ((int64_t(work.image) * p.queries + query.index) * p.heads + work.head) * p.levels
            + level;
        const int height = p.height[level], width = p.width[level];
        for (int i = 0; i < p.points; i++) {
            const auto point = query.locate(height, width, points + (list * p.points + i) * 2);
            if (is_inside(point, height, width))
                atomicAdd(bin_of(p, bins, work.image, work.head, level, point), 1);
        }
    }
}

// One warp allocates the lists of a row of bins: prefix sums of their counts. `used` is the number
// of entries allocated so far.
__global__ void __launch_bounds__(THREADS)
    allocate_kernel(const Layout p, int images, int* bins, int* used) {
    const int lane = threadIdx.x % 32, bin_rows = count_bin_rows(p);
    const int64_t warp = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
    if (warp >= int64_t(images) * p.heads * bin_rows) return;
    int level = 0, row = warp % bin_rows;
    while (row > p.height[level]) row -= p.height[level++] + 1;
    const int64_t list = warp / bin_rows;
    int* ends = bin_row(p, bins, list / p.heads, list % p.heads, level, row);
    const int size = p.width[level] + 2;  // [0] is zero: no bin counts there

    int total = 0;
    for (int k = lane; k < size; k += 32) total += ends[k];
    total = sum_over<31>(total);
    int begin = 0;
    if (lane == 0) begin = atomicAdd(used, total);
    begin = __shfl_sync(ALL_LANES, begin, 0);
    for (int k = lane; k - lane < size; k += 32) {
        const int counted = k < size ? ends[k] : 0;
        int before = counted;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, before, step);
            if (lane >= step) before += other;
        }
        if (k < size) ends[k] = begin + before - counted;
        begin += __shfl_sync(ALL_LANES, before, 31);
    }
}

}  // namespace
}  // namespace deform_attn::tuned
