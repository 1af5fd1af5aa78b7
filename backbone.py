"""Backbones: frames to four feature maps of strides 4, 8, 16, 32 (res2..res5), built from torchvision's classes.

`build_backbone(name)` makes ResNet-50/101 (and the small ones of the toy and the small preset) or Swin-T/S/B/L.
Source: torchvision.models.resnet and swin_transformer; upstream detectron2 modeling/backbone/resnet.py and
mask2former/modeling/backbone/swin.py.

Where torchvision's Swin differs from the detector Swin that official checkpoints come from, ours follows the detector:
  * the shift is kept where a map is smaller than the window (torchvision drops it);
  * every output has a LayerNorm of its own, and there is no last norm, pooling or classifier;
  * inputs need not be multiples of the patch size (zeros are added right and bottom).
Both pad after the block's first norm, so the padded zeros become keys and values like any pixel, and both add -100 to
the attention logits of pixels that the shift brought together from opposite borders.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
)
from torchvision.ops import FrozenBatchNorm2d

RESNETS = {
    "resnet10": dict(block=BasicBlock, layers=[1, 1, 1, 1]),
    "resnet10_thin": dict(block=BasicBlock, layers=[1, 1, 1, 1], last_planes=256),
    "resnet50": dict(block=Bottleneck, layers=[3, 4, 6, 3]),
    "resnet101": dict(block=Bottleneck, layers=[3, 4, 23, 3]),
}
SWINS = {  # T, S, B have torchvision's shapes, so that its ImageNet weights fit; L is the detectors' 384-pixel one
    "swin_t": dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window=7),
    "swin_s": dict(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window=7),
    "swin_b": dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window=7),
    "swin_l": dict(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window=12),
}


def group_norm(channels: int) -> nn.GroupNorm:
    """The norm that learns and does not depend on the batch: for training from scratch, where frozen norms mean nothing."""
    return nn.GroupNorm(32, channels)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's, which makes 32 bit of 16; here 16 bit stays 16 bit, in one pass. (In 32 bit that would round otherwise.)"""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


NORMS = {"frozen": FrozenBatchNorm, "batch": nn.BatchNorm2d, "group": group_norm}


def build_backbone(name: str, norm: str = "frozen", window: int | None = None) -> nn.Module:
    """A backbone by name (the keys of RESNETS and SWINS).

    norm: of a ResNet: "frozen" (statistics and affine are buffers, eps 1e-5: for pretrained weights), "batch", "group".
    window: of a Swin, instead of the table's. ValueError for an unknown name or norm.
    """
    if name in RESNETS:
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
        return ResNetBackbone(**RESNETS[name], norm_layer=NORMS[norm])
    if name in SWINS:
        return SwinBackbone(**(SWINS[name] | ({"window": window} if window else {})))
    raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join([*RESNETS, *SWINS])}")


class ResNetBackbone(nn.Module):
    """torchvision's ResNet without its classifier; the stride of a Bottleneck sits in its 3x3 convolution."""
    recompute = False  # in training: what blocks keep for backward is made there again
    fused = False      # for inference with folded norms: blocks as `block_fused`, the first convolution as `convolve_pairs`

    def __init__(self, block, layers, norm_layer, last_planes: int = 512):
        super().__init__()
        network = ResNet(block, layers, norm_layer=norm_layer)
        planes = [64, 128, 256, last_planes]
        if last_planes != 512:                   # the last stage has three quarters of all weights
            network.inplanes = planes[2] * block.expansion
            network.layer4 = network._make_layer(block, last_planes, layers[3], stride=2)
        for name, module in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        self.channels = [width * block.expansion for width in planes]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W), normalised -> [res2, res3, res4, res5], each (N, channels[i], H / stride, W / stride)."""
        x, maps = self.stem(images), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                if self.fused:
                    x = block_fused(block, x)
                    continue
                # the first two stages keep most of the memory and do a third of the work
                recomputed = self.recompute and x.requires_grad and stage in (self.layer1, self.layer2)
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recomputed else block(x)
            maps.append(x)
        return maps

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the blocks: images -> (N, 64, H / 4, W / 4)."""
        first = convolve_pairs(self.conv1, images) if self.fused else self.bn1(self.conv1(images))
        return self.maxpool(self.relu(first))


def convolve_pairs(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """The first convolution, 7x7 of stride 2 on 3 channels, as 4x4 of stride 1 on the 12 numbers of every 2x2 pixels: the same
    products, in a form that tensor cores take. H and W must be even.

    Output y reads pixels 2 y - 3 to 2 y + 3: those of the pairs y - 2 to y + 1, but for the very first, whose weight is 0. Four more
    channels of zeros make 16, as kernels of 16 bit want a multiple of 8."""
    weight = F.pad(convolution.weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))             # (64, 3, 4, 2, 4, 2)
    weight = F.pad(weight.permute(0, 2, 4, 3, 5, 1).flatten(3), (0, 4)).permute(0, 3, 1, 2)                # (64, 16, 4, 4)
    pairs = images.to(weight.dtype).permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))        # (N, H / 2, 2, W / 2, 2, 3)
    pairs = F.pad(pairs.transpose(2, 3).flatten(3), (0, 4, 2, 1, 2, 1)).permute(0, 3, 1, 2)                # (N, 16, H / 2 + 3, W / 2 + 3)
    return F.conv2d(pairs, weight, convolution.bias)


