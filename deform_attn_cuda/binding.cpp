// Checks, allocation and registration of torch.ops.deform_attn.*, through PyTorch's stable ABI: one binary serves torch 2.11
// and later, and these headers compile in seconds. Shapes and gradients for PyTorch are declared in __init__.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "deform_attn.h"

namespace {

using deform_attn::Problem;
using deform_attn::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t LIST_BYTES = 256 << 20;  // of backward's lists at a time
constexpr int64_t ENOUGH_REGIONS = 200;    // times heads and images: more than one block for each multiprocessor
constexpr int WINDOW_MARGIN = 6;           // pixels

Type type_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Type::float32;
        case ScalarType::Half: return Type::float16;
        case ScalarType::BFloat16: return Type::bfloat16;
        case ScalarType::Double: return Type::float64;
        default: STD_TORCH_CHECK(false, "deform_attn: value must be float32, float16, bfloat16 or float64");
    }
}

cudaStream_t current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

// As the kernels want it: contiguous, and at a multiple of 64 bytes, since they read up to 32 at once.
Tensor prepare(const Tensor& tensor) {
    const Tensor dense = torch::stable::contiguous(tensor);
    return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 64 ? torch::stable::clone(dense) : dense;
}

void check_launch(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "deform_attn: ", cudaGetErrorString(error));
}

// Regions of 16 x 16 pixels of the finest level, or of fewer where that leaves multiprocessors idle or windows too large;
// windows with WINDOW_MARGIN pixels around; forward has room for one more around coarser levels, whose points leave their small
// windows more often. No windows (0 pixels) if they do not fit at all.
void cut_regions(Problem& p, bool backward) {
    const int widest = *std::max_element(p.width, p.width + p.levels), highest = *std::max_element(p.height, p.height + p.levels);
    const auto window = [&](int size, int largest, int regions) {
        const int margin = WINDOW_MARGIN + (!backward && size < largest);
        return std::min(size + 2, (size + regions - 1) / regions + 2 * margin);
    };
    const int fit = deform_attn::window_pixels_that_fit(p, backward);
    for (const int side : {16, 12, 8}) {
        p.across = (widest + side - 1) / side;
        p.down = (highest + side - 1) / side;
        p.window_pixels = 0;
        for (int level = 0; level < p.levels; level++) {
            p.window_width[level] = window(p.width[level], widest, p.across);
            p.window_height[level] = window(p.height[level], highest, p.down);
            p.window_start[level] = p.window_pixels;
            p.window_pixels += p.window_width[level] * p.window_height[level];
        }
        if (int64_t(p.across) * p.down * p.heads * p.images >= ENOUGH_REGIONS && p.window_pixels <= fit) return;
    }
    if (p.window_pixels > fit) p.window_pixels = 0;
}

// value (B, S, M, D); points (B, Q, M, V, P, 2); scores (B, Q, M, V * P), or (B, Q, M, V, P) if they are weights
Problem make_problem(const Tensor& value, const Tensor& points, const Tensor& scores, const std::vector<int64_t>& level_shapes,
                     bool fused, bool backward) {
    STD_TORCH_CHECK(value.dim() == 4 && points.dim() == 6,
                    "deform_attn: value must be (B, S, M, D) and points (B, Q, M, V, P, 2)");
    STD_TORCH_CHECK(points.size(4) >= 1, "deform_attn: each level must have a point");
    const int64_t levels = points.size(3), count = levels * points.size(4);
    STD_TORCH_CHECK(levels >= 1 && levels <= deform_attn::MAX_LEVELS, "deform_attn: 1 to ", deform_attn::MAX_LEVELS,
                    " levels are possible, not ", levels);
    STD_TORCH_CHECK(int64_t(level_shapes.size()) == 2 * levels, "deform_attn: level_shapes must hold height and width of ",
                    levels, " levels");
    STD_TORCH_CHECK(points.size(0) == value.size(0) && points.size(2) == value.size(2) && points.size(5) == 2,
                    "deform_attn: value and points differ in batch or heads, or points do not end in (x, y)");
    STD_TORCH_CHECK(scores.numel() == value.size(0) * points.size(1) * value.size(2) * count && scores.size(0) == value.size(0),
                    "deform_attn: there must be one score for each point");
    for (const Tensor* tensor : {&points, &scores}) {
        STD_TORCH_CHECK(tensor->scalar_type() == value.scalar_type(), "deform_attn: all inputs must have one type");
        STD_TORCH_CHECK(tensor->get_device_index() == value.get_device_index(), "deform_attn: all inputs must be on one GPU");
    }

    Problem p{};
    p.fused = fused;
    p.images = value.size(0);
    p.pixels = value.size(1);
    p.queries = points.size(1);
    p.heads = value.size(2);
    p.channels = value.size(3);
    p.levels = levels;
    p.points = points.size(4);
    for (int level = 0; level < levels; level++) {
        const int64_t height = level_shapes[2 * level], width = level_shapes[2 * level + 1];
        STD_TORCH_CHECK(height >= 1 && width >= 1 && height < 32768 && width < 32768, "deform_attn: a level of ", height, " x ",
                        width, " is not possible");
        p.height[level] = height;
        p.width[level] = width;
        const int64_t pixels = p.start[level] + height * width;
        STD_TORCH_CHECK(pixels <= value.size(1), "deform_attn: value holds ", value.size(1), " pixels, the levels more");
        p.bins_start[level] = p.bins;
        p.bins += (height + 1) * (width + 2);
        if (level + 1 < levels) p.start[level + 1] = pixels;
        else STD_TORCH_CHECK(pixels == value.size(1), "deform_attn: value holds ", value.size(1), " pixels, the levels ", pixels);
    }
    STD_TORCH_CHECK(!fused || p.queries == p.pixels, "deform_attn: with raw offsets, there must be one query for each pixel");
    STD_TORCH_CHECK(int64_t(p.pixels) * p.heads * p.channels * int64_t(value.element_size()) < (int64_t(1) << 32),
                    "deform_attn: the value of one image must be smaller than 4 GB");
    STD_TORCH_CHECK(int64_t(p.images) * p.queries * p.heads < 0xffffffff, "deform_attn: too many queries");
    cut_regions(p, backward);
    return p;
}

