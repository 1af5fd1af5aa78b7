// Checks inputs, allocates outputs, and registers both kernels with PyTorch:
//
//     torch.ops.deform_attn          tuned/
//     torch.ops.deform_attn_plain    plain.cu
//
// This uses PyTorch's stable ABI: one binary serves torch 2.11 and later, and the headers compile
// in seconds. Shapes and gradients are declared in __init__.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "deform_attn.h"

namespace {

using deform_attn::Kernel;
using deform_attn::Problem;
using deform_attn::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr uintptr_t ALIGNMENT = 64;          // bytes; the tuned kernel reads 16 at once
constexpr int64_t MAX_SIDE = 32767;          // of a level: positions are computed in 32 bit
constexpr int64_t MAX_IMAGE_BYTES = int64_t(1) << 32;

Type type_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Type::float32;
        case ScalarType::Half: return Type::float16;
        case ScalarType::BFloat16: return Type::bfloat16;
        case ScalarType::Double: return Type::float64;
        default:
            STD_TORCH_CHECK(false,
                            "deform_attn: value must be float32, float16, bfloat16 or float64");
    }
}

cudaStream_t current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

// The tensor, or a copy of it that is contiguous and aligned.
Tensor prepare(const Tensor& tensor) {
    const Tensor dense = torch::stable::contiguous(tensor);
    const auto address = reinterpret_cast<uintptr_t>(dense.const_data_ptr());
    return address % ALIGNMENT ? torch::stable::clone(dense) : dense;
}

void check_launch(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "deform_attn: ", cudaGetErrorString(error));
}

// The sizes of a call; refuses tensors that do not fit together.
Problem make_problem(const Tensor& value, const Tensor& points, const Tensor& scores,
                     const std::vector<int64_t>& level_shapes, bool fused) {
    STD_TORCH_CHECK(value.dim() == 4 && points.dim() == 6,
                    "deform_attn: value must be (images, pixels, heads, channels), and points "
                    "(images, queries, heads, levels, points, 2)");
    STD_TORCH_CHECK(points.size(4) >= 1, "deform_attn: each level must have a point");
    const int64_t levels = points.size(3), count = levels * points.size(4);
    STD_TORCH_CHECK(levels >= 1 && levels <= deform_attn::MAX_LEVELS,
                    "deform_attn: the number of levels must be 1 to ", deform_attn::MAX_LEVELS,
                    ", not ", levels);
    STD_TORCH_CHECK(int64_t(level_shapes.size()) == 2 * levels,
                    "deform_attn: level_shapes must hold height and width of ", levels, " levels");
    STD_TORCH_CHECK(points.size(0) == value.size(0) && points.size(2) == value.size(2)
                        && points.size(5) == 2,
                    "deform_attn: value and points differ in batch or heads, or points do not end "
                    "in (x, y)");
    STD_TORCH_CHECK(scores.numel() == value.size(0) * points.size(1) * value.size(2) * count
                        && scores.size(0) == value.size(0),
                    "deform_attn: there must be one score for each point");
    for (const Tensor* tensor : {&points, &scores}) {
        STD_TORCH_CHECK(tensor->scalar_type() == value.scalar_type(),
                        "deform_attn: all inputs must have one type");
        STD_TORCH_CHECK(tensor->get_device_index() == value.get_device_index(),
                        "deform_attn: all inputs must be on one GPU");
    }
    STD_TORCH_CHECK(!fused || points.size(1) == value.size(1),
                    "deform_attn: with raw offsets, there must be one query for each pixel");
    STD_TORCH_CHECK(value.size(1) * value.size(2) * value.size(3) * int64_t(value.element_size())
                        < MAX_IMAGE_BYTES,
                    "deform_attn: the value of one image must be smaller than 4 GB");
    STD_TORCH_CHECK(value.size(0) * points.size(1) * value.size(2) < 0xffffffff,
                    "deform_attn: too many queries");

    Problem p{};
    p.fused = fused;
    p.images = int(value.size(0));
    p.pixels = int(value.size(1));
    p.queries = int(points.size(1));
    p.heads = int(value.size(2));
    p.channels = int(value.size(3));
    p.levels = int(levels);
    p.points = int(points.size(4));
    int64_t pixels = 0;
    for (int level = 0; level < levels; level++) {
        const int64_t height = level_shapes[2 * level], width = level_shapes[2 * level + 1];
        STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= MAX_SIDE && width <= MAX_SIDE,
                        "deform_attn: a level of ", height, " x ", width, " is not possible");
        p.height[level] = int(height);
        p.width[level] = int(width);
        p.start[level] = int(pixels);
        pixels += height * width;
        STD_TORCH_CHECK(pixels <= value.size(1), "deform_attn: value holds ", value.size(1),
                        " pixels, the levels more");
    }
    STD_TORCH_CHECK(pixels == value.size(1), "deform_attn: value holds ", value.size(1),
                    " pixels, the levels ", pixels);
    return p;
}

