// Windows in shared memory, and matrix products on tensor cores. For 16 bit, 32 channels per head,
// and raw offsets.
//
// A block computes one head of a region. It first copies what its points are likely to read into
// shared memory: a window around the region on every level. There, rows of adjacent pixels are in
// different banks, so that any rows can be read at full speed. Windows can extend beyond the border
// of a level by one pixel, which is zero. Points outside the windows are read from global memory.
#pragma once

#include "geometry.cuh"

namespace deform_attn::tuned {
namespace {

constexpr int ROW_BYTES = 64;  // of a pixel's 32 channels
// At most so many pixels, so that a multiprocessor of Hopper has room for two blocks.
constexpr int FORWARD_WINDOW_PIXELS = 1650, BACKWARD_WINDOW_PIXELS = 1440;
constexpr int FORWARD_WINDOW_THREADS = 448, BACKWARD_WINDOW_THREADS = 384;
constexpr int PREFETCH_BYTES = FORWARD_WINDOW_THREADS / 4 * 72;  // of forward_window_kernel

// Upper left pixel of a window on its level.
struct Origin {
    int left, top;
};

struct Window {
    int left, top, width, height;
    int first;  // its first pixel among those of all windows
    int level_width, level_height, level_start;
};

__device__ int window_begin(int begin, int cut, int window, int size) {
    return min(max((2 * begin + cut - window) / 2, -1), size + 1 - window);
}

// Computes the origins of all windows, in shared memory.
__device__ void place_windows(const Layout& p, const Area* areas, Origin* origins) {
    for (int level = threadIdx.x; level < p.levels; level += blockDim.x)
        origins[level] = {window_begin(areas[level].left, areas[level].width, p.window_width[level],
                                       p.width[level]),
                          window_begin(areas[level].top, areas[level].height,
                                       p.window_height[level], p.height[level])};
    __syncthreads();
}

// Only the origin depends on the block. The rest is read from constant memory, because shared
// memory is the bottleneck.
__device__ Window window_of(const Layout& p, const Origin* origins, int level) {
    return {origins[level].left,    origins[level].top,    p.window_width[level],
            p.window_height[level], p.window_start[level], p.width[level],
            p.height[level],        p.start[level]};
}

// Asynchronous copy to shared memory; if `zero`, it writes zeros and does not read `from`.
template <int BYTES>
__device__ void copy_in_background(void* to, const void* from, bool zero = false) {
#if __CUDA_ARCH__ >= 800
    const unsigned target = unsigned(__cvta_generic_to_shared(to));
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from),
                     "r"(zero ? 0 : 16));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(from),
                     "n"(BYTES));
#endif
}

// Starts copying the windows. `image` is the head's row of the first pixel, `row` the distance to
// the next pixel's. Each thread copies one piece of 16 bytes of a line, then of lines below; a line
// has fewer pieces than there are threads, because windows are less than 90 pixels wide.
template <typename scalar_t>
__device__ void fill_windows(const Layout& p, const Origin* origins, const scalar_t* image, int row,
                             char* memory) {
    for (int level = 0; level < p.levels; level++) {
        const Window window = window_of(p, origins, level);
        const int pieces = window.width * (ROW_BYTES / 16);
        // Divisions by `pieces`, exact for integers as small as these.
        const float lines_a_piece = inverse(float(pieces));
        const int lines = int((blockDim.x + 0.5f) * lines_a_piece);
        const int y = int((threadIdx.x + 0.5f) * lines_a_piece);
        const int piece = threadIdx.x - y * pieces;
        if (y >= lines) continue;
        const int column = window.left + piece / 4;
        const bool beyond = unsigned(column) >= unsigned(window.level_width);
        const scalar_t* from =
            image
            + (window.level_start + int64_t(window.top + y) * window.level_width + column) * row
            + piece % 4 * 8;
        char* to = memory + (window.first + y * window.width) * ROW_BYTES + piece * 16;
        for (int line = window.top + y; line < window.top + window.height; line += lines) {
            const bool zero = beyond || unsigned(line) >= unsigned(window.level_height);
            copy_in_background<16>(to, zero ? image : from, zero);
            from += int64_t(lines) * window.level_width * row;
            to += lines * window.width * ROW_BYTES;
        }
    }
}

__device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ void wait_for_windows() {
    wait_for_copies();
    __syncthreads();
}

// Index in the windows of the pixel to the upper left of a point, or -1 if any of the four pixels
// around the point is missing.
template <typename acc_t>
__device__ int find_in_window(const Window& window, const Point<acc_t>& point) {
    const int column = point.column - window.left, line = point.row - window.top;
    return unsigned(column) < unsigned(window.width - 1)
                   && unsigned(line) < unsigned(window.height - 1)
               ? window.first + line * window.width + column
               : -1;
}

// For points outside the windows: index in the image of the upper left pixel to read.
__device__ int find_in_level(const Window& window, const Point<float>& point) {
    return window.level_start
           + Neighbours<float>(point.row, window.level_height, 0, 0).first * window.level_width
           + Neighbours<float>(point.column, window.level_width, 0, 0).first;
}

// Loads four 8 x 8 matrices of 16 bit, transposed. Lane l passes the address of row l % 8 (16
// bytes) of matrix l / 8.
__device__ Vector<unsigned, 4> load_transposed(unsigned at) {
    Vector<unsigned, 4> words;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
                 : "r"(at));
    return words;
}

// Transposes an 8 x 8 matrix of 16 bit. Lane 4 g + t holds columns 2 t and 2 t + 1 of row g, before
// and after.
__device__ unsigned transpose(unsigned word) {
    unsigned transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
    return transposed;
}

// ---- matrix products ----------------------------------------------------------------------------

// sum += a * b, with a (16 x 16) and b (16 x 8) in 16 bit, sum (16 x 8) in float32.
template <typename scalar_t>
__device__ void multiply_matrices(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<scalar_t, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();  // not selected on older GPUs, see has_tensor_cores
#endif
}

// Two numbers in 16 bit, `low` in the low half of the word; unpack is the inverse.
template <typename scalar_t> __device__ unsigned pack(float low, float high) {
    unsigned pair;
    if constexpr (std::is_same_v<scalar_t, __half>)
        reinterpret_cast<__half2&>(pair) = __floats2half2_rn(low, high);
    else
        reinterpret_cast<__nv_bfloat162&>(pair) = __floats2bfloat162_rn(low, high);
    return pair;
}
template <typename scalar_t> __device__ float2 unpack(unsigned pair) {
    if constexpr (std::is_same_v<scalar_t, __half>)
        return __half22float2(reinterpret_cast<__half2&>(pair));
    else
        return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair));
}

}  // namespace
}  // namespace deform_attn::tuned