template <bool FUSED>
Tensor forward(const Tensor& value, const Tensor& points, const Tensor& scores, std::vector<int64_t> level_shapes) {
    STD_TORCH_CHECK(value.is_cuda(), "deform_attn: all inputs must be on one GPU");
    const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
    const Problem p = make_problem(value, points, scores, level_shapes, FUSED, false);
    Tensor out = torch::stable::new_empty(value, {p.images, p.queries, int64_t(p.heads) * p.channels});
    if (out.numel() == 0) return out;
    const Tensor values = prepare(value), all_points = prepare(points), all_scores = prepare(scores);
    check_launch(deform_attn::forward(p, type_of(value), values.const_data_ptr(), all_points.const_data_ptr(),
                                      all_scores.const_data_ptr(), out.mutable_data_ptr(), current_stream(value)));
    return out;
}

template <bool FUSED>
Gradients backward(const Tensor& grad, const Tensor& value, const Tensor& points, const Tensor& scores,
                   std::vector<int64_t> level_shapes) {
    STD_TORCH_CHECK(value.is_cuda(), "deform_attn: all inputs must be on one GPU");
    const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
    const Problem p = make_problem(value, points, scores, level_shapes, FUSED, true);
    STD_TORCH_CHECK(grad.numel() == int64_t(p.images) * p.queries * p.heads * p.channels
                    && grad.scalar_type() == value.scalar_type() && grad.get_device_index() == value.get_device_index(),
                    "deform_attn: the gradient must have the output's shape, type and device");
    const Tensor grads = prepare(grad), values = prepare(value), all_points = prepare(points), all_scores = prepare(scores);
    Tensor grad_value = torch::stable::new_empty(values, values.sizes());
    Tensor grad_points = torch::stable::new_empty(all_points, all_points.sizes());
    Tensor grad_scores = torch::stable::new_empty(all_scores, all_scores.sizes());
    if (grads.numel() == 0 || scores.numel() == 0) {
        for (Tensor* nothing : {&grad_value, &grad_points, &grad_scores}) torch::stable::zero_(*nothing);
        return {grad_value, grad_points, grad_scores};
    }
    const Type type = type_of(value);
    const int64_t at_once = std::clamp<int64_t>(LIST_BYTES / deform_attn::entry_bytes(p, type, 1), 1, p.images);
    const int64_t entries = deform_attn::entry_bytes(p, type, at_once);
    const int64_t bins = deform_attn::bins_bytes(p, at_once);
    Tensor workspace = torch::stable::new_empty(values, {entries + bins}, ScalarType::Byte);
    char* memory = static_cast<char*>(workspace.mutable_data_ptr());
    check_launch(deform_attn::backward(
        p, type, grads.const_data_ptr(), values.const_data_ptr(), all_points.const_data_ptr(), all_scores.const_data_ptr(),
        grad_value.mutable_data_ptr(), grad_points.mutable_data_ptr(), grad_scores.mutable_data_ptr(),
        at_once, reinterpret_cast<int*>(memory + entries), memory, current_stream(value)));
    return {grad_value, grad_points, grad_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY(deform_attn, library) {
    library.def("forward(Tensor value, Tensor offsets, Tensor logits, int[] level_shapes) -> Tensor");
    library.def("backward(Tensor grad, Tensor value, Tensor offsets, Tensor logits, int[] level_shapes)"
                " -> (Tensor, Tensor, Tensor)");
    library.def("sample(Tensor value, Tensor locations, Tensor weights, int[] level_shapes) -> Tensor");
    library.def("sample_backward(Tensor grad, Tensor value, Tensor locations, Tensor weights, int[] level_shapes)"
                " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(deform_attn, CUDA, library) {
    library.impl("forward", TORCH_BOX(&forward<true>));
    library.impl("backward", TORCH_BOX(&backward<true>));
    library.impl("sample", TORCH_BOX(&forward<false>));
    library.impl("sample_backward", TORCH_BOX(&backward<false>));
}
