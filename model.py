"""GRAtt-VIS as one model: frames -> backbone -> pixel decoder -> frame decoder -> tracker -> masks of a video.

Paper: GRAtt-VIS (arXiv 2305.17096) on Mask2Former (2112.01527), VITA (2206.04403) and GenVIS (2211.08834). Upstream:
mask2former/modeling/pixel_decoder/msdeformattn.py, vita/modeling/transformer_decoder/vita_mask2former_transformer_decoder.py
and grattvis/grattvis_model.py.

    from model import build_model
    model = build_model("r50", num_classes=25).eval()
    video = model.segment_video(frames, output_size=(720, 1280), top_k=20)    # frames: uint8 (T, 3, H, W), RGB

Shape letters of the whole project:
    B videos, T frames, N = B * T frames of all videos, H height, W width (h, w at stride 4)
    Q queries of the tracker, F queries of a frame, C channels, K classes (index K means "no object")
    L detector layers handed to the tracker (3 in training, the last one otherwise), D decoder layers of the tracker,
    S = L * B streams of the tracker, layer-major
"""
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import build_backbone
from deform_attn import DeformableAttention
from tracker import ClipPrediction, Tracker, TrackerState
from transformer import MLP, CrossAttention, FeedForward, SelfAttention

PIXEL_MEAN = (123.675, 116.28, 103.53)   # RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
SIZE_DIVISOR = 32
SUPERVISED_LAYERS = 3                    # L in training
VITA_WINDOW = 6                          # frames an encoder window of VITA spans


@dataclass
class FrameOutput:
    """What the detector (backbone, pixel decoder, frame decoder) knows of N frames."""
    predictions: list[tuple[Tensor, Tensor]]  # of each decoder layer: logits (N, F, K + 1), mask logits (N, F, h, w)
    queries: Tensor                           # (L, N, F, C), decoder_norm'ed
    mask_features: Tensor                     # (N, C, h, w), the tracker's


@dataclass
class TrainingOutput:
    """One training step's predictions; matcher.py turns them and the targets into losses."""
    frames: FrameOutput
    clips: list[ClipPrediction]
    mask_features: list[Tensor]               # of each clip: (B, T of the clip, C, h, w)
    padded_size: tuple[int, int]              # pixels, the size that masks are normalised by


@dataclass
class VideoResult:
    """Instances of a whole video, best first."""
    scores: Tensor      # (K,) float, 0..1: class score (maximum over frames) times mask score of the whole video
    labels: Tensor      # (K,) int64, 0-based
    masks: Tensor       # (K, T, H, W) bool
    track_ids: Tensor   # (K,) int64: the query; one query may appear under several labels
    logits: Tensor      # (clips, Q, K + 1) class logits of every query, clip by clip


@dataclass
class StepState:
    """What `step` carries from frame to frame. Its size is constant unless the mode has a memory."""
    size: tuple[int, int] # of the frames, pixels
    tracker: TrackerState
    class_scores: Tensor  # (Q, K) maximum so far
    mask_sum: Tensor      # (Q,) sum of the probabilities inside the masks so far
    mask_area: Tensor     # (Q,) pixels inside the masks so far


@dataclass
class FrameTracks:
    """Instances of one frame, best first by what is known so far."""
    scores: Tensor      # (K,) float, causal: of the frames up to this one
    labels: Tensor      # (K,) int64, 0-based
    masks: Tensor       # (K, H, W) bool, this frame's
    track_ids: Tensor   # (K,) int64: the query, stable over the video
    logits: Tensor      # (Q, K + 1) class logits of every query in this frame


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sine position encoding (1, channels, height, width): y in the first half, x in the second.

    Coordinates run from 1/size to 1 times 2 pi; always computed in at least float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = channels // 2
    exponent = 2 * torch.div(torch.arange(half, dtype=dtype, device=like.device), 2, rounding_mode="floor") / half

    def encode(size: int) -> Tensor:
        place = torch.arange(1, size + 1, dtype=dtype, device=like.device) / (size + 1e-6) * (2 * math.pi)
        phase = place[:, None] / 10000 ** exponent
        return torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), 2).flatten(1)   # (size, half)

    y = encode(height)[:, None].expand(height, width, half)
    x = encode(width)[None].expand(height, width, half)
    return torch.cat((y, x), 2).permute(2, 0, 1)[None]


