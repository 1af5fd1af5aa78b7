// What the kernels (forward.cu, backward.cu) and their registration with PyTorch (binding.cpp) both know.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deform_attn {

constexpr int MAX_LEVELS = 32;

enum class Type { float32, float16, bfloat16, float64 };

// B images, S pixels of all levels together, Q queries (Q = S where query s is pixel s), M heads, D channels of a head,
// V levels, P points of a level.
struct Problem {
    int images, pixels, queries, heads, channels, levels, points;
    bool fused;                   // true: raw offsets and logits; false: locations in 0..1 and weights
    int height[MAX_LEVELS], width[MAX_LEVELS];
    int start[MAX_LEVELS];        // first pixel of a level
    int bins_start[MAX_LEVELS];   // first bin of a level, see bins.cuh
    int bins;                     // of one head of one image
    int across, down;             // regions: each is the same part of the picture on all levels
    int window_height[MAX_LEVELS], window_width[MAX_LEVELS];   // a region and what surrounds it
    int window_start[MAX_LEVELS]; // first pixel of a level's window in shared memory
    int window_pixels;            // of all levels
};

// How many pixels windows may have on the current GPU, so that the kernels that use them have room in shared memory.
int window_pixels_that_fit(const Problem&, bool backward);

// All tensors are contiguous, begin at multiples of 64 bytes, and are of one type; a failed launch is returned.
cudaError_t forward(const Problem&, Type, const void* value, const void* points, const void* scores, void* out,
                    cudaStream_t);

// Device memory that `backward` needs for this many images at a time: `bins` ints, then the entries of its lists.
size_t bins_bytes(const Problem&, int images);
size_t entry_bytes(const Problem&, Type, int images);

cudaError_t backward(const Problem&, Type, const void* grad, const void* value, const void* points, const void* scores,
                     void* grad_value, void* grad_points, void* grad_scores,
                     int images_at_once, int* bins, void* entries, cudaStream_t);

}  // namespace deform_attn
