// Backward, second part: gradients of offsets and logits (or locations and weights); files every point under its bin.
#pragma once

#include "bins.cuh"

namespace deform_attn::tuned {
namespace {

// What one point gets from `corner`, the products of the four rows around it with the output's gradient.
template <typename R> struct PointGradient {
    R sample, along_x, along_y;     // the gradient times its sample; derivatives of that
    __device__ PointGradient(const Point<R>& point, int height, int width, const R (&corner)[4]) {
        const Pair<R> x(point.column, width, 1 - point.x, point.x), y(point.row, height, 1 - point.y, point.y);
        const Pair<R> slope_x(point.column, width, R(-1), R(1)), slope_y(point.row, height, R(-1), R(1));
        const R upper = x.at[0] * corner[0] + x.at[1] * corner[1], lower = x.at[0] * corner[2] + x.at[1] * corner[3];
        const R upper_slope = slope_x.at[0] * corner[0] + slope_x.at[1] * corner[1];
        const R lower_slope = slope_x.at[0] * corner[2] + slope_x.at[1] * corner[3];
        sample = y.at[0] * upper + y.at[1] * lower;
        along_x = y.at[0] * upper_slope + y.at[1] * lower_slope;
        along_y = slope_y.at[0] * upper + slope_y.at[1] * lower;
    }
};

template <typename T, int D, bool FUSED>
__global__ void __launch_bounds__(THREADS, 3)
points_kernel(const Layout p, const T* __restrict__ grad, const T* __restrict__ value, const T* __restrict__ points,
              const T* __restrict__ scores, T* __restrict__ grad_points, T* __restrict__ grad_scores,
              int* __restrict__ bins, Entry<typename Computed<T>::type>* __restrict__ entries) {
    using S = Shape<T, D>;
    using R = typename Computed<T>::type;
    extern __shared__ __align__(16) char shared[];
    R* sampled = reinterpret_cast<R*>(shared) + threadIdx.x;       // of each point that this thread placed, THREADS apart
    const int channels = D ? D : p.channels, row = p.heads * channels, count = p.levels * p.points;
    const int lane = threadIdx.x % S::LANES, group = threadIdx.x % 32 / S::LANES;
    const Part part(regions_of(p), p.heads, S::HEADS);
    const bool head_valid = part.head + group % S::HEADS < p.heads;
    const int head = min(part.head + group % S::HEADS, p.heads - 1);
    const char* rows = reinterpret_cast<const char*>(value + int64_t(part.image) * p.pixels * row + head * channels);
    __shared__ Cut cuts[MAX_LEVELS];
    const int queries = cut_queries<FUSED>(p, part.region, cuts);

    for (int begin = first_warp() * S::QUERIES; begin < queries; begin += all_warps() * S::QUERIES) {
        const int place = begin + group / S::HEADS;
        const bool valid = place < queries && head_valid;
        const Query<R, FUSED> query(p, part.region, cuts, min(place, queries - 1));
        const int64_t item = (int64_t(part.image) * p.queries + query.index) * p.heads + head;
        const auto weights = Weights<T, R, FUSED>::template of<S::LANES - 1>(scores + item * count, count, lane);
        const T* grad_row = grad + item * channels;
        R weighted = 0;
        int own = 0;

        for (int level = 0; level < p.levels; level++) {
            const int height = p.height[level], width = p.width[level];
            const unsigned bytes = row * sizeof(T), right = width > 1 ? bytes : 0, down = height > 1 ? width * bytes : 0;
            for (int first = 0; first < p.points; first += S::LANES) {
                const int i = level * p.points + first + lane;
                const bool placing = first + lane < p.points;
                Point<R> point{-2, -2, R(0), R(0)};
                R weight = 0;
                int filed = -1;                                    // its place among the entries: asked for early, used late
                unsigned at = p.start[level] * bytes;
                if (placing) {
                    point = place_point<T>(query, height, width, read_pair(points + (item * count + i) * 2));
                    weight = weights[i];
                    at += (Pair<R>(point.row, height, 0, 0).first * width + Pair<R>(point.column, width, 0, 0).first) * bytes;
                    if (valid && touches(point, height, width))
                        filed = atomicAdd(bin_of(p, bins, part.image, head, level, point), 1);
                }
                R corner[4] = {};
                const int placed = min(p.points - first, S::LANES);
                for (int next = 0; next < placed; next += S::UNROLL) {
                    R product[S::UNROLL][4] = {};
                    const char* from[S::UNROLL];
                    #pragma unroll
                    for (int u = 0; u < S::UNROLL; u++) from[u] = rows + __shfl_sync(WARP, at, next + u, S::LANES);
                    for (int channel = lane * S::WIDTH; channel < channels; channel += S::LANES * S::WIDTH) {
                        const auto gradient = *reinterpret_cast<const typename S::Row*>(grad_row + channel);
                        typename S::Row read[S::UNROLL][4];
                        #pragma unroll
                        for (int u = 0; u < S::UNROLL; u++) {
                            #pragma unroll
                            for (int k = 0; k < 4; k++)
                                read[u][k] = *reinterpret_cast<const typename S::Row*>(
                                    from[u] + (k % 2 ? right : 0) + (k / 2 ? down : 0) + channel * sizeof(T));
                        }
                        #pragma unroll
                        for (int u = 0; u < S::UNROLL; u++) {
                            #pragma unroll
                            for (int k = 0; k < 4; k++) {
                                #pragma unroll
                                for (int c = 0; c < S::WIDTH; c++) product[u][k] += R(gradient.at[c]) * R(read[u][k].at[c]);
                            }
                        }
                    }
                    #pragma unroll
                    for (int i = 0; i < 4 * S::UNROLL; i++) {
                        const R total = sum_over<S::LANES - 1>(product[i / 4][i % 4]);
                        if (lane == next + i / 4) corner[i % 4] = total;
                    }
                }
                if (placing) {
                    if (filed >= 0) entries[filed] = {query.index, weight, point.x, point.y};
                    const PointGradient<R> gradient(point, height, width, corner);
                    sampled[own++ * THREADS] = gradient.sample;
                    weighted += weight * gradient.sample;
                    if (valid)
                        *reinterpret_cast<Vector<T, 2>*>(grad_points + (item * count + i) * 2) = {
                            T(weight * gradient.along_x * (FUSED ? R(1) : R(width))),
                            T(weight * gradient.along_y * (FUSED ? R(1) : R(height)))};
                }
            }
        }
        if (FUSED) weighted = sum_over<S::LANES - 1>(weighted);
        own = 0;
        for (int level = 0; valid && level < p.levels; level++)
            for (int j = lane; j < p.points; j += S::LANES) {
                const int i = level * p.points + j;
                const R sample = sampled[own++ * THREADS];
                grad_scores[item * count + i] = T(FUSED ? weights[i] * (sample - weighted) : sample);
            }
    }
}

__device__ Vector<unsigned, 4> load_shared(unsigned at) {
    Vector<unsigned, 4> words;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3]) : "r"(at));
    return words;
}

