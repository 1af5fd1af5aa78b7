// Backward, third part: the value's gradient, gathered by each pixel from the points in the bins around it.
#pragma once

#include "bins.cuh"

namespace deform_attn::tuned {
namespace {

// The entries that one or two neighbouring pixels gather from: two or three bins in the row of bins above them, then below.
struct Lists {
    int begin_above, second_above, third_above, size_above;       // where bins begin
    int begin_below, second_below, third_below, size;

    __device__ Lists(const Layout& p, int* bins, int image, int head, const Pixel& pixel, int pixels) {
        const int* above = bin_row(p, bins, image, head, pixel.level, pixel.row) + pixel.column;
        const int* below = above + p.width[pixel.level] + 2;
        begin_above = above[0];
        second_above = above[1];
        third_above = above[2];
        size_above = above[pixels + 1] - begin_above;
        begin_below = below[0] - size_above;                       // counting goes on
        second_below = below[1];
        third_below = below[2];
        size = size_above + below[pixels + 1] - below[0];
    }

    __device__ int place(int i) const { return (i >= size_above ? begin_below : begin_above) + i; }    // of number i

    template <typename R> __device__ Entry<R> read(const Entry<R>* entries, int i) const {
        return i < size ? entries[place(i)] : Entry<R>{0, 0, 0, 0};
    }

