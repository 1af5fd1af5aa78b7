"""The CUDA kernels of deformable attention: building them (on any machine), results (on a GPU).

Every test of results runs on both kernels, plain.cu and tuned/.
"""

import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import deform_attn
import deform_attn_cuda
from deform_attn import (
    DeformableAttention,
    attend_in_pytorch,
    deformable_attention,
    implementation,
    pixel_centres,
    weighted_samples,
)
from deform_attn_cuda import build

FOLDER = Path(deform_attn_cuda.__file__).parent
SUFFIXES = (".cu", ".cuh", ".cpp", ".h")
SOURCES = sorted(
    path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in SUFFIXES
)
SHAPES, PIXELS = [(6, 9), (11, 17)], 6 * 9 + 11 * 17


def draw(
    level_shapes=SHAPES,
    batch=2,
    heads=3,
    channels=32,
    points=4,
    spread=3,
    dtype=torch.float32,
    device="cuda",
    seed=0,
    queries=None,
):
    """Random value, offsets and logits, or, with `queries`, value, locations and weights.

    The numbers are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = sum(height * width for height, width in level_shapes)
    levels = len(level_shapes)
    value = torch.randn(batch, pixels, heads, channels, generator=generator)
    offsets = spread * torch.randn(batch, pixels, heads, levels, points, 2, generator=generator)
    logits = torch.randn(batch, pixels, heads, levels * points, generator=generator)
    if queries is not None:
        offsets = 0.5 + 0.1 * offsets[:, :queries]
        logits = logits[:, :queries].unflatten(-1, (levels, points))
    return [tensor.to(device, dtype) for tensor in (value, offsets, logits)]


def error(result, exact):
    """Norm of the difference, relative to the norm of the exact result."""
    return ((result.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


# ---- Part 1: on any machine ---------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without GPU, nvcc and earlier builds, before the first load(); no warnings."""

    def no_nvcc():
        raise build.BuildError("nvcc was not found")

    for name in ("DEFORM_ATTN_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(build, "find_nvcc", no_nvcc)
    monkeypatch.setattr(deform_attn_cuda, "find_library", lambda: None)
    monkeypatch.setattr(deform_attn_cuda, "_loaded", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    "listed, expected",
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        (" 9.0a  8.0 8.0 ", ["8.0", "9.0a"]),
        ("", ["8.0", "9.0+PTX"]),
    ],
)
def test_wanted_architectures(bare, monkeypatch, listed, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.wanted_architectures() == expected


def test_architecture_names_are_refused(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(build.BuildError, match="'Hopper'.*8.0;9.0[+]PTX"):
        build.wanted_architectures()


def test_missing_nvcc_names_the_paths_tried(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/one")
    monkeypatch.setenv("CUDA_PATH", "/opt/two")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    tried = "PATH, /opt/one/bin/nvcc, /opt/two/bin/nvcc, /usr/local/cuda/bin/nvcc"
    with pytest.raises(build.BuildError, match=tried):
        build.find_nvcc()


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_changes_the_name_of_the_library(monkeypatch, tmp_path, name):
    for source in SOURCES:
        (tmp_path / source).parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER / source, tmp_path / source)
    before = build.library_name(["9.0"])
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.library_name(["9.0"]) == before != build.library_name(["8.0"])
    (tmp_path / name).write_text((tmp_path / name).read_text() + "// changed\n")
    assert build.library_name(["9.0"]) != before


def test_the_page_of_the_kernels_names_every_file_of_the_tuned_one():
    page = (FOLDER.parent / "docs/kernel.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    assert sorted(files) == sorted(path.name for path in (FOLDER / "tuned").iterdir())


@pytest.mark.parametrize("step", [*build.SOURCES, "-shared"])
def test_failed_build_shows_the_compilers_output_and_leaves_no_file(monkeypatch, tmp_path, step):
    """nvcc is a script that fails in one of the steps."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *{step}*) echo "fatal: no such GPU"; exit 1;; esac\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    target = tmp_path / "cache" / "library.so"
    with pytest.raises(build.BuildError, match=f"(?s){step}.* failed:.*fatal: no such GPU"):
        build.build_library(target, ["9.0"])
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize(
    "architecture, capability, expected",
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (12, 1), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
    ],
)
def test_runs_on(architecture, capability, expected):
    assert deform_attn_cuda.runs_on(architecture, capability) == expected


def test_an_architecture_that_no_visible_gpu_runs_is_not_built(bare, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with pytest.raises(build.BuildError, match="8.0, which a GPU here cannot run"):
        deform_attn_cuda.build_in_cache()


def test_load_warns_once_if_nothing_can_be_built(bare):
    with pytest.warns(UserWarning, match="deformable attention runs in PyTorch") as caught:
        assert not deform_attn_cuda.load()
    messages = [str(warning.message) for warning in caught]
    (message,) = [text for text in messages if "deformable attention" in text]
    assert "nvcc was not found" in message
    assert f"python -m pip install --no-build-isolation {FOLDER}" in message
    assert not deform_attn_cuda.load()  # a second warning would be an error


def test_an_environment_variable_disables_the_kernels(bare, monkeypatch):
    monkeypatch.setenv("DEFORM_ATTN_CUDA", "0")
    assert not deform_attn_cuda.load()


def test_errors_of_the_library_are_raised(bare, monkeypatch, tmp_path):
    def broken(path):
        raise RuntimeError("registered twice")

    monkeypatch.setattr(deform_attn_cuda, "find_library", lambda: tmp_path / "library.so")
    monkeypatch.setattr(torch.ops, "load_library", broken)
    with pytest.raises(RuntimeError, match="registered twice"):
        deform_attn_cuda.load()


def test_of_two_processes_one_builds(bare, monkeypatch, tmp_path):
    """Threads stand for processes: each opens the lock file for itself."""

    def build_slowly(target, architectures):
        with open(tmp_path / "log", "a") as log:
            print(*architectures, file=log)
        target.write_text("half")
        time.sleep(0.3)
        target.write_text("whole")

    monkeypatch.setattr(deform_attn_cuda, "build_library", build_slowly)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda _: deform_attn_cuda.build_in_cache().read_text(), range(2))
        assert list(results) == ["whole", "whole"]
    assert (tmp_path / "log").read_text() == "8.0 9.0+PTX\n"


@pytest.mark.parametrize("name", ["plain", "tuned"])
def test_implementation_names_the_selected_kernel(monkeypatch, name):
    monkeypatch.setattr(deform_attn_cuda, "load", lambda: True)
    monkeypatch.setattr(deform_attn, "KERNEL", getattr(deform_attn_cuda, name))
    assert implementation(torch.device("cuda")) == f"{name} CUDA kernel"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_16_bit_on_the_cpu(monkeypatch, dtype, bound, autocast):
    """A CPU does not load the kernels, and computes in float32, also under autocast."""
    monkeypatch.setattr(deform_attn_cuda, "load", lambda: pytest.fail("load() was called"))
    level_shapes = [(5, 6), (40, 50)]
    inputs = draw(level_shapes, batch=1, dtype=dtype, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value, *others = inputs
        result = deformable_attention(value, level_shapes, *others)
    assert result.dtype == dtype
    value, *others = (tensor.double() for tensor in inputs)
    assert error(result, attend_in_pytorch(value, level_shapes, *others)) < bound


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library, built once for this file."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    architectures = build.wanted_architectures() if torch.cuda.is_available() else ["9.0"]
    folder = tmp_path_factory.mktemp("cache") / "deform_attn_cuda"
    target = folder / build.library_name(architectures)
    build.build_library(target, architectures)
    return target


META_SCRIPT = """
import sys, torch, deform_attn_cuda
torch.ops.load_library(sys.argv[1])
deform_attn_cuda.declare()
for kernel in (deform_attn_cuda.plain, deform_attn_cuda.tuned):
    for name, queries, score_shape in (("forward", 14, (8,)), ("sample", 5, (2, 4))):
        shapes = (2, 14, 3, 8), (2, queries, 3, 2, 4, 2), (2, queries, 3, *score_shape)
        inputs = [torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=True)
                  for shape in shapes]
        out = getattr(kernel, name)(*inputs, [3, 4, 1, 2])
        assert out.shape == (2, queries, 24) and out.dtype == torch.float16
        out.sum().backward(retain_graph=True)
        assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in inputs)
        first, *_ = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        try:
            torch.autograd.grad(first.sum(), inputs[2])
        except NotImplementedError as error:
            assert "no second derivatives" in str(error)
        else:
            raise AssertionError("a second derivative was computed")
"""


@pytest.mark.slow
def test_it_compiles_and_registers_without_a_gpu(library):
    command = [sys.executable, "-c", META_SCRIPT, str(library)]
    run = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- Part 2: on a GPU ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(request):
    """The library is loaded: the one built above, if there is nvcc."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that PyTorch sees")
    with pytest.MonkeyPatch.context() as patch:
        if shutil.which("nvcc"):
            folder = request.getfixturevalue("library").parents[1]
            patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        if not deform_attn_cuda.load():
            pytest.skip("deform_attn_cuda.load() is False: DEFORM_ATTN_CUDA is 0, or see warnings")