// Rows of a point's left or right corners, one above the other. `place` is even: 2 * pixel of the windows, or odd:
// 2 * pixel of the image + 1. `memory` and `image` point to this lane's channels in the first row of each.
template <typename T>
__device__ void read_corners(unsigned place, unsigned memory, const T* image, int row, const Window& window, bool any_far,
                             Vector<unsigned, 4>& upper, Vector<unsigned, 4>& lower) {
    if (any_far && place % 2) {
        const T* from = image + int64_t(place / 2) * row;
        upper = *reinterpret_cast<const Vector<unsigned, 4>*>(from);
        lower = *reinterpret_cast<const Vector<unsigned, 4>*>(from + (window.level_height > 1 ? window.level_width * row : 0));
    } else {
        upper = load_shared(memory + place * (ROW_BYTES / 2));
        lower = load_shared(memory + place * (ROW_BYTES / 2) + window.width * ROW_BYTES);
    }
}

// The same with windows, and the products on tensor cores. A warp takes eight queries; each product multiplies the corners of
// two points of two queries with both queries' gradients:
//   rows of A     {left, right} x {first, second query} x {one point, another}, rows g above, rows g + 8 below
//   columns of A  channels, in the order in which lanes t = 0..3 read 16 bytes each
//   columns of B  even: the first query's gradient, odd: the second's
// Lane 4 g + t reads what g stands for of each pair of queries, and keeps the products of pair t: of one side of two of its own
// query's points, of which it placed one and the lane that reads the other side the other. They swap.
template <typename T, int LEVELS>
__global__ void __launch_bounds__(BACKWARD_WINDOW_THREADS, 2)
points_window_kernel(const Layout p, const T* __restrict__ grad, const T* __restrict__ value, const T* __restrict__ points,
                     const T* __restrict__ scores, T* __restrict__ grad_points, T* __restrict__ grad_scores,
                     int* __restrict__ bins, Entry<float>* __restrict__ entries) {
    using Words = Vector<unsigned, 4>;                             // 8 channels
    constexpr int D = ROW_BYTES / sizeof(T);
    extern __shared__ __align__(16) char memory[];
    __shared__ Cut cuts[MAX_LEVELS];
    __shared__ Corner corners[MAX_LEVELS];
    int* next = reinterpret_cast<int*>(memory + p.window_pixels * ROW_BYTES);        // entry of each pixel's bin
    // of each point that this thread placed, BACKWARD_WINDOW_THREADS apart: its weight, its sample times the output's gradient
    float2* kept = reinterpret_cast<float2*>(next + (p.window_pixels + 1) / 2 * 2) + threadIdx.x;
    const int row = p.heads * D, count = p.levels * p.points;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, g = lane / 4;
    const int side = g % 2, own_query = 2 * t + g / 2 % 2, own_index = g / 4 + 2 * side;
    const Part part(p.across * p.down, p.heads, 1);
    const int queries = cut_region(p, part.region, cuts);
    const T* image = value + int64_t(part.image) * p.pixels * row + part.head * D;
    const unsigned rows = unsigned(__cvta_generic_to_shared(memory)) + t * 16;
    place_windows(p, cuts, corners);
    fill_windows(p, corners, image, row, memory);
    count_in_windows(p, part, cuts, corners, queries, points, next, nullptr);
    add_to_bins(p, part, corners, next, bins);
    wait_for_windows();

    for (int begin = warp * 8; begin < queries; begin += BACKWARD_WINDOW_THREADS / 4) {
        const bool valid = begin + own_query < queries;
        const Query<float, true> query(p, part.region, cuts, min(begin + own_query, queries - 1));
        const int64_t item = (int64_t(part.image) * p.queries + query.index) * p.heads + part.head;
        const T* own_points = points + (item * count + own_index) * 2;
        const T* own_scores = scores + item * count + own_index;
        T* grad_point = grad_points + (item * count + own_index) * 2;
        T* grad_score = grad_scores + item * count + own_index;
        Vector<T, 2> offsets[LEVELS ? LEVELS : 1];
        float logits[LEVELS ? LEVELS : 1], maximum = -FLT_MAX, total = 0;
        #pragma unroll
        for (int level = 0; level < LEVELS; level++) {
            offsets[level] = read_pair(own_points + level * 8);
            logits[level] = own_scores[level * 4];
            maximum = max(maximum, logits[level]);
        }
        for (int i = 0; !LEVELS && i < count - own_index; i += 4) maximum = max(maximum, float(own_scores[i]));
        maximum = maximum_over<4 | 16>(maximum);
        #pragma unroll
        for (int level = 0; level < LEVELS; level++) total += exponential(logits[level] - maximum);
        for (int i = 0; !LEVELS && i < count - own_index; i += 4) total += exponential(float(own_scores[i]) - maximum);
        const float scale = 1 / sum_over<4 | 16>(total);
        Words gradient[4];                                         // of the query of each pair that column g stands for
        #pragma unroll
        for (int pair = 0; pair < 4; pair++)
            gradient[pair] = *reinterpret_cast<const Words*>(grad + __shfl_sync(WARP, item, g % 2 * 8 + pair) * D + t * 8);
        float weighted = 0;
        int own = 0;

        #pragma unroll
        for (int level = 0; level < (LEVELS ? LEVELS : p.levels); level++) {
            const Window window = window_of(p, corners, level);
            for (int first = 0; first < (LEVELS ? 4 : p.points); first += 4) {
                const bool placing = LEVELS || first + own_index < p.points;
                Point<float> point{-2, -2, 0, 0};
                float weight = 0;
                int filed = -1, found = -1;
                unsigned place = window.first * 2;
                if (placing) {
                    const auto offset = LEVELS ? offsets[level] : read_pair(own_points + first * 2);
                    point = place_point<T>(query, window.level_height, window.level_width, offset);
                    weight = exponential((LEVELS ? logits[level] : float(own_scores[first])) - maximum) * scale;
                    found = find_in_window(window, point);
                    if (found >= 0) {
                        place = found * 2;
                        if (valid) filed = atomicAdd(next + found, 1);
                    } else if (touches(point, window.level_height, window.level_width)) {
                        place = find_in_level(window, point) * 2 + 1;
                        if (valid) filed = atomicAdd(bin_of(p, bins, part.image, part.head, level, point), 1);
                    }
                }
                const unsigned far = __ballot_sync(WARP, place % 2);
                float above[2], below[2];                          // this lane's side, of points g / 4 and g / 4 + 2
                #pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    Words upper[2], lower[2];
                    unsigned places[2];
                    #pragma unroll
                    for (int half = 0; half < 2; half++) places[half] = __shfl_sync(WARP, place, ((g & 6) | half) * 4 + pair);
                    if (!(far & 0x11111111 << pair)) {
                        #pragma unroll
                        for (int half = 0; half < 2; half++)
                            read_corners(places[half] + side * 2, rows, image + t * 8, row, window, false,
                                         upper[half], lower[half]);
                    } else {
                        for (int half = 0; half < 2; half++) {
                            const bool step = side && (places[half] % 2 == 0 || window.level_width > 1);
                            read_corners(places[half] + step * 2, rows, image + t * 8, row, window, true,
                                         upper[half], lower[half]);
                        }
                    }
                    #pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float product[4] = {};
                        #pragma unroll
                        for (int w = 0; w < 4; w += 2)
                            multiply<T>(product, {upper[half].at[w], lower[half].at[w],
                                                  upper[half].at[w + 1], lower[half].at[w + 1]},
                                        {gradient[pair].at[w], gradient[pair].at[w + 1]});
                        if (t == pair) {
                            above[half] = g / 2 % 2 ? product[1] : product[0];
                            below[half] = g / 2 % 2 ? product[3] : product[2];
                        }
                    }
                }
                const float other_above = __shfl_xor_sync(WARP, side ? above[0] : above[1], 4);
                const float other_below = __shfl_xor_sync(WARP, side ? below[0] : below[1], 4);
                if (placing) {
                    const float corner[4] = {side ? other_above : above[0], side ? above[1] : other_above,
                                             side ? other_below : below[0], side ? below[1] : other_below};
                    if (filed >= 0) entries[filed] = {query.index, weight, point.x, point.y};
                    if (found >= 0) point.column = point.row = 0;  // windows need no care of borders
                    const PointGradient<float> result(point, found >= 0 ? 2 : window.level_height,
                                                      found >= 0 ? 2 : window.level_width, corner);
                    kept[own++ * BACKWARD_WINDOW_THREADS] = {weight, result.sample};
                    weighted += weight * result.sample;
                    if (valid)
                        *reinterpret_cast<Vector<T, 2>*>(grad_point + first * 2) = {
                            T(weight * result.along_x), T(weight * result.along_y)};
                }
            }
            own_points += p.points * 2;
            own_scores += p.points;
            grad_point += p.points * 2;
        }
        weighted = sum_over<4 | 16>(weighted);
        own = 0;
        for (int level = 0; valid && level < p.levels; level++, grad_score += p.points)
            for (int j = 0; j < p.points - own_index; j += 4) {
                const float2 its = kept[own++ * BACKWARD_WINDOW_THREADS];
                grad_score[j] = T(its.x * (its.y - weighted));
            }
    }
}

}  // namespace
}  // namespace deform_attn::tuned
