// Backward, first part: bins of points, a counting sort.
//
// Bins: a point between columns k - 1 and k, rows j - 1 and j of a level (k = 0..width, j = 0..height) is in bin (j, k). A row
// of bins has width + 2 ints: [0] where its list begins, [k + 1] where bin k ends. While it is filled, [k + 1] is where the
// next point of bin k goes, so filling leaves the ends behind.
#pragma once

#include "windows.cuh"

namespace deform_attn::tuned {
namespace {

template <typename R> struct alignas(4 * sizeof(R)) Entry {
    int query;
    R weight, x, y;
};

__device__ int* bin_row(const Layout& p, int* bins, int image, int head, int level, int row) {
    return bins + (int64_t(image) * p.heads + head) * p.bins + p.bins_start[level] + row * (p.width[level] + 2);
}

template <typename R>
__device__ int* bin_of(const Layout& p, int* bins, int image, int head, int level, const Point<R>& point) {
    return bin_row(p, bins, image, head, level, point.row + 1) + point.column + 2;
}

// One thread for all points of a (query, level), a block for a head of a region.
template <typename T, bool FUSED>
__global__ void __launch_bounds__(THREADS)
count_kernel(const Layout p, const T* __restrict__ points, int* __restrict__ bins) {
    using R = typename Computed<T>::type;
    __shared__ Cut cuts[MAX_LEVELS];
    const Part part(regions_of(p), p.heads, 1);
    const int tasks = cut_queries<FUSED>(p, part.region, cuts) * p.levels;
    for (int task = threadIdx.x; task < tasks; task += THREADS) {
        const int level = task % p.levels;
        const Query<R, FUSED> query(p, part.region, cuts, task / p.levels);
        const int64_t list = ((int64_t(part.image) * p.queries + query.index) * p.heads + part.head) * p.levels + level;
        const int height = p.height[level], width = p.width[level];
        for (int i = 0; i < p.points; i++) {
            const auto point = place_point<T>(query, height, width, read_pair(points + (list * p.points + i) * 2));
            if (touches(point, height, width))
                atomicAdd(bin_of(p, bins, part.image, part.head, level, point), 1);
        }
    }
}

// Counts the points of a region by the pixel of the windows they are found at; the others are counted in `bins`, if given.
template <typename T>
__device__ void count_in_windows(const Layout& p, const Part& part, const Cut* cuts, const Corner* corners, int queries,
                                 const T* points, int* counts, int* bins) {
    using R = typename Computed<T>::type;
    for (int i = threadIdx.x; i < p.window_pixels; i += BACKWARD_WINDOW_THREADS) counts[i] = 0;
    __syncthreads();
    for (int place = threadIdx.x; place < queries; place += BACKWARD_WINDOW_THREADS) {
        const Query<R, true> query(p, part.region, cuts, place);
        const int64_t item = (int64_t(part.image) * p.queries + query.index) * p.heads + part.head;
        const T* its_points = points + item * p.levels * p.points * 2;
        for (int level = 0; level < p.levels; level++, its_points += p.points * 2) {
            const Window window = window_of(p, corners, level);
            const auto count = [&](Vector<T, 2> pair) {
                const auto point = place_point<T>(query, window.level_height, window.level_width, pair);
                const int found = find_in_window(window, point);
                if (found >= 0) atomicAdd(counts + found, 1);
                else if (bins && touches(point, window.level_height, window.level_width))
                    atomicAdd(bin_of(p, bins, part.image, part.head, level, point), 1);
            };
            if (p.points == 4) {
                const auto four = *reinterpret_cast<const Vector<T, 8>*>(its_points);
                #pragma unroll
                for (int i = 0; i < 4; i++) count({four.at[2 * i], four.at[2 * i + 1]});
            } else {
                for (int i = 0; i < p.points; i++) count(read_pair(its_points + i * 2));
            }
        }
    }
    __syncthreads();
}

// Adds what was counted to the bins, and leaves in place of each count where its bin stood before.
__device__ void add_to_bins(const Layout& p, const Part& part, const Corner* corners, int* counts, int* bins) {
    for (int level = 0; level < p.levels; level++) {
        const Window window = window_of(p, corners, level);
        for (int y = threadIdx.x / 32; y < window.height - 1; y += blockDim.x / 32)
            for (int x = threadIdx.x % 32; x < window.width - 1; x += 32) {
                int& counted = counts[window.first + y * window.width + x];
                const Point<float> point{window.left + x, window.top + y, 0, 0};
                if (counted) counted = atomicAdd(bin_of(p, bins, part.image, part.head, level, point), counted);
            }
    }
}

template <typename T>
__global__ void __launch_bounds__(BACKWARD_WINDOW_THREADS)
count_window_kernel(const Layout p, const T* __restrict__ points, int* __restrict__ bins) {
    extern __shared__ __align__(16) char memory[];
    __shared__ Cut cuts[MAX_LEVELS];
    __shared__ Corner corners[MAX_LEVELS];
    const Part part(p.across * p.down, p.heads, 1);
    const int queries = cut_region(p, part.region, cuts);
    place_windows(p, cuts, corners);
    count_in_windows(p, part, cuts, corners, queries, points, reinterpret_cast<int*>(memory), bins);
    add_to_bins(p, part, corners, reinterpret_cast<int*>(memory), bins);
}

// One warp for a row of bins; `used` counts the entries given away.
__global__ void __launch_bounds__(THREADS) allocate_kernel(const Layout p, int images, int* bins, int* used) {
    const int lane = threadIdx.x % 32;
    int bin_rows = 0;
    for (int level = 0; level < p.levels; level++) bin_rows += p.height[level] + 1;
    const int64_t warp = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
    if (warp >= int64_t(images) * p.heads * bin_rows) return;
    int level = 0, row = warp % bin_rows;
    while (row > p.height[level]) row -= p.height[level++] + 1;
    const int64_t list = warp / bin_rows;
    int* ends = bin_row(p, bins, list / p.heads, list % p.heads, level, row);
    const int size = p.width[level] + 2;                       // [0] was never counted in: 0

    int total = 0;
    for (int k = lane; k < size; k += 32) total += ends[k];
    total = sum_over<31>(total);
    int begin = 0;
    if (lane == 0) begin = atomicAdd(used, total);
    begin = __shfl_sync(WARP, begin, 0);
    for (int k = lane; k - lane < size; k += 32) {
        const int counted = k < size ? ends[k] : 0;
        int before = counted;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(WARP, before, step);
            if (lane >= step) before += other;
        }
        if (k < size) ends[k] = begin + before - counted;
        begin += __shfl_sync(WARP, before, 31);
    }
}

}  // namespace
}  // namespace deform_attn::tuned
