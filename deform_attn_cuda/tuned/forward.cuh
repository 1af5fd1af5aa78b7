// The forward pass of the tuned kernel: positions, softmax, sampling and weighted sum in one pass
// over the raw inputs.
//
// A group of lanes shares a row, the channels of one head at one pixel. For each level, every lane
// of the group computes the position of one sampling point. Then all of them go through these
// points together and read the four rows around each.
//
// With 12 points, 48 rows are read for each row of the output, so they must come from a cache. The
// groups of a warp take neighbouring heads, which share cache lines, and a block takes a square
// region.
#pragma once

#include "geometry.cuh"

namespace deform_attn::tuned {
namespace {

template <typename scalar_t, int CHANNELS, bool FUSED>
__global__ void __launch_bounds__(THREADS, 4)
    forward_kernel(const Layout p, const scalar_t* __restrict__ value,
                   const scalar_t* __restrict__ points, const scalar_t* __restrict__ scores,
                   scalar_t* __restrict__ out) {
    using Shape = WarpShape<scalar_t, CHANNELS>;
    using Row = typename Shape::Row;
    using acc_t = accumulator<scalar_t>;
    const int channels = CHANNELS ? CHANNELS : p.channels, row = p.heads * channels,
              count = p.levels * p.points;
    const int lane = threadIdx.x % Shape::LANES, group = threadIdx.x % 32 / Shape::LANES;
    const BlockWork work(count_regions(p), p.heads, Shape::HEADS);
    const bool head_valid = work.head + group % Shape::HEADS < p.heads;
    const int head = min(work.head + group % Shape::HEADS, p.heads - 1);
    __shared__ Area areas[MAX_LEVELS];
    const int queries = load_queries<FUSED>(p, work.region, areas);

    for (int begin = first_warp() * Shape::QUERIES; begin < queries;
         begin += all_warps() * Shape::QUERIES) {
        const int place = begin + group / Shape::HEADS;
        const Query<acc_t, FUSED> query(p, work.region, areas, min(place, queries - 1));
        const int64_t item = (int64_t(work.image) * p.queries + query.index) * p.heads + head;
        const auto weights = Weights<scalar_t, acc_t, FUSED>::template of<Shape::LANES>(
            scores + item * count, count, lane);

        for (int chunk = 0; chunk < channels; chunk += Shape::LANES * Shape::WIDTH) {
            const int channel = min(chunk + lane * Shape::WIDTH, channels - Shape::WIDTH);
            const char* rows = reinterpret_cast<const char*>(
                value + int64_t(work.image) * p.pixels * row + head * channels + channel);
            acc_t sum[Shape::WIDTH] = {};
            for (int level = 0; level < p.levels; level++) {
                const int height = p.height[level], width = p.width[level];
                const unsigned bytes = row * sizeof(scalar_t), right = width > 1 ? bytes : 0,
                               down = height > 1 ? width * bytes : 0;
                for (int first = 0; first < p.points; first += Shape::LANES) {
                    // Lanes without a point read the first pixel, with weight 0.
                    unsigned at = p.start[level] * bytes;
                    acc_t corner[4] = {};
                    if (first + lane < p.points) {
                        const int i = level * p.points + first + lane;
                        const auto point =
                            query.locate(height, width, points + (item * count + i) * 2);
                        const Neighbours<acc_t> x(point.x, width), y(point.y, height);
                        const acc_t weight = weights[i];
                        at += (y.first * width + x.first) * bytes;
                        for (int k = 0; k < 4; k++)
                            corner[k] = weight * y.weight[k / 2] * x.weight[k % 2];
                    }
                    const int placed = min(p.points - first, Shape::LANES);
                    for (int next = 0; next < placed; next += Shape::UNROLL) {
                        Row read[Shape::UNROLL][4];
#pragma unroll
                        for (int u = 0; u < Shape::UNROLL; u++) {
                            const char* upper =
                                rows + __shfl_sync(ALL_LANES, at, next + u, Shape::LANES);
                            const char* lower = upper + down;
                            read[u][0] = read_row<Row>(upper);
                            read[u][1] = read_row<Row>(upper + right);
                            read[u][2] = read_row<Row>(lower);
                            read[u][3] = read_row<Row>(lower + right);
                        }
#pragma unroll
                        for (int i = 0; i < 4 * Shape::UNROLL; i++) {
                            const acc_t weight =
                                __shfl_sync(ALL_LANES, corner[i % 4], next + i / 4, Shape::LANES);
#pragma unroll
                            for (int c = 0; c < Shape::WIDTH; c++)
                                sum[c] += weight * acc_t(read[i / 4][i % 4].at[c]);
                        }
                    }
                }
            }
            if (place < queries && head_valid && chunk + lane * Shape::WIDTH < channels) {
                Row written;
#pragma unroll
                for (int c = 0; c < Shape::WIDTH; c++) written.at[c] = scalar_t(sum[c]);
                *reinterpret_cast<Row*>(out + item * channels + channel) = written;
            }
        }
    }
}

}  // namespace
}  // namespace deform_attn::tuned
