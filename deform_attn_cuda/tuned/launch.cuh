// Host code shared by forward.cu and backward.cu: the layout of a problem, the instance of a kernel
// for a dtype and number of channels, and grid sizes.
#pragma once

#include <algorithm>

#include "windows.cuh"

namespace deform_attn::tuned {
namespace {

constexpr int64_t ENOUGH_BLOCKS = 200;  // more than one for each multiprocessor
constexpr int WINDOW_MARGIN = 6;  // pixels around a region

// Per point and thread, points_window_kernel keeps a weight and a sample.
size_t kept_bytes(const Problem& p) {
    return size_t(p.levels) * ((p.points + 3) / 4) * BACKWARD_WINDOW_THREADS * sizeof(float2);
}

// How many pixels the windows of a block may have: what fits into shared memory of this GPU.
int max_window_pixels(const Problem& p, bool backward) {
    int device = 0, available = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    available -= MAX_LEVELS * int(sizeof(Area) + sizeof(Origin));
    if (!backward)
        return std::clamp((available - PREFETCH_BYTES) / ROW_BYTES, 0, FORWARD_WINDOW_PIXELS);
    available -= int(std::min<size_t>(kept_bytes(p) + 8, available));
    return std::clamp(available / int(ROW_BYTES + sizeof(int)), 0, BACKWARD_WINDOW_PIXELS);
}

// Regions have 16 x 16 pixels of the finest level, or fewer where that would leave multiprocessors
// idle or make windows too large.
Layout make_layout(const Problem& problem, bool backward) {
    Layout p{problem};
    for (int level = 0; level < p.levels; level++) {
        p.bins_start[level] = p.bins;
        p.bins += (p.height[level] + 1) * (p.width[level] + 2);
    }
    const int max_width = *std::max_element(p.width, p.width + p.levels);
    const int max_height = *std::max_element(p.height, p.height + p.levels);
    // Size of a level's window along one axis. Forward has room for one more pixel around coarser
    // levels, whose windows are small, so that more points leave them.
    const auto window_size = [&](int size, int max_size, int regions) {
        const int margin = WINDOW_MARGIN + (!backward && size < max_size);
        return std::min(size + 2, (size + regions - 1) / regions + 2 * margin);
    };
    const int fitting = max_window_pixels(p, backward);
    for (const int side : {16, 12, 8}) {
        p.across = (max_width + side - 1) / side;
        p.down = (max_height + side - 1) / side;
        p.window_pixels = 0;
        for (int level = 0; level < p.levels; level++) {
            p.window_width[level] = window_size(p.width[level], max_width, p.across);
            p.window_height[level] = window_size(p.height[level], max_height, p.down);
            p.window_start[level] = p.window_pixels;
            p.window_pixels += p.window_width[level] * p.window_height[level];
        }
        const bool busy = int64_t(p.across) * p.down * p.heads * p.images >= ENOUGH_BLOCKS;
        if (busy && p.window_pixels <= fitting) return p;
    }
    if (p.window_pixels > fitting) p.window_pixels = 0;
    return p;
}

// A choice of template arguments.
template <typename T, int N> struct Instance {
    using Scalar = T;
    static constexpr int CHANNELS = N;  // 0 = any number
};

template <typename scalar_t, typename Body> cudaError_t dispatch_channels(int channels, Body body) {
    switch (channels) {
        case 16:
            return body(Instance<scalar_t, 16>());
        case 32:
            return body(Instance<scalar_t, 32>());
        case 64:
            return body(Instance<scalar_t, 64>());
        default:
            return body(Instance<scalar_t, 0>());
    }
}

template <typename Body> cudaError_t dispatch(Type type, int channels, Body body) {
    switch (type) {
        case Type::float32:
            return dispatch_channels<float>(channels, body);
        case Type::float16:
            return dispatch_channels<__half>(channels, body);
        case Type::bfloat16:
            return dispatch_channels<__nv_bfloat16>(channels, body);
        default:
            return body(Instance<double, 0>());
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

// Whether the GPU has the matrix products of multiply_matrices.
bool has_tensor_cores() {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 8;
}

// A kernel must request shared memory beyond 48 KB.
template <typename Kernel> cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
    if (bytes == 0) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

}  // namespace
}  // namespace deform_attn::tuned
