"""A ResNet for inference on a GPU: batch norms folded into convolutions, blocks in fused kernels.

    fold_resnet(model.backbone, torch.float16)          # in place, for inference
    fold_frozen_resnet(model.backbone, torch.bfloat16)  # in place, for training

fast/acceleration.py calls them. The plain network is backbone.py, which it equals up to
rounding (tests/test_backbone.py).

Source: torch.nn.utils.fusion and cuDNN's fused convolutions.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from backbone import ResNetBackbone
from fast.plain_source import is_unchanged

# Of the methods that `FusedResNet` replaces, when it was written.
DIGESTS = {ResNetBackbone.forward: "fb33ae5e", ResNetBackbone.stem: "8f1aeb30"}


def fold_resnet(backbone: ResNetBackbone, dtype: torch.dtype) -> None:
    """Fold the batch norms of a ResNet, in place. In 16 bit on a GPU, also fuse its blocks.

    dtype: of the autocast that inference will run under. Group norms cannot be folded; a network
    with group norms stays as it is.
    """
    backbone.__class__ = ResNetBackbone  # not in the form of trained_resnet.py
    fold_norms(backbone)
    folded = isinstance(backbone.bn1, nn.Identity)
    on_gpu = backbone.conv1.weight.is_cuda and torch.backends.cudnn.is_available()
    unchanged = all(is_unchanged(plain, digest) for plain, digest in DIGESTS.items())
    if folded and on_gpu and dtype != torch.float32 and unchanged:
        fuse_blocks(backbone)


def fold_frozen_resnet(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Let a frozen ResNet run as a folded copy of itself, in place, without gradients.

    Its own modules and weights stay as they are, so checkpoints do not change. Other backbones,
    trained ones, and batch norms that use batch statistics are left alone.
    """
    is_trained = any(parameter.requires_grad for parameter in backbone.parameters())
    is_normed_by_batch = any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    if not isinstance(backbone, ResNetBackbone) or is_trained or is_normed_by_batch:
        return
    folded = copy.deepcopy(backbone)
    fold_resnet(folded, dtype)
    backbone.forward = folded.to(dtype).forward


def fuse_blocks(backbone: ResNetBackbone) -> None:
    """Make a ResNet with folded norms a `FusedResNet`, in place. Its weights do not move."""
    backbone.__class__ = FusedResNet


class FusedResNet(ResNetBackbone):
    """Each convolution runs in one cuDNN kernel with its bias, residual and ReLU.

    The modules of a block are not called, so their forward hooks do not fire.
    """

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = fused_block(block, x)
            maps.append(x)
        return maps

    def stem(self, images: Tensor) -> Tensor:
        squares, weight = space_to_depth(images, self.conv1.weight)
        options = (1, 1), (0, 0), (1, 1), 1  # stride, padding, dilation, groups
        x = torch.cudnn_convolution_relu(squares, weight, self.conv1.bias, *options)
        return self.maxpool(x)


def space_to_depth(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A 7x7 convolution of stride 2 on 3 channels in a form that tensor cores accept.

        F.conv2d(images, weight, stride=2, padding=3) = F.conv2d(*space_to_depth(images, weight))

    Each square of 2x2 pixels becomes one pixel of 12 channels, and the convolution
    a 4x4 of stride 1. Output row y reads rows 2 y - 3 to 2 y + 3. These lie in squares y - 2 to
    y + 1, whose first row has weight 0. Channels are padded to 16, because 16-bit kernels need a
    multiple of 8. H and W must be even.
    """
    weight = F.pad(weight, (1, 0, 1, 0))  # (64, 3, 8, 8)
    weight = weight.unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (64, 3, 4, 2, 4, 2)
    weight = weight.permute(0, 2, 4, 3, 5, 1).flatten(3)  # (64, 4, 4, 12)
    weight = F.pad(weight, (0, 4)).permute(0, 3, 1, 2)  # (64, 16, 4, 4)

    squares = images.to(weight.dtype).permute(0, 2, 3, 1)  # (N, H, W, 3)
    squares = squares.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (N, H/2, 2, W/2, 2, 3)
    squares = squares.transpose(2, 3).flatten(3)  # (N, H/2, W/2, 12)
    squares = F.pad(squares, (0, 4, 2, 1, 2, 1)).permute(0, 3, 1, 2)  # (N, 16, H/2 + 3, W/2 + 3)
    return squares, weight


def fused_block(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    """block(x), of a block with folded norms."""
    residual = x if block.downsample is None else block.downsample(x)
    *convolutions, last = (getattr(block, name) for name, _ in convolution_names(block))
    for convolution in convolutions:
        x = convolution_relu(convolution, x)
    return convolution_relu(last, x, residual)


def convolution_relu(convolution: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(convolution(x) + residual) in one cuDNN kernel."""
    options = convolution.bias, *options_of(convolution)
    if residual is None:
        return torch.cudnn_convolution_relu(x, convolution.weight, *options)
    return torch.cudnn_convolution_add_relu(x, convolution.weight, residual, 1.0, *options)


def options_of(convolution: nn.Conv2d) -> tuple:
    """Stride, padding, dilation and groups."""
    return convolution.stride, convolution.padding, convolution.dilation, convolution.groups


def blocks_of(backbone: ResNetBackbone) -> list[BasicBlock | Bottleneck]:
    """All blocks, in order."""
    stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    return [block for stage in stages for block in stage]


def convolution_names(block: BasicBlock | Bottleneck) -> list[tuple[str, str]]:
    """torchvision's names of the convolutions of a block and their norms, in order."""
    count = 3 if isinstance(block, Bottleneck) else 2
    return [(f"conv{i}", f"bn{i}") for i in range(1, count + 1)]


def fold_norms(network: ResNetBackbone) -> None:
    """Fold each batch norm into the convolution before it: the same up to rounding.

    The constants of both branches of a block move to its last convolution.
    """
    blocks = blocks_of(network)
    fold(network, "conv1", "bn1")
    for block in blocks:
        for convolution, norm in convolution_names(block):
            fold(block, convolution, norm)
        if block.downsample:
            fold(block.downsample, "0", "1")
    for block in blocks:
        if block.downsample and block.downsample[0].bias is not None:
            last = getattr(block, convolution_names(block)[-1][0])
            last.bias = nn.Parameter(last.bias + block.downsample[0].bias)
            block.downsample[0].bias = None


def fold(parent: nn.Module, convolution_name: str, norm_name: str) -> None:
    """Fold one batch norm, a child of `parent`, into a convolution. Other norms stay."""
    convolution, norm = getattr(parent, convolution_name), getattr(parent, norm_name)
    if not isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)):
        return
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    setattr(parent, norm_name, nn.Identity())