template <const Kernel& kernel, bool fused>
Tensor forward(const Tensor& value, const Tensor& points, const Tensor& scores,
               std::vector<int64_t> level_shapes) {
    STD_TORCH_CHECK(value.is_cuda(), "deform_attn: all inputs must be on one GPU");
    const DeviceGuard guard(value.get_device_index());
    const Problem p = make_problem(value, points, scores, level_shapes, fused);
    const Type type = type_of(value);
    Tensor output = torch::stable::new_empty(
        value, {p.images, p.queries, int64_t(p.heads) * p.channels});
    if (output.numel() == 0) return output;
    const Tensor values = prepare(value), all_points = prepare(points);
    const Tensor all_scores = prepare(scores);
    check_launch(kernel.forward(p, type, values.const_data_ptr(), all_points.const_data_ptr(),
                                all_scores.const_data_ptr(), output.mutable_data_ptr(),
                                current_stream(value)));
    return output;
}

template <const Kernel& kernel, bool fused>
Gradients backward(const Tensor& grad, const Tensor& value, const Tensor& points,
                   const Tensor& scores, std::vector<int64_t> level_shapes) {
    STD_TORCH_CHECK(value.is_cuda(), "deform_attn: all inputs must be on one GPU");
    const DeviceGuard guard(value.get_device_index());
    const Problem p = make_problem(value, points, scores, level_shapes, fused);
    const Type type = type_of(value);
    STD_TORCH_CHECK(grad.numel() == int64_t(p.images) * p.queries * p.heads * p.channels
                        && grad.scalar_type() == value.scalar_type()
                        && grad.get_device_index() == value.get_device_index(),
                    "deform_attn: the gradient must have the output's shape, type and device");
    const Tensor grads = prepare(grad), values = prepare(value), all_points = prepare(points);
    const Tensor all_scores = prepare(scores);
    Tensor grad_value = torch::stable::new_empty(values, values.sizes());
    Tensor grad_points = torch::stable::new_empty(all_points, all_points.sizes());
    Tensor grad_scores = torch::stable::new_empty(all_scores, all_scores.sizes());
    if (grads.numel() == 0 || scores.numel() == 0) {
        for (Tensor* tensor : {&grad_value, &grad_points, &grad_scores})
            torch::stable::zero_(*tensor);
        return {grad_value, grad_points, grad_scores};
    }
    Tensor workspace = torch::stable::new_empty(
        values, {int64_t(kernel.workspace_bytes(p, type))}, ScalarType::Byte);
    check_launch(kernel.backward(
        p, type, grads.const_data_ptr(), values.const_data_ptr(), all_points.const_data_ptr(),
        all_scores.const_data_ptr(), grad_value.mutable_data_ptr(),
        grad_points.mutable_data_ptr(), grad_scores.mutable_data_ptr(),
        workspace.mutable_data_ptr(), current_stream(value)));
    return {grad_value, grad_points, grad_scores};
}

template <typename Library> void define(Library& library) {
    library.def("forward(Tensor value, Tensor offsets, Tensor logits, int[] level_shapes)"
                " -> Tensor");
    library.def("backward(Tensor grad, Tensor value, Tensor offsets, Tensor logits,"
                " int[] level_shapes) -> (Tensor, Tensor, Tensor)");
    library.def("sample(Tensor value, Tensor locations, Tensor weights, int[] level_shapes)"
                " -> Tensor");
    library.def("sample_backward(Tensor grad, Tensor value, Tensor locations, Tensor weights,"
                " int[] level_shapes) -> (Tensor, Tensor, Tensor)");
}

template <const Kernel& kernel, typename Library> void implement(Library& library) {
    library.impl("forward", TORCH_BOX((&forward<kernel, true>)));
    library.impl("backward", TORCH_BOX((&backward<kernel, true>)));
    library.impl("sample", TORCH_BOX((&forward<kernel, false>)));
    library.impl("sample_backward", TORCH_BOX((&backward<kernel, false>)));
}

}  // namespace

STABLE_TORCH_LIBRARY(deform_attn, library) { define(library); }
STABLE_TORCH_LIBRARY(deform_attn_plain, library) { define(library); }
STABLE_TORCH_LIBRARY_IMPL(deform_attn, CUDA, library) {
    implement<deform_attn::tuned::kernel>(library);
}
STABLE_TORCH_LIBRARY_IMPL(deform_attn_plain, CUDA, library) {
    implement<deform_attn::plain::kernel>(library);
}