    // What number i gives the first and the second pixel.
    template <typename R> __device__ Vector<R, 2> weights(const Entry<R>& entry, int i) const {
        const bool below = i >= size_above;
        const bool right = place(i) >= (below ? second_below : second_above);
        const bool beyond = place(i) >= (below ? third_below : third_above);
        const R weight = entry.weight * (below ? 1 - entry.y : entry.y), near = weight * entry.x, far = weight - near;
        return {right ? (beyond ? R(0) : far) : near, right ? (beyond ? far : near) : R(0)};
    }
};

__device__ int pairs_of(const Layout& p, const Cut* cuts) {
    int pairs = 0;
    for (int level = 0; level < p.levels; level++) pairs += (cuts[level].width + 1) / 2 * cuts[level].height;
    return pairs;
}

// A warp for two neighbouring pixels, which share two thirds of their entries, one head after the other. Its lanes read 32
// entries at once; then groups of LANES lanes take turns at the rows of those.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 4)
value_kernel(const Layout p, const T* __restrict__ grad, int* __restrict__ bins,
             const Entry<typename Computed<T>::type>* __restrict__ entries, T* __restrict__ grad_value) {
    using S = Shape<T, D>;
    using R = typename Computed<T>::type;
    constexpr int TURNS = 32 / S::LANES, BATCH = S::LANES < 4 ? S::LANES : 4;
    __shared__ Cut cuts[MAX_LEVELS];
    const int channels = D ? D : p.channels, row = p.heads * channels;
    const int lane = threadIdx.x % S::LANES, turn = threadIdx.x % 32 / S::LANES;
    const Part part(p.across * p.down, p.heads, S::HEADS);
    cut_region(p, part.region, cuts);
    const int pairs = pairs_of(p, cuts), end = min(part.head + S::HEADS, p.heads);

    for (int place = first_warp(); place < pairs; place += all_warps()) {
        const Pixel pixel = pixel_of<2>(p, cuts, place);
        const int pixels = min(2, cuts[pixel.level].left + cuts[pixel.level].width - pixel.column);
        for (int head = part.head; head < end; head++) {
            const Lists lists(p, bins, part.image, head, pixel, pixels);
            for (int chunk = 0; chunk < channels; chunk += S::LANES * S::WIDTH) {
                const int channel = min(chunk + lane * S::WIDTH, channels - S::WIDTH);
                const T* rows = grad + (int64_t(part.image) * p.queries * p.heads + head) * channels + channel;
                R sum[2][S::WIDTH] = {};
                for (int first = 0; first < lists.size; first += 32) {
                    const auto own = lists.read(entries, first + threadIdx.x % 32);
                    const auto weights = lists.weights(own, first + threadIdx.x % 32);
                    for (int i = 0; i < 32 && first + i < lists.size; i += BATCH * TURNS) {
                        typename S::Row read[BATCH];
                        #pragma unroll
                        for (int k = 0; k < BATCH; k++)
                            read[k] = *reinterpret_cast<const typename S::Row*>(
                                rows + int64_t(__shfl_sync(WARP, own.query, i + k * TURNS + turn)) * row);
                        #pragma unroll
                        for (int k = 0; k < BATCH; k++) {
                            const R left = __shfl_sync(WARP, weights.at[0], i + k * TURNS + turn);
                            const R right = __shfl_sync(WARP, weights.at[1], i + k * TURNS + turn);
                            #pragma unroll
                            for (int c = 0; c < S::WIDTH; c++) {
                                sum[0][c] += left * R(read[k].at[c]);
                                sum[1][c] += right * R(read[k].at[c]);
                            }
                        }
                    }
                }
                for (int i = 0; i < pixels; i++) {
                    typename S::Row written;
                    #pragma unroll
                    for (int c = 0; c < S::WIDTH; c++)
                        written.at[c] = T(sum_over<(TURNS - 1) * S::LANES>(i ? sum[1][c] : sum[0][c]));
                    const int64_t target = (int64_t(part.image) * p.pixels + pixel.index + i) * p.heads + head;
                    if (turn == 0 && chunk + lane * S::WIDTH < channels)
                        *reinterpret_cast<typename S::Row*>(grad_value + target * channels + channel) = written;
                }
            }
        }
    }
}

// The same for 16 bit and 32 or 64 channels, on tensor cores, for two heads and two neighbouring pixels, which share two thirds
// of their entries. Sixteen lanes read the entries of each head; a product takes four of each:
//   rows of A     16 pairs of channels
//   columns of A  4 entries of each head times the two channels of a pair
//   columns of B  {first, second pixel} x {first, second head} x {even, odd channel}; once the weights, once what was rounded off
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, D == 32 ? 4 : 2)
value_tensor_kernel(const Layout p, const T* __restrict__ grad, int* __restrict__ bins, const Entry<float>* __restrict__ entries,
                    T* __restrict__ grad_value) {
    constexpr int BLOCKS = D / 32;
    using Words = Vector<unsigned, 2 * BLOCKS>;
    __shared__ Cut cuts[MAX_LEVELS];
    const int row = p.heads * D, lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
    const Part part(p.across * p.down, p.heads, 2);
    cut_region(p, part.region, cuts);
    const int pairs = pairs_of(p, cuts);
    const bool wanted = g / 2 % 2 == t / 2;
    const unsigned select = !wanted ? 0x4444 : g % 2 ? 0x1044 : 0x4410, select_rest = !wanted ? 0x4444 : g % 2 ? 0x3244 : 0x4432;
    const int own_head = part.head + lane / 16;                    // as one who reads entries
    const int head = min(part.head + t / 2, p.heads - 1);          // as one who reads rows
    const T* rows = grad + (int64_t(part.image) * p.queries * p.heads + head) * D + g * 4 * BLOCKS;

    for (int place = first_warp(); place < pairs; place += all_warps()) {
        const Pixel pixel = pixel_of<2>(p, cuts, place);
        const int pixels = min(2, cuts[pixel.level].left + cuts[pixel.level].width - pixel.column);
        Lists lists(p, bins, part.image, min(own_head, p.heads - 1), pixel, pixels);
        if (own_head >= p.heads) lists.size = 0;
        const int longest = maximum_over<16>(lists.size);
        float sum[BLOCKS][4] = {};
        for (int first = 0; first < longest; first += 16) {
            const auto own = lists.read(entries, first + lane % 16);
            const auto weights = lists.weights(own, first + lane % 16);
            const unsigned rounded = pack<T>(weights.at[0], weights.at[1]);
            const float2 kept = unpack<T>(rounded);
            const unsigned rest = pack<T>(weights.at[0] - kept.x, weights.at[1] - kept.y);
            const unsigned words[2] = {__byte_perm(rounded, rest, 0x5410), __byte_perm(rounded, rest, 0x7632)};   // of each pixel
            Words front[4], back[4];
            unsigned its[4][2];
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const int reader = t / 2 * 16 + k * 4 + t % 2;
                front[k] = *reinterpret_cast<const Words*>(rows + int64_t(__shfl_sync(WARP, own.query, reader)) * row);
                back[k] = *reinterpret_cast<const Words*>(rows + int64_t(__shfl_sync(WARP, own.query, reader + 2)) * row);
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const unsigned left = __shfl_sync(WARP, words[0], reader + half * 2);
                    const unsigned right = __shfl_sync(WARP, words[1], reader + half * 2);
                    its[k][half] = g < 4 ? left : right;
                }
            }
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                #pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
                    const unsigned a[4] = {front[k].at[2 * block], front[k].at[2 * block + 1],
                                           back[k].at[2 * block], back[k].at[2 * block + 1]};
                    multiply<T>(sum[block], a, {__byte_perm(its[k][0], 0, select), __byte_perm(its[k][1], 0, select)});
                    multiply<T>(sum[block], a, {__byte_perm(its[k][0], 0, select_rest), __byte_perm(its[k][1], 0, select_rest)});
                }
            }
        }
        Vector<T, 4 * BLOCKS> written;
        #pragma unroll
        for (int c = 0; c < 4 * BLOCKS; c++) written.at[c] = T(sum[c / 4][c % 4]);
        const int64_t target = (int64_t(part.image) * p.pixels + pixel.index + t / 2) * p.heads + part.head + t % 2;
        if (t / 2 < pixels && part.head + t % 2 < p.heads)
            *reinterpret_cast<Vector<T, 4 * BLOCKS>*>(grad_value + target * D + g * 4 * BLOCKS) = written;
    }
}

}  // namespace
}  // namespace deform_attn::tuned
