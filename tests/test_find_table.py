"""On real architectures `find` reports exactly the norms that run.

Three accounts of the same models are compared: the literal counts of `transformers_zoo`, the ATen
recorder, and `find`. The literals and the recorder know nothing of normsurgery.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from recorder import record
from torch import nn
from transformers_zoo import models

import normsurgery as ns

ROWS = models()
each_model = pytest.mark.parametrize("name", list(ROWS))


@contextmanager
def renamed(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Every class of the model, torch's own included, under random names while inside.

    A model is to be built again inside: transformers keeps what it wants to know of a class under
    the name that the class had when a model of it was made.
    """
    letters = random.Random(seed)

    def word() -> str:
        return "".join(letters.choices(string.ascii_lowercase, k=9))

    classes = sorted(
        {type(module) for module in model.modules()},
        key=lambda cls: f"{cls.__module__}.{cls.__qualname__}",
    )
    names = [(cls, cls.__name__, cls.__qualname__, cls.__module__) for cls in classes]
    try:
        for cls in classes:
            cls.__name__ = cls.__qualname__ = word().title()
            cls.__module__ = word()
        yield
    finally:
        for cls, name, qualified, module in names:
            cls.__name__, cls.__qualname__, cls.__module__ = name, qualified, module


def without_names(survey: ns.Survey, model: nn.Module) -> dict[str, Any]:
    """A survey as JSON, less the words in it that are names of the model's classes."""
    data = survey.to_json()
    del data["model"], data["inputs"]
    for site in data["sites"]:
        del site["class_name"]
        if site["call"] is not None:
            del site["call"]["function"]
    names = "|".join({re.escape(type(module).__name__) for module in model.modules()})
    for skip in data["skips"]:
        skip["reason"] = re.sub(rf"\b({names})\b", "a class", skip["reason"])
    return data


@cache
def survey_of(name: str) -> ns.Survey:
    """What find says of a row; found once for all tests that ask."""
    return ns.find(ROWS[name].build(), ROWS[name].inputs())


def sites_by_kind(survey: ns.Survey, attach: str) -> dict[str, int]:
    return dict(Counter(site.kind for site in survey.sites if site.attach == attach))


def calls_by_kind(survey: ns.Survey) -> dict[str, int | None]:
    calls: Counter[str] = Counter()
    for site in survey.sites:
        if site.attach == "norm":
            assert site.calls, f"{site.label} was found but never seen to run"
            calls[site.kind] += site.calls
    return dict(calls)


@each_model
def test_the_recorder_counts_what_a_reader_counts(name: str) -> None:
    row = ROWS[name]
    run = record(row.build(), row.inputs())
    assert run.sites() == row.sites
    assert run.calls() == row.expected_calls()
    assert run.sites("weight") == row.weights
    assert run.offset_one() == row.offset_one


@each_model
def test_find_reports_exactly_the_norms_that_run(name: str) -> None:
    row, survey = ROWS[name], survey_of(name)
    assert len(survey.skips) == row.skips, survey.skips
    assert sites_by_kind(survey, "norm") == row.within_forwards(row.sites)
    assert calls_by_kind(survey) == row.within_forwards(row.expected_calls())


@each_model
def test_find_tells_a_scale_of_one_plus_weight_from_weight(name: str) -> None:
    offsets = Counter(site.settings.get("weight_offset", 0.0) for site in survey_of(name).sites)
    assert offsets[1.0] == ROWS[name].offset_one
    assert set(offsets) <= {0.0, 1.0}


@each_model
def test_find_sets_norms_of_weights_apart(name: str) -> None:
    weights = ROWS[name].weights
    registered = {kind: count for kind, count in weights.items() if kind in ns.names()}
    assert sites_by_kind(survey_of(name), "weight") == registered


@each_model
def test_find_does_not_read_names(name: str) -> None:
    model = ROWS[name].build()
    as_named = without_names(survey_of(name), model)
    with renamed(model):
        again = ROWS[name].build()
        as_renamed = without_names(ns.find(again, ROWS[name].inputs()), again)
    assert as_renamed == as_named


def test_renaming_really_renames_and_really_restores() -> None:
    model = ROWS["llama"].build()
    before = [(type(m).__name__, type(m).__module__) for m in model.modules()]
    with renamed(model):
        inside = [(type(m).__name__, type(m).__module__) for m in model.modules()]
        assert not {name for name, _ in before} & {name for name, _ in inside}
        assert not {place for _, place in before} & {place for _, place in inside}
        again = ROWS["llama"].build()
        assert record(again, ROWS["llama"].inputs()).sites() == ROWS["llama"].sites
    assert [(type(m).__name__, type(m).__module__) for m in model.modules()] == before


def test_the_table_has_every_architecture_that_must_hold() -> None:
    wanted = {
        *("resnet", "bit", "efficientnet", "convnext", "convnextv2", "swin", "segformer", "levit"),
        *(
            "dinov2",
            "bert",
            "deberta",
            "gpt2",
            "gpt_neox",
            "opt",
            "t5",
            "llama",
            "mistral",
            "qwen3",
        ),
        *("gemma2", "gemma3", "olmo2", "phi3", "cohere", "nemotron", "stablelm", "mamba", "mamba2"),
        *("wav2vec2", "whisper"),
    }
    assert not wanted - set(ROWS)
    assert not [name for name in wanted if ROWS[name].skips or ROWS[name].outside]
