// Forward: reference points, locations, softmax, bilinear gather and weighted sum in one pass over the raw inputs
// (Deformable DETR, arXiv 2010.04159, eq. 3). Written from the formula; upstream's op (mask2former/modeling/pixel_decoder/ops)
// takes locations and weights that others computed, in float32.
//
// A group of lanes shares a row: the channels of one head at one pixel. For each level every lane of the group places one
// sampling point, then all of them walk over the points placed and read the four rows around each. 48 rows are read for each
// one written, so rows must come from close by: a warp's groups take neighbouring heads, which share cache lines, and a block
// takes a square region of the picture. In 16 bit, converting the rows and adding them one channel at a time would bind even
// then: forward_window_kernel keeps the region in shared memory and adds on tensor cores.
#include "instances.cuh"
#include "windows.cuh"

namespace deform_attn {
namespace {

template <typename T, int D, bool FUSED>
__global__ void __launch_bounds__(THREADS, 4)
forward_kernel(const Problem p, const T* __restrict__ value, const T* __restrict__ points, const T* __restrict__ scores,
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

// Where the corners of a pair of queries are written: what 16 lanes write at once falls into different banks.
constexpr unsigned SECOND_HALF = 192;
__device__ constexpr unsigned corners_of(int pair) { return pair % 2 * 400 + pair / 2 * 720; }

// A warp takes eight queries, two for each product of a 16 x 16 by a 16 x 8 matrix, which adds one point of both:
//   rows of A     16 pairs of channels
//   columns of A  8 corners (of each query's point: left and right, above and below) times the two channels of a pair
//   columns of B  {first, second query} x {even, odd channel} x {weight, what its rounding to 16 bit left out}
// so that the rows of the value enter as they lie in memory, and weights count with twice the 16-bit type's digits.
// In a fragment, lane 4 g + t holds rows g and g + 8, columns 2t, 2t + 1 of A and of the sums, column g of B. It reads channels
// 4 g .. 4 g + 3; for the second query 4 (g ^ 4) .., for the sake of the banks.
// LEVELS: 0, or the number of levels, if each has four points: what a lane reads is then asked for at once, and read once.
template <typename T, int LEVELS>
__global__ void __launch_bounds__(FORWARD_WINDOW_THREADS, 2)
forward_window_kernel(const Problem p, const T* __restrict__ value, const T* __restrict__ points, const T* __restrict__ scores,
                      T* __restrict__ out) {
    constexpr int D = ROW_BYTES / sizeof(T);
    extern __shared__ __align__(16) char memory[];
    // of each warp: pair of queries, pair of points, {rounded, rest} x {first, second query} x {left, right}, point of the pair:
    // the upper corner's place, and the weights of it (low half) and of the corner below
    __shared__ __align__(16) char all_corners[FORWARD_WINDOW_THREADS / 32 * CORNER_BYTES];
    __shared__ Cut cuts[MAX_LEVELS];
    __shared__ Window windows[MAX_LEVELS];

    const int row = p.heads * D, count = p.levels * p.points;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Part part(p.across * p.down, p.heads, 1);
    const int queries = cut_region(p, part.region, cuts);
    const T* image = value + int64_t(part.image) * p.pixels * row + part.head * D;
    place_windows(p, cuts, windows);
    fill_windows(p.levels, windows, image, row, memory);
    wait_for_windows();

    const int own_query = lane / 4, own_index = lane % 4;                  // as one who places points
    const int t = lane % 4, g = lane / 4;                                  // as one who reads
    const bool wanted = g / 2 % 2 == t / 2;
    const unsigned select_upper = !wanted ? 0x4444 : g % 2 ? 0x1044 : 0x4410;
    const unsigned select_lower = !wanted ? 0x4444 : g % 2 ? 0x3244 : 0x4432;
    const int channel = (g ^ (t < 2 ? 0 : 4)) * 4;
    const unsigned rows = unsigned(__cvta_generic_to_shared(memory)) + channel * sizeof(T);
    const unsigned corners = unsigned(__cvta_generic_to_shared(all_corners)) + warp * CORNER_BYTES;
    const unsigned writing = corners + corners_of(own_query / 2) + own_index / 2 * SECOND_HALF
                             + own_query % 2 * 32 + own_index % 2 * 8;
    const unsigned reading = corners + (g / 4 * 4 + t) * 16;

    for (int begin = warp * 8; begin < queries; begin += FORWARD_WINDOW_THREADS / 4) {
        const Query<float, true> query(p, part.region, cuts, min(begin + own_query, queries - 1));
        const int64_t item = (int64_t(part.image) * p.queries + query.index) * p.heads + part.head;
        const T* own_points = points + (item * count + own_index) * 2;
        const T* own_scores = scores + item * count + own_index;
        float maximum = -FLT_MAX, total = 0, sum[4][4] = {};
        Vector<T, 2> offsets[LEVELS ? LEVELS : 1];
        float logits[LEVELS ? LEVELS : 1];
        #pragma unroll
        for (int level = 0; level < LEVELS; level++) {
            offsets[level] = read_pair(own_points + level * 8);
            logits[level] = own_scores[level * 4];
            maximum = max(maximum, logits[level]);
        }
        for (int i = 0; !LEVELS && i < count - own_index; i += 4) maximum = max(maximum, float(own_scores[i]));
        maximum = maximum_over<3>(maximum);

        #pragma unroll
        for (int level = 0; level < (LEVELS ? LEVELS : p.levels); level++) {
            const Window window = windows[level];
            for (int first = 0; first < (LEVELS ? 4 : p.points); first += 4) {
                float corner[4] = {};
                unsigned place[2] = {unsigned(window.first) * 2, unsigned(window.first) * 2};
                if (LEVELS || first + own_index < p.points) {
                    // float32 is enough here: a 16-bit type holds the offset
                    const auto offset = LEVELS ? offsets[level] : read_pair(own_points + first * 2);
                    const float x = fmaf(query.twice_x, window.level_width * query.inverse_width, float(offset.at[0]) - 0.5f);
                    const float y = fmaf(query.twice_y, window.level_height * query.inverse_height, float(offset.at[1]) - 0.5f);
                    const Point<float> point{floor_to_int(x), floor_to_int(y), x - floorf(x), y - floorf(y)};
                    const float weight = exponential((LEVELS ? logits[level] : float(own_scores[first])) - maximum);
                    const int found = find_in_window(window, point);
                    total += weight;
                    if (found >= 0) {
                        place[0] = found * 2;
                        place[1] = found * 2 + 2;
                        corner[3] = weight * point.y * point.x;
                        corner[2] = weight * point.y - corner[3];
                        corner[1] = weight * point.x - corner[3];
                        corner[0] = weight - weight * point.y - corner[1];
                    } else if (touches(point, window.level_height, window.level_width)) {
                        const Pair<float> along_x(point.column, window.level_width, 1 - point.x, point.x);
                        const Pair<float> along_y(point.row, window.level_height, 1 - point.y, point.y);
                        for (int k = 0; k < 4; k++) corner[k] = weight * along_y.at[k / 2] * along_x.at[k % 2];
                        place[0] = find_in_level(window, point) * 2 + 1;
                        place[1] = place[0] + (window.level_width > 1 ? 2 : 0);
                    }
                }
                __syncwarp();
                for (int side = 0; side < 2; side++) {
                    const unsigned rounded = pack<T>(corner[side], corner[2 + side]);
                    const float2 kept = unpack<T>(rounded);
                    store_shared(writing + side * 16, place[side], rounded);
                    store_shared(writing + side * 16 + 64, place[side],
                                 pack<T>(corner[side] - kept.x, corner[2 + side] - kept.y));
                }
                const unsigned far = __ballot_sync(WARP, place[0] % 2);
                __syncwarp();
                #pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    const auto front = load_shared<4>(reading + corners_of(pair));
                    const auto back = load_shared<4>(reading + corners_of(pair) + SECOND_HALF);
                    const unsigned places[4] = {front.at[0], front.at[2], back.at[0], back.at[2]};
                    const unsigned weight[4] = {front.at[1], front.at[3], back.at[1], back.at[3]};
                    const bool any_far = far >> pair * 8 & 0xff;
                    Vector<unsigned, 2> upper[4], lower[4];
                    if (!any_far) {
                        #pragma unroll
                        for (int i = 0; i < 4; i++)
                            read_corners(places[i], rows, image + channel, row, window, false, upper[i], lower[i]);
                    } else {
                        for (int i = 0; i < 4; i++)
                            read_corners(places[i], rows, image + channel, row, window, true, upper[i], lower[i]);
                    }
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        multiply<T>(sum[pair], {upper[i].at[0], upper[i].at[1], lower[i].at[0], lower[i].at[1]},
                                    {__byte_perm(weight[i], 0, select_upper), __byte_perm(weight[i], 0, select_lower)});
                }
            }
            own_points += p.points * 2;
            own_scores += p.points;
        }
        const float scale = 1 / sum_over<3>(total);
        const int index = begin + own_query < queries ? query.index : -1;
        #pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const int target = __shfl_sync(WARP, index, pair * 8 + t % 2 * 4);
            const float its_scale = __shfl_sync(WARP, scale, pair * 8 + t % 2 * 4);
            Vector<T, 4> written;
            #pragma unroll
            for (int c = 0; c < 4; c++) written.at[c] = T((sum[pair][c] + __shfl_xor_sync(WARP, sum[pair][c], 2)) * its_scale);
            if (target >= 0 && t < 2)
                *reinterpret_cast<Vector<T, 4>*>(
                    out + ((int64_t(part.image) * p.queries + target) * p.heads + part.head) * D + (g ^ (t * 4)) * 4) = written;
        }
    }
}

}  // namespace

cudaError_t forward(const Problem& p, Type type, const void* value, const void* points, const void* scores, void* out,
                    cudaStream_t stream) {
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

}  // namespace deform_attn
