"""Networks that read images."""

from __future__ import annotations

import transformers as hf

from transformers_zoo.row import CLIP_TOWER, ENCODER, Row, built, image, image_and_text


def vision() -> dict[str, Row]:
    return {
        # stem; two stages of two basic blocks with two norms each; the shortcut of the second
        # stage's first block and of the first stage's (its width changes too).
        "resnet": Row(
            built(
                hf.ResNetForImageClassification,
                hf.ResNetConfig(
                    embedding_size=8, hidden_sizes=[12, 16], depths=[2, 2], layer_type="basic"
                ),
            ),
            image(),
            {"batchnorm": 1 + 2 * 2 * 2 + 2},
        ),
        # Each of the two bottlenecks has three norms; the final norm. The stem's convolution, three
        # per block and two of shortcuts have their weight standardised by `batch_norm`.
        "bit": Row(
            built(
                hf.BitForImageClassification,
                hf.BitConfig(
                    embedding_size=32, hidden_sizes=[64, 128], depths=[1, 1], num_groups=8
                ),
            ),
            image(),
            {"groupnorm": 2 * 3 + 1},
            weights={"batchnorm": 1 + 2 * 3 + 2},
        ),
        # stem, top; the first block has no expansion (two norms), the others three.
        "efficientnet": Row(
            built(
                hf.EfficientNetForImageClassification,
                hf.EfficientNetConfig(
                    image_size=32,
                    width_coefficient=0.25,
                    depth_coefficient=1.0,
                    hidden_dim=320,
                    kernel_sizes=[3, 3, 5],
                    in_channels=[16, 16, 24],
                    out_channels=[16, 24, 40],
                    depthwise_padding=[],
                    strides=[1, 2, 2],
                    num_block_repeats=[1, 1, 1],
                    expand_ratios=[1, 6, 6],
                ),
            ),
            image(),
            {"batchnorm": 2 + 2 + 3 + 3},
        ),
        # The embeddings and the downsampling before the second stage normalise NCHW maps; one norm
        # per block, channels last; one after pooling.
        "convnext": Row(
            built(
                hf.ConvNextForImageClassification,
                hf.ConvNextConfig(hidden_sizes=[12, 16], depths=[2, 1], num_stages=2),
            ),
            image(),
            {"layernorm2d": 2, "layernorm": 3 + 1},
        ),
        # As ConvNeXt. The global response normalisation of its blocks scales by a ratio of norms
        # and is none of the kinds counted here.
        "convnextv2": Row(
            built(
                hf.ConvNextV2ForImageClassification,
                hf.ConvNextV2Config(hidden_sizes=[12, 16], depths=[2, 1], num_stages=2),
            ),
            image(),
            {"layernorm2d": 2, "layernorm": 3 + 1},
        ),
        # patch embeddings; two per block; patch merging between the stages; final.
        "swin": Row(
            built(
                hf.SwinForImageClassification,
                hf.SwinConfig(
                    image_size=32,
                    patch_size=4,
                    embed_dim=12,
                    depths=[2, 1],
                    num_heads=[2, 4],
                    window_size=4,
                ),
            ),
            image(),
            {"layernorm": 1 + 2 * 3 + 1 + 1},
        ),
        # Per stage: patch embeddings, two per block, final; where the ratio is above 1, the reduced
        # keys of attention. The decoder head has a batch norm.
        "segformer": Row(
            built(
                hf.SegformerForSemanticSegmentation,
                hf.SegformerConfig(
                    num_encoder_blocks=2,
                    depths=[1, 1],
                    sr_ratios=[2, 1],
                    hidden_sizes=[16, 24],
                    patch_sizes=[7, 3],
                    strides=[4, 2],
                    num_attention_heads=[2, 3],
                    mlp_ratios=[2, 2],
                    decoder_hidden_size=16,
                ),
            ),
            image(),
            {"layernorm": 2 * (1 + 2 + 1) + 1, "batchnorm": 1},
        ),
        # Four convolutions; per attention qkv and projection, per feed-forward two; the two
        # subsamplings have three norms and a feed-forward; one before the classifier, one per head.
        "levit": Row(
            built(
                hf.LevitForImageClassificationWithTeacher,
                hf.LevitConfig(
                    image_size=64,
                    hidden_sizes=[16, 24, 32],
                    num_attention_heads=[2, 3, 4],
                    depths=[1, 1, 1],
                    key_dim=[8, 8, 8],
                    mlp_ratio=[2, 2, 2],
                    attention_ratio=[2, 2, 2],
                ),
            ),
            image(64),
            {"batchnorm": 4 + 3 * 4 + 2 * 5 + 2},
        ),
        "dinov2": Row(
            built(
                hf.Dinov2ForImageClassification,
                hf.Dinov2Config(**ENCODER, image_size=28, patch_size=14),
            ),
            image(28),
            {"layernorm": 2 * 2 + 1},
        ),
        "vit": Row(
            built(
                hf.ViTForImageClassification, hf.ViTConfig(**ENCODER, image_size=16, patch_size=8)
            ),
            image(16),
            {"layernorm": 2 * 2 + 1},
        ),
        # Text: two per layer and a final one. Vision: the same and one before the first layer. Both
        # embeddings are divided by their length at the end, in the forward of the model itself.
        "clip": Row(
            built(
                hf.CLIPModel,
                hf.CLIPConfig(
                    text_config={
                        **CLIP_TOWER,
                        "vocab_size": 97,
                        "max_position_embeddings": 16,
                        "eos_token_id": 2,
                        "bos_token_id": 1,
                    },
                    vision_config={**CLIP_TOWER, "image_size": 16, "patch_size": 8},
                    projection_dim=24,
                ),
            ),
            image_and_text,
            {"layernorm": 5 + 6, "l2norm": 2},
        ),
    }
