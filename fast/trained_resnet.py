"""A ResNet with frozen norms, trained in 16 bit on a GPU: one kernel for each convolution.

    fuse_trained_resnet(model.backbone, torch.bfloat16)    # in place, before training

A frozen norm is scale * x + shift, with constants for each channel, so

    relu(norm(convolution(x)) + residual)
        = relu(F.conv2d(x, scale * weight) + shift + residual)

which cuDNN computes in one kernel. Backward needs only the input and the output, where the plain
network also keeps the input of each norm. Weights stay where they are, so checkpoints do not
change. The constants are computed once, and after `load_state_dict`: move the model to its device
before. The plain network is backbone.py, which this equals up to rounding (tests/test_backbone.py,
tests/test_gpu.py). It runs if modules or their code have been exchanged.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from backbone import FrozenBatchNorm, ResNetBackbone, checkpointed
from fast.folded_resnet import DIGESTS, blocks_of, convolution_names, options_of
from fast.plain_source import is_unchanged

# Of the plain code that `FusedTrainedResNet` replaces, when it was written.
PLAIN = DIGESTS | {FrozenBatchNorm: "2e96e4ea"}


def fuse_trained_resnet(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Train a ResNet with frozen norms in fused kernels, in place. Others are left alone.

    dtype: of the autocast that training will run under. cuDNN's fused kernels are not
        deterministic, so nothing is fused with --deterministic.
    """
    is_trained = any(parameter.requires_grad for parameter in backbone.parameters())
    if not is_trained or torch.are_deterministic_algorithms_enabled() or not is_known(backbone):
        return
    if all(is_unchanged(plain, digest) for plain, digest in PLAIN.items()):
        backbone.__class__ = FusedTrainedResNet
        backbone.register_load_state_dict_post_hook(partial(hold_constants, dtype))
        hold_constants(dtype, backbone)


def is_known(backbone: nn.Module) -> bool:
    """Whether this is a ResNet of the modules that the fused kernels compute."""
    if type(backbone) is not ResNetBackbone:
        return False
    blocks = blocks_of(backbone)
    relus = [backbone.relu, *(block.relu for block in blocks)]
    return (
        all(type(block) in (BasicBlock, Bottleneck) for block in blocks)
        and all(type(relu) is nn.ReLU for relu in relus)
        and all(
            type(convolution) is nn.Conv2d
            and convolution.bias is None
            and type(norm) is FrozenBatchNorm
            for convolution, norm in normed_convolutions(backbone)
        )
    )


def normed_convolutions(backbone: ResNetBackbone) -> list[tuple[nn.Module, nn.Module]]:
    """Each convolution with the norm that follows it."""
    pairs = [(backbone.conv1, backbone.bn1)]
    for block in blocks_of(backbone):
        names = convolution_names(block)
        pairs += [(getattr(block, name), getattr(block, norm)) for name, norm in names]
        if block.downsample is not None:
            pairs.append(tuple(block.downsample))
    return pairs


def hold_constants(dtype: torch.dtype, backbone: ResNetBackbone, *_) -> None:
    """Give each convolution the `scale` and `shift` of its norm. Also called after loading."""
    if type(backbone) is not FusedTrainedResNet:  # it has been folded since
        return
    for convolution, norm in normed_convolutions(backbone):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        convolution.scale = scale[:, None, None, None]
        convolution.shift = shift.to(dtype)


class FusedTrainedResNet(ResNetBackbone):
    """Only `maxpool` is called: forward hooks of the other modules do not fire."""

    def forward(self, images: Tensor) -> list[Tensor]:
        if not torch.is_autocast_enabled(images.device.type):
            return super().forward(images)
        x = images.to(self.conv1.shift.dtype)
        x = self.maxpool(convolution_relu(self.conv1, x))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            recompute = self.recompute and stage in (self.layer1, self.layer2)
            for block in stage:
                x = checkpointed(recompute, partial(fused_block, block), x)
            maps.append(x)
        return maps


def fused_block(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    """block(x)."""
    residual = x
    if block.downsample is not None:
        convolution = block.downsample[0]
        weight = (convolution.weight * convolution.scale).to(x.dtype)
        residual = F.conv2d(x, weight, convolution.shift, convolution.stride)
    *convolutions, last = (getattr(block, name) for name, _ in convolution_names(block))
    for convolution in convolutions:
        x = convolution_relu(convolution, x)
    return convolution_relu(last, x, residual)


def convolution_relu(convolution: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(scale * convolution(x) + shift + residual)."""
    return ConvolutionReLU.apply(x, convolution.weight, residual, convolution)


class ConvolutionReLU(torch.autograd.Function):
    """`convolution_relu`, with gradients of x, weight and residual."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, residual: Tensor | None, convolution: nn.Conv2d
    ) -> Tensor:
        scaled = torch.empty_like(weight, dtype=x.dtype)
        torch.mul(weight, convolution.scale, out=scaled)
        output = fused_kernel(x, scaled, residual, convolution)
        ctx.save_for_backward(x, scaled, output)
        ctx.convolution, ctx.has_residual = convolution, residual is not None
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        """The gradients of `forward`'s arguments, from that of its output."""
        x, scaled, output = ctx.saved_tensors
        convolution = ctx.convolution
        gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        x_gradient, scaled_gradient, _ = torch.ops.aten.convolution_backward(
            gradient,
            x,
            scaled,
            None,  # no bias
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            False,  # not transposed
            (0, 0),  # so without output padding
            convolution.groups,
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False),
        )
        weight_gradient = None if scaled_gradient is None else scaled_gradient * convolution.scale
        return x_gradient, weight_gradient, gradient if ctx.has_residual else None, None


def fused_kernel(
    x: Tensor, weight: Tensor, residual: Tensor | None, convolution: nn.Conv2d
) -> Tensor:
    """relu(F.conv2d(x, weight) + shift + residual), on a GPU in one kernel of cuDNN."""
    shift, options = convolution.shift, options_of(convolution)
    if not x.is_cuda:
        output = F.conv2d(x, weight, shift, *options)
        return (output if residual is None else output + residual).relu()
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, shift, *options)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, shift, *options)
