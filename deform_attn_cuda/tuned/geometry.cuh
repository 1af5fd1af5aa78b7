// Regions, queries, the positions of sampling points, and their weights: what all kernels share.
//
// Template parameters:
//     scalar_t   the dtype of all tensors
//     acc_t      the dtype of all computations: float, or double for double
//     CHANNELS   per head, if the compiler is to know it, else 0
//     FUSED      raw offsets and logits, or else locations in 0..1 and weights
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <type_traits>

#include "layout.h"

namespace deform_attn::tuned {
namespace {

constexpr int THREADS = 256;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int QUERIES_OF_A_REGION = 256;  // if queries are not pixels

template <typename scalar_t>
using accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t, int N> struct alignas(N * sizeof(scalar_t)) Vector {
    scalar_t at[N];
};

// How a warp is cut into groups of lanes.
template <typename scalar_t, int CHANNELS> struct WarpShape {
    // Channels that a lane reads at once.
    static constexpr int WIDTH = CHANNELS ? 16 / sizeof(scalar_t) : 1;
    // Lanes of a group, which share a row: the channels of one head at one pixel.
    static constexpr int LANES = CHANNELS ? CHANNELS / WIDTH : 32;
    // Neighbouring heads of a warp, so that rows fill a cache line of 128 bytes.
    static constexpr int HEADS =
        CHANNELS * sizeof(scalar_t) < 128 && CHANNELS ? 128 / (CHANNELS * sizeof(scalar_t)) : 1;
    static constexpr int QUERIES = 32 / LANES / HEADS;  // of a warp at a time
    static constexpr int UNROLL = 2;  // points that are loaded together
    using Row = Vector<scalar_t, WIDTH>;
};

// Reductions over the lanes whose indices differ only in BITS.
template <unsigned BITS, typename acc_t> __device__ acc_t sum_over(acc_t x) {
    for (unsigned bit = 1; bit < 32; bit *= 2)
        if (BITS & bit) x += __shfl_xor_sync(ALL_LANES, x, bit);
    return x;
}
template <unsigned BITS, typename acc_t> __device__ acc_t maximum_over(acc_t x) {
    for (unsigned bit = 1; bit < 32; bit *= 2)
        if (BITS & bit) x = max(x, __shfl_xor_sync(ALL_LANES, x, bit));
    return x;
}

// Explicitly fused, because all kernels must round the position of a point in the same way.
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

// ---- regions and queries ------------------------------------------------------------------------

struct Pixel {
    int index;  // among all levels of the image
    int level, column, row;
};

// The pixels of a region on one level.
struct Area {
    int left, top, width, height;
};

// Computes a region's area on every level, in shared memory; returns its number of pixels.
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

// Pixel `place` of a region; with STEP 2, the left pixel of horizontal pair `place`.
template <int STEP = 1> __device__ Pixel pixel_of(const Layout& p, const Area* areas, int place) {
    Pixel pixel{};
    int width;
    while (true) {
        width = (areas[pixel.level].width + STEP - 1) / STEP;
        if (place < width * areas[pixel.level].height) break;
        place -= width * areas[pixel.level++].height;
    }
    // place / width, exact for integers as small as these.
    const int row = int((place + 0.5f) * inverse(float(width)));
    pixel.row = areas[pixel.level].top + row;
    pixel.column = areas[pixel.level].left + (place - row * width) * STEP;
    pixel.index = p.start[pixel.level] + pixel.row * p.width[pixel.level] + pixel.column;
    return pixel;
}

// A query, and if it is a pixel, its centre. Among the pixels of another level, the centre is at
// (2 column + 1) * (width of that level) / (2 width). This is split in integers into a whole number
// and a rest, because float32 would lose the last digits of the fraction.
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

// ---- sampling points ----------------------------------------------------------------------------

template <typename acc_t> struct Point {
    int column, row;  // of the pixel to its upper left, which can be outside the level
    acc_t x, y;  // from the centre of that pixel, 0..1
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
    // May be off by one, which `rest` then corrects.
    const int whole = floor_to_int(acc_t(twice * size) * inverse);
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

// Whether any of the four pixels around a point is inside the level.
template <typename acc_t>
__device__ bool is_inside(const Point<acc_t>& point, int height, int width) {
    return point.column >= -1 && point.column < width && point.row >= -1 && point.row < height;
}

// Two adjacent pixels along one axis that can be read, `first` and the next (the same one again in
// a level of size 1), and their shares `at`. The pixels `cell` and `cell` + 1 have the shares `low`
// and `high`; a pixel outside the level has none.
template <typename acc_t> struct Neighbours {
    int first;
    acc_t at[2];
    __device__ Neighbours(int cell, int size, acc_t low, acc_t high) {
        first = min(max(cell, 0), max(size - 2, 0));
        at[0] = cell == first ? low : cell + 1 == first ? high : acc_t(0);
        at[1] = size == 1 ? acc_t(0) : cell == first ? high : cell == first + 1 ? low : acc_t(0);
    }
};

// Weights from scores: a softmax over all points of one head of a query, if FUSED.
template <typename scalar_t, typename acc_t, bool FUSED> struct Weights {
    const scalar_t* scores;
    acc_t maximum, scale;

    // For one head of a query that the lanes differing in BITS share; `lane` is the index among
    // them.
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

// What a block computes: a region, for `heads_at_once` heads of an image. blockIdx.x runs over
// regions, then heads, then images. Blocks with the same blockIdx.x share the work: their warps
// take alternate queries, starting with first_warp().
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