@pytest.fixture(params=["plain", "tuned"])
def operators(request, loaded, monkeypatch):
    """The operators of one kernel, which is also selected in deform_attn.py."""
    namespace = getattr(deform_attn_cuda, request.param)
    monkeypatch.setattr(deform_attn, "KERNEL", namespace)
    return namespace


BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}  # of `error`
QUERIES = {"forward": None, "sample": 7}
CASES = {  # levels, heads, points
    "one level, one point": ([(9, 13)], 3, 1),
    "height or width 1": ([(1, 7), (8, 1), (1, 1)], 3, 3),
    "height or width 1, four points": ([(1, 40), (50, 1), (1, 1)], 3, 4),
    "four levels, five points": ([(1, 1), (5, 6), (10, 12), (20, 24)], 5, 5),
    "large levels": ([(24, 32), (48, 64), (96, 128)], 5, 4),  # tuned: many regions
    "levels of one size": ([(40, 40)] * 4, 2, 4),
}


def draw_gradient(inputs):
    """A random gradient of the output."""
    shape = (*inputs[1].shape[:2], inputs[0].shape[2] * inputs[0].shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])


def differentiate(function, inputs, grad):
    """The output of function(*inputs), then the gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def flat(level_shapes):
    return [size for shape in level_shapes for size in shape]


def run(operator, inputs, level_shapes=SHAPES, grad=None):
    grad = draw_gradient(inputs) if grad is None else grad
    return differentiate(lambda *tensors: operator(*tensors, flat(level_shapes)), inputs, grad)


def check(operator, in_pytorch, inputs, level_shapes):
    """Compare with the PyTorch path in float64, from the same rounded inputs.

    The derivative by the position is discontinuous on the lines through pixel centres; samples
    close to one are not compared.
    """
    results = run(operator, inputs, level_shapes)
    value, points, scores = [tensor.double() for tensor in inputs]
    exact = differentiate(
        lambda value, *others: in_pytorch(value, level_shapes, *others),
        (value, points, scores),
        draw_gradient(inputs).double(),
    )
    sizes = points.new_tensor([(width, height) for height, width in level_shapes])[:, None]
    if in_pytorch is attend_in_pytorch:
        points = pixel_centres(level_shapes, points)[:, None, None, None] + points / sizes
    positions = points * sizes - 0.5
    smooth = ((positions - positions.round()).abs() > 1e-3).all(-1)
    results[2], exact[2] = results[2][smooth], exact[2][smooth]
    bound = BOUNDS[inputs[0].dtype]
    assert error(results[0], exact[0]) < bound
    for name, gradient, expected in zip(("value", "points", "scores"), results[1:], exact[1:]):
        assert gradient.dtype == inputs[0].dtype
        assert error(gradient, expected) < 2 * bound, name


@pytest.mark.parametrize("spread", [3, 30])
@pytest.mark.parametrize("channels", [5, 16, 32, 40, 64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_values_and_gradients(operators, dtype, case, channels, spread):
    """One lane or several read 32 channels, whole warps others; few and many samples outside."""
    level_shapes, heads, points = CASES[case]
    batch = 1 if case == "large levels" else 2
    inputs = draw(level_shapes, batch, heads, channels, points, spread, dtype)
    check(operators.forward, attend_in_pytorch, inputs, level_shapes)


@pytest.mark.parametrize("channels", [5, 16, 32, 64])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_sample_equals_weighted_samples(operators, dtype, channels):
    """The signature of Deformable-DETR: locations and weights, queries that are not pixels."""
    inputs = draw(channels=channels, dtype=dtype, queries=50)
    check(operators.sample, weighted_samples, inputs, SHAPES)


@pytest.mark.parametrize("name", QUERIES)
def test_gradcheck(operators, name):
    """Against numeric derivatives. Runs may differ slightly, because of the order of additions."""
    level_shapes, operator = [(2, 3), (4, 1)], getattr(operators, name)
    inputs = draw(level_shapes, 1, channels=3, points=2, dtype=torch.float64, queries=QUERIES[name])
    assert torch.autograd.gradcheck(
        lambda *tensors: operator(*tensors, flat(level_shapes)),
        [tensor.requires_grad_() for tensor in inputs],
        nondet_tol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name, backward", [("forward", "backward"), ("sample", "sample_backward")])
def test_opcheck(operators, name, backward, dtype):
    """PyTorch's own test of operators: schema, fake tensors, autograd, tracing."""
    inputs = draw(dtype=dtype, queries=QUERIES[name])
    torch.library.opcheck(
        getattr(operators, backward).default, (draw_gradient(inputs), *inputs, flat(SHAPES))
    )
    inputs = [tensor.requires_grad_() for tensor in inputs]
    torch.library.opcheck(getattr(operators, name).default, (*inputs, flat(SHAPES)))


