// The forward pass with windows and tensor cores.
//
// A warp takes eight queries at a time, in four pairs, and four points of each: every lane computes
// the position of one point. One matrix product, 16 x 16 by 16 x 8, adds two corners (left and
// right) of the eight points k = 0..7 of a pair, of which four belong to each query:
//
//     columns of A    one corner of each point, then the other corner
//     rows of A       8 channels of one chunk, then 8 channels of another; a chunk is 16 bytes
//     B               column k ^ 2 pair holds the weights of point k and is zero otherwise
//
// So rows of the value enter as they are in memory (ldmatrix transposes them while loading), and
// each lane supplies the weights of the very point whose position it computed. The order of the
// chunks depends on the point, and the order of the corners on the query: then the 16 bytes that
// lanes read at the same time are in different banks, for any positions.
//
// Weights are rounded to 16 bit, sums are in float32. Each column of the sums belongs to one point;
// the points of a query are added at the end.
//
// Layout of matrices, for lane 4 g + t: rows g and g + 8, columns 2 t and 2 t + 1 (and + 8) of A
// and of the sums; rows 2 t and 2 t + 1 (and + 8), column g of B.
#pragma once

#include "windows.cuh"

namespace deform_attn::tuned {
namespace {

// Index of a query, and its centre as a fraction of the picture.
struct Centre {
    int index;
    float x, y;
};

__device__ Centre centre_of(const Layout& p, const Area* areas, int place) {
    const Pixel pixel = pixel_of(p, areas, place);
    return {pixel.index, (2 * pixel.column + 1) * inverse(float(2 * p.width[pixel.level])),
            (2 * pixel.row + 1) * inverse(float(2 * p.height[pixel.level]))};
}

// Reductions over the four lanes that have points of the same query.
__device__ float maximum_over_query(float x) {
    x = max(x, __shfl_xor_sync(ALL_LANES, x, 4));
    return max(x, __shfl_xor_sync(ALL_LANES, x, 9));
}
__device__ float sum_over_query(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 4);
    return x + __shfl_xor_sync(ALL_LANES, x, 9);
}

// LEVELS: the number of levels if each has four points, else 0. If it is known, loops are unrolled,
// and offsets and logits of the next queries are copied to shared memory ahead of their use.
template <typename scalar_t, int LEVELS>
__global__ void __launch_bounds__(FORWARD_WINDOW_THREADS, 2)
    forward_window_kernel(const Layout p, const scalar_t* __restrict__ value,
                          const scalar_t* __restrict__ points, const scalar_t* __restrict__ scores,
                          scalar_t* __restrict__ out) {
    constexpr int CHANNELS = ROW_BYTES / sizeof(scalar_t), UNROLL = LEVELS ? LEVELS : 1;
    constexpr int TURN = FORWARD_WINDOW_THREADS / 4;  // queries that the block takes at a time
    extern __shared__ __align__(128) char memory[];
    __shared__ Area areas[MAX_LEVELS];
    __shared__ Origin origins[MAX_LEVELS];
    // Offsets, then logits, of the eight queries of each warp.
    __shared__ __align__(16) scalar_t prefetched[FORWARD_WINDOW_THREADS / 32][8 * UNROLL * 12];

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row = p.heads * CHANNELS, count = p.levels * p.points;
    const BlockWork work(p.across * p.down, p.heads, 1);
    const int queries = load_region(p, work.region, areas);
    if (queries == 0) return;  // possible if one level has width 1 and another height 1
    // An item is one head of one query. Queries are pixels, so items are also rows of the value.
    const unsigned first_item = unsigned(work.image) * p.queries * p.heads + work.head;
    const scalar_t* image = value + int64_t(first_item) * CHANNELS;

    // The point whose position and weight this lane computes: k = 2 t + g % 2 of a pair.
    const int lane_pair = g / 2 ^ t, lane_query = 2 * lane_pair + t / 2,
              lane_index = t % 2 * 2 + g % 2;
    const unsigned lane_first = t / 2 * ROW_BYTES, lane_low = g % 2 ? 0x1044 : 0x4410,
                   lane_high = g % 2 ? 0x3244 : 0x4432;
    scalar_t* const lane_prefetched = prefetched[warp] + lane_query * LEVELS * 8;
    scalar_t* const lane_prefetched_scores = prefetched[warp] + (8 * 8 + lane_query * 4) * LEVELS;
    // The row whose address this lane passes to ldmatrix: of point k, one corner or the other
    // (lane / 16), one chunk or the other (lane / 8 % 2).
    const int k = lane % 8, source = k * 4 + k / 2;
    const unsigned wanted = (k / 4 ^ lane / 16) * ROW_BYTES;
    const unsigned rows = unsigned(__cvta_generic_to_shared(memory)) + (k % 4 ^ lane / 8 % 2) * 16;

    // Each of the four lanes of a query computes the centre of a query of one of the next four
    // turns.
    const auto place_turns = [&](int begin) {
        return centre_of(p, areas, min(begin + lane_index * TURN + lane_query, queries - 1));
    };
    const auto take_turn = [&](const Centre& turns, int turn) -> Centre {
        const int from = lane ^ (turn ^ lane_index) % 2 * 4 ^ (turn ^ lane_index) / 2 * 9;
        return {__shfl_sync(ALL_LANES, turns.index, from), __shfl_sync(ALL_LANES, turns.x, from),
                __shfl_sync(ALL_LANES, turns.y, from)};
    };
    const auto prefetch = [&](int index) {
        if (lane_index >= LEVELS) return;
        const int64_t item = first_item + unsigned(index) * p.heads;
        copy_in_background<16>(lane_prefetched + lane_index * 8,
                               points + item * LEVELS * 8 + lane_index * 8);
        copy_in_background<8>(lane_prefetched_scores + lane_index * 4,
                              scores + item * LEVELS * 4 + lane_index * 4);
    };
    // Sums of chunks 0 and 1 (in the order for k = 0) and of chunks 2 and 3, for each pair.
    float sum[2][4][4];
    // The whole warp adds the point of lane `owner`, which is outside the windows.
    const auto add_far_point = [&](int owner, const Point<float>& lane_point, float lane_weight,
                                   const Window& window) {
        const Point<float> point{__shfl_sync(ALL_LANES, lane_point.column, owner),
                                 __shfl_sync(ALL_LANES, lane_point.row, owner),
                                 __shfl_sync(ALL_LANES, lane_point.x, owner),
                                 __shfl_sync(ALL_LANES, lane_point.y, owner)};
        const float weight = __shfl_sync(ALL_LANES, lane_weight, owner);
        const int owner_pair = owner / 8 ^ owner % 4;
        const scalar_t* from =
            image + int64_t(find_in_level(window, point)) * row + (t ^ owner_pair) % 2 * 16 + g;
        const Neighbours<float> along_x(point.column, window.level_width, 1 - point.x, point.x);
        const Neighbours<float> along_y(point.row, window.level_height, 1 - point.y, point.y);
        const int right = window.level_width > 1 ? row : 0,
                  down = window.level_height > 1 ? window.level_width * row : 0;
        float added[2] = {};
        for (int i = 0; i < 4; i++) {
            const scalar_t* at = from + i % 2 * right + i / 2 * down;
            const float corner_weight = weight * along_y.at[i / 2] * along_x.at[i % 2];
            added[0] += corner_weight * float(at[0]);
            added[1] += corner_weight * float(at[8]);
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++)
            if (pair == owner_pair && (t ^ pair) / 2 == owner % 4 / 2) {
                sum[0][pair][0] += added[0];
                sum[0][pair][1] += added[1];
            }
    };

    Centre turns = place_turns(warp * 8), query = take_turn(turns, 0);
    prefetch(query.index);
    place_windows(p, areas, origins);
    fill_windows(p, origins, image, row, memory);
    wait_for_windows();

    for (int begin = warp * 8, turn = 1; begin < queries; begin += TURN, turn = (turn + 1) % 4) {
        const unsigned lane_item = first_item + unsigned(query.index) * p.heads;
        const scalar_t* lane_points =
            (LEVELS ? lane_prefetched : points + int64_t(lane_item) * count * 2) + lane_index * 2;
        const scalar_t* lane_scores =
            (LEVELS ? lane_prefetched_scores : scores + int64_t(lane_item) * count) + lane_index;
        const int levels = LEVELS ? LEVELS : p.levels, level_points = LEVELS ? 4 : p.points;
        const int lane_count = LEVELS ? LEVELS * 4 : count - lane_index;
        float maximum = -FLT_MAX, total = 0;
        for (int i = 0; i < 32; i++) sum[i / 16][i / 4 % 4][i % 4] = 0;
#pragma unroll UNROLL
        for (int i = 0; i < lane_count; i += 4) maximum = max(maximum, float(lane_scores[i]));
        maximum = maximum_over_query(maximum) * LOG2_E;
#pragma unroll UNROLL
        for (int i = 0; i < lane_count; i += 4)
            total += power_of_two(fmaf(lane_scores[i], LOG2_E, -maximum));
        const float normalizer = maximum + __log2f(sum_over_query(total));

#pragma unroll UNROLL
        for (int level = 0; level < levels; level++) {
            const Window window = window_of(p, origins, level);
            for (int first = 0; first < level_points; first += 4) {
                Point<float> point{-2, -2, 0, 0};
                float weight = 0;
                if (LEVELS || first + lane_index < p.points) {
                    // Without splitting the centre, because a 16 bit offset is less precise.
                    const auto offset = read_pair(lane_points + first * 2);
                    const float x = fmaf(query.x, window.level_width, float(offset.at[0]) - 0.5f);
                    const float y = fmaf(query.y, window.level_height, float(offset.at[1]) - 0.5f);
                    point = {floor_to_int(x), floor_to_int(y), x - floorf(x), y - floorf(y)};
                    weight = power_of_two(fmaf(lane_scores[first], LOG2_E, -normalizer));
                }
                const int found = find_in_window(window, point);
                const bool far =
                    found < 0 && is_inside(point, window.level_height, window.level_width);
                for (unsigned left = __ballot_sync(ALL_LANES, far); left; left &= left - 1)
                    add_far_point(__ffs(left) - 1, point, weight, window);
                if (found < 0) weight = 0;

                const unsigned place = max(found, 0) * ROW_BYTES;
                // Weights of the upper and lower row, each for one corner and the other.
                unsigned words[2][2];
#pragma unroll
                for (int below = 0; below < 2; below++) {
                    const float both = below ? weight * point.y : weight - weight * point.y;
                    const float right = both * point.x, left = both - right;
                    const bool right_first = (place ^ lane_first) & ROW_BYTES;
                    const unsigned rounded =
                        pack<scalar_t>(right_first ? right : left, right_first ? left : right);
                    words[below][0] = __byte_perm(rounded, 0, lane_low);
                    words[below][1] = __byte_perm(rounded, 0, lane_high);
                }
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    const unsigned upper_left = __shfl_sync(ALL_LANES, place, source ^ pair * 8);
                    const unsigned from = rows + upper_left + ((upper_left ^ wanted) & ROW_BYTES);
#pragma unroll
                    for (int below = 0; below < 2; below++)
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const auto a = load_transposed((from + below * window.width * ROW_BYTES)
                                                           ^ half * 32);
                            multiply_matrices<scalar_t>(sum[half][pair], a.at,
                                                        {lane_pair == pair ? words[below][0] : 0,
                                                         lane_pair == pair ? words[below][1] : 0});
                        }
                }
            }
            lane_points += level_points * 2;
            lane_scores += level_points;
        }

