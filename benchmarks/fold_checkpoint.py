"""By hand: fold a checkpoint of 12 GB in little memory, against a plain copy, and kill it thrice.

    python benchmarks/fold_checkpoint.py FOLDER [--tied] [--gigabytes 12]

FOLDER needs three times the checkpoint's size. A synthetic Llama (random bf16, sharded) is written
there; its files are copied; it is folded, with the proof; then it is folded again by runs that are
killed with -9 at random points of the write phase, and the last one is let finish: the files of
both outputs must have the same hashes. Printed: peak resident memory of the process tree, seconds
and throughput of each phase, and the verdict.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KEY_HEADS, WORDS = 4096, 14336, 32, 8, 128256
KILLS = 3
SHARD_LAYERS = 4
PEAK_ALLOWED = 2e9
PAUSE = 0.05


def shapes(layers: int, tied: bool) -> Iterator[dict[str, tuple[int, ...]]]:
    """Per shard: key -> shape."""
    keys = HIDDEN // HEADS * KEY_HEADS
    yield {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for first in range(0, layers, SHARD_LAYERS):
        shard: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + SHARD_LAYERS, layers)):
            at = f"model.layers.{layer}"
            shard |= {
                f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
                f"{at}.self_attn.k_proj.weight": (keys, HIDDEN),
                f"{at}.self_attn.v_proj.weight": (keys, HIDDEN),
                f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
                f"{at}.mlp.gate_proj.weight": (INNER, HIDDEN),
                f"{at}.mlp.up_proj.weight": (INNER, HIDDEN),
                f"{at}.mlp.down_proj.weight": (HIDDEN, INNER),
                f"{at}.input_layernorm.weight": (HIDDEN,),
                f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            }
        yield shard
    last = {"model.norm.weight": (HIDDEN,)}
    yield last if tied else {**last, "lm_head.weight": (WORDS, HIDDEN)}


def write_checkpoint(directory: Path, gigabytes: float, tied: bool) -> None:
    """A Llama of at least this size, with random weights and gains far from one."""
    layers = 1
    while sum(size(shard) for shard in shapes(layers, tied)) < gigabytes * 1e9:
        layers += 1
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": WORDS,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }
    (directory / "config.json").write_text(json.dumps(config))
    made = list(shapes(layers, tied))
    index: dict[str, str] = {}
    torch.manual_seed(0)
    for number, shard in enumerate(made, 1):
        name = f"model-{number:05d}-of-{len(made):05d}.safetensors"
        tensors = {key: drawn(shape) for key, shape in shard.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    total = sum(size(shard) for shard in made)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def size(shard: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in shard.values())


def drawn(shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16)
    return values.uniform_(0.3, 2.0) if len(shape) == 1 else values.normal_(0, 0.02)


def worker(source: str, out: str) -> None:
    """Fold in this process, telling each phase on stdout."""
    from normsurgery.folding.checkpoint import fold_checkpoint
    from normsurgery.folding.ground import Choices

    def tell(what: str, done: int, total: int) -> None:
        print(json.dumps([what, done, total, time.time()]), flush=True)

    report = fold_checkpoint(source, out, choices=Choices(), progress=tell)
    print(json.dumps(["folded", len(report.plan.steps), len(report.plan.skips), time.time()]))
    assert report.evidence is not None and report.evidence.passed


def started(source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", str(source), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def resident(pid: int) -> int:
    """Bytes of memory that a process and those it started have now."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def watched(source: Path, out: Path) -> tuple[int, list[list[object]]]:
    """Run to the end: the peak of the tree's resident memory, and what the worker told."""
    log = out.with_suffix(".log")
    with log.open("w") as file:
        command = [sys.executable, __file__, "--worker", str(source), str(out)]
        process = subprocess.Popen(command, stdout=file)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(PAUSE)
    if process.returncode:
        sys.exit(f"the run failed with {process.returncode}")
    return peak, [json.loads(line) for line in log.read_text().splitlines()]


def killed(source: Path, out: Path, share: float) -> None:
    """Start, and kill with -9 once this share of the bytes is written."""
    process = started(source, out)
    assert process.stdout is not None
    for line in process.stdout:
        what, done, total, _ = json.loads(line)
        if what == "write" and done >= share * total:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert not out.exists(), "a killed run left an output"


def hashes(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(directory))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return found


def copied(source: Path, out: Path) -> float:
    """Seconds of a plain copy, on the disk."""
    begun = time.monotonic()
    shutil.copytree(source, out)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    taken = time.monotonic() - begun
    shutil.rmtree(out)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.worker:
        worker(str(given.folder), given.out)
        return
    source, out, again = (given.folder / name for name in ("source", "folded", "resumed"))
    if not source.exists():
        write_checkpoint(source, given.gigabytes, given.tied)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    plain = copied(source, given.folder / "copy")
    print(f"{nbytes / 1e9:.2f} GB; plain copy {plain:.1f} s, {nbytes / plain / 1e6:.0f} MB/s")
    begun = time.time()
    peak, told = watched(source, out)
    times = {what: [float(t) for w, _, _, t in told if w == what] for what in ("write", "verify")}
    first = min(times["write"])
    writing = max(times["write"]) - first
    print(f"planned in {first - begun:.1f} s; folded, left: {told[-1][1:3]}")
    print(
        f"write {writing:.1f} s, {nbytes / writing / 1e6:.0f} MB/s, {plain / writing:.2f} of copy"
    )
    print(f"proof {max(times['verify']) - max(times['write']):.1f} s; peak {peak / 1e9:.2f} GB")
    wanted = hashes(out)
    shutil.rmtree(out)
    chance = random.Random(given.seed)
    for share in sorted(chance.random() for _ in range(KILLS)):
        killed(source, again, share)
        print(f"killed at {share:.0%}")
    watched(source, again)
    same = hashes(again) == wanted
    shutil.rmtree(again)
    print(f"resumed: hashes {'equal' if same else 'DIFFER'}")
    if not same or peak > PEAK_ALLOWED or 2 * plain < writing:
        sys.exit("FAILED")


if __name__ == "__main__":
    main()