def test_compiled(operators):
    def attend(value, offsets, logits):
        return deformable_attention(value, SHAPES, offsets, logits)

    inputs = draw(dtype=torch.bfloat16)
    grad = draw_gradient(inputs)
    torch.compiler.reset()
    compiled = differentiate(torch.compile(attend, fullgraph=True), inputs, grad)
    torch.testing.assert_close(compiled, differentiate(attend, inputs, grad))


def test_cuda_graph(operators):
    """Captured once, replayed with other numbers in the same memory."""
    inputs, others = draw(dtype=torch.bfloat16), draw(dtype=torch.bfloat16, seed=1)
    grad, expected = draw_gradient(inputs), run(operators.forward, others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(operators.forward, inputs, grad=grad)
    for tensor, other in zip(inputs, others):
        tensor.copy_(other)
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_another_stream(operators):
    """Kernels run on the current stream: here it sleeps first, then writes the inputs."""
    inputs, others = draw(dtype=torch.bfloat16), draw(dtype=torch.bfloat16, seed=1)
    grad, expected = draw_gradient(inputs), run(operators.forward, others)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles
        for tensor, other in zip(inputs, others):
            tensor.copy_(other)
        results = run(operators.forward, inputs, grad=grad)
    stream.synchronize()
    torch.testing.assert_close(results, expected)


def shifted(tensor, elements):
    """A copy that starts that many elements behind an aligned address."""
    return tensor.new_empty(tensor.numel() + elements)[elements:].view_as(tensor).copy_(tensor)


@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="transposed"),
        pytest.param(lambda x: x.repeat_interleave(2, -1)[..., ::2], id="every other element"),
        pytest.param(lambda x: shifted(x, 1), id="one element further"),
        pytest.param(lambda x: shifted(x, 16 // x.element_size()), id="16 bytes further"),
    ],
)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_strides_and_alignment(operators, dtype, arrange):
    inputs = draw(dtype=dtype)
    arranged = [arrange(tensor) for tensor in inputs]
    results = run(operators.forward, arranged, grad=arrange(draw_gradient(inputs)))
    torch.testing.assert_close(results, run(operators.forward, inputs))


