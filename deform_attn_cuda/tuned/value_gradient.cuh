// Step 4 of the backward pass: the gradient of the value. Each pixel adds the points in the four
// bins around it.
#pragma once

#include "bins.cuh"

namespace deform_attn::tuned {
namespace {

// The entries that one or two horizontally adjacent pixels add: those of two or three bins in the
// row of bins above them, then those below.
struct Lists {
    int begin_above, second_above, third_above, size_above;  // where bins begin
    int begin_below, second_below, third_below, size;

    __device__ Lists(const Layout& p, int* bins, int image, int head, const Pixel& pixel,
                     int pixels) {
        const int* above = bin_row(p, bins, image, head, pixel.level, pixel.row) + pixel.column;
        const int* below = above + p.width[pixel.level] + 2;
        begin_above = above[0];
        second_above = above[1];
        third_above = above[2];
        size_above = above[pixels + 1] - begin_above;
        begin_below = below[0] - size_above;  // entries below are numbered after those above
        second_below = below[1];
        third_below = below[2];
        size = size_above + below[pixels + 1] - below[0];
    }

    // Index of entry number i.
    __device__ int place(int i) const { return (i >= size_above ? begin_below : begin_above) + i; }

    template <typename acc_t>
    __device__ Entry<acc_t> read(const Entry<acc_t>* entries, int i) const {
        return i < size ? entries[place(i)] : Entry<acc_t>{0, 0, 0, 0};
    }

