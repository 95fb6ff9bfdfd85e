"""Segment with SAM 2.1: templates in memory and prompts as input, one mask as output.

The graph is `SAM2Base` of the `sam2` package. This module calls its parts one by one, because the
package's video tracker (`track_step`) replaces logits by constants and blocks gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from sam2.modeling.sam2_utils import get_1d_sine_pe
from torch import Tensor, nn

from vessa_server.model.geometry import resize
from vessa_server.model.presets import SegmenterPreset
from vessa_server.model.sam_graphs import MEMORY_DIM, nano_graph, official_graph


@dataclass(frozen=True)
class ImageFeatures:
    """Output of the image encoder for B images.

    embedding: (B, C, h, w); position: (h * w, B, C) sine encoding;
    fine, finer: (B, C / 4, 2h, 2w) and (B, C / 8, 4h, 4w), for the mask decoder
    """

    embedding: Tensor
    position: Tensor
    fine: Tensor
    finer: Tensor

    @property
    def details(self) -> tuple[Tensor, Tensor]:
        """The two finest levels, which the mask decoder needs: finer, fine."""
        return self.finer, self.fine

    def __getitem__(self, index: Any) -> "ImageFeatures":
        """Pick images by a slice, list or index tensor."""
        return ImageFeatures(
            self.embedding[index], self.position[:, index], self.fine[index], self.finer[index]
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of N masks in px of the network's square. A field is None when no mask has such a prompt.

    points: (N, P, 2) (x, y); point_labels: (N, P) 1 inside, 0 outside, 2 and 3 the corners of a
    box, -1 padding; mask_logits: (N, 1, 4h, 4w); mask_present: (N,) bool
    """

    points: Tensor | None = None
    point_labels: Tensor | None = None
    mask_logits: Tensor | None = None
    mask_present: Tensor | None = None


class Correlation(nn.Module):
    """Read the template's mask through dense template-target correlation.

    Each target position attends to all template positions and reads the mask there, per head.
    Memory attention can learn this too, but much more slowly: here one softmax leads from feature
    similarity to the mask. The result is added to the embedding of the mask decoder.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, MEMORY_DIM)
        self.key = nn.Linear(dim, MEMORY_DIM)
        self.log_scale = nn.Parameter(torch.full((heads,), 2.3))
        self.project = nn.Sequential(
            nn.Conv2d(2 * heads, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )

    def _split(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        return F.normalize(x.view(batch, tokens, self.heads, -1).transpose(1, 2), dim=-1)

    def keys(self, tokens: Tensor) -> Tensor:
        """Map template tokens (B, M, C) to keys (B, M, 64)."""
        return self.key(tokens)

    def forward(
        self, tokens: Tensor, rows: Tensor, keys: Tensor, mask: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Return (N, C, h, w) to add to the embedding.

        tokens: (B, h * w, C) of the targets; rows: (N,) the target of each mask; keys: (N, M, 64);
        mask: (N, M) template mask in [0, 1]
        """
        query = (self._split(self.query(tokens)) * self.log_scale.exp()[None, :, None, None])[rows]
        value = mask[:, None, :, None].expand(-1, self.heads, -1, query.shape[-1])
        # The fused kernel does not store the (h * w, M) map. It needs values as wide as the keys.
        read = F.scaled_dot_product_attention(query, self._split(keys), value.contiguous(), scale=1.0)
        # The log-odds keep the distance from the border where all heads saturate.
        read = read[..., 0].float().clamp(1e-4, 1 - 1e-4)  # (N, heads, h * w); bfloat16 rounds 1 - 1e-4 to 1
        maps = torch.cat([read, 0.2 * torch.logit(read)], dim=1)
        return self.project(maps.unflatten(-1, size))


