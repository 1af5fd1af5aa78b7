"""Backbones: frames -> four feature maps of strides 4, 8, 16, 32 (res2..res5).

`build_backbone(name)` makes a ResNet or a Swin from torchvision's classes. Source:
torchvision.models.resnet and swin_transformer; upstream detectron2 modeling/backbone/resnet.py and
mask2former/modeling/backbone/swin.py.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
)
from torchvision.ops import FrozenBatchNorm2d


def group_norm(channels: int) -> nn.GroupNorm:
    """A trainable norm that is independent of the batch, for training from scratch."""
    return nn.GroupNorm(32, channels)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d, except that 16-bit inputs give 16-bit outputs.

    float32 keeps torchvision's formula bit for bit; F.batch_norm rounds differently.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


NORMS = {"frozen": FrozenBatchNorm, "batch": nn.BatchNorm2d, "group": group_norm}


def build_backbone(name: str, norm: str = "frozen", window: int | None = None) -> nn.Module:
    """A backbone by name, one of BACKBONES. Raises ValueError for an unknown name or norm.

    norm: of a ResNet: "frozen" (statistics and affine parameters are buffers, for pretrained
        weights), "batch" or "group".
    window: window size of a Swin; None = that of the table.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
    return BACKBONES[name](NORMS[norm], window)


class ResNetBackbone(nn.Module):
    """torchvision's ResNet without classifier; Bottleneck blocks have their stride in the 3x3.

    last_planes: width of res5. Preset "small" has a narrower one, since res5 holds three quarters
        of all weights.
    """

    recompute = False  # Memory: recompute activations of res2 and res3 in backward

    def __init__(self, block, layers, norm_layer, last_planes: int = 512):
        super().__init__()
        network = ResNet(block, layers, norm_layer=norm_layer)
        planes = [64, 128, 256, last_planes]
        if last_planes != 512:
            # torchvision's own way of making a stage, which starts from `inplanes` channels.
            network.inplanes = planes[2] * block.expansion
            network.layer4 = network._make_layer(block, last_planes, layers[3], stride=2)
        for name, module in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        self.channels = [width * block.expansion for width in planes]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W), normalised -> [res2, res3, res4, res5].

        Map i has shape (N, channels[i], H / stride, W / stride) with strides 4, 8, 16, 32.
        """
        x = self.stem(images)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            # Memory: res2 and res3 hold most of the activations and do a third of the work.
            if self.recompute and stage in (self.layer1, self.layer2):
                for block in stage:
                    x = checkpointed(True, block, x)
            else:
                x = stage(x)
            maps.append(x)
        return maps

    def stem(self, images: Tensor) -> Tensor:
        """images -> (N, 64, H / 4, W / 4)."""
        x = self.relu(self.bn1(self.conv1(images)))
        return self.maxpool(x)


def checkpointed(recompute: bool, function: Callable[..., Tensor], x: Tensor, *others) -> Tensor:
    """function(x, *others); with `recompute`, backward computes its activations again."""
    if recompute and x.requires_grad:
        return checkpoint(function, x, *others, use_reentrant=False, preserve_rng_state=False)
    return function(x, *others)


# Swin. Official checkpoints use Mask2Former's, which differs from torchvision's:
#   * windows are shifted even if the map is smaller than a window;
#   * each output has its own LayerNorm; there is no final norm, pooling or classifier;
#   * inputs are padded to multiples of the patch size with zeros, at the right and bottom.
# As in torchvision, maps are padded after the first norm of a block, so that padding takes part in
# attention, and -100 is added to the logits of pixels that the shift moved next to each other.


class DetectorWindowAttention(ShiftedWindowAttention):
    """torchvision's shifted window attention, but windows are shifted on small maps, too."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, H, W, C), normed -> the same shape."""
        batch, height, width, channels = x.shape
        window, shift = self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows = x.shape[1] // window  # of windows
        columns = x.shape[2] // window
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = x.view(batch, rows, window, columns, window, channels)
        x = x.transpose(2, 3).reshape(-1, window * window, channels)  # (N * windows, tokens, C)

        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (N * windows, heads, tokens, C / heads)
        bias = self.get_relative_position_bias()  # (1, heads, tokens, tokens)
        if shift:
            wrapped = wrapped_pairs(rows, columns, window, shift, x.device)
            bias = bias + wrapped[None, :, None].to(bias.dtype) * -100.0
            bias = bias.expand(batch, -1, -1, -1, -1).flatten(0, 1)  # for each window
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        x = self.proj(x.transpose(1, 2).flatten(2))  # (N * windows, tokens, C)

        x = x.view(batch, rows, columns, window, window, channels)
        x = x.transpose(2, 3).reshape(batch, rows * window, columns * window, channels)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width].contiguous()