    // Weights of entry number i for the first and the second pixel.
    template <typename acc_t>
    __device__ Vector<acc_t, 2> weights(const Entry<acc_t>& entry, int i) const {
        const bool below = i >= size_above;
        const bool right = place(i) >= (below ? second_below : second_above);
        const bool beyond = place(i) >= (below ? third_below : third_above);
        const acc_t weight = entry.weight * (below ? 1 - entry.y : entry.y);
        const acc_t near = weight * entry.x, far = weight - near;
        return {right ? (beyond ? acc_t(0) : far) : near, right ? (beyond ? far : near) : acc_t(0)};
    }
};

__device__ int pairs_of(const Layout& p, const Area* areas) {
    int pairs = 0;
    for (int level = 0; level < p.levels; level++)
        pairs += (areas[level].width + 1) / 2 * areas[level].height;
    return pairs;
}

// A warp computes two adjacent pixels, which share two thirds of their entries, one head after the
// other. Its lanes read 32 entries at a time; then groups of LANES lanes take their rows in turn.
template <typename scalar_t, int CHANNELS>
__global__ void __launch_bounds__(THREADS, 4)
    value_kernel(const Layout p, const scalar_t* __restrict__ grad, int* __restrict__ bins,
                 const Entry<accumulator<scalar_t>>* __restrict__ entries,
                 scalar_t* __restrict__ grad_value) {
    using Shape = WarpShape<scalar_t, CHANNELS>;
    using acc_t = accumulator<scalar_t>;
    constexpr int TURNS = 32 / Shape::LANES, BATCH = Shape::LANES < 4 ? Shape::LANES : 4;
    __shared__ Area areas[MAX_LEVELS];
    const int channels = CHANNELS ? CHANNELS : p.channels, row = p.heads * channels;
    const int lane = threadIdx.x % Shape::LANES, turn = threadIdx.x % 32 / Shape::LANES;
    const BlockWork work(p.across * p.down, p.heads, Shape::HEADS);
    load_region(p, work.region, areas);
    const int pairs = pairs_of(p, areas), end = min(work.head + Shape::HEADS, p.heads);

    for (int place = first_warp(); place < pairs; place += all_warps()) {
        const Pixel pixel = pixel_of<2>(p, areas, place);
        const int pixels =
            min(2, areas[pixel.level].left + areas[pixel.level].width - pixel.column);
        for (int head = work.head; head < end; head++) {
            const Lists lists(p, bins, work.image, head, pixel, pixels);
            for (int chunk = 0; chunk < channels; chunk += Shape::LANES * Shape::WIDTH) {
                const int channel = min(chunk + lane * Shape::WIDTH, channels - Shape::WIDTH);
                const scalar_t* rows =
                    grad + (int64_t(work.image) * p.queries * p.heads + head) * channels + channel;
                acc_t sum[2][Shape::WIDTH] = {};
                for (int first = 0; first < lists.size; first += 32) {
                    const auto lane_entry = lists.read(entries, first + threadIdx.x % 32);
                    const auto weights = lists.weights(lane_entry, first + threadIdx.x % 32);
                    for (int i = 0; i < 32 && first + i < lists.size; i += BATCH * TURNS) {
                        typename Shape::Row read[BATCH];
#pragma unroll
                        for (int k = 0; k < BATCH; k++)
                            read[k] = *reinterpret_cast<const typename Shape::Row*>(
                                rows
                                + int64_t(__shfl_sync(ALL_LANES, lane_entry.query,
                                                      i + k * TURNS + turn))
                                      * row);
#pragma unroll
                        for (int k = 0; k < BATCH; k++) {
                            const acc_t left =
                                __shfl_sync(ALL_LANES, weights.at[0], i + k * TURNS + turn);
                            const acc_t right =
                                __shfl_sync(ALL_LANES, weights.at[1], i + k * TURNS + turn);
#pragma unroll
                            for (int c = 0; c < Shape::WIDTH; c++) {
                                sum[0][c] += left * acc_t(read[k].at[c]);
                                sum[1][c] += right * acc_t(read[k].at[c]);
                            }
                        }
                    }
                }
                for (int i = 0; i < pixels; i++) {
                    typename Shape::Row written;
#pragma unroll
                    for (int c = 0; c < Shape::WIDTH; c++)
                        written.at[c] = scalar_t(
                            sum_over<(TURNS - 1) * Shape::LANES>(i ? sum[1][c] : sum[0][c]));
                    const int64_t target =
                        (int64_t(work.image) * p.pixels + pixel.index + i) * p.heads + head;
                    if (turn == 0 && chunk + lane * Shape::WIDTH < channels)
                        *reinterpret_cast<typename Shape::Row*>(grad_value + target * channels
                                                                + channel) = written;
                }
            }
        }
    }
}

// The same on tensor cores, for 16 bit and 32 or 64 channels: two adjacent pixels and two heads at
// a time. Sixteen lanes read the entries of each head, and a matrix product takes four of each:
//
//     rows of A       16 pairs of channels
//     columns of A    4 entries of each head x the two channels of a pair
//     columns of B    {first, second pixel} x {first, second head} x {even, odd channel}
//
// B holds the weights rounded to 16 bit; a second product adds the rounding errors.
template <typename scalar_t, int CHANNELS>
__global__ void __launch_bounds__(THREADS, CHANNELS == 32 ? 4 : 2)
    value_tensor_kernel(const Layout p, const scalar_t* __restrict__ grad, int* __restrict__ bins,
                        const Entry<float>* __restrict__ entries,
                        scalar_t* __restrict__ grad_value) {
    constexpr int BLOCKS = CHANNELS / 32;
    using Words = Vector<unsigned, 2 * BLOCKS>;
    __shared__ Area areas[MAX_LEVELS];
    const int row = p.heads * CHANNELS, lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
    const BlockWork work(p.across * p.down, p.heads, 2);
    load_region(p, work.region, areas);
    const int pairs = pairs_of(p, areas);
    const bool wanted = g / 2 % 2 == t / 2;
    const unsigned select = !wanted ? 0x4444 : (g % 2 ? 0x1044 : 0x4410);
    const unsigned select_rest = !wanted ? 0x4444 : (g % 2 ? 0x3244 : 0x4432);
    const int lane_head = work.head + lane / 16;  // whose entries this lane reads
    const int head = min(work.head + t / 2, p.heads - 1);  // whose rows this lane reads
    const scalar_t* rows =
        grad + (int64_t(work.image) * p.queries * p.heads + head) * CHANNELS + g * 4 * BLOCKS;

    for (int place = first_warp(); place < pairs; place += all_warps()) {
        const Pixel pixel = pixel_of<2>(p, areas, place);
        const int pixels =
            min(2, areas[pixel.level].left + areas[pixel.level].width - pixel.column);
        Lists lists(p, bins, work.image, min(lane_head, p.heads - 1), pixel, pixels);
        if (lane_head >= p.heads) lists.size = 0;
        const int longest = maximum_over<16>(lists.size);
        float sum[BLOCKS][4] = {};
        for (int first = 0; first < longest; first += 16) {
            const auto lane_entry = lists.read(entries, first + lane % 16);
            const auto weights = lists.weights(lane_entry, first + lane % 16);
            const unsigned rounded = pack<scalar_t>(weights.at[0], weights.at[1]);
            const float2 kept = unpack<scalar_t>(rounded);
            const unsigned rest = pack<scalar_t>(weights.at[0] - kept.x, weights.at[1] - kept.y);
            const unsigned words[2] = {__byte_perm(rounded, rest, 0x5410),
                                       __byte_perm(rounded, rest, 0x7632)};  // of each pixel
            Words front[4], back[4];
            unsigned entry_words[4][2];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int reader = t / 2 * 16 + k * 4 + t % 2;
                front[k] = *reinterpret_cast<const Words*>(
                    rows + int64_t(__shfl_sync(ALL_LANES, lane_entry.query, reader)) * row);
                back[k] = *reinterpret_cast<const Words*>(
                    rows + int64_t(__shfl_sync(ALL_LANES, lane_entry.query, reader + 2)) * row);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const unsigned left = __shfl_sync(ALL_LANES, words[0], reader + half * 2);
                    const unsigned right = __shfl_sync(ALL_LANES, words[1], reader + half * 2);
                    entry_words[k][half] = g < 4 ? left : right;
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
                    const unsigned a[4] = {front[k].at[2 * block], front[k].at[2 * block + 1],
                                           back[k].at[2 * block], back[k].at[2 * block + 1]};
                    multiply_matrices<scalar_t>(sum[block], a,
                                                {__byte_perm(entry_words[k][0], 0, select),
                                                 __byte_perm(entry_words[k][1], 0, select)});
                    multiply_matrices<scalar_t>(sum[block], a,
                                                {__byte_perm(entry_words[k][0], 0, select_rest),
                                                 __byte_perm(entry_words[k][1], 0, select_rest)});
                }
            }
        }
        Vector<scalar_t, 4 * BLOCKS> written;
#pragma unroll
        for (int c = 0; c < 4 * BLOCKS; c++) written.at[c] = scalar_t(sum[c / 4][c % 4]);
        const int64_t target =
            (int64_t(work.image) * p.pixels + pixel.index + t / 2) * p.heads + work.head + t % 2;
        if (t / 2 < pixels && work.head + t % 2 < p.heads)
            *reinterpret_cast<Vector<scalar_t, 4 * BLOCKS>*>(grad_value + target * CHANNELS
                                                             + g * 4 * BLOCKS) = written;
    }
}

}  // namespace
}  // namespace deform_attn::tuned
