"""Language models that decode."""

from __future__ import annotations

import transformers as hf

from transformers_zoo.row import DECODER, ENCODER, Row, built, text_input


def decoders() -> dict[str, Row]:
    gpt = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "gpt2": Row(
            built(
                hf.GPT2LMHeadModel,
                hf.GPT2Config(**gpt, n_embd=32, n_layer=2, n_head=4, n_positions=32),
            ),
            text_input,
            {"layernorm": 2 * 2 + 1},
        ),
        "gpt_neox": Row(
            built(
                hf.GPTNeoXForCausalLM,
                hf.GPTNeoXConfig(**gpt, **ENCODER, max_position_embeddings=32),
            ),
            text_input,
            {"layernorm": 2 * 2 + 1},
        ),
        "opt": Row(
            built(
                hf.OPTForCausalLM,
                hf.OPTConfig(
                    **gpt,
                    hidden_size=32,
                    ffn_dim=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=32,
                    word_embed_proj_dim=32,
                ),
            ),
            text_input,
            {"layernorm": 2 * 2 + 1},
        ),
        "llama": Row(
            built(hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER)),
            text_input,
            {"rmsnorm": 2 * 2 + 1},
        ),
        "mistral": Row(
            built(hf.MistralForCausalLM, hf.MistralConfig(**DECODER, head_dim=8)),
            text_input,
            {"rmsnorm": 2 * 2 + 1},
        ),
        "mixtral": Row(
            built(
                hf.MixtralForCausalLM,
                hf.MixtralConfig(**DECODER, head_dim=8, num_local_experts=3, num_experts_per_tok=2),
            ),
            text_input,
            {"rmsnorm": 2 * 2 + 1},
        ),
        # Two more per layer: queries and keys.
        "qwen3": Row(
            built(hf.Qwen3ForCausalLM, hf.Qwen3Config(**DECODER, head_dim=8)),
            text_input,
            {"rmsnorm": 2 * 4 + 1},
        ),
        "qwen3_moe": Row(
            built(
                hf.Qwen3MoeForCausalLM,
                hf.Qwen3MoeConfig(
                    **DECODER,
                    head_dim=8,
                    num_experts=3,
                    num_experts_per_tok=2,
                    moe_intermediate_size=16,
                    decoder_sparse_step=1,
                ),
            ),
            text_input,
            {"rmsnorm": 2 * 4 + 1},
        ),
        # One layer of linear attention: two norms of `1 + weight`, queries and keys divided by
        # their length in a function outside any module, one gated norm of plain weight. One layer
        # of full attention: two, and queries and keys. A final one.
        "qwen3_next": Row(
            built(
                hf.Qwen3NextForCausalLM,
                hf.Qwen3NextConfig(
                    **DECODER,
                    head_dim=8,
                    layer_types=["linear_attention", "full_attention"],
                    linear_key_head_dim=8,
                    linear_value_head_dim=8,
                    linear_num_key_heads=2,
                    linear_num_value_heads=4,
                    num_experts=3,
                    num_experts_per_tok=2,
                    moe_intermediate_size=16,
                    shared_expert_intermediate_size=16,
                ),
            ),
            text_input,
            {"rmsnorm": 3 + 4 + 1, "l2norm": 2},
            offset_one=2 + 4 + 1,
            outside={"l2norm": 2},
            skips=1,
            gated=1,
        ),
        # Four per layer: before and after attention and feed-forward.
        "gemma2": Row(
            built(hf.Gemma2ForCausalLM, hf.Gemma2Config(**DECODER, head_dim=8)),
            text_input,
            {"rmsnorm": 2 * 4 + 1},
            offset_one=2 * 4 + 1,
        ),
        # Six per layer: those of Gemma2, queries and keys.
        "gemma3": Row(
            built(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**DECODER, head_dim=8)),
            text_input,
            {"rmsnorm": 2 * 6 + 1},
            offset_one=2 * 6 + 1,
        ),
        # After attention, after feed-forward, queries and keys.
        "olmo2": Row(
            built(hf.Olmo2ForCausalLM, hf.Olmo2Config(**DECODER)),
            text_input,
            {"rmsnorm": 2 * 4 + 1},
        ),
        # Without weights.
        "olmo": Row(
            built(hf.OlmoForCausalLM, hf.OlmoConfig(**DECODER)),
            text_input,
            {"layernorm": 2 * 2 + 1},
        ),
        "phi3": Row(
            built(hf.Phi3ForCausalLM, hf.Phi3Config(**DECODER)), text_input, {"rmsnorm": 2 * 2 + 1}
        ),
        # One per layer and a final one, and with `use_qk_norm` one each for queries and keys.
        "cohere": Row(
            built(hf.CohereForCausalLM, hf.CohereConfig(**DECODER, use_qk_norm=True)),
            text_input,
            {"layernorm": 2 * 3 + 1},
        ),
        # LayerNorm of `1 + weight`.
        "nemotron": Row(
            built(hf.NemotronForCausalLM, hf.NemotronConfig(**DECODER)),
            text_input,
            {"layernorm": 2 * 2 + 1},
            offset_one=2 * 2 + 1,
        ),
        # Two per layer and a final one; one norm for each of four query and two key heads.
        "stablelm": Row(
            built(hf.StableLmForCausalLM, hf.StableLmConfig(**DECODER, qk_layernorm=True)),
            text_input,
            {"layernorm": 2 * (2 + 4 + 2) + 1},
        ),
        # Two per layer and a final one with weights. In the layer that uses rotary positions one
        # module without weights, called twice, divides queries and keys by their root mean square.
        "llama4": Row(
            built(
                hf.Llama4ForCausalLM,
                hf.Llama4TextConfig(
                    **DECODER,
                    intermediate_size_mlp=48,
                    head_dim=8,
                    num_local_experts=3,
                    interleave_moe_layer_step=2,
                    no_rope_layers=[1, 0],
                    use_qk_norm=True,
                ),
            ),
            text_input,
            {"rmsnorm": 2 * 2 + 1 + 1},
            calls={"rmsnorm": 2 * 2 + 1 + 2},
        ),
        "mamba": Row(
            built(
                hf.MambaForCausalLM,
                hf.MambaConfig(**gpt, hidden_size=32, state_size=4, num_hidden_layers=2),
            ),
            text_input,
            {"rmsnorm": 2 + 1},
        ),
        # One per layer, the gated one inside each mixer, a final one.
        "mamba2": Row(
            built(
                hf.Mamba2ForCausalLM,
                hf.Mamba2Config(
                    **gpt,
                    hidden_size=32,
                    state_size=4,
                    num_hidden_layers=2,
                    num_heads=8,
                    head_dim=8,
                    n_groups=2,
                    chunk_size=4,
                ),
            ),
            text_input,
            {"rmsnorm": 2 * 2 + 1},
            gated=2,
        ),
    }
