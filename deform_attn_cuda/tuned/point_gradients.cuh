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
    __device__ PointGradient(const Point<acc_t>& point, int height, int width,
                             const acc_t (&corner)[4]) {
        const Neighbours<acc_t> x(point.column, width, 1 - point.x, point.x),
            y(point.row, height, 1 - point.y, point.y);
        const Neighbours<acc_t> slope_x(point.column, width, acc_t(-1), acc_t(1)),
            slope_y(point.row, height, acc_t(-1), acc_t(1));
        const acc_t upper = x.at[0] * corner[0] + x.at[1] * corner[1],
                    lower = x.at[0] * corner[2] + x.at[1] * corner[3];
        const acc_t upper_slope = slope_x.at[0] * corner[0] + slope_x.at[1] * corner[1];
        const acc_t lower_slope = slope_x.at[0] * corner[2] + slope_x.at[1] * corner[3];
        sample = y.at[0] * upper + y.at[1] * lower;
        along_x = y.at[0] * upper_slope + y.at[1] * lower_slope;
        along_y = slope_y.at[0] * upper + slope_y.at[1] * lower;
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
        const auto weights = Weights<scalar_t, acc_t, FUSED>::template of<Shape::LANES - 1>(
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
                Point<acc_t> point{-2, -2, acc_t(0), acc_t(0)};
                acc_t weight = 0;
                int slot = -1;  // its entry; requested early because atomics take long
                unsigned at = p.start[level] * bytes;
                if (placing) {
                    point = locate_point<scalar_t>(query, height, width,
                                                   read_pair(points + (item * count + i) * 2));
                    weight = weights[i];
                    at += (Neighbours<acc_t>(point.row, height, 0, 0).first * width
                           + Neighbours<acc_t>(point.column, width, 0, 0).first)
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
                        const auto gradient =
                            *reinterpret_cast<const typename Shape::Row*>(grad_row + channel);
                        typename Shape::Row read[Shape::UNROLL][4];
#pragma unroll
                        for (int u = 0; u < Shape::UNROLL; u++) {
#pragma unroll
                            for (int k = 0; k < 4; k++)
                                read[u][k] = *reinterpret_cast<const typename Shape::Row*>(
                                    from[u] + (k % 2 ? right : 0) + (k / 2 ? down : 0)
                                    + channel * sizeof(scalar_t));
                        }
#pragma unroll
                        for (int u = 0; u < Shape::UNROLL; u++) {
#pragma unroll
                            for (int k = 0; k < 4; k++) {
#pragma unroll
                                for (int c = 0; c < Shape::WIDTH; c++)
                                    product[u][k] +=
                                        acc_t(gradient.at[c]) * acc_t(read[u][k].at[c]);
                            }
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4 * Shape::UNROLL; i++) {
                        const acc_t total = sum_over<Shape::LANES - 1>(product[i / 4][i % 4]);
                        if (lane == next + i / 4) corner[i % 4] = total;
                    }
                }
                if (placing) {
                    if (slot >= 0) entries[slot] = {query.index, weight, point.x, point.y};
                    const PointGradient<acc_t> gradient(point, height, width, corner);
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

__device__ Vector<unsigned, 4> load_shared(unsigned at) {
    Vector<unsigned, 4> words;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
                 : "r"(at));
    return words;
}

// Loads the upper and lower row of a point's left or right corners. `place` is 2 * (pixel of the
// windows) if even, 2 * (pixel of the image) + 1 if odd. `memory` and `image` point to this lane's
// channels in the first row of each.
template <typename scalar_t>
__device__ void read_corners(unsigned place, unsigned memory, const scalar_t* image, int row,
                             const Window& window, bool any_far, Vector<unsigned, 4>& upper,
                             Vector<unsigned, 4>& lower) {
    if (any_far && place % 2) {
        const scalar_t* from = image + int64_t(place / 2) * row;
        upper = *reinterpret_cast<const Vector<unsigned, 4>*>(from);
        lower = *reinterpret_cast<const Vector<unsigned, 4>*>(
            from + (window.level_height > 1 ? window.level_width * row : 0));
    } else {
        upper = load_shared(memory + place * (ROW_BYTES / 2));
        lower = load_shared(memory + place * (ROW_BYTES / 2) + window.width * ROW_BYTES);
    }
}

// The same with windows and tensor cores. A warp takes eight queries at a time. One matrix product
// multiplies the corners of two points of each of two queries with the gradients of both queries:
//
//     rows of A       {left, right} x {first, second query} x {one point, the other}: rows g are
//                     the upper corners, rows g + 8 the lower ones
//     columns of A    channels, in the order in which lanes t = 0..3 read 16 bytes each
//     columns of B    even: gradient of the first query, odd: of the second
//
// Lane 4 g + t loads the corners of row g for each pair of queries and keeps the products of pair
// t. These are left or right corners of two points of its query. It computed the position of one of
// these points, and the lane that loads the other side that of the other, so both swap products.
template <typename scalar_t, int LEVELS>
__global__ void __launch_bounds__(BACKWARD_WINDOW_THREADS, 2)
    points_window_kernel(const Layout p, const scalar_t* __restrict__ grad,
                         const scalar_t* __restrict__ value, const scalar_t* __restrict__ points,
                         const scalar_t* __restrict__ scores, scalar_t* __restrict__ grad_points,
                         scalar_t* __restrict__ grad_scores, int* __restrict__ bins,
                         Entry<float>* __restrict__ entries) {
    using Words = Vector<unsigned, 4>;  // 8 channels
    constexpr int CHANNELS = ROW_BYTES / sizeof(scalar_t);
    extern __shared__ __align__(16) char memory[];
    __shared__ Area areas[MAX_LEVELS];
    __shared__ Origin origins[MAX_LEVELS];
    int* next =
        reinterpret_cast<int*>(memory + p.window_pixels * ROW_BYTES);  // entry of each pixel's bin
    // For each point of this thread, BACKWARD_WINDOW_THREADS apart: its weight, and the output's
    // gradient times its sample.
    float2* kept = reinterpret_cast<float2*>(next + (p.window_pixels + 1) / 2 * 2) + threadIdx.x;
    const int row = p.heads * CHANNELS, count = p.levels * p.points;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, g = lane / 4;
    const int side = g % 2, lane_query = 2 * t + g / 2 % 2, lane_index = g / 4 + 2 * side;
    const BlockWork work(p.across * p.down, p.heads, 1);
    const int queries = load_region(p, work.region, areas);
    const scalar_t* image = value + int64_t(work.image) * p.pixels * row + work.head * CHANNELS;
    const unsigned rows = unsigned(__cvta_generic_to_shared(memory)) + t * 16;
    place_windows(p, areas, origins);
    fill_windows(p, origins, image, row, memory);
    count_in_windows(p, work, areas, origins, queries, points, next, nullptr);
    add_to_bins(p, work, origins, next, bins);
    wait_for_windows();

    for (int begin = warp * 8; begin < queries; begin += BACKWARD_WINDOW_THREADS / 4) {
        const bool valid = begin + lane_query < queries;
        const Query<float, true> query(p, work.region, areas, min(begin + lane_query, queries - 1));
        const int64_t item = (int64_t(work.image) * p.queries + query.index) * p.heads + work.head;
        const scalar_t* lane_points = points + (item * count + lane_index) * 2;
        const scalar_t* lane_scores = scores + item * count + lane_index;
        scalar_t* grad_point = grad_points + (item * count + lane_index) * 2;
        scalar_t* grad_score = grad_scores + item * count + lane_index;
        Vector<scalar_t, 2> offsets[LEVELS ? LEVELS : 1];
        float logits[LEVELS ? LEVELS : 1], maximum = -FLT_MAX, total = 0;
#pragma unroll
        for (int level = 0; level < LEVELS; level++) {
            offsets[level] = read_pair(lane_points + level * 8);
            logits[level] = lane_scores[level * 4];
            maximum = max(maximum, logits[level]);
        }
        for (int i = 0; !LEVELS && i < count - lane_index; i += 4)
            maximum = max(maximum, float(lane_scores[i]));
        maximum = maximum_over<4 | 16>(maximum);
#pragma unroll
        for (int level = 0; level < LEVELS; level++) total += exponential(logits[level] - maximum);
        for (int i = 0; !LEVELS && i < count - lane_index; i += 4)
            total += exponential(float(lane_scores[i]) - maximum);
        const float scale = 1 / sum_over<4 | 16>(total);
        Words gradient[4];  // for each pair, of the query of column g
#pragma unroll
        for (int pair = 0; pair < 4; pair++)
            gradient[pair] = *reinterpret_cast<const Words*>(
                grad + __shfl_sync(ALL_LANES, item, g % 2 * 8 + pair) * CHANNELS + t * 8);
        float weighted = 0;
        int kept_count = 0;

#pragma unroll
        for (int level = 0; level < (LEVELS ? LEVELS : p.levels); level++) {
            const Window window = window_of(p, origins, level);
            for (int first = 0; first < (LEVELS ? 4 : p.points); first += 4) {
                const bool placing = LEVELS || first + lane_index < p.points;
                Point<float> point{-2, -2, 0, 0};
                float weight = 0;
                int slot = -1, found = -1;
                unsigned place = window.first * 2;
                if (placing) {
                    const auto offset =
                        LEVELS ? offsets[level] : read_pair(lane_points + first * 2);
                    point = locate_point<scalar_t>(query, window.level_height, window.level_width,
                                                   offset);
                    weight =
                        exponential((LEVELS ? logits[level] : float(lane_scores[first])) - maximum)
                        * scale;
                    found = find_in_window(window, point);
                    if (found >= 0) {
                        place = found * 2;
                        if (valid) slot = atomicAdd(next + found, 1);
                    } else if (is_inside(point, window.level_height, window.level_width)) {
                        place = find_in_level(window, point) * 2 + 1;
                        if (valid)
                            slot =
                                atomicAdd(bin_of(p, bins, work.image, work.head, level, point), 1);
                    }
                }
                const unsigned far = __ballot_sync(ALL_LANES, place % 2);
                float above[2], below[2];  // on this lane's side, of points g / 4 and g / 4 + 2
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    Words upper[2], lower[2];
                    unsigned places[2];
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        places[half] = __shfl_sync(ALL_LANES, place, ((g & 6) | half) * 4 + pair);
                    if (!(far & 0x11111111 << pair)) {
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            read_corners(places[half] + side * 2, rows, image + t * 8, row, window,
                                         false, upper[half], lower[half]);
                    } else {
                        for (int half = 0; half < 2; half++) {
                            const bool step =
                                side && (places[half] % 2 == 0 || window.level_width > 1);
                            read_corners(places[half] + step * 2, rows, image + t * 8, row, window,
                                         true, upper[half], lower[half]);
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float product[4] = {};
#pragma unroll
                        for (int w = 0; w < 4; w += 2)
                            multiply_matrices<scalar_t>(
                                product,
                                {upper[half].at[w], lower[half].at[w], upper[half].at[w + 1],
                                 lower[half].at[w + 1]},
                                {gradient[pair].at[w], gradient[pair].at[w + 1]});
                        if (t == pair) {
                            above[half] = g / 2 % 2 ? product[1] : product[0];
                            below[half] = g / 2 % 2 ? product[3] : product[2];
                        }
                    }
                }
                const float other_above = __shfl_xor_sync(ALL_LANES, side ? above[0] : above[1], 4);
                const float other_below = __shfl_xor_sync(ALL_LANES, side ? below[0] : below[1], 4);
                if (placing) {
                    const float corner[4] = {
                        side ? other_above : above[0], side ? above[1] : other_above,
                        side ? other_below : below[0], side ? below[1] : other_below};
                    if (slot >= 0) entries[slot] = {query.index, weight, point.x, point.y};
                    if (found >= 0)
                        point.column = point.row = 0;  // inside a window, no border is near
                    const PointGradient<float> result(point, found >= 0 ? 2 : window.level_height,
                                                      found >= 0 ? 2 : window.level_width, corner);
                    kept[kept_count++ * BACKWARD_WINDOW_THREADS] = {weight, result.sample};
                    weighted += weight * result.sample;
                    if (valid)
                        *reinterpret_cast<Vector<scalar_t, 2>*>(grad_point + first * 2) = {
                            scalar_t(weight * result.along_x), scalar_t(weight * result.along_y)};
                }
            }
            lane_points += p.points * 2;
            lane_scores += p.points;
            grad_point += p.points * 2;
        }
        weighted = sum_over<4 | 16>(weighted);
        kept_count = 0;
        for (int level = 0; valid && level < p.levels; level++, grad_score += p.points)
            for (int j = 0; j < p.points - lane_index; j += 4) {
                const float2 sample_kept = kept[kept_count++ * BACKWARD_WINDOW_THREADS];
                grad_score[j] = scalar_t(sample_kept.x * (sample_kept.y - weighted));
            }
    }
}

}  // namespace
}  // namespace deform_attn::tuned
