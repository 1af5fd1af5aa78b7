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

// A warp computes two adjacent pixels, which share two thirds of their entries, one head after the
// other. Its lanes read 32 entries at a time; then groups of LANES lanes take their rows in turn.
template <typename scalar_t, int CHANNELS>
__global__ void __launch_bounds__(THREADS, 4)
    value_kernel(const Layout p, const scalar_t* __restrict__ grad, int* __restrict__ bins,
                 const Entry<accumulator<scalar_t>>* __restrict__ entries,
                 scalar_t* __restrict__ grad_value) {
    using Shape = WarpShape<scalar_t, CHANNELS>;
    using Row = typename Shape::Row;
    using acc_t = accumulator<scalar_t>;
    constexpr int TURNS = 32 / Shape::LANES, BATCH = 4;  // rows that are read together
    __shared__ Area areas[MAX_LEVELS];
    const int channels = CHANNELS ? CHANNELS : p.channels, row = p.heads * channels;
    const int lane = threadIdx.x % Shape::LANES, turn = threadIdx.x % 32 / Shape::LANES;
    const BlockWork work(p.across * p.down, p.heads, Shape::HEADS);
    const int pairs = load_region<2>(p, work.region, areas);
    const int end = min(work.head + Shape::HEADS, p.heads);

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
                        Row read[BATCH];
#pragma unroll
                        for (int k = 0; k < BATCH; k++) {
                            const int query =
                                __shfl_sync(ALL_LANES, lane_entry.query, i + k * TURNS + turn);
                            read[k] = read_row<Row>(rows + int64_t(query) * row);
                        }
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
                    Row written;
#pragma unroll
                    for (int c = 0; c < Shape::WIDTH; c++)
                        written.at[c] = scalar_t(
                            sum_over<(TURNS - 1) * Shape::LANES>(i ? sum[1][c] : sum[0][c]));
                    const int64_t target =
                        (int64_t(work.image) * p.pixels + pixel.index + i) * p.heads + head;
                    if (turn == 0 && chunk + lane * Shape::WIDTH < channels)
                        *reinterpret_cast<Row*>(grad_value + target * channels + channel) = written;
                }
            }
        }
    }
}

}  // namespace
}  // namespace deform_attn::tuned