def wrapped_pairs(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Pairs of pixels in a window that were not neighbours before the cyclic shift.

    Returns bool (windows, tokens, tokens).
    """

    def zones(windows: int) -> Tensor:
        zone = torch.zeros(windows * window, dtype=torch.long, device=device)
        zone[-window:] = 1  # the last window
        zone[-shift:] = 2  # in it, the rows that were rolled in from the other border
        return zone

    region = zones(rows)[:, None] * 3 + zones(columns)
    region = region.view(rows, window, columns, window).transpose(1, 2)
    region = region.flatten(2).flatten(0, 1)  # (windows, tokens)
    return region[:, :, None] != region[:, None]


class SwinBackbone(nn.Module):
    """torchvision's Swin stages with `DetectorWindowAttention` and a LayerNorm for each output."""

    def __init__(self, embed_dim, depths, num_heads, window, drop_path: float = 0.3):
        super().__init__()
        block = partial(SwinTransformerBlock, attn_layer=DetectorWindowAttention)
        network = SwinTransformer(
            [4, 4],
            embed_dim,
            depths,
            num_heads,
            [window, window],
            stochastic_depth_prob=drop_path,
            num_classes=1,
            block=block,
        )
        self.features = network.features
        self.channels = [embed_dim * 2**stage for stage in range(4)]
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W), normalised -> [res2, res3, res4, res5].

        Map i has shape (N, channels[i], H / stride, W / stride) with strides 4, 8, 16, 32.
        """
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % 4, 0, -height % 4))
        x = self.features[0](x)  # patches (N, H/4, W/4, C)
        maps = []
        for stage, norm in enumerate(self.norms):
            if stage:
                x = self.features[2 * stage](x)  # patch merging
            x = self.features[2 * stage + 1](x)
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


# Factories of (norm layer, window or None). A backbone is a module with `channels`, the widths of
# its four maps, that maps images to them.
BACKBONES = {
    "resnet10": lambda norm, _: ResNetBackbone(BasicBlock, [1, 1, 1, 1], norm),
    "resnet10_thin": lambda norm, _: ResNetBackbone(BasicBlock, [1, 1, 1, 1], norm, 256),
    "resnet50": lambda norm, _: ResNetBackbone(Bottleneck, [3, 4, 6, 3], norm),
    "resnet101": lambda norm, _: ResNetBackbone(Bottleneck, [3, 4, 23, 3], norm),
    # T, S, B as in torchvision, to load its ImageNet weights; L is trained at 384 pixels
    "swin_t": lambda _, window: SwinBackbone(96, [2, 2, 6, 2], [3, 6, 12, 24], window or 7),
    "swin_s": lambda _, window: SwinBackbone(96, [2, 2, 18, 2], [3, 6, 12, 24], window or 7),
    "swin_b": lambda _, window: SwinBackbone(128, [2, 2, 18, 2], [4, 8, 16, 32], window or 7),
    "swin_l": lambda _, window: SwinBackbone(192, [2, 2, 18, 2], [6, 12, 24, 48], window or 12),
}
