"""The verbs that prove what they say: export, verify and blame."""

from __future__ import annotations

from typing import Any

import typer

from . import options as o
from . import render_onnx
from .session import one_sentence_errors, progress


def export(
    model: o.Model,
    inputs: o.Inputs = None,
    dynamic: o.Dynamic = None,
    opset: o.Opset = None,
    dtype: o.DType = None,
    fold: o.FoldFirst = True,
    allow_batch_stats: o.AllowBatchStats = False,
    verify: o.Verify = True,
    on: o.On = "cpu",
    require_runner: o.RequireRunner = None,
    hard: o.Hard = True,
    seed: o.Seed = 0,
    external_data: o.ExternalData = None,
    out: o.Out = None,
    report: o.Report = None,
    force: o.Force = False,
    arguments: o.Arg = None,
    weights: o.Weights = None,
    trust: o.Trust = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Write MODEL as ONNX, and prove that the file computes what MODEL computes.

    MODEL is exported in eval mode. Every output, every stage on the way and every value inside the
    graph is held against a float64 run of MODEL.
    """
    with one_sentence_errors(debug):
        from . import exporting

        wanted: dict[str, Any] = {
            "dynamic": exporting.dynamic_axes(dynamic),
            "opset": opset,
            "dtype": dtype,
            "fold": fold,
            "allow_batch_stats": allow_batch_stats,
            "verify": verify,
            "on": tuple(on.split(",")),
            "require_runner": tuple(require_runner or ()),
            "hard": hard,
            "seed": seed,
            "external_data": external_data,
        }
        asked = exporting.Request(
            model, wanted, inputs, out, report, force, arguments, weights, trust
        )
        done = exporting.export_model(asked)
        render_onnx.exported(done, as_json)
        raise typer.Exit(done.report.exit_code)


def verify(
    a: o.ModelA,
    b: o.ModelB,
    inputs: o.Inputs = None,
    on: o.On = "cpu",
    require_runner: o.RequireRunner = None,
    modes: o.Modes = "eval",
    gradients: o.Gradients = False,
    hard: o.Hard = True,
    intermediates: o.Intermediates = True,
    blame: o.Blame = False,
    seed: o.Seed = 0,
    memory: o.Memory = None,
    save: o.Save = None,
    report: o.Report = None,
    force: o.Force = False,
    arguments: o.Arg = None,
    weights: o.Weights = None,
    trust: o.Trust = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Tell whether B computes what A computes.

    Both are held against a float64 run of A: B may err about as much as A itself does.
    """
    with one_sentence_errors(debug):
        import normsurgery as ns

        from . import verifying

        verifying.check_files(save, report, force=force)
        first, second = verifying.open_sides(a, b, arguments, weights, trust)
        example = verifying.example_of(inputs, first)
        with progress(f"comparing {a} and {b}"):
            evidence = ns.verify(
                first,
                second,
                example,
                on=on.split(","),
                require_runner=require_runner or (),
                modes=modes.split(","),
                gradients=gradients,
                hard=hard,
                intermediates=intermediates,
                blame=blame,
                seed=seed,
                memory=memory,
                save=save,
            )
        command = verifying.command(a, b, evidence, arguments, weights, trust)
        written = verifying.written(evidence, f"verify {b} against {a}", command, save, report)
        render_onnx.verified(evidence, as_json, written)
        raise typer.Exit(0 if evidence.passed else 1)


def blame(
    a: o.ModelA,
    b: o.ModelB,
    inputs: o.Inputs = None,
    hard: o.Hard = True,
    seed: o.Seed = 0,
    arguments: o.Arg = None,
    weights: o.Weights = None,
    trust: o.Trust = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Name the first operation of B that computes something else than A does.

    B is an .onnx file; or a plan saved by --save-plan, or a report, whose steps are then tried on
    A, and those that break their promise are named. The exit code is 1 where there is one.
    """
    with one_sentence_errors(debug):
        import normsurgery as ns

        from . import verifying

        first, second = verifying.open_suspects(a, b, arguments, weights, trust)
        example = verifying.example_of(inputs, first)
        with progress(f"looking for what differs between {a} and {b}"):
            found = ns.blame(first, second, example, hard=hard, seed=seed)
        raise typer.Exit(1 if render_onnx.blamed(found, as_json) else 0)