def convolve_fused(convolution: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(convolution(x) + residual) in one kernel of cuDNN's."""
    how = convolution.bias, convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    if residual is None:
        return torch.cudnn_convolution_relu(x, convolution.weight, *how)
    return torch.cudnn_convolution_add_relu(x, convolution.weight, residual, 1.0, *how)


def convolution_numbers(block: BasicBlock | Bottleneck) -> tuple[int, ...]:
    """By which torchvision names its convolutions and norms."""
    return (1, 2, 3) if isinstance(block, Bottleneck) else (1, 2)


def block_fused(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    """A block of a ResNet whose norms are folded."""
    residual = x if block.downsample is None else block.downsample(x)
    *others, last = (getattr(block, f"conv{number}") for number in convolution_numbers(block))
    for convolution in others:
        x = convolve_fused(convolution, x)
    return convolve_fused(last, x, residual)


def fold_norms(network: ResNetBackbone) -> None:
    """Put every batch norm into the convolution before it, in place, for inference: the same but for rounding, in fewer passes.
    What a block adds at its end gets the constants of both sides on one."""
    pairs = [(network, "conv1", "bn1")]
    blocks = [block for stage in (network.layer1, network.layer2, network.layer3, network.layer4) for block in stage]
    for block in blocks:
        pairs += [(block, f"conv{number}", f"bn{number}") for number in convolution_numbers(block)]
        pairs += [(block.downsample, "0", "1")] if block.downsample else []
    for owner, convolution, norm in pairs:
        own, its = getattr(owner, convolution), getattr(owner, norm)
        if isinstance(its, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            own.weight, own.bias = fuse_conv_bn_weights(own.weight, own.bias, its.running_mean, its.running_var, its.eps, its.weight,
                                                        its.bias)
            setattr(owner, norm, nn.Identity())
    for block in blocks:
        if block.downsample and block.downsample[0].bias is not None:
            last = getattr(block, f"conv{convolution_numbers(block)[-1]}")
            last.bias, block.downsample[0].bias = nn.Parameter(last.bias + block.downsample[0].bias), None


class DetectorWindowAttention(ShiftedWindowAttention):
    """torchvision's windowed attention with the detector's rule: a shift is a shift, however small the map."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, H, W, C), already normed -> the same shape."""
        count, height, width, channels = x.shape
        window, shift = self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = x.shape[1] // window, x.shape[2] // window
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = x.view(count, rows, window, columns, window, channels).transpose(2, 3)
        x = x.reshape(count * rows * columns, window * window, channels)

        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.get_relative_position_bias()                                # (1, heads, tokens, tokens)
        if shift:
            apart = shifted_from_afar(rows, columns, window, shift, x.device)   # True = came from another border
            bias = bias + apart[None, :, None].to(bias.dtype) * -100.0          # (1, windows, heads, tokens, tokens)
            bias = bias.expand(count, -1, -1, -1, -1).flatten(0, 1)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        x = self.proj(x.transpose(1, 2).flatten(2))

        x = x.view(count, rows, columns, window, window, channels).transpose(2, 3)
        x = x.reshape(count, rows * window, columns * window, channels)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width].contiguous()


def shifted_from_afar(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which pairs of a shifted window were not neighbours before the roll: bool (windows, tokens, tokens), True = apart."""
    def zones(count: int) -> Tensor:  # 0: untouched windows, 1: last window up to the seam, 2: rolled in from the start
        zone = torch.zeros(count * window, dtype=torch.long, device=device)
        zone[-window:] = 1
        zone[-shift:] = 2
        return zone

    region = zones(rows)[:, None] * 3 + zones(columns)
    region = region.view(rows, window, columns, window).transpose(1, 2).flatten(2).flatten(0, 1)
    return region[:, :, None] != region[:, None]


class SwinBackbone(nn.Module):
    """torchvision's Swin stages with the detector's attention and one LayerNorm an output."""

    def __init__(self, embed_dim, depths, num_heads, window, drop_path: float = 0.3):
        super().__init__()
        network = SwinTransformer([4, 4], embed_dim, depths, num_heads, [window, window],
                                  stochastic_depth_prob=drop_path, num_classes=1,
                                  block=partial(SwinTransformerBlock, attn_layer=DetectorWindowAttention))
        self.features = network.features
        self.channels = [embed_dim * 2 ** stage for stage in range(4)]
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W), normalised -> [res2, res3, res4, res5], each (N, channels[i], H / stride, W / stride)."""
        height, width = images.shape[-2:]
        x = self.features[0](F.pad(images, (0, -width % 4, 0, -height % 4)))    # (N, H / 4, W / 4, C)
        maps = []
        for stage, norm in enumerate(self.norms):
            if stage:
                x = self.features[2 * stage](x)                                 # patch merging
            x = self.features[2 * stage + 1](x)
            maps.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return maps