class Segmenter(nn.Module):
    """Image encoder, memory encoder, memory attention, prompt encoder and mask decoder."""

    def __init__(self, preset: SegmenterPreset) -> None:
        super().__init__()
        self.preset = preset
        self.sam = official_graph(preset) if preset.config else nano_graph(preset)
        self.sam.sam_mask_decoder.transformer.register_forward_pre_hook(_by_position)
        self.side = preset.image_size // preset.stride
        self.correlation = (
            Correlation(preset.dim, preset.correlation_heads) if preset.correlation_heads else None
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    @property
    def memory_width(self) -> int:
        """Channels of one memory token as `encode_memory` returns it."""
        return MEMORY_DIM + (MEMORY_DIM + 1 if self.correlation is not None else 0)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize (B, 3, S, S) in [0, 1] as in the trunk's training."""
        if not self.preset.per_image_normalization:
            return (images - self.mean) / self.std
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) / (images.std((1, 2, 3), keepdim=True) + 1e-2)

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Encode (B, 3, S, S) float in [0, 1].

        The same function as SAM 2's `forward_image`, in fewer operations: the two finest levels have no
        top-down path, so their lateral convolution and the decoder's projection are one.
        """
        neck, decoder = self.sam.image_encoder.neck, self.sam.sam_mask_decoder
        # Channels-last convolutions are faster on a CPU, and attention reads positions without a copy. The
        # weights stay contiguous, which FSDP needs.
        pixels = self.normalize(images).contiguous(memory_format=torch.channels_last)
        levels = self.sam.image_encoder.trunk(pixels)  # finest first
        lateral = [level.conv for level in neck.convs][::-1]
        finer = _projected(levels[0], lateral[0], decoder.conv_s0)
        fine = _projected(levels[1], lateral[1], decoder.conv_s1)
        embedding = lateral[-1](levels[-1])
        for level in range(len(levels) - 2, 1, -1):
            coarser = F.interpolate(embedding.float(), scale_factor=2.0, mode=neck.fpn_interp_model)
            embedding = lateral[level](levels[level]) + coarser
        position = neck.position_encoding(embedding).to(embedding.dtype)
        return ImageFeatures(embedding, position.flatten(2).permute(2, 0, 1), fine, finer)

    def encode_memory(self, features: ImageFeatures, masks: Tensor) -> Tensor:
        """Encode templates into memory tokens.

        features: of B templates; masks: (B, 1, S, S) float, 1 inside
        Returns (B, M, memory_width): SAM 2's spatial memory (64) of each position, followed by the
        correlation's key (64) and the mask (1) in presets with a correlation. Graphs with object
        pointers add them as tokens at the end.
        """
        sam = self.sam
        scaled = masks * sam.sigmoid_scale_for_mem_enc + sam.sigmoid_bias_for_mem_enc
        memory = sam.memory_encoder(features.embedding, scaled, skip_mask_sigmoid=True)["vision_features"]
        if sam.no_obj_embed_spatial is not None:
            empty = (masks.amax((1, 2, 3)) <= 0).to(memory.dtype).view(-1, 1, 1, 1)
            memory = memory + empty * sam.no_obj_embed_spatial[..., None, None]
        tokens = memory.flatten(2).transpose(1, 2)
        if self.correlation is not None:
            keys = self.correlation.keys(self._tokens(features))
            inside = resize(masks, (self.side, self.side)).flatten(2).transpose(1, 2)
            tokens = torch.cat([tokens, keys, inside], dim=-1)
        if sam.use_obj_ptrs_in_encoder:
            tokens = torch.cat([tokens, self._object_pointers(features, masks)], dim=1)
        return tokens

    def _tokens(self, features: ImageFeatures) -> Tensor:
        content = features.embedding.flatten(2).transpose(1, 2)
        return content + 0.5 * features.position.transpose(0, 1)

    def _object_pointers(self, features: ImageFeatures, masks: Tensor) -> Tensor:
        """Return SAM 2's object pointer of each template as 64-channel tokens (B, C / 64, 64)."""
        pointer = self.sam._use_mask_as_output(
            features.embedding, [features.finer, features.fine], masks.to(features.embedding.dtype)
        )[5]
        return pointer.view(pointer.shape[0], -1, MEMORY_DIM)

    @property
    def pointer_tokens(self) -> int:
        """Object-pointer tokens at the end of each template's memory."""
        return self.sam.hidden_dim // MEMORY_DIM if self.sam.use_obj_ptrs_in_encoder else 0

    def attend(self, features: ImageFeatures, memories: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Condition the targets of N masks on their templates.

        features: of B images; memories: (N, T, M, memory_width), T templates each, None for the ablation
        without memory; rows: (N,) int64, the image of each mask, None where each image has one mask
        Returns (N, C, h, w), the embedding for the mask decoder. What depends on the image alone is
        computed once for all of its masks.
        """
        count, channels, height, width = features.embedding.shape
        rows = torch.arange(count, device=features.embedding.device) if rows is None else rows
        if memories is None:
            return features.embedding[rows] + self.sam.no_mem_embed.view(1, channels, 1, 1)
        spatial_tokens = height * width
        spatial = memories[:, :, :spatial_tokens, :MEMORY_DIM].flatten(1, 2)
        pointers = memories[:, :, spatial_tokens:, :MEMORY_DIM].flatten(1, 2)
        memory = torch.cat([spatial, pointers], 1)
        position = self._memory_position(memory.transpose(0, 1), memories.shape[1]).transpose(0, 1)
        attended = self._attend_memory(features, memory, position, pointers.shape[1], rows)
        embedding = attended.transpose(1, 2).unflatten(2, (height, width))
        if self.correlation is not None:
            keys = memories[:, :, :spatial_tokens, MEMORY_DIM : 2 * MEMORY_DIM].flatten(1, 2)
            mask = memories[:, :, :spatial_tokens, 2 * MEMORY_DIM].flatten(1, 2)
            tokens = self._tokens(features)
            embedding = embedding + self.correlation(tokens, rows, keys, mask, (height, width))
        return embedding

    def _attend_memory(
        self, features: ImageFeatures, memory: Tensor, position: Tensor, pointers: int, rows: Tensor
    ) -> Tensor:
        """Run SAM 2's memory attention, with the first self-attention once for each image.

        memory: (N, tokens, 64); position: (1, tokens, 64); pointers: object-pointer tokens at its end
        Returns (N, h * w, C), as `MemoryAttention.forward` does for N separate images.
        """
        attention = self.sam.memory_attention
        target_position = features.position.transpose(0, 1)
        target = features.embedding.flatten(2).transpose(1, 2)
        if attention.pos_enc_at_input:
            target = target + 0.1 * target_position
        for index, layer in enumerate(attention.layers):
            target = layer._forward_sa(target, target_position)
            if index == 0:
                target, target_position = target[rows], target_position[rows]
            target = layer._forward_ca(target, memory, target_position, position, pointers)
            hidden = layer.activation(layer.linear1(layer.norm3(target)))
            target = target + layer.dropout3(layer.linear2(layer.dropout(hidden)))
        normed: Tensor = attention.norm(target)
        return normed

    def _memory_position(self, memory: Tensor, templates: int) -> Tensor:
        """Return the position encoding of the memory tokens (tokens, 1, 64), as in a video of SAM 2.

        Templates count as conditioning frames, the most similar one directly before the target. Their
        spatial memories share one place in time; their object pointers encode the distance in time.
        """
        sam = self.sam
        like = memory.new_zeros(1, MEMORY_DIM, self.side, self.side)
        sine = sam.memory_encoder.position_encoding(like).flatten(2).permute(2, 0, 1)
        conditioning = sam.maskmem_tpos_enc[sam.num_maskmem - 1].view(1, 1, -1)
        position = [(sine + conditioning).repeat(templates, 1, 1)]
        if self.pointer_tokens:
            distance = torch.arange(1, templates + 1, device=memory.device)
            time = get_1d_sine_pe(distance / (sam.max_obj_ptrs_in_encoder - 1), dim=sam.hidden_dim)
            pointers = sam.obj_ptr_tpos_proj(time).repeat_interleave(self.pointer_tokens, dim=0)
            position.append(pointers[:, None])
        return torch.cat(position).to(memory.dtype)

    def decode(
        self, embedding: Tensor, details: Sequence[Tensor], h_seg: Tensor | None, prompts: PromptBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode N masks.

        embedding: (N, C, h, w) from `attend`; details: `ImageFeatures.details` of the N targets;
        h_seg: (N, C) from the language model, joined to the sparse prompts as in LISA, or None
        Returns logits (N, 1, 4h, 4w), predicted IoU (N,) in [0, 1], presence logit (N,). With
        official weights the mask of an absent class (presence below 0) is empty in eval mode, as in
        SAM 2's tracker. In training that would block the gradient.
        """
        encoder, count = self.sam.sam_prompt_encoder, embedding.shape[0]
        points, labels = prompts.points, prompts.point_labels
        if points is None:  # SAM 2 always expects a point: label -1 means "no point"
            points = embedding.new_zeros(count, 1, 2)
            labels = torch.full((count, 1), -1, device=embedding.device)
        sparse, dense = encoder(points=(points, labels), boxes=None, masks=prompts.mask_logits)
        if prompts.mask_logits is not None and prompts.mask_present is not None:
            absent = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
            dense = torch.where(prompts.mask_present.view(-1, 1, 1, 1), dense, absent)
        if h_seg is not None:
            sparse = torch.cat([sparse, h_seg[:, None]], dim=1)
        logits, iou, _, presence = self.sam.sam_mask_decoder(
            image_embeddings=embedding,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=[level.contiguous(memory_format=torch.channels_last) for level in details],
        )
        if self.preset.config is not None and not self.training:
            logits = torch.where(presence[..., None, None] > 0, logits, NO_OBJ_SCORE)
        return logits, iou[:, 0], presence[:, 0]


def _projected(level: Tensor, lateral: nn.Conv2d, projection: nn.Conv2d) -> Tensor:
    """Apply two 1x1 convolutions, (B, c, h, w) to (B, c', h, w), as their product."""
    outer, inner = projection.weight.flatten(1), lateral.weight.flatten(1)
    bias = None
    if lateral.bias is not None and projection.bias is not None:
        bias = outer @ lateral.bias + projection.bias
    return F.conv2d(level, (outer @ inner)[..., None, None], bias)


def _by_position(transformer: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Store the mask decoder's images channels-last, the order in which its transformer reads them.

    This avoids copies in every sum and product. All N images share one position encoding (N, C, h, w),
    which is expanded instead of stored N times.
    """
    images, positions, tokens = arguments
    images, position = (x.contiguous(memory_format=torch.channels_last) for x in (images, positions[:1]))
    return images, position.expand_as(images), tokens
