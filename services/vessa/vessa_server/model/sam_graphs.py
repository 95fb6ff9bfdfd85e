"""Build the graphs of SAM 2.1: the official ones, and that of the preset nano."""

from typing import Any

from sam2.build_sam import build_sam2
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base

from vessa_server.model.conv_trunk import ConvolutionalTrunk
from vessa_server.model.presets import SegmenterPreset
from vessa_server.model.timm_trunk import TimmTrunk

MEMORY_DIM = 64  # channels of SAM 2's spatial memory, the same in every official checkpoint


def official_graph(preset: SegmenterPreset) -> SAM2Base:
    """Build an official graph without weights; `weights.directory` loads them strictly.

    With apply_postprocessing the decoder would return another of its masks when the requested one is
    unstable.
    """
    overrides = [f"++model.image_size={preset.image_size}"]
    return build_sam2(
        preset.config,
        ckpt_path=None,
        device="cpu",
        hydra_overrides_extra=overrides,
        apply_postprocessing=False,
    )


def nano_graph(preset: SegmenterPreset) -> SAM2Base:
    """Build nano's SAM 2 graph in Python: no configuration file of the package has these sizes."""
    side = [preset.image_size // preset.stride] * 2
    dim = preset.dim

    def attention(**options: Any) -> RoPEAttention:
        return RoPEAttention(
            rope_theta=10000.0, feat_sizes=side, embedding_dim=dim, num_heads=1, downsample_rate=1, **options
        )

    trunk: ConvolutionalTrunk | TimmTrunk
    if preset.trunk is None:
        trunk = ConvolutionalTrunk(preset.width, preset.stride // 4)
    else:
        trunk = TimmTrunk(preset.trunk, preset.stride)
    levels = len(trunk.channel_list)  # the third, at `stride`, is the embedding's
    encoder = ImageEncoder(
        scalp=levels - 3,
        trunk=trunk,
        neck=FpnNeck(
            PositionEmbeddingSine(dim, normalize=True),
            dim,
            trunk.channel_list,
            fpn_top_down_levels=list(range(2, levels)),
            fpn_interp_model="nearest",
        ),
    )
    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=attention(rope_k_repeat=True, kv_in_dim=MEMORY_DIM),
        d_model=dim,
        dim_feedforward=dim * 4,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=attention(),
    )
    return SAM2Base(
        encoder,
        MemoryAttention(dim, True, layer, preset.attention_layers),
        MemoryEncoder(
            out_dim=MEMORY_DIM,
            mask_downsampler=MaskDownSampler(
                embed_dim=dim, kernel_size=3, stride=2, padding=1, total_stride=preset.stride
            ),
            fuser=Fuser(CXBlock(dim, 7, 3, layer_scale_init_value=0.1, use_dwconv=True), 2),
            position_encoding=PositionEmbeddingSine(MEMORY_DIM, normalize=True),
            in_dim=dim,
        ),
        image_size=preset.image_size,
        backbone_stride=preset.stride,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_high_res_features_in_sam=True,
        directly_add_no_mem_embed=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
    )
