"""Checkpoints that are not plain weights, told by their files and their tensors' names."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path

from normsurgery.errors import CannotRead

# What a tensor's name (or the type it is stored in) says about the whole checkpoint.
_BY_NAME = (
    (r"(^|\.)lora_[A-Za-z]+(\.|$)", "an adapter (LoRA)", "Merge it into its model first"),
    (r"\.(weight\.)?(absmax|quant_map|nested_absmax|nested_quant_map)$", "bitsandbytes", ""),
    (r"\.quant_state(\.|$)", "bitsandbytes", ""),
    (r"\.(SCB|weight_format)$", "bitsandbytes (int8)", ""),
    (r"\.g_idx$", "GPTQ", ""),
    (r"\.(qweight|qzeros)$", "AWQ", ""),
    (r"\.weight_scale(_inv)?$", "a quantized checkpoint (fp8 or the like)", ""),
    (r"\.weight_packed$", "a quantized checkpoint (compressed-tensors)", ""),
    (r"_proj_(blocks|scales)$", "a quantized checkpoint (mxfp4)", ""),
)
_DEQUANTIZE = "Fold the checkpoint it was quantized from, then quantize again"


def refuse_foreign_files(directory: Path) -> None:
    """Raises CannotRead where the directory holds no plain safetensors weights."""
    if (directory / "adapter_config.json").is_file():
        raise CannotRead(
            f"{directory}: adapter_config.json says that this is an adapter. Merge it into its "
            "model first (merge_and_unload of peft), then save that."
        )
    if any(directory.glob("*.safetensors")):
        return
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    if ggufs:
        raise CannotRead(
            f"{directory}: holds GGUF ({ggufs[0]}). Fold the checkpoint it was converted from, "
            "then convert again."
        )
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin*"))
    if pickles:
        raise CannotRead(
            f"{directory}: holds {pickles[0]} and no safetensors. Load the model and convert it "
            "with save_pretrained(directory, safe_serialization=True)."
        )


def refuse_foreign_tensors(path: Path, codes: Mapping[str, str], known: Container[str]) -> None:
    """codes: key -> safetensors' name of its type. Raises CannotRead with the first bad key."""
    for pattern, what, cure in _BY_NAME:
        for key in codes:
            if re.search(pattern, key):
                raise CannotRead(_sentence(path, key, what, cure))
    for key, code in codes.items():
        if code.startswith("F8"):
            raise CannotRead(_sentence(path, f"{key} ({code})", "fp8", ""))
        if code not in known:
            raise CannotRead(
                f"{path}: {key} is stored as {code}, which has no arithmetic here. {_DEQUANTIZE}."
            )


def _sentence(path: Path, key: str, what: str, cure: str) -> str:
    return f"{path}: {key} is a tensor of {what}, not a plain weight. {cure or _DEQUANTIZE}."