class DeformableEncoderLayer(nn.Module):
    """Post-norm encoder layer over the joined pixels of all levels."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.attention = DeformableAttention(channels, levels=3, heads=heads)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, position: Tensor, level_shapes: list[tuple[int, int]]) -> Tensor:
        x = self.norm(x + self.attention(x + position, x, level_shapes))
        return self.feed_forward(x)


class PixelDecoder(nn.Module):
    """Deformable encoder over strides 32, 16, 8 and one FPN step to stride 4 (Mask2Former, section 3.1)."""

    def __init__(self, in_channels: list[int], channels: int, heads: int, layers: int, feed_forward: int):
        super().__init__()
        res2, *others = in_channels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, channels, 1), nn.GroupNorm(32, channels)) for inputs in reversed(others))
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.layers = nn.ModuleList(DeformableEncoderLayer(channels, heads, feed_forward) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(res2, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.output = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                                    nn.GroupNorm(32, channels), nn.ReLU())
        self.mask_features = nn.Conv2d(channels, channels, 1)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """[res2, res3, res4, res5] -> maps of strides [32, 16, 8] and the FPN map of stride 4, all with C channels.

        Under autocast its products and the deformable attention run in 16 bit (the official code leaves autocast here: its
        operator has no 16 bit); the residual stream stays in float32.
        """
        res2, *others = maps
        dtype = torch.promote_types(res2.dtype, torch.float32)
        sources = [projection(m).to(dtype) for projection, m in zip(self.input_proj, reversed(others))]
        level_shapes = [tuple(source.shape[-2:]) for source in sources]
        position = torch.cat([
            sine_position(*shape, source.shape[1], source).flatten(2).transpose(1, 2) + embed
            for shape, source, embed in zip(level_shapes, sources, self.level_embed)], 1)
        x = torch.cat([source.flatten(2).transpose(1, 2) for source in sources], 1)      # (N, pixels, C)
        for layer in self.layers:
            x = layer(x, position, level_shapes)
        levels = x.transpose(1, 2).split([height * width for height, width in level_shapes], 2)
        levels = [level.unflatten(2, shape) for level, shape in zip(levels, level_shapes)]
        upsampled = F.interpolate(levels[-1], size=res2.shape[-2:], mode="bilinear", align_corners=False)
        return levels, self.output(self.lateral(res2) + upsampled)


class FrameDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward."""

    def __init__(self, channels: int, heads: int, feed_forward: int):
        super().__init__()
        self.cross_attention = CrossAttention(channels, heads)
        self.self_attention = SelfAttention(channels, heads)
        self.feed_forward = FeedForward(channels, feed_forward)

    def forward(self, x: Tensor, position: Tensor, tokens: Tensor, token_position: Tensor, blocked: Tensor) -> Tensor:
        x = self.cross_attention(x, position, tokens, token_position, blocked=blocked)
        return self.feed_forward(self.self_attention(x, position))


