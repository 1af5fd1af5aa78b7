// Where points fall: lanes of a warp, regions of the picture and their pixels, queries, sampling points, their weights.
//
// Types: T what is stored, R what is computed in (float; double for double). D = 0 stands for any number of channels, FUSED for
// raw offsets and logits (locations in 0..1 and weights otherwise).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <type_traits>

#include "layout.h"

namespace deform_attn::tuned {
namespace {

constexpr int THREADS = 256;
constexpr unsigned WARP = 0xffffffffu;
constexpr int QUERIES_OF_A_REGION = 256;  // where queries are no pixels

template <typename scalar_t>
using accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t, int N> struct alignas(N * sizeof(scalar_t)) Vector {
    scalar_t at[N];
};

// How a warp is cut into groups of lanes.
template <typename scalar_t, int CHANNELS> struct WarpShape {
    static constexpr int WIDTH =
        CHANNELS ? 16 / sizeof(scalar_t) : 1;  // channels that a lane reads at once
    static constexpr int LANES = CHANNELS ? CHANNELS / WIDTH : 32;  // of a group
    static constexpr int HEADS = CHANNELS * sizeof(scalar_t) < 128 && CHANNELS
                                     ? 128 / (CHANNELS * sizeof(scalar_t))
                                     : 1;  // side by side, one cache line
    static constexpr int QUERIES = 32 / LANES / HEADS;  // of a warp at once
    static constexpr int UNROLL = 2;  // points whose rows are in flight together
    using Row = Vector<scalar_t, WIDTH>;
};

// Over the lanes whose numbers differ in these bits alone.
template <unsigned BITS, typename acc_t> __device__ acc_t sum_over(acc_t x) {
    for (unsigned bit = 1; bit < 32; bit *= 2)
        if (BITS & bit) x += __shfl_xor_sync(WARP, x, bit);
    return x;
}
template <unsigned BITS, typename acc_t> __device__ acc_t maximum_over(acc_t x) {
    for (unsigned bit = 1; bit < 32; bit *= 2)
        if (BITS & bit) x = max(x, __shfl_xor_sync(WARP, x, bit));
    return x;
}

// Rounded once, whatever the compiler thinks: all kernels that place a point must place it alike.
__device__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ float exponential(float x) { return __expf(x); }
__device__ double exponential(double x) { return exp(x); }
constexpr float LOG2_E = 1.4426950408889634f;
__device__ float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ float inverse(float x) { return __fdividef(1, x); }
__device__ double inverse(double x) { return 1 / x; }
__device__ int floor_to_int(float x) { return __float2int_rd(x); }
__device__ int floor_to_int(double x) { return __double2int_rd(x); }

// ---- which pixel, which query ---------------------------------------------------------------------------------------

struct Pixel {
    int index;  // among all levels of the image
    int level, column, row;
};

// What a region is on one level.
struct Area {
    int left, top, width, height;
};

// Fills `cuts`, which the block shares; returns the region's number of pixels.
__device__ int load_region(const Layout& p, int region, Area* areas) {
    for (int level = threadIdx.x; level < p.levels; level += blockDim.x) {
        const int i = region % p.across, j = region / p.across;
        const int left = i * p.width[level] / p.across, top = j * p.height[level] / p.down;
        areas[level] = {left, top, (i + 1) * p.width[level] / p.across - left,
                        (j + 1) * p.height[level] / p.down - top};
    }
    __syncthreads();
    int pixels = 0;
    for (int level = 0; level < p.levels; level++)
        pixels += areas[level].width * areas[level].height;
    return pixels;
}

// Pixel number `place` of a region, or the first of pair number `place` (STEP 2).
template <int STEP = 1> __device__ Pixel pixel_of(const Layout& p, const Area* areas, int place) {
    Pixel pixel{};
    int width;
    while (true) {
        width = (areas[pixel.level].width + STEP - 1) / STEP;
        if (place < width * areas[pixel.level].height) break;
        place -= width * areas[pixel.level++].height;
    }
    const int row =
        int((place + 0.5f) * inverse(float(width)));  // right for small integers, as these are
    pixel.row = areas[pixel.level].top + row;
    pixel.column = areas[pixel.level].left + (place - row * width) * STEP;
    pixel.index = p.start[pixel.level] + pixel.row * p.width[pixel.level] + pixel.column;
    return pixel;
}

// A query and, if it is a pixel, the terms of its centre. The centre in pixels of another level, (2 column + 1) / (2 width)
// times that level's width, is split into a whole and a small part in integers: float32 would lose the fraction's last digits.
template <typename acc_t, bool FUSED> struct Query {
    int index;
    int twice_x, twice_y, twice_width, twice_height;
    acc_t inverse_width, inverse_height;

    __device__ Query(const Layout& p, int region, const Area* areas, int place) {
        if (FUSED) {
            const Pixel pixel = pixel_of(p, areas, place);
            index = pixel.index;
            twice_x = 2 * pixel.column + 1;
            twice_y = 2 * pixel.row + 1;
            twice_width = 2 * p.width[pixel.level];
            twice_height = 2 * p.height[pixel.level];
            inverse_width = inverse(acc_t(twice_width));
            inverse_height = inverse(acc_t(twice_height));
        } else {
            index = region * QUERIES_OF_A_REGION + place;
        }
    }
};

template <bool FUSED> __device__ int load_queries(const Layout& p, int region, Area* areas) {
    return FUSED ? load_region(p, region, areas)
                 : min(p.queries - region * QUERIES_OF_A_REGION, QUERIES_OF_A_REGION);
}

// ---- where a point falls --------------------------------------------------------------------------------------------

template <typename acc_t> struct Point {
    int column,
        row;  // of the pixel to its upper left, -1 .. size - 1 if any of the four around it is inside
    acc_t x, y;  // from that pixel's centre, 0..1
};

template <typename acc_t>
__device__ void split(acc_t position, int whole, int& cell, acc_t& fraction) {
    const acc_t low = floor(position);
    fraction = position - low;
    cell = whole + min(max(floor_to_int(position), -(1 << 30)), 1 << 30);
}

template <typename acc_t>
__device__ void locate_axis(int twice, int twice_size, acc_t inverse, int size, acc_t offset,
                            int& cell, acc_t& fraction) {
    const int whole =
        floor_to_int(acc_t(twice * size) * inverse);  // one too many or too few does no harm
    const int rest = twice * size - whole * twice_size;
    split(offset + multiply_add(acc_t(rest), inverse, acc_t(-0.5)), whole, cell, fraction);
}

template <typename scalar_t> __device__ Vector<scalar_t, 2> read_pair(const scalar_t* xy) {
    return *reinterpret_cast<const Vector<scalar_t, 2>*>(xy);
}

template <typename scalar_t, typename acc_t, bool FUSED>
__device__ Point<acc_t> locate_point(const Query<acc_t, FUSED>& query, int height, int width,
                                     Vector<scalar_t, 2> pair) {
    Point<acc_t> point;
    if (FUSED) {
        locate_axis(query.twice_x, query.twice_width, query.inverse_width, width, acc_t(pair.at[0]),
                    point.column, point.x);
        locate_axis(query.twice_y, query.twice_height, query.inverse_height, height,
                    acc_t(pair.at[1]), point.row, point.y);
    } else {
        split(multiply_add(acc_t(pair.at[0]), acc_t(width), acc_t(-0.5)), 0, point.column, point.x);
        split(multiply_add(acc_t(pair.at[1]), acc_t(height), acc_t(-0.5)), 0, point.row, point.y);
    }
    return point;
}

template <typename acc_t>
__device__ bool is_inside(const Point<acc_t>& point, int height, int width) {
    return point.column >= -1 && point.column < width && point.row >= -1 && point.row < height;
}

// The two neighbours along one axis that are always read: `first` and the one after it (or itself, in a level of size 1), and
// what the pixels at cell and cell + 1 with weights `low` and `high` come to there. Neighbours outside get nothing.
template <typename acc_t> struct Neighbours {
    int first;
    acc_t at[2];
    __device__ Neighbours(int cell, int size, acc_t low, acc_t high) {
        first = min(max(cell, 0), max(size - 2, 0));
        at[0] = cell == first ? low : cell + 1 == first ? high : acc_t(0);
        at[1] = size == 1 ? acc_t(0) : cell == first ? high : cell == first + 1 ? low : acc_t(0);
    }
};

// Scores to weights: softmax over all points of a (query, head); the identity if the scores are weights already.
template <typename scalar_t, typename acc_t, bool FUSED> struct Weights {
    const scalar_t* scores;
    acc_t maximum, scale;

    // The lanes that differ in BITS share a (query, head); `lane` counts them.
    template <unsigned BITS>
    __device__ static Weights of(const scalar_t* scores, int count, int lane) {
        constexpr int LANES = 1 << __builtin_popcount(BITS);
        Weights weights{scores, acc_t(0), acc_t(1)};
        if (FUSED) {
            acc_t maximum = acc_t(-FLT_MAX), sum = 0;
            for (int i = lane; i < count; i += LANES) maximum = max(maximum, acc_t(scores[i]));
            weights.maximum = maximum_over<BITS>(maximum);
            for (int i = lane; i < count; i += LANES)
                sum += exponential(acc_t(scores[i]) - weights.maximum);
            weights.scale = acc_t(1) / sum_over<BITS>(sum);
        }
        return weights;
    }
    __device__ acc_t operator[](int i) const {
        return FUSED ? exponential(acc_t(scores[i]) - maximum) * scale : acc_t(scores[i]);
    }
};

// The part of the work that a block has: blocks run over regions, then sets of HEADS heads, then images. Where these are few,
// blocks of the same x share one part: their warps take turns at it, see first_warp.
struct BlockWork {
    int region, head, image;
    __device__ BlockWork(int regions, int heads, int heads_at_once) {
        const int sets = (heads + heads_at_once - 1) / heads_at_once;
        region = blockIdx.x % regions;
        head = blockIdx.x / regions % sets * heads_at_once;
        image = blockIdx.x / regions / sets;
    }
};

__device__ int first_warp() { return blockIdx.y * (THREADS / 32) + threadIdx.x / 32; }
__device__ int all_warps() { return gridDim.y * (THREADS / 32); }

__host__ __device__ int count_regions(const Layout& p) {
    return p.fused ? p.across * p.down
                   : (p.queries + QUERIES_OF_A_REGION - 1) / QUERIES_OF_A_REGION;
}

}  // namespace
}  // namespace deform_attn::tuned
