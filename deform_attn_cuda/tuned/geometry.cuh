// Regions, queries, the positions of sampling points, and their weights: what all kernels share.
//
// Template parameters:
//     scalar_t   the dtype of all tensors
//     acc_t      the dtype of all computations: float, or double for double
//     CHANNELS   32 if a head has that many, so that the compiler knows it, else 0
//     FUSED      raw offsets and logits, or else locations in 0..1 and weights
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <type_traits>

#include "../deform_attn.h"

namespace deform_attn::tuned {
namespace {

constexpr int THREADS = 256;  // of a block
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int QUERIES_OF_A_REGION = 256;  // if queries are not pixels

// A problem cut into regions and bins, see docs/kernel.md.
struct Layout : Problem {
    int across, down;            // regions of the picture; each is the same part of all levels
    int bins_start[MAX_LEVELS];  // first bin of a level, see bins.cuh
    int bins;                    // of one head of one image
};

template <typename scalar_t>
using accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t, int N> struct alignas(N * sizeof(scalar_t)) Vector {
    scalar_t at[N];
};

// How a warp is cut into groups of lanes. A group shares a row: the channels of one head at one
// pixel.
template <typename scalar_t, int CHANNELS> struct WarpShape {
    static constexpr int WIDTH = CHANNELS ? 16 / sizeof(scalar_t) : 1;  // channels read at once
    static constexpr int LANES = CHANNELS ? CHANNELS / WIDTH : 32;      // of a group
    // Neighbouring heads of a warp: the rows of two fill a cache line of 128 bytes in 16 bit.
    static constexpr int HEADS = CHANNELS && sizeof(scalar_t) == 2 ? 2 : 1;
    static constexpr int QUERIES = 32 / LANES / HEADS;  // of a warp at a time
    static constexpr int UNROLL = 2;                    // points whose rows are read together
    using Row = Vector<scalar_t, WIDTH>;
};

template <typename Row> __device__ Row read_row(const void* from) {
    return *static_cast<const Row*>(from);
}

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
__device__ float inverse(float x) { return __fdividef(1, x); }
__device__ double inverse(double x) { return 1 / x; }
__device__ int floor_to_int(float x) { return __float2int_rd(x); }
__device__ int floor_to_int(double x) { return __double2int_rd(x); }

// ---- regions and queries ------------------------------------------------------------------------

__host__ __device__ int count_regions(const Layout& p) {
    return p.fused ? p.across * p.down
                   : (p.queries + QUERIES_OF_A_REGION - 1) / QUERIES_OF_A_REGION;
}

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

// The pixels of a region on one level.
struct Area {
    int left, top, width, height;
};

// Computes a region's area on every level, in shared memory. Returns its number of pixels; with
// STEP 2, of horizontal pairs of pixels.
template <int STEP = 1> __device__ int load_region(const Layout& p, int region, Area* areas) {
    for (int level = threadIdx.x; level < p.levels; level += blockDim.x) {
        const int i = region % p.across, j = region / p.across;
        const int left = i * p.width[level] / p.across, top = j * p.height[level] / p.down;
        areas[level] = {left, top, (i + 1) * p.width[level] / p.across - left,
                        (j + 1) * p.height[level] / p.down - top};
    }
    __syncthreads();
    int count = 0;
    for (int level = 0; level < p.levels; level++)
        count += (areas[level].width + STEP - 1) / STEP * areas[level].height;
    return count;
}

// The number of queries of a region.
template <bool FUSED> __device__ int load_queries(const Layout& p, int region, Area* areas) {
    return FUSED ? load_region(p, region, areas)
                 : min(p.queries - region * QUERIES_OF_A_REGION, QUERIES_OF_A_REGION);
}

struct Pixel {
    int index;  // among all levels of the image
    int level, column, row;
};

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

// ---- sampling points ----------------------------------------------------------------------------

// A position along one axis: a pixel, which can be outside the level, and the distance from its
// centre, 0..1.
template <typename acc_t> struct Position {
    int pixel;
    acc_t rest;
};

template <typename acc_t> struct Point {
    Position<acc_t> x, y;
};

// The position `distance` pixels after the centre of pixel `whole`.
template <typename acc_t> __device__ Position<acc_t> split(int whole, acc_t distance) {
    return {whole + min(max(floor_to_int(distance), -(1 << 30)), 1 << 30),
            distance - floor(distance)};
}

// The centre of pixel i of n, along one axis. Among the m pixels of another level, it is at
// (2 i + 1) * m / (2 n). This is split in integers into a whole number and a rest, because float32
// would lose the last digits of the fraction.
template <typename acc_t> struct Centre {
    int twice, twice_size;
    acc_t inverse_size;

    __device__ Centre(int i, int n)
        : twice(2 * i + 1), twice_size(2 * n), inverse_size(inverse(acc_t(twice_size))) {}

    // The position `offset` pixels after it, in a level of this size.
    __device__ Position<acc_t> locate(int size, acc_t offset) const {
        // May be off by one, which `rest` then corrects.
        const int whole = floor_to_int(acc_t(twice * size) * inverse_size);
        const int rest = twice * size - whole * twice_size;
        return split(whole, offset + multiply_add(acc_t(rest), inverse_size, acc_t(-0.5)));
    }
};

// Query `place` of a region. If queries are not pixels, they have no centre.
template <typename acc_t, bool FUSED> struct Query {
    int index;
    Centre<acc_t> x{0, 1}, y{0, 1};

    __device__ Query(const Layout& p, int region, const Area* areas, int place) {
        index = region * QUERIES_OF_A_REGION + place;
        if (FUSED) {
            const Pixel pixel = pixel_of(p, areas, place);
            index = pixel.index;
            x = {pixel.column, p.width[pixel.level]};
            y = {pixel.row, p.height[pixel.level]};
        }
    }

    // The point whose offset or location is at `xy`.
    template <typename scalar_t>
    __device__ Point<acc_t> locate(int height, int width, const scalar_t* xy) const {
        const auto pair = *reinterpret_cast<const Vector<scalar_t, 2>*>(xy);
        if (FUSED) return {x.locate(width, pair.at[0]), y.locate(height, pair.at[1])};
        return {split(0, multiply_add(acc_t(pair.at[0]), acc_t(width), acc_t(-0.5))),
                split(0, multiply_add(acc_t(pair.at[1]), acc_t(height), acc_t(-0.5)))};
    }
};

// Whether any of the four pixels around a point is inside the level.
template <typename acc_t>
__device__ bool is_inside(const Point<acc_t>& point, int height, int width) {
    return point.x.pixel >= -1 && point.x.pixel < width && point.y.pixel >= -1
           && point.y.pixel < height;
}

// Two adjacent pixels around a position that can be read, `first` and the next (the same one again
// in a level of size 1), and their bilinear weights. A pixel outside the level has weight 0.
template <typename acc_t> struct Neighbours {
    int first;
    acc_t weight[2];
    acc_t slope[2];  // derivative of the weight by the position

    __device__ Neighbours(Position<acc_t> at, int size) {
        first = min(max(at.pixel, 0), max(size - 2, 0));
        share(at.pixel, size, 1 - at.rest, at.rest, weight);
        share(at.pixel, size, acc_t(-1), acc_t(1), slope);
    }
    // Shares `low` of `pixel` and `high` of the next one.
    __device__ void share(int pixel, int size, acc_t low, acc_t high, acc_t (&shares)[2]) {
        const acc_t none = 0;
        shares[0] = pixel == first ? low : pixel + 1 == first ? high : none;
        shares[1] = size == 1 ? none : pixel == first ? high : pixel == first + 1 ? low : none;
    }
};

// Weights from scores: a softmax over all points of one head of a query, if FUSED.
template <typename scalar_t, typename acc_t, bool FUSED> struct Weights {
    const scalar_t* scores;
    acc_t maximum = 0, scale = 1;

    // LANES lanes share the head of the query; `lane` is the index among them.
    template <int LANES> __device__ static Weights of(const scalar_t* scores, int count, int lane) {
        Weights weights{scores};
        if (FUSED) {
            acc_t maximum = -FLT_MAX, sum = 0;
            for (int i = lane; i < count; i += LANES) maximum = max(maximum, acc_t(scores[i]));
            weights.maximum = maximum_over<LANES - 1>(maximum);
            for (int i = lane; i < count; i += LANES)
                sum += exponential(acc_t(scores[i]) - weights.maximum);
            weights.scale = acc_t(1) / sum_over<LANES - 1>(sum);
        }
        return weights;
    }
    __device__ acc_t operator[](int i) const {
        return FUSED ? exponential(acc_t(scores[i]) - maximum) * scale : acc_t(scores[i]);
    }
};

}  // namespace
}  // namespace deform_attn::tuned
