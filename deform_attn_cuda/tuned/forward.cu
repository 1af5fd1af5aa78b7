// Forward: reference points, locations, softmax, bilinear gather and weighted sum in one pass over the raw inputs
// (Deformable DETR, arXiv 2010.04159, eq. 3). Written from the formula; upstream's op (mask2former/modeling/pixel_decoder/ops)
// takes locations and weights that others computed, in float32.
//
// A group of lanes shares a row: the channels of one head at one pixel. For each level every lane of the group places one
// sampling point, then all of them walk over the points placed and read the four rows around each. 48 rows are read for each
// one written, so rows must come from close by: a warp's groups take neighbouring heads, which share cache lines, and a block
// takes a square region of the picture. In 16 bit, converting the rows and adding them one channel at a time would bind even
// then: the kernel of forward_window.cuh keeps the region in shared memory and adds on tensor cores.
#include "forward_window.cuh"
#include "launch.cuh"

namespace deform_attn::tuned {
namespace {

template <typename T, int D, bool FUSED>
__global__ void __launch_bounds__(THREADS, 4)
forward_kernel(const Layout p, const T* __restrict__ value, const T* __restrict__ points, const T* __restrict__ scores,
               T* __restrict__ out) {
    using S = Shape<T, D>;
    using R = typename Computed<T>::type;
    const int channels = D ? D : p.channels, row = p.heads * channels, count = p.levels * p.points;
    const int lane = threadIdx.x % S::LANES, group = threadIdx.x % 32 / S::LANES;
    const Part part(regions_of(p), p.heads, S::HEADS);
    const bool head_valid = part.head + group % S::HEADS < p.heads;
    const int head = min(part.head + group % S::HEADS, p.heads - 1);
    __shared__ Cut cuts[MAX_LEVELS];
    const int queries = cut_queries<FUSED>(p, part.region, cuts);

    for (int begin = first_warp() * S::QUERIES; begin < queries; begin += all_warps() * S::QUERIES) {
        const int place = begin + group / S::HEADS;
        const Query<R, FUSED> query(p, part.region, cuts, min(place, queries - 1));
        const int64_t item = (int64_t(part.image) * p.queries + query.index) * p.heads + head;
        const auto weights = Weights<T, R, FUSED>::template of<S::LANES - 1>(scores + item * count, count, lane);

        for (int chunk = 0; chunk < channels; chunk += S::LANES * S::WIDTH) {
            const int channel = min(chunk + lane * S::WIDTH, channels - S::WIDTH);
            const char* rows = reinterpret_cast<const char*>(
                value + int64_t(part.image) * p.pixels * row + head * channels + channel);
            R sum[S::WIDTH] = {};
            for (int level = 0; level < p.levels; level++) {
                const int height = p.height[level], width = p.width[level];
                const unsigned bytes = row * sizeof(T), right = width > 1 ? bytes : 0, down = height > 1 ? width * bytes : 0;
                for (int first = 0; first < p.points; first += S::LANES) {
                    unsigned at = p.start[level] * bytes;   // lanes without a point read a pixel with weight 0
                    R corner[4] = {};
                    if (first + lane < p.points) {
                        const int i = level * p.points + first + lane;
                        const auto point = place_point<T>(query, height, width, read_pair(points + (item * count + i) * 2));
                        const Pair<R> x(point.column, width, 1 - point.x, point.x);
                        const Pair<R> y(point.row, height, 1 - point.y, point.y);
                        const R weight = weights[i];
                        at += (y.first * width + x.first) * bytes;
                        for (int k = 0; k < 4; k++) corner[k] = weight * y.at[k / 2] * x.at[k % 2];
                    }
                    const int placed = min(p.points - first, S::LANES);
                    for (int next = 0; next < placed; next += S::UNROLL) {
                        typename S::Row read[S::UNROLL][4];
                        #pragma unroll
                        for (int u = 0; u < S::UNROLL; u++) {
                            const char* upper = rows + __shfl_sync(WARP, at, next + u, S::LANES);
                            const char* lower = upper + down;
                            read[u][0] = *reinterpret_cast<const typename S::Row*>(upper);
                            read[u][1] = *reinterpret_cast<const typename S::Row*>(upper + right);
                            read[u][2] = *reinterpret_cast<const typename S::Row*>(lower);
                            read[u][3] = *reinterpret_cast<const typename S::Row*>(lower + right);
                        }
                        #pragma unroll
                        for (int u = 0; u < S::UNROLL; u++) {
                            #pragma unroll
                            for (int k = 0; k < 4; k++) {
                                const R weight = __shfl_sync(WARP, corner[k], next + u, S::LANES);
                                #pragma unroll
                                for (int c = 0; c < S::WIDTH; c++) sum[c] += weight * R(read[u][k].at[c]);
                            }
                        }
                    }
                }
            }
            if (place < queries && head_valid && chunk + lane * S::WIDTH < channels) {
                typename S::Row written;
                #pragma unroll
                for (int c = 0; c < S::WIDTH; c++) written.at[c] = T(sum[c]);
                *reinterpret_cast<typename S::Row*>(out + item * channels + channel) = written;
            }
        }
    }
}

}  // namespace

cudaError_t forward(const Problem& problem, Type type, const void* value, const void* points,
                    const void* scores, void* out, cudaStream_t stream) {
    const Layout p = make_layout(problem, false);
    return choose(type, p.channels, [&](auto instance) {
        using T = typename decltype(instance)::Stored;
        constexpr int D = decltype(instance)::CHANNELS;
        const auto launch = [&](auto kernel, dim3 grid, int threads, size_t shared) {
            if (const cudaError_t error = allow_shared(kernel, shared)) return error;
            kernel<<<grid, threads, shared, stream>>>(
                p, static_cast<const T*>(value), static_cast<const T*>(points), static_cast<const T*>(scores),
                static_cast<T*>(out));
            return cudaGetLastError();
        };
        if constexpr (sizeof(T) == 2 && D == 32)
            if (p.fused && p.window_pixels && has_tensor_cores())
                return launch(p.levels == 3 && p.points == 4 ? forward_window_kernel<T, 3> : forward_window_kernel<T, 0>,
                              parts(regions_of(p), p.heads, 1, p.images), FORWARD_WINDOW_THREADS,
                              size_t(p.window_pixels) * ROW_BYTES);
        const dim3 grid = shared_parts(parts(regions_of(p), p.heads, Shape<T, D>::HEADS, p.images));
        return launch(p.fused ? forward_kernel<T, D, true> : forward_kernel<T, D, false>, grid, THREADS, 0);
    });
}

}  // namespace deform_attn::tuned
