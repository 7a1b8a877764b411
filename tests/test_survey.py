"""A Survey as text, as HTML and as JSON."""

from __future__ import annotations

import json

import torch
from torch import nn
from torch.nn import functional as F

import normsurgery as ns


class Mixed(nn.Module):
    """A norm module, a functional norm, and a formula that no registered norm has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(self.linear(self.norm(x)), dim=-1)
        cubes = (x.abs() + x.pow(2).mean(-1, keepdim=True)).sqrt()
        return x / (cubes.mean(-1, keepdim=True) + x.pow(2).mean(-1, keepdim=True)).sqrt()


def survey() -> ns.Survey:
    torch.manual_seed(0)
    return ns.find(Mixed(), (torch.randn(2, 5, 8),))


def test_text_and_html_name_every_site_and_skip() -> None:
    found = survey()
    assert {site.kind for site in found} == {"layernorm", "l2norm"}
    for text in (str(found), found._repr_html_()):
        for site in found:
            assert site.label in text and site.kind in text
    assert "<table>" in found._repr_html_()
    plan = ns.plan(found, Mixed(), "rmsnorm", kind="layernorm")
    assert "rmsnorm" in plan._repr_html_() and "not selected" in plan._repr_html_()


def test_html_escapes_what_a_class_is_called() -> None:
    """A class may have any name at all; a notebook must not run it."""
    hostile = type("<script>", (Mixed,), {})
    model = nn.Sequential(hostile())
    html = ns.find(model, (torch.randn(2, 5, 8),))._repr_html_()
    assert "<script>" not in html


def test_json_both_ways() -> None:
    found = survey()
    assert ns.Survey.from_json(json.loads(json.dumps(found.to_json()))) == found
