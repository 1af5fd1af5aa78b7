// The interface between binding.cpp, which checks tensors and registers operators with PyTorch,
// and the two kernels: plain.cu, to read, and tuned/, to run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace deform_attn {

constexpr int MAX_LEVELS = 32;

enum class Type { float32, float16, bfloat16, float64 };

// The sizes of a call. All tensors are contiguous, start at multiples of 64 bytes, and have one
// dtype; "pixels" are those of all levels, joined.
//   value                        (images, pixels, heads, channels)
//   points                       (images, queries, heads, levels, points, 2), x then y
//   scores                       (images, queries, heads, levels, points)
//   output and its gradient      (images, queries, heads, channels)
// fused: query i is pixel i, points are offsets from its centre in pixels of the sampled level,
// and scores are logits. Otherwise points are locations in 0..1, and scores are weights.
struct Problem {
    int images, pixels, queries, heads, channels, levels, points;
    bool fused;
    int height[MAX_LEVELS], width[MAX_LEVELS];
    int start[MAX_LEVELS];  // first pixel of each level
};

// An implementation. The functions launch on a stream of the current device and return the error
// of a failed launch. No tensor is empty.
struct Kernel {
    cudaError_t (*forward)(const Problem&, Type, const void* value, const void* points,
                           const void* scores, void* output, cudaStream_t);
    // Bytes of device memory that backward needs as its workspace.
    size_t (*workspace_bytes)(const Problem&, Type);
    cudaError_t (*backward)(const Problem&, Type, const void* grad, const void* value,
                            const void* points, const void* scores, void* grad_value,
                            void* grad_points, void* grad_scores, void* workspace, cudaStream_t);
};

namespace plain { extern const Kernel kernel; }
namespace tuned { extern const Kernel kernel; }

}  // namespace deform_attn