@pytest.mark.parametrize(
    "name, batch, queries", [("forward", 0, None), ("sample", 0, 5), ("sample", 2, 0)]
)
def test_empty_tensors(operators, name, batch, queries):
    inputs = draw(batch=batch, queries=queries)
    out, *gradients = run(getattr(operators, name), inputs)
    assert out.shape == (*inputs[1].shape[:2], 96)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]
    assert not gradients[0].any()


@pytest.mark.parametrize("channels", [20, 32])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_samples_outside_are_zero(operators, dtype, channels):
    value, offsets, logits = draw(channels=channels, dtype=dtype)
    results = run(operators.forward, [value, 1000 * offsets.sign(), logits])
    assert not any(tensor.any() for tensor in results)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_nan_stays_with_its_query(operators, dtype):
    inputs = draw(dtype=dtype)
    expected = run(operators.forward, inputs)
    inputs[1][0, 5, 1, 0, 2, 0] = inputs[2][0, 8, 2, 3] = float("nan")
    inputs[1][0, 5, 1, 1, 3, 1] = float("inf")
    results = run(operators.forward, inputs)
    assert results[0].view(2, PIXELS, 3, 32)[0, 8, 2].isnan().all()
    for i in (0, 2, 3):  # the gradient of the value is NaN where these queries sample
        results[i][0, [5, 8]] = expected[i][0, [5, 8]] = 0
        torch.testing.assert_close(results[i], expected[i])


