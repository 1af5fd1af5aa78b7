// The backward pass of the tuned kernel, without floating-point atomics, in four steps:
//
//     1. count the points in each bin                                          bins.cuh
//     2. allocate a list of points for each bin                                bins.cuh
//     3. gradients of offsets and logits; every point enters its bin's list    point_gradients.cuh
//     4. gradient of the value: each pixel adds the points in four bins        value_gradient.cuh
//
// Atomic additions would move 128 bytes for every 64 bytes that are read here, and need a float32
// copy of the value's gradient to add to.
#include "launch.cuh"
#include "point_gradients.cuh"
#include "value_gradient.cuh"

namespace deform_attn::tuned {
namespace {

constexpr int64_t MAX_ENTRY_BYTES = 256 << 20;  // images are taken in groups whose lists fit

// Memory for the lists of some images.
size_t entry_bytes(const Problem& p, Type type, int64_t images) {
    const size_t entry = type == Type::float64 ? sizeof(Entry<double>) : sizeof(Entry<float>);
    return entry * images * p.queries * p.heads * p.levels * p.points;
}

size_t bins_bytes(const Layout& p, int64_t images) {
    return (size_t(images) * p.heads * p.bins + 1) * sizeof(int);
}

int group_size(const Problem& p, Type type) {
    return int(std::clamp<int64_t>(MAX_ENTRY_BYTES / entry_bytes(p, type, 1), 1, p.images));
}

// The workspace holds the lists of a group of images, then its bins.
size_t workspace_bytes(const Problem& p, Type type) {
    const int images = group_size(p, type);
    return entry_bytes(p, type, images) + bins_bytes(make_layout(p, true), images);
}

// The tensors of a group of images.
template <typename scalar_t> struct Group {
    using acc_t = accumulator<scalar_t>;
    int images;
    const scalar_t *grad, *value, *points, *scores;
    scalar_t *grad_value, *grad_points, *grad_scores;
    int* bins;
    Entry<acc_t>* entries;
    cudaStream_t stream;
};

template <typename scalar_t>
cudaError_t count_points(const Layout& p, const Group<scalar_t>& group) {
    const unsigned blocks = count_blocks(count_regions(p), p.heads, 1, group.images);
    if (p.fused && p.window_pixels) {
        const size_t shared = p.window_pixels * sizeof(int);
        const auto kernel = count_window_kernel<scalar_t>;
        kernel<<<blocks, BACKWARD_WINDOW_THREADS, shared, group.stream>>>(p, group.points,
                                                                          group.bins);
        return cudaGetLastError();
    }
    const auto kernel = p.fused ? count_kernel<scalar_t, true> : count_kernel<scalar_t, false>;
    kernel<<<blocks, THREADS, 0, group.stream>>>(p, group.points, group.bins);
    return cudaGetLastError();
}

cudaError_t allocate_lists(const Layout& p, int images, int* bins, cudaStream_t stream) {
    int bin_rows = 0;
    for (int level = 0; level < p.levels; level++) bin_rows += p.height[level] + 1;
    const int64_t threads = int64_t(images) * p.heads * bin_rows * 32;
    int* used = bins + size_t(images) * p.heads * p.bins;
    allocate_kernel<<<unsigned((threads + THREADS - 1) / THREADS), THREADS, 0, stream>>>(
        p, images, bins, used);
    return cudaGetLastError();
}

template <typename scalar_t, int CHANNELS>
cudaError_t differentiate_points(const Layout& p, const Group<scalar_t>& group) {
    using acc_t = accumulator<scalar_t>;
    const auto launch = [&](auto kernel, dim3 grid, int threads, size_t shared) {
        if (const cudaError_t error = allow_shared(kernel, shared)) return error;
        kernel<<<grid, threads, shared, group.stream>>>(
            p, group.grad, group.value, group.points, group.scores, group.grad_points,
            group.grad_scores, group.bins, group.entries);
        return cudaGetLastError();
    };
    if constexpr (sizeof(scalar_t) == 2 && CHANNELS == 32)
        if (p.fused && p.window_pixels && has_tensor_cores()) {
            const auto kernel = p.levels == 3 && p.points == 4 ? points_window_kernel<scalar_t, 3>
                                                               : points_window_kernel<scalar_t, 0>;
            const size_t shared =
                size_t(p.window_pixels) * (ROW_BYTES + sizeof(int)) + sizeof(int) + kept_bytes(p);
            return launch(kernel, count_blocks(count_regions(p), p.heads, 1, group.images),
                          BACKWARD_WINDOW_THREADS, shared);
        }
    using Shape = WarpShape<scalar_t, CHANNELS>;
    const auto kernel = p.fused ? points_kernel<scalar_t, CHANNELS, true>
                                : points_kernel<scalar_t, CHANNELS, false>;
    const size_t kept = size_t(p.levels) * ((p.points + Shape::LANES - 1) / Shape::LANES);
    const unsigned blocks = count_blocks(count_regions(p), p.heads, Shape::HEADS, group.images);
    return launch(kernel, share_regions(blocks), THREADS, kept * THREADS * sizeof(acc_t));
}

template <typename scalar_t, int CHANNELS>
cudaError_t differentiate_value(const Layout& p, const Group<scalar_t>& group) {
    const auto launch = [&](auto kernel, int heads) {
        const unsigned blocks = count_blocks(p.across * p.down, p.heads, heads, group.images);
        kernel<<<share_regions(blocks), THREADS, 0, group.stream>>>(
            p, group.grad, group.bins, group.entries, group.grad_value);
        return cudaGetLastError();
    };
    if constexpr (sizeof(scalar_t) == 2 && CHANNELS >= 32)
        if (has_tensor_cores()) return launch(value_tensor_kernel<scalar_t, CHANNELS>, 2);
    return launch(value_kernel<scalar_t, CHANNELS>, WarpShape<scalar_t, CHANNELS>::HEADS);
}

cudaError_t backward(const Problem& problem, Type type, const void* grad, const void* value,
                     const void* points, const void* scores, void* grad_value, void* grad_points,
                     void* grad_scores, void* workspace, cudaStream_t stream) {
    const Layout p = make_layout(problem, true);
    const int max_images = group_size(p, type);
    char* const memory = static_cast<char*>(workspace);
    int* const bins = reinterpret_cast<int*>(memory + entry_bytes(p, type, max_images));
    return dispatch(type, p.channels, [&](auto instance) {
        using scalar_t = typename decltype(instance)::Scalar;
        using acc_t = accumulator<scalar_t>;
        constexpr int CHANNELS = decltype(instance)::CHANNELS;
        const auto input = [](const void* tensor, int64_t index) {
            return static_cast<const scalar_t*>(tensor) + index;
        };
        const auto output = [](void* tensor, int64_t index) {
            return static_cast<scalar_t*>(tensor) + index;
        };
        for (int first = 0; first < p.images; first += max_images) {
            const int images = std::min(p.images - first, max_images);
            const int64_t query = int64_t(first) * p.queries * p.heads;
            const int64_t pixel = int64_t(first) * p.pixels * p.heads;
            const int64_t point = query * p.levels * p.points;
            const Group<scalar_t> group{
                images,
                input(grad, query * p.channels),
                input(value, pixel * p.channels),
                input(points, point * 2),
                input(scores, point),
                output(grad_value, pixel * p.channels),
                output(grad_points, point * 2),
                output(grad_scores, point),
                bins,
                reinterpret_cast<Entry<acc_t>*>(memory),
                stream,
            };
            cudaError_t error = cudaMemsetAsync(bins, 0, bins_bytes(p, images), stream);
            if (error == cudaSuccess) error = count_points(p, group);
            if (error == cudaSuccess) error = allocate_lists(p, images, bins, stream);
            if (error == cudaSuccess) error = differentiate_points<scalar_t, CHANNELS>(p, group);
            if (error == cudaSuccess) error = differentiate_value<scalar_t, CHANNELS>(p, group);
            if (error != cudaSuccess) return error;
        }
        return cudaSuccess;
    });
}

}  // namespace

const Kernel kernel{forward, workspace_bytes, backward};

}  // namespace deform_attn::tuned
