// From types and sizes that are known when running to instances of the kernels.
#pragma once

#include <algorithm>

#include "geometry.cuh"

namespace deform_attn {
namespace {

template <typename T, int D> struct Instance {
    using Stored = T;
    static constexpr int CHANNELS = D;
};

template <typename T, typename Body> cudaError_t choose_channels(int channels, Body body) {
    switch (channels) {
        case 16: return body(Instance<T, 16>());
        case 32: return body(Instance<T, 32>());
        case 64: return body(Instance<T, 64>());
        default: return body(Instance<T, 0>());
    }
}

template <typename Body> cudaError_t choose(Type type, int channels, Body body) {
    switch (type) {
        case Type::float32: return choose_channels<float>(channels, body);
        case Type::float16: return choose_channels<__half>(channels, body);
        case Type::bfloat16: return choose_channels<__nv_bfloat16>(channels, body);
        default: return body(Instance<double, 0>());
    }
}

// Parts of the work, see Part: a block for each,
unsigned parts(int64_t regions, int heads, int heads_at_once, int images) {
    return unsigned(regions * ((heads + heads_at_once - 1) / heads_at_once) * images);
}

// or, where there are few, several blocks for each: as many as keep the largest GPUs busy.
dim3 shared_parts(unsigned parts) {
    constexpr unsigned ENOUGH = 1024, MOST = 8;
    return dim3(parts, std::clamp(ENOUGH / parts, 1u, MOST));
}

bool has_tensor_cores() {                                          // of the shape that `multiply` asks for
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 8;
}

// More than 48 KB of shared memory, those of a kernel's own variables counted in, have to be asked for.
template <typename Kernel> cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
    if (bytes == 0) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

}  // namespace
}  // namespace deform_attn
