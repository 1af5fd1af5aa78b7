// Host code of the tuned kernel: cuts a problem into regions and bins, and launches the kernels.
#include <algorithm>

#include "forward.cuh"
#include "point_gradients.cuh"
#include "value_gradient.cuh"

namespace deform_attn::tuned {
namespace {

// Pixels of the finest level. In forward, what four blocks read at once fits into the L1 cache.
constexpr int FORWARD_SIDE = 8, BACKWARD_SIDE = 16;

Layout make_layout(const Problem& problem, int side) {
    Layout p{problem};
    for (int level = 0; level < p.levels; level++) {
        p.bins_start[level] = p.bins;
        p.bins += (p.height[level] + 1) * (p.width[level] + 2);
    }
    p.across = (*std::max_element(p.width, p.width + p.levels) + side - 1) / side;
    p.down = (*std::max_element(p.height, p.height + p.levels) + side - 1) / side;
    return p;
}

// A choice of template arguments.
template <typename T, int N> struct Instance {
    using Scalar = T;
    static constexpr int CHANNELS = N;  // 0 = any number
};

template <typename scalar_t, typename Body> cudaError_t dispatch_channels(int channels, Body body) {
    return channels == 32 ? body(Instance<scalar_t, 32>()) : body(Instance<scalar_t, 0>());
}

template <typename Body> cudaError_t dispatch(Type type, int channels, Body body) {
    switch (type) {
        case Type::float32: return dispatch_channels<float>(channels, body);
        case Type::float16: return dispatch_channels<__half>(channels, body);
        case Type::bfloat16: return dispatch_channels<__nv_bfloat16>(channels, body);
        default: return body(Instance<double, 0>());
    }
}

// Blocks for all work, see BlockWork.
unsigned count_blocks(int64_t regions, int heads, int heads_at_once, int images) {
    return unsigned(regions * ((heads + heads_at_once - 1) / heads_at_once) * images);
}

// If there are few blocks, several share each piece of work: as many as fill the largest GPUs.
dim3 share_regions(unsigned blocks) {
    constexpr unsigned ENOUGH = 1024, MAX_SHARING = 8;
    return dim3(blocks, std::clamp(ENOUGH / blocks, 1u, MAX_SHARING));
}

// ---- forward ------------------------------------------------------------------------------------

cudaError_t forward(const Problem& problem, Type type, const void* value, const void* points,
                    const void* scores, void* out, cudaStream_t stream) {
    const Layout p = make_layout(problem, FORWARD_SIDE);
    return dispatch(type, p.channels, [&](auto instance) {
        using scalar_t = typename decltype(instance)::Scalar;
        constexpr int CHANNELS = decltype(instance)::CHANNELS;
        const unsigned blocks = count_blocks(count_regions(p), p.heads,
                                             WarpShape<scalar_t, CHANNELS>::HEADS, p.images);
        const auto kernel = p.fused ? forward_kernel<scalar_t, CHANNELS, true>
                                    : forward_kernel<scalar_t, CHANNELS, false>;
        kernel<<<share_regions(blocks), THREADS, 0, stream>>>(
            p, static_cast<const scalar_t*>(value), static_cast<const scalar_t*>(points),
            static_cast<const scalar_t*>(scores), static_cast<scalar_t*>(out));
        return cudaGetLastError();
    });
}

// ---- backward -----------------------------------------------------------------------------------
//
// Without floating-point atomics, in four steps:
//
//     1. count the points in each bin                                          bins.cuh
//     2. allocate a list of points for each bin                                bins.cuh
//     3. gradients of offsets and logits; every point enters its bin's list    point_gradients.cuh
//     4. gradient of the value: each pixel adds the points in four bins        value_gradient.cuh
//
// Atomic additions would move 128 bytes for every 64 bytes that are read here, and need a float32
// copy of the value's gradient to add to.

constexpr int64_t MAX_ENTRY_BYTES = 256 << 20;  // images are taken in groups whose lists fit

// The workspace holds the lists of a group of images, then its bins and the counter `used`.
struct Workspace {
    int images;
    size_t entry_bytes, bins_bytes;
};

Workspace make_workspace(const Layout& p, Type type) {
    const int64_t entry = type == Type::float64 ? sizeof(Entry<double>) : sizeof(Entry<float>);
    const int64_t image = entry * p.queries * p.heads * p.levels * p.points;
    const int images = int(std::clamp<int64_t>(MAX_ENTRY_BYTES / image, 1, p.images));
    return {images, size_t(images) * image, (size_t(images) * p.heads * p.bins + 1) * sizeof(int)};
}

size_t workspace_bytes(const Problem& p, Type type) {
    const Workspace sizes = make_workspace(make_layout(p, BACKWARD_SIDE), type);
    return sizes.entry_bytes + sizes.bins_bytes;
}

cudaError_t backward(const Problem& problem, Type type, const void* grad, const void* value,
                     const void* points, const void* scores, void* grad_value, void* grad_points,
                     void* grad_scores, void* workspace, cudaStream_t stream) {
    const Layout p = make_layout(problem, BACKWARD_SIDE);
    const Workspace sizes = make_workspace(p, type);
    int* const bins = reinterpret_cast<int*>(static_cast<char*>(workspace) + sizes.entry_bytes);
    return dispatch(type, p.channels, [&](auto instance) {
        using scalar_t = typename decltype(instance)::Scalar;
        using acc_t = accumulator<scalar_t>;
        constexpr int CHANNELS = decltype(instance)::CHANNELS;
        using Shape = WarpShape<scalar_t, CHANNELS>;
        const auto input = [](const void* tensor, int64_t index) {
            return static_cast<const scalar_t*>(tensor) + index;
        };
        const auto output = [](void* tensor, int64_t index) {
            return static_cast<scalar_t*>(tensor) + index;
        };
        auto* const entries = static_cast<Entry<acc_t>*>(workspace);
        const auto count = p.fused ? count_kernel<scalar_t, true> : count_kernel<scalar_t, false>;
        const auto differentiate = p.fused ? points_kernel<scalar_t, CHANNELS, true>
                                           : points_kernel<scalar_t, CHANNELS, false>;
        const int turns = (p.points + Shape::LANES - 1) / Shape::LANES;
        const size_t shared = size_t(p.levels) * turns * THREADS * sizeof(acc_t);
        cudaFuncSetAttribute(differentiate, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(shared));

        for (int first = 0; first < p.images; first += sizes.images) {
            const int images = std::min(p.images - first, sizes.images);
            const int64_t pixel = int64_t(first) * p.pixels * p.heads;
            const int64_t query = int64_t(first) * p.queries * p.heads;
            const int64_t point = query * p.levels * p.points;
            const int64_t lists = int64_t(images) * p.heads * count_bin_rows(p);
            int* const used = bins + size_t(images) * p.heads * p.bins;
            cudaMemsetAsync(bins, 0, sizes.bins_bytes, stream);
            count<<<count_blocks(count_regions(p), p.heads, 1, images), THREADS, 0, stream>>>(
                p, input(points, point * 2), bins);
            allocate_kernel<<<unsigned((lists * 32 + THREADS - 1) / THREADS), THREADS, 0, stream>>>(
                p, images, bins, used);
            const unsigned blocks = count_blocks(count_regions(p), p.heads, Shape::HEADS, images);
            differentiate<<<share_regions(blocks), THREADS, shared, stream>>>(
                p, input(grad, query * p.channels), input(value, pixel * p.channels),
                input(points, point * 2), input(scores, point), output(grad_points, point * 2),
                output(grad_scores, point), bins, entries);
            const unsigned value_blocks =
                count_blocks(p.across * p.down, p.heads, Shape::HEADS, images);
            value_kernel<scalar_t, CHANNELS>
                <<<share_regions(value_blocks), THREADS, 0, stream>>>(
                    p, input(grad, query * p.channels), bins, entries,
                    output(grad_value, pixel * p.channels));
        }
        return cudaGetLastError();
    });
}

}  // namespace

const Kernel kernel{forward, workspace_bytes, backward};

}  // namespace deform_attn::tuned