        const unsigned item =
            begin + lane_query < queries ? first_item + unsigned(query.index) * p.heads : ~0u;
        if (begin + TURN < queries) {
            __syncwarp();  // all lanes have read what prefetch overwrites
            if (turn == 0) turns = place_turns(begin + TURN);
            query = take_turn(turns, turn);
            prefetch(query.index);
        }
        scalar_t* const columns[2] = {out + g % 4 * 8 + t * 2, out + (g % 4 * 8 ^ 16) + t * 2};
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const float (&here)[4] = sum[0][pair], (&there)[4] = sum[1][pair];
            const float even =
                here[0] + here[3] + __shfl_xor_sync(ALL_LANES, there[0] + there[3], 1);
            const float odd =
                here[1] + here[2] + __shfl_xor_sync(ALL_LANES, there[1] + there[2], 1);
            // Two channels of column g.
            const unsigned word = transpose(pack<scalar_t>(even, odd));
            const unsigned target =
                __shfl_sync(ALL_LANES, item, g / 4 * 18 ^ pair * 8 ^ pair / 2 * 18);
            unsigned* to =
                reinterpret_cast<unsigned*>(columns[pair % 2] + uint64_t(target) * CHANNELS);
            if (target != ~0u) *to = word;
        }
        wait_for_copies();
        __syncwarp();
    }
}

}  // namespace
}  // namespace deform_attn::tuned
