"""The registry: names in any spelling, third parties' norms, clashes, plugins that do not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from normsurgery import spec
from normsurgery.errors import UnknownName, UsageError
from normsurgery.testing import Check, norm_checks

PLUGIN = Path(__file__).with_name("plugin")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("groupnorm", "groupnorm"),
        ("GroupNorm", "groupnorm"),
        ("group_norm", "groupnorm"),
        ("group-norm", "groupnorm"),
        ("GN", "groupnorm"),
        ("group", "groupnorm"),
        ("bn", "batchnorm"),
        ("LayerNorm2d", "layernorm2d"),
        ("layernorm-chw", "layernorm_chw"),
        ("EvoNorm_S0", "evonorm-s0"),
        ("L2", "l2norm"),
        ("none", "identity"),
    ],
)
def test_a_norm_is_known_by_any_spelling(written: str, meant: str) -> None:
    assert spec.canonical(written) == meant


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'gruopnorm'.*Did you mean 'groupnorm'.*identity"):
        spec.get("gruopnorm")


def test_every_row_of_the_table_is_the_norm_it_says() -> None:
    """Rows are read from sources: one that is made of no literal would mislead `norms`."""
    for name in spec.names():
        found, row = spec.get(name), spec.row(name)
        assert (found.name, *row) == (name, found.summary, found.attach, found.also)


def test_no_class_belongs_to_two_norms() -> None:
    owners: dict[type, str] = {}
    for norm in spec.specs():
        for kind in norm.classes:
            assert owners.setdefault(kind, norm.name) == norm.name


def run_with(paths: list[Path], code: str) -> Any:
    """The JSON that `code` prints in a fresh interpreter with `paths` on its path."""
    search = os.pathsep.join(str(path) for path in (*paths, ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def installed(folder: Path, name: str, points: dict[str, str]) -> Path:
    """What an installer leaves of a distribution: its metadata with the entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[{spec.ENTRY_POINT_GROUP}]\n{lines}")
    return folder


def real_plugin(folder: Path) -> list[Path]:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    points = project["entry-points"][spec.ENTRY_POINT_GROUP]
    return [installed(folder, project["name"], points), PLUGIN]


def test_an_installed_package_adds_its_norm(tmp_path: Path) -> None:
    code = (
        "import json, torch, normsurgery.spec as s\n"
        "n = s.get('MeanAbs_Norm')\n"
        "print(json.dumps([s.names()[-1], n.name, n.owner, s.get('groupnorm').owner,"
        " dict(s.broken_plugins())]))"
    )
    answer = run_with(real_plugin(tmp_path), code)
    assert answer == ["meanabsnorm", "meanabsnorm", "meanabsnorm", "normsurgery", {}]


def test_a_clash_names_both_owners_and_is_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "imposter.py").write_text(
        "from dataclasses import replace\n"
        "from meanabsnorm import NORM\n"
        "NORM = replace(NORM, name='Group_Norm')\n"
    )
    paths = [*real_plugin(tmp_path), installed(tmp_path, "imposter", {"it": "imposter:NORM"})]
    answer = run_with(
        paths,
        "import json, normsurgery.spec as s\n"
        "print(json.dumps([s.names(), dict(s.broken_plugins())]))",
    )
    known, broken = answer
    assert "meanabsnorm" in known
    assert "Group_Norm" not in known
    assert list(broken) == ["imposter"]
    assert "by normsurgery and by imposter" in broken["imposter"]


def test_a_plugin_that_does_not_import_is_listed_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "shattered.py").write_text("raise RuntimeError('glass')\n")
    paths = [*real_plugin(tmp_path), installed(tmp_path, "shattered", {"it": "shattered:NORM"})]
    answer = run_with(
        paths,
        "import json, normsurgery.spec as s\n"
        "print(json.dumps(['meanabsnorm' in s.names(), dict(s.broken_plugins())]))",
    )
    assert answer == [True, {"shattered": "RuntimeError: glass"}]


def test_names_need_no_torch() -> None:
    answer = run_with(
        [],
        "import sys, json, normsurgery.spec as s\n"
        "print(json.dumps([s.names()[0], 'torch' in sys.modules]))",
    )
    assert answer == ["batchnorm", False]


def test_register_refuses_a_taken_name_in_any_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))
    from dataclasses import replace

    from meanabsnorm import NORM

    monkeypatch.setattr(spec, "_registry", spec._Registry())
    assert spec.register(NORM).owner == "register()"
    assert spec.get("meanabs") is spec.get("MeanAbsNorm")
    with pytest.raises(UsageError, match=r"by register\(\) and by somebody"):
        spec.register(replace(NORM, name="MeanAbs-Norm"), owner="somebody")


def plugin_checks() -> tuple[Check, ...]:
    sys.path.insert(0, str(PLUGIN))
    try:
        from meanabsnorm import NORM
    finally:
        sys.path.remove(str(PLUGIN))
    return norm_checks(NORM)


@pytest.mark.parametrize("check", plugin_checks(), ids=lambda check: check.name.replace(" ", "-"))
def test_the_public_checks_serve_a_third_party(check: Check) -> None:
    check()