def test_more_than_2_to_the_31_elements(operators):
    """The last image of many has the same results as alone."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    shapes = [(520, 128 * 128, 8, *last) for last in ((32,), (1, 2, 2), (2,), (32,))]
    *inputs, grad = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    assert inputs[0].numel() > 2**31
    results = run(operators.forward, inputs, [(128, 128)], grad.flatten(2))
    last = [tensor[-1:] for tensor in inputs]
    alone = run(operators.forward, last, [(128, 128)], grad[-1:].flatten(2))
    torch.testing.assert_close([tensor[-1:] for tensor in results], alone)


@pytest.mark.parametrize(
    "sentence, change",
    [
        (
            "must be float32, float16, bfloat16 or float64",
            lambda v, o, l, s: (v.int(), o.int(), l.int(), s),
        ),
        ("all inputs must have one type", lambda v, o, l, s: (v, o.half(), l, s)),
        ("all inputs must be on one GPU", lambda v, o, l, s: (v, o.cpu(), l, s)),
        ("differ in batch or heads", lambda v, o, l, s: (v[:1], o, l, s)),
        ("one score for each point", lambda v, o, l, s: (v, o, l[..., 1:], s)),
        ("one query for each pixel", lambda v, o, l, s: (v, o[:, 1:], l[:, 1:], s)),
        ("height and width of 2 levels", lambda v, o, l, s: (v, o, l, s[:2])),
        ("a level of 0 x 9 is not possible", lambda v, o, l, s: (v, o, l, [0, *s[1:]])),
        ("value holds 241 pixels", lambda v, o, l, s: (v, o, l, [s[0] + 1, *s[1:]])),
    ],
)
def test_wrong_inputs_are_refused(operators, sentence, change):
    with pytest.raises(RuntimeError, match=sentence):
        operators.forward(*change(*draw(), flat(SHAPES)))


def test_the_layer_under_autocast(operators, monkeypatch):
    """The operator is called in bfloat16, which changes the result only slightly."""
    forward, dtypes = operators.forward, []

    def record(*arguments):
        dtypes.append([tensor.dtype for tensor in arguments[:3]])
        return forward(*arguments)

    monkeypatch.setattr(operators, "forward", record)
    torch.manual_seed(0)
    layer = DeformableAttention(64, levels=2, heads=2).to("cuda")
    x = torch.randn(2, PIXELS, 64, device="cuda")
    exact = layer(x, x, SHAPES)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        result = layer(x, x, SHAPES)
    assert dtypes == [[torch.float32] * 3, [torch.bfloat16] * 3]
    assert result.dtype == torch.bfloat16 and error(result, exact.double()) < 0.01
