"""Encoders of text and sound, with a decoder or without."""

from __future__ import annotations

import transformers as hf

from transformers_zoo.row import ENCODER, Row, built, pair, spectrogram, text_input, waveform


def encoders() -> dict[str, Row]:
    text = {**ENCODER, "vocab_size": 97, "max_position_embeddings": 32}
    return {
        # embeddings, two per layer, the prediction head.
        "bert": Row(
            built(hf.BertForMaskedLM, hf.BertConfig(**text)),
            text_input,
            {"layernorm": 1 + 2 * 2 + 1},
        ),
        # The same; all but the head's are written out in DebertaLayerNorm.
        "deberta": Row(
            built(
                hf.DebertaForMaskedLM,
                hf.DebertaConfig(
                    **text, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
                ),
            ),
            text_input,
            {"layernorm": 1 + 2 * 2 + 1},
        ),
        # The same, and one for the relative positions, which normalises an embedding table.
        "deberta_v2": Row(
            built(
                hf.DebertaV2ForMaskedLM,
                hf.DebertaV2Config(
                    **text,
                    relative_attention=True,
                    pos_att_type=["c2p", "p2c"],
                    norm_rel_ebd="layer_norm",
                    type_vocab_size=0,
                ),
            ),
            text_input,
            {"layernorm": 1 + 2 * 2 + 1},
            weights={"layernorm": 1},
        ),
        # encoder: two per layer and final; decoder: three per layer and final.
        "t5": Row(
            built(
                hf.T5ForConditionalGeneration,
                hf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
            ),
            pair,
            {"rmsnorm": (2 * 2 + 1) + (2 * 3 + 1)},
        ),
        # The first convolution's group norm; feature projection; after positions; two per layer.
        "wav2vec2": Row(
            built(
                hf.Wav2Vec2ForCTC,
                hf.Wav2Vec2Config(
                    **ENCODER,
                    vocab_size=32,
                    conv_dim=(16, 16),
                    conv_stride=(5, 4),
                    conv_kernel=(10, 8),
                    num_conv_pos_embeddings=8,
                    num_conv_pos_embedding_groups=2,
                ),
            ),
            waveform,
            {"groupnorm": 1, "layernorm": 1 + 1 + 2 * 2},
            weights={"weightnorm": 1},
        ),
        # encoder: two per layer and final; decoder: three per layer and final.
        "whisper": Row(
            built(
                hf.WhisperForConditionalGeneration,
                hf.WhisperConfig(
                    vocab_size=97,
                    num_mel_bins=8,
                    d_model=32,
                    encoder_layers=2,
                    decoder_layers=2,
                    encoder_attention_heads=4,
                    decoder_attention_heads=4,
                    encoder_ffn_dim=48,
                    decoder_ffn_dim=48,
                    max_source_positions=10,
                    max_target_positions=16,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                ),
            ),
            spectrogram,
            {"layernorm": (2 * 2 + 1) + (2 * 3 + 1)},
        ),
    }
