// Windows of shared memory, and products on tensor cores: for 16 bit, raw offsets, and windows of 32 channels a head.
//
// A block takes one head of a region and copies what its points will read, the region's windows on all levels, to shared
// memory: there the rows of neighbouring pixels lie in different banks, so that a gather runs at full rate. Windows reach over
// the border of a level by one pixel, which is zero. Points outside the windows are read from global memory.
#pragma once

#include "geometry.cuh"

namespace deform_attn {
namespace {

constexpr int ROW_BYTES = 64;                   // of a pixel's 32 channels
constexpr int WINDOW_PIXELS = 1440;              // two blocks of a Hopper multiprocessor then have room
constexpr int FORWARD_WINDOW_THREADS = 448, BACKWARD_WINDOW_THREADS = 384;
constexpr int CORNER_BYTES = 1440;               // of a warp, see forward_window_kernel

struct Window {
    int left, top, width, height;
    int first;                                   // pixel of the windows
    int level_width, level_height, level_start;
};

__device__ int window_begin(int begin, int cut, int window, int size) {
    return min(max((2 * begin + cut - window) / 2, -1), size + 1 - window);
}

__device__ void place_windows(const Problem& p, const Cut* cuts, Window* windows) {
    for (int level = threadIdx.x; level < p.levels; level += blockDim.x) {
        const int width = p.window_width[level], height = p.window_height[level];
        windows[level] = {window_begin(cuts[level].left, cuts[level].width, width, p.width[level]),
                          window_begin(cuts[level].top, cuts[level].height, height, p.height[level]),
                          width, height, p.window_start[level], p.width[level], p.height[level], p.start[level]};
    }
    __syncthreads();
}

// Starts copying, in the background; `image` is the head's row of the first pixel, `row` what lies between pixels.
template <typename T> __device__ void fill_windows(int levels, const Window* windows, const T* image, int row, char* memory) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int level = 0; level < levels; level++) {
        const Window window = windows[level];
        for (int y = warp; y < window.height; y += blockDim.x / 32) {
            const int line = window.top + y;
            const bool beyond = unsigned(line) >= unsigned(window.level_height);
            const T* from = image + (window.level_start + int64_t(beyond ? 0 : line) * window.level_width) * row;
            char* to = memory + (window.first + y * window.width) * ROW_BYTES;
            for (int x = lane; x < window.width * 4; x += 32) {
                const int column = window.left + x / 4;
                const bool zero = beyond || unsigned(column) >= unsigned(window.level_width);
#if __CUDA_ARCH__ >= 800
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                             :: "r"(unsigned(__cvta_generic_to_shared(to + x * 16))),
                                "l"(from + (zero ? 0 : column) * row + x % 4 * 8), "r"(zero ? 0 : 16));
#endif
            }
        }
    }
}

__device__ void wait_for_windows() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncthreads();
}

// The pixel of the windows to the upper left of a point, or -1 if not all four around it are there.
template <typename R> __device__ int find_in_window(const Window& window, const Point<R>& point) {
    const int column = point.column - window.left, line = point.row - window.top;
    return unsigned(column) < unsigned(window.width - 1) && unsigned(line) < unsigned(window.height - 1)
           ? window.first + line * window.width + column : -1;
}

// Outside the windows: the upper left pixel of the level among those always read (see Pair).
__device__ int find_in_level(const Window& window, const Point<float>& point) {
    return window.level_start + Pair<float>(point.row, window.level_height, 0, 0).first * window.level_width
           + Pair<float>(point.column, window.level_width, 0, 0).first;
}

template <int N> __device__ Vector<unsigned, N> load_shared(unsigned at) {
    Vector<unsigned, N> words;
    if constexpr (N == 2) asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words.at[0]), "=r"(words.at[1]) : "r"(at));
    else asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                      : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3]) : "r"(at));
    return words;
}

__device__ void store_shared(unsigned at, unsigned low, unsigned high) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(at), "r"(low), "r"(high) : "memory");
}

// Rows of a point's left or right corners, one above the other. `place` is even: 2 * pixel of the windows, or odd:
// 2 * pixel of the image + 1. `memory` and `image` point to this lane's channels in the first row of each.
template <int N, typename T>
__device__ void read_corners(unsigned place, unsigned memory, const T* image, int row, const Window& window, bool any_far,
                             Vector<unsigned, N>& upper, Vector<unsigned, N>& lower) {
    if (any_far && place % 2) {
        const T* from = image + int64_t(place / 2) * row;
        upper = *reinterpret_cast<const Vector<unsigned, N>*>(from);
        lower = *reinterpret_cast<const Vector<unsigned, N>*>(from + (window.level_height > 1 ? window.level_width * row : 0));
    } else {
        upper = load_shared<N>(memory + place * (ROW_BYTES / 2));
        lower = load_shared<N>(memory + place * (ROW_BYTES / 2) + window.width * ROW_BYTES);
    }
}

// ---- products ---------------------------------------------------------------------------------------------------------

// sum += a * b, for a 16 x 16 and b 16 x 8 of 16 bit, sum 16 x 8 in float32
template <typename T> __device__ void multiply(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();  // kernels that use this are not chosen there
#endif
}

// Two numbers as 16 bit, `low` in the low half, and back.
template <typename T> __device__ unsigned pack(float low, float high) {
    unsigned pair;
    if constexpr (std::is_same_v<T, __half>) reinterpret_cast<__half2&>(pair) = __floats2half2_rn(low, high);
    else reinterpret_cast<__nv_bfloat162&>(pair) = __floats2bfloat162_rn(low, high);
    return pair;
}
template <typename T> __device__ float2 unpack(unsigned pair) {
    if constexpr (std::is_same_v<T, __half>) return __half22float2(reinterpret_cast<__half2&>(pair));
    else return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair));
}

}  // namespace
}  // namespace deform_attn
