// Multi-scale deformable attention, the plain kernel: any shape, in float32, float16, bfloat16 and
// float64. Read this file first; tuned/ computes the same, faster.
//
// In each head, a query samples a few points of every level of a feature pyramid (Deformable DETR,
// arXiv 2010.04159, eq. 3):
//
//     output = sum over levels v and points p of
//              weight[v, p] * bilinear(value of level v, at x[v, p], y[v, p])
//
// Positions are in pixels of the level, 0 = the centre of its first pixel; values outside a level
// are 0. From the inputs of the fused operator (see Problem in deform_attn.h):
//
//     x[v, p] = (centre of the query / width of its level) * width of level v - 1/2 + offset[v, p]
//     weight  = softmax of the logits, over all points of all levels
//
// One warp computes one head of one query. Its 32 lanes hold one channel each (of the first 32, of
// the next 32, ...), so a warp reads a pixel's channels from consecutive addresses. Everything that
// does not depend on the channel, positions and softmax, is computed by all lanes alike.
//
// Sums are in acc_t: float32, or float64 for float64.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "deform_attn.h"

namespace deform_attn::plain {
namespace {

constexpr int WARP_SIZE = 32;
constexpr int BLOCK_SIZE = 128;
constexpr unsigned ALL_LANES = 0xffffffff;

template <typename scalar_t>
using accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

__host__ __device__ int64_t count_items(const Problem& p) {
    return int64_t(p.images) * p.queries * p.heads;
}

// What a warp computes: one head of one query.
struct Item {
    int64_t index;  // among all (image, query, head)
    int image, query, head;

