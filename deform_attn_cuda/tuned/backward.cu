// Backward, without floating-point atomics.
//
// The points are placed again. Gradients of offsets and logits come with the same gather as forward (point_gradients.cuh), which
// also files every point under the pixel to its upper left; the lists were sized and laid out before (bins.cuh). Then each pixel
// gathers its gradient from the points in the four bins around it, in float32 (value_gradient.cuh). Scattering would move
// 128 bytes of atomics for every 64 bytes read here, and need a float32 copy of the value to add to.
#include "launch.cuh"
#include "point_gradients.cuh"
#include "value_gradient.cuh"

namespace deform_attn::tuned {

namespace {

constexpr int64_t MAX_ENTRY_BYTES = 256 << 20;  // images are taken in groups whose lists fit

// Memory that the lists of some images take.
size_t entry_bytes(const Problem& p, Type type, int64_t images) {
    const size_t entry = type == Type::float64 ? sizeof(Entry<double>) : sizeof(Entry<float>);
    return entry * images * p.queries * p.heads * p.levels * p.points;
}

size_t bins_bytes(const Layout& p, int64_t images) {
    return (size_t(images) * p.heads * p.bins + 1) * sizeof(int);
}

int count_images_at_once(const Problem& p, Type type) {
    return int(std::clamp<int64_t>(MAX_ENTRY_BYTES / entry_bytes(p, type, 1), 1, p.images));
}

// The workspace holds entries, then bins.
size_t workspace_bytes(const Problem& p, Type type) {
    const int images = count_images_at_once(p, type);
    return entry_bytes(p, type, images) + bins_bytes(make_layout(p, true), images);
}

cudaError_t backward(const Problem& problem, Type type, const void* grad, const void* value,
                     const void* points, const void* scores, void* grad_value, void* grad_points,
                     void* grad_scores, void* workspace, cudaStream_t stream) {
    const Layout p = make_layout(problem, true);
    const int images_at_once = count_images_at_once(p, type);
    void* entries = workspace;
    int* bins = reinterpret_cast<int*>(static_cast<char*>(workspace)
                                       + entry_bytes(p, type, images_at_once));
    return choose(type, p.channels, [&](auto instance) {
        using T = typename decltype(instance)::Stored;
        using R = typename Computed<T>::type;
        constexpr int D = decltype(instance)::CHANNELS;
        const int count = p.levels * p.points;
        auto count_points = p.fused ? count_kernel<T, true> : count_kernel<T, false>;
        auto differentiate = p.fused ? points_kernel<T, D, true> : points_kernel<T, D, false>;
        auto gather = value_kernel<T, D>;
        constexpr int lanes = Shape<T, D>::LANES;
        int heads_at_once = Shape<T, D>::HEADS, gather_heads = heads_at_once;
        int count_threads = THREADS, threads = THREADS;
        bool in_windows = false;
        size_t count_shared = 0, shared = size_t(p.levels) * ((p.points + lanes - 1) / lanes) * THREADS * sizeof(R);
        if (p.fused && p.window_pixels) {
            count_points = count_window_kernel<T>;
            count_threads = BACKWARD_WINDOW_THREADS;
            count_shared = p.window_pixels * sizeof(int);
        }
        if constexpr (sizeof(T) == 2 && D >= 32)
            if (has_tensor_cores()) {
                gather = value_tensor_kernel<T, D>;
                gather_heads = 2;
            }
        if constexpr (sizeof(T) == 2 && D == 32)
            if (p.fused && p.window_pixels && has_tensor_cores()) {
                differentiate = p.levels == 3 && p.points == 4 ? points_window_kernel<T, 3> : points_window_kernel<T, 0>;
                in_windows = true;
                heads_at_once = 1;
                threads = BACKWARD_WINDOW_THREADS;
                shared = size_t(p.window_pixels) * (ROW_BYTES + sizeof(int)) + sizeof(int) + kept_bytes(p);
            }
        if (const cudaError_t error = allow_shared(differentiate, shared)) return error;
        int bin_rows = 0;
        for (int level = 0; level < p.levels; level++) bin_rows += p.height[level] + 1;

        for (int first = 0; first < p.images; first += images_at_once) {
            const int images = p.images - first < images_at_once ? p.images - first : images_at_once;
            const int64_t queries = int64_t(first) * p.queries * p.heads, pixels = int64_t(first) * p.pixels * p.heads;
            const T* grads = static_cast<const T*>(grad) + queries * p.channels;
            const T* some_points = static_cast<const T*>(points) + queries * count * 2;
            Entry<R>* lists = static_cast<Entry<R>*>(entries);
            int* used = bins + size_t(images) * p.heads * p.bins;
            if (const cudaError_t error = cudaMemsetAsync(bins, 0, bins_bytes(p, images), stream)) return error;
            count_points<<<parts(regions_of(p), p.heads, 1, images), count_threads, count_shared, stream>>>(p, some_points, bins);
            const int64_t lists_of_rows = int64_t(images) * p.heads * bin_rows * 32;
            allocate_kernel<<<unsigned((lists_of_rows + THREADS - 1) / THREADS), THREADS, 0, stream>>>(p, images, bins, used);
            const unsigned some_parts = parts(regions_of(p), p.heads, heads_at_once, images);
            differentiate<<<in_windows ? dim3(some_parts) : shared_parts(some_parts), threads, shared, stream>>>(
                p, grads, static_cast<const T*>(value) + pixels * p.channels, some_points,
                static_cast<const T*>(scores) + queries * count, static_cast<T*>(grad_points) + queries * count * 2,
                static_cast<T*>(grad_scores) + queries * count, bins, lists);
            gather<<<shared_parts(parts(p.across * p.down, p.heads, gather_heads, images)), THREADS, 0, stream>>>(
                p, grads, bins, lists, static_cast<T*>(grad_value) + pixels * p.channels);
            if (const cudaError_t error = cudaGetLastError()) return error;
        }
        return cudaSuccess;
    });
}

}  // namespace

const Kernel kernel{forward, workspace_bytes, backward};

}  // namespace deform_attn::tuned