class FrameDecoder(nn.Module):
    """Mask2Former's decoder: learned queries read the levels in turn, each inside its own last mask (section 3.2)."""

    def __init__(self, num_classes: int, channels: int, queries: int, heads: int, layers: int, feed_forward: int):
        super().__init__()
        self.layers = nn.ModuleList(FrameDecoderLayer(channels, heads, feed_forward) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)
        self.query_embed = nn.Embedding(queries, channels)
        self.level_embed = nn.Embedding(3, channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MLP(channels, channels)

    def forward(self, levels: list[Tensor], mask_features: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """levels of strides [32, 16, 8], mask_features (N, C, h, w) -> predictions before and after each layer, queries."""
        tokens = [level.flatten(2).transpose(1, 2) + embed for level, embed in zip(levels, self.level_embed.weight)]
        positions = [sine_position(*level.shape[-2:], level.shape[1], level).flatten(2).transpose(1, 2)
                     for level in levels]
        x = self.query_feat.weight.expand(len(mask_features), -1, -1)
        normed = [self.decoder_norm(x)]
        predictions = [self.predict(normed[0], mask_features)]
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            blocked = self.blocked_pixels(predictions[-1][1], levels[level].shape[-2:])
            x = layer(x, self.query_embed.weight, tokens[level], positions[level], blocked)
            normed.append(self.decoder_norm(x))
            predictions.append(self.predict(normed[-1], mask_features))
        handed_on = SUPERVISED_LAYERS if self.training else 1
        return predictions, torch.stack(normed[1:][-handed_on:])

    def predict(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (N, F, K + 1) and mask logits (N, F, h, w) of normed queries (N, F, C)."""
        return self.class_embed(x), torch.einsum("nfc,nchw->nfhw", self.mask_embed(x), mask_features)

    @staticmethod
    @torch.no_grad()
    def blocked_pixels(masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Where the last masks say background: bool (N, 1, F, pixels), True = may not attend; an all-True row is opened."""
        masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        blocked = masks.sigmoid().flatten(2) < 0.5
        return (blocked & ~blocked.all(-1, keepdim=True))[:, None]


class GRAttVIS(nn.Module):
    """The whole model. `forward` serves training, `segment_video` and `step` inference."""

    def __init__(self, num_classes: int, backbone: str, norm: str = "frozen", swin_window: int | None = None,
                 channels: int = 256, heads: int = 8, queries: int = 100, frame_queries: int = 100,
                 pixel_layers: int = 6, pixel_feed_forward: int = 1024, frame_layers: int = 9,
                 tracker_encoder_layers: int = 6, tracker_decoder_layers: int = 3, feed_forward: int = 2048,
                 propagation: str = "gated", gate_mask: str = "additive", window: int | None = None, clip_length: int = 1):
        """clip_length: frames the tracker reads at once (GenVIS semi-online: 3); "clip" propagation reads all.
        window: see Tracker; None = 6 frames for "clip" (VITA), 0 otherwise. Other arguments are sizes."""
        super().__init__()
        if clip_length < 1 or num_classes < 1:
            raise ValueError(f"clip_length and num_classes must be at least 1, not {clip_length} and {num_classes}")
        self.num_classes, self.propagation, self.clip_length = num_classes, propagation, clip_length
        self.backbone = build_backbone(backbone, norm, swin_window)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, channels, heads, pixel_layers, pixel_feed_forward)
        self.frame_decoder = FrameDecoder(num_classes, channels, frame_queries, heads, frame_layers, feed_forward)
        if window is None:
            window = VITA_WINDOW if propagation == "clip" else 0
        self.tracker = Tracker(num_classes, channels, channels, queries, frame_queries, tracker_encoder_layers,
                               tracker_decoder_layers, heads, feed_forward, propagation, gate_mask, window)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def prepare(self, frames: list[Tensor]) -> Tensor:
        """uint8 frames (3, H, W), RGB, sizes may differ -> (N, 3, H', W'): normalised, then zero-padded to multiples of 32."""
        if not frames:
            raise ValueError("the video has no frames")
        for frame in frames:
            if not isinstance(frame, Tensor):
                raise ValueError(f"a frame must be a torch tensor, not {type(frame).__module__}.{type(frame).__name__}")
            if frame.dtype != torch.uint8 or frame.ndim != 3 or len(frame) != 3:
                raise ValueError(f"a frame must be uint8 of shape (3, H, W), not {frame.dtype} {tuple(frame.shape)}")
        height, width = (math.ceil(max(frame.shape[axis] for frame in frames) / SIZE_DIVISOR) * SIZE_DIVISOR
                         for axis in (1, 2))
        images = self.pixel_mean.new_zeros(len(frames), 3, height, width)
        for image, frame in zip(images, frames):
            frame = frame.to(image.device, non_blocking=True)
            image[:, :frame.shape[1], :frame.shape[2]] = (frame - self.pixel_mean) / self.pixel_std
        return images

    def detect(self, images: Tensor) -> FrameOutput:
        """images (N, 3, H, W) from `prepare`."""
        levels, features = self.pixel_decoder(self.backbone(images))
        predictions, queries = self.frame_decoder(levels, self.pixel_decoder.mask_features(features))
        return FrameOutput(predictions, queries, self.tracker.mask_features(features))

    def forward(self, videos: list[Tensor]) -> TrainingOutput:
        """B videos of T frames each, uint8 (T, 3, H, W); T the same for all, H and W may differ."""
        batch, length = len(videos), len(videos[0]) if videos else 0
        if any(len(video) != length for video in videos):
            raise ValueError(f"all videos of a batch need the same number of frames, not {[len(v) for v in videos]}")
        images = self.prepare([frame for video in videos for frame in video])
        frames = self.detect(images)
        queries = frames.queries.unflatten(1, (batch, length))                           # (L, B, T, F, C)
        mask_features = frames.mask_features.unflatten(0, (batch, length))               # (B, T, C, h, w)
        clip_length = length if self.propagation == "clip" else self.clip_length
        clips, state = [], None
        for clip_queries in queries.split(clip_length, 2):
            prediction, state = self.tracker(clip_queries, state)
            clips.append(prediction)
        return TrainingOutput(frames, clips, list(mask_features.split(clip_length, 1)), tuple(images.shape[-2:]))

    @torch.no_grad()
    def segment_video(self, frames: Tensor | Iterable[Tensor], output_size: tuple[int, int] | None = None,
                      top_k: int = 10) -> VideoResult:
        """Segment and track a whole video (upstream grattvis_model.py, `inference`).

        frames: uint8 (T, 3, H, W) RGB, or an iterable of (3, H, W), all of one size; resized by the caller (data.py).
        output_size: (height, width) of the masks; None = that of the frames. Raises ValueError on an empty video.
        """
        self.check_request(output_size, top_k)
        features, queries, logits, embeds, state, sizes = [], [], [], [], None, set()
        for frame in frames:
            images = self.prepare([frame])
            sizes.add((tuple(frame.shape[-2:]), tuple(images.shape[-2:])))
            if len(sizes) > 1:
                raise ValueError(f"all frames of a video must have one size, not {sorted(size for size, _ in sizes)}")
            output = self.detect(images)
            features.append(output.mask_features[0])
            queries.append(output.queries)
            if self.propagation != "clip" and len(queries) == self.clip_length:
                state = self.track_clip(queries, state, logits, embeds)
        if not features:
            raise ValueError("the video has no frames")
        if queries:
            self.track_clip(queries, state, logits, embeds)
        clip_length = len(features) if self.propagation == "clip" else self.clip_length
        logits, embeds = torch.stack(logits), torch.stack(embeds)                        # (clips, Q, ...)

        scores, labels, chosen = self.best_pairs(class_probabilities(logits).amax(0), top_k)
        (size, padded_size), = sizes
        mask_sum, mask_area, masks = 0, 0, []
        for index, feature in enumerate(features):
            mask_logits = upsample_masks(embeds[index // clip_length, chosen], feature, size, padded_size)
            frame_sum, frame_area = mask_confidence(mask_logits)
            mask_sum, mask_area = mask_sum + frame_sum, mask_area + frame_area
            masks.append(resize_masks(mask_logits, output_size) > 0)
        scores = scores * mask_sum / (mask_area + 1e-6)
        order = scores.argsort(descending=True, stable=True)
        return VideoResult(scores[order], labels[order], torch.stack(masks, 1)[order], chosen[order], logits)

    def track_clip(self, queries: list[Tensor], state: TrackerState | None, logits: list, embeds: list) -> TrackerState:
        """Hand the frame queries gathered so far to the tracker as one clip; empties `queries`, extends the other lists."""
        prediction, state = self.tracker(torch.stack(queries, 2), state)                 # (L, 1, T, F, C)
        queries.clear()
        logits.append(prediction.logits[-1][-1, 0])
        embeds.append(prediction.mask_embed[-1][-1, 0])
        return state

    @torch.no_grad()
    def step(self, frame: Tensor, state: StepState | None = None, output_size: tuple[int, int] | None = None,
             top_k: int = 10) -> tuple[FrameTracks, StepState]:
        """One frame (3, H, W) uint8 of a live video, causally; state is None at its start.

        Scores are those of segment_video for the frames so far; at the last frame the two agree.
        """
        self.check_request(output_size, top_k)
        if self.propagation == "clip" or self.clip_length != 1:
            raise ValueError("step needs a model that goes frame by frame, not one that reads clips of several frames")
        images = self.prepare([frame])
        size = tuple(frame.shape[-2:])
        if state and state.size != size:
            raise ValueError(f"all frames of a video must have one size, not {state.size} and {size}")
        output = self.detect(images)
        prediction, tracker_state = self.tracker(output.queries[:, None], state.tracker if state else None)
        logits, embed = prediction.logits[-1][-1, 0], prediction.mask_embed[-1][-1, 0]
        mask_logits = upsample_masks(embed, output.mask_features[0], size, tuple(images.shape[-2:]))
        class_scores, (mask_sum, mask_area) = class_probabilities(logits), mask_confidence(mask_logits)
        if state:
            class_scores = torch.maximum(class_scores, state.class_scores)
            mask_sum, mask_area = mask_sum + state.mask_sum, mask_area + state.mask_area
        scores, labels, chosen = self.best_pairs(class_scores, top_k)
        scores = scores * mask_sum[chosen] / (mask_area[chosen] + 1e-6)
        order = scores.argsort(descending=True, stable=True)
        masks = resize_masks(mask_logits[chosen[order]], output_size) > 0
        tracks = FrameTracks(scores[order], labels[order], masks, chosen[order], logits)
        return tracks, StepState(size, tracker_state, class_scores, mask_sum, mask_area)

    def best_pairs(self, class_scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The top_k (query, class) pairs of (Q, K) scores: scores, labels, queries; equal scores keep their order."""
        scores, index = class_scores.flatten().sort(descending=True, stable=True)
        scores, index = scores[:top_k], index[:top_k]
        return scores, index % self.num_classes, index // self.num_classes

    def check_request(self, output_size: tuple[int, int] | None, top_k: int) -> None:
        """Refuse what would return noise (sampled gates, dropped paths) or nothing."""
        if self.training:
            raise RuntimeError("the model is in training mode: call model.eval() first")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        if output_size is not None and min(output_size) < 1:
            raise ValueError(f"output_size must be (height, width) of at least 1 pixel, not {output_size}")


def class_probabilities(logits: Tensor) -> Tensor:
    """(..., K + 1) logits -> (..., K) probabilities, "no object" left out."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[..., :-1]


def upsample_masks(embed: Tensor, features: Tensor, size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """Mask logits (Q, *size) of one frame: embeddings (Q, C) times features (C, h, w), bilinear to the padded frame, cropped."""
    masks = torch.einsum("qc,chw->qhw", embed, features)[None]
    masks = F.interpolate(masks, size=padded_size, mode="bilinear", align_corners=False)[0]
    return masks[:, :size[0], :size[1]]


def mask_confidence(mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the probabilities above one half and their number, each (Q,): their ratio over a video is the mask score."""
    soft = mask_logits.to(torch.promote_types(mask_logits.dtype, torch.float32)).sigmoid()
    hard = soft > 0.5
    return (soft * hard).sum((1, 2)), hard.sum((1, 2))


def resize_masks(mask_logits: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Bilinear resize of (Q, H, W) mask logits; None or the same size returns them as they are."""
    if size is None or tuple(size) == tuple(mask_logits.shape[-2:]):
        return mask_logits
    return F.interpolate(mask_logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


PRESETS = {  # a model of the paper a line; every value is an argument of GRAttVIS and can be overridden in build_model
    "r50": dict(backbone="resnet50"),
    "r101": dict(backbone="resnet101"),
    "swin_t": dict(backbone="swin_t"),
    "swin_s": dict(backbone="swin_s"),
    "swin_b": dict(backbone="swin_b"),
    "swin_l": dict(backbone="swin_l", frame_queries=200),
    "toy": dict(backbone="resnet10", norm="batch", channels=64, heads=4, queries=20, frame_queries=20, pixel_layers=1,
                pixel_feed_forward=256, frame_layers=3, tracker_encoder_layers=1, feed_forward=256),
}


def build_model(preset: str, num_classes: int, propagation: str = "gated", gate_mask: str = "additive",
                **overrides) -> GRAttVIS:
    """A model by preset (the keys of PRESETS), randomly initialised, in training mode.

    propagation: "gated" (GRAtt-VIS), "plain", "memory" (GenVIS), "gated+memory", "clip" (VITA).
    gate_mask: "additive" (as released) or "blocked" (as in the paper), see Tracker.gate_bias.
    overrides: other arguments of GRAttVIS, such as norm="group" to train from scratch. ValueError for unknown names.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    unknown = overrides.keys() - inspect.signature(GRAttVIS).parameters.keys()
    if unknown:
        raise ValueError(f"GRAttVIS has no argument {', '.join(sorted(unknown))}")
    return GRAttVIS(num_classes, propagation=propagation, gate_mask=gate_mask, **(PRESETS[preset] | overrides))