    __device__ explicit Item(const Problem& p) {
        index = (int64_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x) / WARP_SIZE;
        head = int(index % p.heads);
        query = int(index / p.heads % p.queries);
        image = int(index / p.heads / p.queries);
    }
};

// The two pixels around a position along one axis, and their bilinear weights. A pixel outside the
// level has weight 0, and its index is clamped so that it can be read.
template <typename acc_t> struct Neighbours {
    int index[2];
    acc_t weight[2];
    acc_t slope[2];  // derivative of the weight by the position

    // The position is `whole` + `position`.
    __device__ Neighbours(int whole, acc_t position, int size) {
        const acc_t low = floor(position);
        const acc_t far = acc_t(1 << 24);  // beyond every level
        const int first = whole + int(fmax(fmin(low, far), -far));
        for (int i = 0; i < 2; i++) {
            const acc_t inside = first + i >= 0 && first + i < size;
            index[i] = min(max(first + i, 0), size - 1);
            weight[i] = inside * (i == 0 ? 1 - (position - low) : position - low);
            slope[i] = inside * (i == 0 ? -1 : 1);
        }
    }
};

// Where offset 0 is along one axis, in pixels of a level: whole pixels plus a rest.
template <typename acc_t> struct Origin {
    int whole;
    acc_t rest;
};

// The centre of pixel `index` of `from_size` pixels, among `to_size` pixels. It is split in
// integers, because in large levels float32 would lose the last digits of the rest.
template <typename acc_t> __device__ Origin<acc_t> centre(int index, int from_size, int to_size) {
    const int numerator = (2 * index + 1) * to_size, denominator = 2 * from_size;
    return {numerator / denominator,
            acc_t(numerator % denominator) / denominator - acc_t(0.5)};
}

// A sampling point: number `index` among the levels * points of its item.
template <typename acc_t> struct Point {
    int index, level;
    Neighbours<acc_t> x, y;
    acc_t weight;
};

// Pixels of a level per unit of an input point.
__device__ int unit_x(const Problem& p, int level) { return p.fused ? 1 : p.width[level]; }
__device__ int unit_y(const Problem& p, int level) { return p.fused ? 1 : p.height[level]; }

// Calls body(point) for each sampling point of an item.
template <typename scalar_t, typename Body>
__device__ void for_each_point(const Problem& p, const Item& item, const scalar_t* points,
                               const scalar_t* scores, Body body) {
    using acc_t = accumulator<scalar_t>;
    const int count = p.levels * p.points;
    points += item.index * count * 2;
    scores += item.index * count;

    acc_t maximum = -INFINITY, total = 0;  // of the softmax
    for (int i = 0; p.fused && i < count; i++) maximum = fmax(maximum, acc_t(scores[i]));
    for (int i = 0; p.fused && i < count; i++) total += exp(acc_t(scores[i]) - maximum);

    int query_level = 0, column = 0, row = 0;  // of the pixel that the query is
    if (p.fused) {
        while (query_level + 1 < p.levels && item.query >= p.start[query_level + 1]) query_level++;
        column = (item.query - p.start[query_level]) % p.width[query_level];
        row = (item.query - p.start[query_level]) / p.width[query_level];
    }
    for (int level = 0; level < p.levels; level++) {
        const int width = p.width[level], height = p.height[level];
        Origin<acc_t> x{0, acc_t(-0.5)}, y{0, acc_t(-0.5)};
        if (p.fused) {
            x = centre<acc_t>(column, p.width[query_level], width);
            y = centre<acc_t>(row, p.height[query_level], height);
        }
        for (int i = level * p.points; i < (level + 1) * p.points; i++) {
            const acc_t position_x = x.rest + acc_t(points[2 * i]) * unit_x(p, level);
            const acc_t position_y = y.rest + acc_t(points[2 * i + 1]) * unit_y(p, level);
            const acc_t score = scores[i];
            body(Point<acc_t>{i, level, {x.whole, position_x, width},
                              {y.whole, position_y, height},
                              p.fused ? exp(score - maximum) / total : score});
        }
    }
}

// Index in `value` of a channel of one of the four pixels around a point.
template <typename acc_t>
__device__ int64_t value_index(const Problem& p, const Item& item, const Point<acc_t>& point,
                               int j, int i, int channel) {
    const int pixel = p.start[point.level] + point.y.index[j] * p.width[point.level]
                      + point.x.index[i];
    const int64_t first = (int64_t(item.image) * p.pixels * p.heads + item.head) * p.channels;
    return first + int64_t(pixel) * (p.heads * p.channels) + channel;
}

template <typename scalar_t>
__global__ void forward_kernel(const Problem p, const scalar_t* value, const scalar_t* points,
                               const scalar_t* scores, scalar_t* output) {
    using acc_t = accumulator<scalar_t>;
    const Item item(p);
    if (item.index >= count_items(p)) return;
    for (int channel = threadIdx.x % WARP_SIZE; channel < p.channels; channel += WARP_SIZE) {
        acc_t sum = 0;
        for_each_point(p, item, points, scores, [&](const Point<acc_t>& point) {
            for (int j = 0; j < 2; j++)
                for (int i = 0; i < 2; i++)
                    sum += point.weight * point.y.weight[j] * point.x.weight[i]
                           * acc_t(value[value_index(p, item, point, j, i, channel)]);
        });
        output[item.index * p.channels + channel] = scalar_t(sum);
    }
}

template <typename acc_t> __device__ acc_t sum_over_lanes(acc_t x) {
    for (int step = WARP_SIZE / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// g . sample and g . (derivatives of the sample by the position), over the channels of a lane.
template <typename acc_t> struct Products { acc_t sample, along_x, along_y; };

template <typename scalar_t, typename acc_t>
__device__ Products<acc_t> multiply(const Problem& p, const Item& item, const Point<acc_t>& point,
                                    const scalar_t* grad, const scalar_t* value) {
    Products<acc_t> sums{0, 0, 0};
    for (int channel = threadIdx.x % WARP_SIZE; channel < p.channels; channel += WARP_SIZE)
        for (int j = 0; j < 2; j++)
            for (int i = 0; i < 2; i++) {
                const acc_t product = acc_t(grad[channel])
                                      * acc_t(value[value_index(p, item, point, j, i, channel)]);
                sums.sample += point.y.weight[j] * point.x.weight[i] * product;
                sums.along_x += point.y.weight[j] * point.x.slope[i] * product;
                sums.along_y += point.y.slope[j] * point.x.weight[i] * product;
            }
    return sums;
}

// With g the gradient of the output, and "." a sum over the channels, the gradients are
//
//     of the value      weight * bilinear weight * g, added by all items that read the pixel
//     of a position     weight * (g . derivative of the sample by the position)
//     of a weight       g . sample
//     of a logit        weight * (g . sample - sum over all points of weight * (g . sample))
//
// Items share pixels, so gradients of the value are added atomically, in acc_t.
template <typename scalar_t, typename acc_t>
__global__ void backward_kernel(const Problem p, const scalar_t* grad, const scalar_t* value,
                                const scalar_t* points, const scalar_t* scores, acc_t* grad_value,
                                scalar_t* grad_points, scalar_t* grad_scores) {
    const Item item(p);
    if (item.index >= count_items(p)) return;
    const int lane = threadIdx.x % WARP_SIZE, count = p.levels * p.points;
    grad += item.index * p.channels;
    grad_points += item.index * count * 2;
    grad_scores += item.index * count;

    // The sum over all points in the gradient of a logit. multiply() computes both terms of the
    // difference, so that they cancel exactly if there is only one point.
    acc_t mean = 0;
    if (p.fused)
        for_each_point(p, item, points, scores, [&](const Point<acc_t>& point) {
            mean += point.weight * multiply(p, item, point, grad, value).sample;
        });
    mean = sum_over_lanes(mean);

    for_each_point(p, item, points, scores, [&](const Point<acc_t>& point) {
        for (int channel = lane; channel < p.channels; channel += WARP_SIZE)
            for (int j = 0; j < 2; j++)
                for (int i = 0; i < 2; i++) {
                    const acc_t share = point.weight * point.y.weight[j] * point.x.weight[i];
                    if (share != 0)
                        atomicAdd(grad_value + value_index(p, item, point, j, i, channel),
                                  share * acc_t(grad[channel]));
                }
        const Products<acc_t> sums = multiply(p, item, point, grad, value);
        const acc_t sample = sum_over_lanes(sums.sample);
        const acc_t along_x = sum_over_lanes(sums.along_x) * unit_x(p, point.level);
        const acc_t along_y = sum_over_lanes(sums.along_y) * unit_y(p, point.level);
        if (lane == 0) {
            grad_points[2 * point.index] = scalar_t(point.weight * along_x);
            grad_points[2 * point.index + 1] = scalar_t(point.weight * along_y);
            grad_scores[point.index] = scalar_t(p.fused ? point.weight * (sample - mean) : sample);
        }
    });
}

template <typename scalar_t>
__global__ void round_kernel(int64_t count, const float* from, scalar_t* to) {
    const int64_t i = int64_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
    if (i < count) to[i] = scalar_t(from[i]);
}

// ---- launching ----------------------------------------------------------------------------------

// Calls body with a null pointer to the scalar type.
template <typename Body> cudaError_t dispatch(Type type, Body body) {
    switch (type) {
        case Type::float32: body(static_cast<float*>(nullptr)); break;
        case Type::float16: body(static_cast<__half*>(nullptr)); break;
        case Type::bfloat16: body(static_cast<__nv_bfloat16*>(nullptr)); break;
        case Type::float64: body(static_cast<double*>(nullptr)); break;
    }
    return cudaGetLastError();
}

unsigned blocks_for(int64_t threads) { return unsigned((threads + BLOCK_SIZE - 1) / BLOCK_SIZE); }

int64_t value_count(const Problem& p) {
    return int64_t(p.images) * p.pixels * p.heads * p.channels;
}

cudaError_t forward(const Problem& p, Type type, const void* value, const void* points,
                    const void* scores, void* output, cudaStream_t stream) {
    return dispatch(type, [&](auto* null) {
        using scalar_t = std::remove_pointer_t<decltype(null)>;
        forward_kernel<<<blocks_for(count_items(p) * WARP_SIZE), BLOCK_SIZE, 0, stream>>>(
            p, static_cast<const scalar_t*>(value), static_cast<const scalar_t*>(points),
            static_cast<const scalar_t*>(scores), static_cast<scalar_t*>(output));
    });
}

// In 16 bit, the gradient of the value is added in float32 first.
size_t workspace_bytes(const Problem& p, Type type) {
    const bool wide = type == Type::float32 || type == Type::float64;
    return wide ? 0 : value_count(p) * sizeof(float);
}

cudaError_t backward(const Problem& p, Type type, const void* grad, const void* value,
                     const void* points, const void* scores, void* grad_value, void* grad_points,
                     void* grad_scores, void* workspace, cudaStream_t stream) {
    return dispatch(type, [&](auto* null) {
        using scalar_t = std::remove_pointer_t<decltype(null)>;
        using acc_t = accumulator<scalar_t>;
        constexpr bool wide = std::is_same_v<scalar_t, acc_t>;
        acc_t* sums = static_cast<acc_t*>(wide ? grad_value : workspace);
        cudaMemsetAsync(sums, 0, value_count(p) * sizeof(acc_t), stream);
        backward_kernel<<<blocks_for(count_items(p) * WARP_SIZE), BLOCK_SIZE, 0, stream>>>(
            p, static_cast<const scalar_t*>(grad), static_cast<const scalar_t*>(value),
            static_cast<const scalar_t*>(points), static_cast<const scalar_t*>(scores), sums,
            static_cast<scalar_t*>(grad_points), static_cast<scalar_t*>(grad_scores));
        if constexpr (!wide)
            round_kernel<<<blocks_for(value_count(p)), BLOCK_SIZE, 0, stream>>>(
                value_count(p), sums, static_cast<scalar_t*>(grad_value));
    });
}

}  // namespace

const Kernel kernel{forward, workspace_bytes, backward};

}  // namespace deform_attn::plain
