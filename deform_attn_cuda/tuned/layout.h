// A problem, and how the tuned kernels cut it into parts.
#pragma once

#include "../deform_attn.h"

namespace deform_attn::tuned {

// Regions, windows and bins are explained in docs/kernel.md.
struct Layout : Problem {
    int across, down;  // regions of the picture; each is the same part of it on all levels
    int window_height[MAX_LEVELS], window_width[MAX_LEVELS];  // a region and its surroundings
    int window_start[MAX_LEVELS];  // first pixel of a level's window in shared memory
    int window_pixels;             // of all levels; 0 = no windows
    int bins_start[MAX_LEVELS];    // first bin of a level, see bins.cuh
    int bins;                      // of one head of one image
};

cudaError_t forward(const Problem&, Type, const void* value, const void* points,
                    const void* scores, void* output, cudaStream_t);

}  // namespace deform_attn::tuned
