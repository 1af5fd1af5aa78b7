// Backward, first part: bins of points, a counting sort.
//
// Bins: a point between columns k - 1 and k, rows j - 1 and j of a level (k = 0..width, j = 0..height) is in bin (j, k). A row
// of bins has width + 2 ints: [0] where its list begins, [k + 1] where bin k ends. While it is filled, [k + 1] is where the
// next point of bin k goes, so filling leaves the ends behind.
#pragma once

#include "windows.cuh"

namespace deform_attn::tuned {
namespace {

template <typename acc_t> struct alignas(4 * sizeof(acc_t)) Entry {
    int query;
    acc_t weight, x, y;
};

__device__ int* bin_row(const Layout& p, int* bins, int image, int head, int level, int row) {
    return bins + (int64_t(image) * p.heads + head) * p.bins + p.bins_start[level]
           + row * (p.width[level] + 2);
}

template <typename acc_t>
__device__ int* bin_of(const Layout& p, int* bins, int image, int head, int level,
                       const Point<acc_t>& point) {
    return bin_row(p, bins, image, head, level, point.row + 1) + point.column + 2;
}

// One thread for all points of a (query, level), a block for a head of a region.
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
            const auto point = locate_point<scalar_t>(
                query, height, width, read_pair(points + (list * p.points + i) * 2));
            if (is_inside(point, height, width))
                atomicAdd(bin_of(p, bins, work.image, work.head, level, point), 1);
        }
    }
}

// Counts the points of a region by the pixel of the windows they are found at; the others are counted in `bins`, if given.
template <typename scalar_t>
__device__ void count_in_windows(const Layout& p, const BlockWork& work, const Area* areas,
                                 const Origin* origins, int queries, const scalar_t* points,
                                 int* counts, int* bins) {
    using acc_t = accumulator<scalar_t>;
    for (int i = threadIdx.x; i < p.window_pixels; i += BACKWARD_WINDOW_THREADS) counts[i] = 0;
    __syncthreads();
    for (int place = threadIdx.x; place < queries; place += BACKWARD_WINDOW_THREADS) {
        const Query<acc_t, true> query(p, work.region, areas, place);
        const int64_t item = (int64_t(work.image) * p.queries + query.index) * p.heads + work.head;
        const scalar_t* query_points = points + item * p.levels * p.points * 2;
        for (int level = 0; level < p.levels; level++, query_points += p.points * 2) {
            const Window window = window_of(p, origins, level);
            const auto count = [&](Vector<scalar_t, 2> pair) {
                const auto point =
                    locate_point<scalar_t>(query, window.level_height, window.level_width, pair);
                const int found = find_in_window(window, point);
                if (found >= 0)
                    atomicAdd(counts + found, 1);
                else if (bins && is_inside(point, window.level_height, window.level_width))
                    atomicAdd(bin_of(p, bins, work.image, work.head, level, point), 1);
            };
            if (p.points == 4) {
                const auto four = *reinterpret_cast<const Vector<scalar_t, 8>*>(query_points);
#pragma unroll
                for (int i = 0; i < 4; i++) count({four.at[2 * i], four.at[2 * i + 1]});
            } else {
                for (int i = 0; i < p.points; i++) count(read_pair(query_points + i * 2));
            }
        }
    }
    __syncthreads();
}

// Adds what was counted to the bins, and leaves in place of each count where its bin stood before.
__device__ void add_to_bins(const Layout& p, const BlockWork& work, const Origin* origins,
                            int* counts, int* bins) {
    for (int level = 0; level < p.levels; level++) {
        const Window window = window_of(p, origins, level);
        for (int y = threadIdx.x / 32; y < window.height - 1; y += blockDim.x / 32)
            for (int x = threadIdx.x % 32; x < window.width - 1; x += 32) {
                int& counted = counts[window.first + y * window.width + x];
                const Point<float> point{window.left + x, window.top + y, 0, 0};
                if (counted)
                    counted =
                        atomicAdd(bin_of(p, bins, work.image, work.head, level, point), counted);
            }
    }
}

template <typename scalar_t>
__global__ void __launch_bounds__(BACKWARD_WINDOW_THREADS)
    count_window_kernel(const Layout p, const scalar_t* __restrict__ points,
                        int* __restrict__ bins) {
    extern __shared__ __align__(16) char memory[];
    __shared__ Area areas[MAX_LEVELS];
    __shared__ Origin origins[MAX_LEVELS];
    const BlockWork work(p.across * p.down, p.heads, 1);
    const int queries = load_region(p, work.region, areas);
    place_windows(p, areas, origins);
    count_in_windows(p, work, areas, origins, queries, points, reinterpret_cast<int*>(memory),
                     bins);
    add_to_bins(p, work, origins, reinterpret_cast<int*>(memory), bins);
}

// One warp for a row of bins; `used` counts the entries given away.
__global__ void __launch_bounds__(THREADS)
    allocate_kernel(const Layout p, int images, int* bins, int* used) {
    const int lane = threadIdx.x % 32;
    int bin_rows = 0;
    for (int level = 0; level < p.levels; level++) bin_rows += p.height[level] + 1;
    const int64_t warp = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
    if (warp >= int64_t(images) * p.heads * bin_rows) return;
    int level = 0, row = warp % bin_rows;
    while (row > p.height[level]) row -= p.height[level++] + 1;
    const int64_t list = warp / bin_rows;
    int* ends = bin_row(p, bins, list / p.heads, list % p.heads, level, row);
    const int size = p.width[level] + 2;  // [0] was never counted in: 0

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
