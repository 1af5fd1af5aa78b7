// Step 3 of the backward pass: gradients of offsets and logits, or of locations and weights. Every
// point is also entered in the list of its bin.
#pragma once

#include "bins.cuh"

namespace deform_attn::tuned {
namespace {

// From the products `corner` of the output's gradient with the four rows around a point.
template <typename acc_t> struct PointGradient {
    acc_t sample;  // the gradient times the sample
    acc_t along_x, along_y;  // derivatives of that by the position

    __device__ PointGradient(const Neighbours<acc_t>& x, const Neighbours<acc_t>& y,
                             const acc_t (&corner)[4]) {
        const acc_t upper = x.weight[0] * corner[0] + x.weight[1] * corner[1];
        const acc_t lower = x.weight[0] * corner[2] + x.weight[1] * corner[3];
        const acc_t upper_slope = x.slope[0] * corner[0] + x.slope[1] * corner[1];
        const acc_t lower_slope = x.slope[0] * corner[2] + x.slope[1] * corner[3];
        sample = y.weight[0] * upper + y.weight[1] * lower;
        along_x = y.weight[0] * upper_slope + y.weight[1] * lower_slope;
        along_y = y.slope[0] * upper + y.slope[1] * lower;
    }
};

template <typename scalar_t, int CHANNELS, bool FUSED>
__global__ void __launch_bounds__(THREADS, 3)
    points_kernel(const Layout p, const scalar_t* __restrict__ grad,
                  const scalar_t* __restrict__ value, const scalar_t* __restrict__ points,
                  const scalar_t* __restrict__ scores, scalar_t* __restrict__ grad_points,
                  scalar_t* __restrict__ grad_scores, int* __restrict__ bins,
                  Entry<accumulator<scalar_t>>* __restrict__ entries) {
    using Shape = WarpShape<scalar_t, CHANNELS>;
    using Row = typename Shape::Row;
    using acc_t = accumulator<scalar_t>;
    extern __shared__ __align__(16) char shared[];
    acc_t* sampled = reinterpret_cast<acc_t*>(shared)
                     + threadIdx.x;  // of each point that this thread placed, THREADS apart
    const int channels = CHANNELS ? CHANNELS : p.channels, row = p.heads * channels,
              count = p.levels * p.points;
    const int lane = threadIdx.x % Shape::LANES, group = threadIdx.x % 32 / Shape::LANES;
    const BlockWork work(count_regions(p), p.heads, Shape::HEADS);
    const bool head_valid = work.head + group % Shape::HEADS < p.heads;
    const int head = min(work.head + group % Shape::HEADS, p.heads - 1);
    const char* rows = reinterpret_cast<const char*>(value + int64_t(work.image) * p.pixels * row
                                                     + head * channels);
    __shared__ Area areas[MAX_LEVELS];
    const int queries = load_queries<FUSED>(p, work.region, areas);

    for (int begin = first_warp() * Shape::QUERIES; begin < queries;
         begin += all_warps() * Shape::QUERIES) {
        const int place = begin + group / Shape::HEADS;
        const bool valid = place < queries && head_valid;
        const Query<acc_t, FUSED> query(p, work.region, areas, min(place, queries - 1));
        const int64_t item = (int64_t(work.image) * p.queries + query.index) * p.heads + head;
        const auto weights = Weights<scalar_t, acc_t, FUSED>::template of<Shape::LANES>(
            scores + item * count, count, lane);
        const scalar_t* grad_row = grad + item * channels;
        acc_t weighted = 0;
        int kept_count = 0;

        for (int level = 0; level < p.levels; level++) {
            const int height = p.height[level], width = p.width[level];
            const unsigned bytes = row * sizeof(scalar_t), right = width > 1 ? bytes : 0,
                           down = height > 1 ? width * bytes : 0;
            for (int first = 0; first < p.points; first += Shape::LANES) {
                const int i = level * p.points + first + lane;
                const bool placing = first + lane < p.points;
                Point<acc_t> point{};
                acc_t weight = 0;
                int slot = -1;  // its entry; requested early because atomics take long
                unsigned at = p.start[level] * bytes;
                if (placing) {
                    point = query.locate(height, width, points + (item * count + i) * 2);
                    weight = weights[i];
                    at += (Neighbours<acc_t>(point.y, height).first * width
                           + Neighbours<acc_t>(point.x, width).first)
                          * bytes;
                    if (valid && is_inside(point, height, width))
                        slot = atomicAdd(bin_of(p, bins, work.image, head, level, point), 1);
                }
                acc_t corner[4] = {};
                const int placed = min(p.points - first, Shape::LANES);
                for (int next = 0; next < placed; next += Shape::UNROLL) {
                    acc_t product[Shape::UNROLL][4] = {};
                    const char* from[Shape::UNROLL];
#pragma unroll
                    for (int u = 0; u < Shape::UNROLL; u++)
                        from[u] = rows + __shfl_sync(ALL_LANES, at, next + u, Shape::LANES);
                    for (int channel = lane * Shape::WIDTH; channel < channels;
                         channel += Shape::LANES * Shape::WIDTH) {
                        const Row gradient = read_row<Row>(grad_row + channel);
                        Row read[Shape::UNROLL][4];
#pragma unroll
                        for (int i = 0; i < 4 * Shape::UNROLL; i++) {
                            const char* corner_row =
                                from[i / 4] + (i % 2 ? right : 0) + (i % 4 / 2 ? down : 0);
                            read[i / 4][i % 4] =
                                read_row<Row>(corner_row + channel * sizeof(scalar_t));
                        }
#pragma unroll
                        for (int i = 0; i < 4 * Shape::UNROLL; i++) {
#pragma unroll
                            for (int c = 0; c < Shape::WIDTH; c++)
                                product[i / 4][i % 4] +=
                                    acc_t(gradient.at[c]) * acc_t(read[i / 4][i % 4].at[c]);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4 * Shape::UNROLL; i++) {
                        const acc_t total = sum_over<Shape::LANES - 1>(product[i / 4][i % 4]);
                        if (lane == next + i / 4) corner[i % 4] = total;
                    }
                }
                if (placing) {
                    if (slot >= 0)
                        entries[slot] = {query.index, weight, point.x.rest, point.y.rest};
                    const PointGradient<acc_t> gradient({point.x, width}, {point.y, height},
                                                        corner);
                    sampled[kept_count++ * THREADS] = gradient.sample;
                    weighted += weight * gradient.sample;
                    if (valid)
                        *reinterpret_cast<Vector<scalar_t, 2>*>(grad_points
                                                                + (item * count + i) * 2) = {
                            scalar_t(weight * gradient.along_x * (FUSED ? acc_t(1) : acc_t(width))),
                            scalar_t(weight * gradient.along_y
                                     * (FUSED ? acc_t(1) : acc_t(height)))};
                }
            }
        }
        if (FUSED) weighted = sum_over<Shape::LANES - 1>(weighted);
        kept_count = 0;
        for (int level = 0; valid && level < p.levels; level++)
            for (int j = lane; j < p.points; j += Shape::LANES) {
                const int i = level * p.points + j;
                const acc_t sample = sampled[kept_count++ * THREADS];
                grad_scores[item * count + i] =
                    scalar_t(FUSED ? weights[i] * (sample - weighted) : sample);
            }
    }
}

}  // namespace
}  // namespace deform_attn::tuned
