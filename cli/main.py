"""The command line: one short function per verb, which parses, calls the verb and renders."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import typer

from . import options as o
from . import render, render_onnx
from .opening import (
    batches,
    example_inputs,
    keep_plan,
    named_values,
    open_model,
    output_path,
)
from .proving import blame, export, verify
from .session import one_sentence_errors, progress, quiet_libraries

app = typer.Typer(
    name="normsurgery",
    help="Find, swap, fold, export and verify the normalization layers of a trained model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def find(
    model: o.Model,
    inputs: o.Inputs = None,
    attach: o.Attach = "norm",
    arguments: o.Arg = None,
    weights: o.Weights = None,
    trust: o.Trust = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """List every normalization of MODEL.

    Modules, functional calls, and formulas written out in a forward, each with how it is known;
    and what looks like one and could not be proven, with the reason. Of an .onnx file, its norm
    operators.
    """
    with one_sentence_errors(debug):
        if model.endswith(".onnx"):
            render_onnx.norms(model, as_json)
            raise typer.Exit
        import normsurgery as ns

        loaded = open_model(model, arguments, weights, trust, meta=True)
        example = example_inputs(inputs, loaded.model)
        with progress("finding the norms"):
            survey = ns.find(loaded.model, example, attach=attach)
        render.survey(survey, as_json)


@app.command()
def swap(
    model: o.Model,
    to: o.To = None,
    rules: o.Rules = None,
    plan: o.Plan = None,
    kind: o.Kind = None,
    only: o.Only = None,
    exclude: o.Exclude = None,
    options: o.Options = None,
    init: o.Init = "copy",
    require: o.Require = None,
    calibrate: o.Calibrate = None,
    inputs: o.Inputs = None,
    dry_run: o.DryRun = False,
    save_plan: o.SavePlan = None,
    out: o.Out = None,
    force: o.Force = False,
    arguments: o.Arg = None,
    weights: o.Weights = None,
    trust: o.Trust = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Replace normalizations of MODEL.

    The new model is written beside the old one, with a report of what was promised and measured.
    """
    with one_sentence_errors(debug):
        import normsurgery as ns

        from . import swapping

        wanted: dict[str, Any] = {
            "rules": rules or (),
            "kind": kind,
            "only": only or (),
            "exclude": exclude or (),
            "options": named_values(options),
            "init": init,
            "require": require,
        }
        ready = swapping.ready_plan(to, plan, save_plan, **wanted)
        loaded = open_model(model, arguments, weights, trust)
        target = output_path(loaded, swapping.suffix(to), out, force=force or dry_run)
        example = example_inputs(inputs, loaded.model)
        if dry_run:
            made = ready or swapping.planned(loaded.model, to, example, **wanted)
            keep_plan(made, save_plan)
            return render.plan(made, as_json)
        given: Any = loaded.model
        with progress("swapping the norms and measuring what was promised"):
            changed, report = ns.swap(
                given,
                to,
                plan=ready,
                calibrate=batches(calibrate),
                inputs=example,
                **wanted,
            )
        keep_plan(report.plan, save_plan)
        written = swapping.save(loaded, changed, report, target, force=force)
        following = swapping.next_command(loaded, written, named_values(arguments), trust or ())
        render.report(report, as_json, written, following)
        raise typer.Exit(report.exit_code)


@app.command()
def fold(
    model: o.Model,
    rmsnorm: o.RMSNorm = False,
    pad: o.Pad = "refuse",
    untie: o.Untie = False,
    prune: o.Prune = False,
    drop: o.Drop = False,
    calls: o.Call = None,
    plan: o.Plan = None,
    kind: o.Kind = None,
    only: o.Only = None,
    exclude: o.Exclude = None,
    inputs: o.Inputs = None,
    verify: o.Verify = True,
    time: o.Time = True,
    dry_run: o.DryRun = False,
    save_plan: o.SavePlan = None,
    out: o.Out = None,
    force: o.Force = False,
    arguments: o.Arg = None,
    weights: o.Weights = None,
    trust: o.Trust = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Remove normalizations of MODEL by absorbing them into their neighbours, exactly.

    Every norm is folded, and proven to be, or left where it is with the reason. The result computes
    what MODEL computes in eval mode. Where nothing can be folded nothing is written, unless to the
    file that --out names. A checkpoint directory is streamed and need not fit into memory.
    """
    with one_sentence_errors(debug):
        from . import folding, render_fold

        selection = {"kind": kind, "only": only or (), "exclude": exclude or ()}
        asked = folding.Request(
            model=model,
            wanted={
                **selection,
                "rmsnorm": rmsnorm,
                "pad": pad,
                "untie": untie,
                "prune": prune,
                "calls": [named_values(text.split(",")) for text in calls or ()],
                "verify": verify,
                "time": time,
            },
            plan=folding.ready_plan(plan, save_plan, selection),
            inputs=inputs,
            drop=drop,
            dry_run=dry_run,
            out=out,
            force=force,
            arguments=arguments,
            weights=weights,
            trust=trust,
        )
        fold_it = folding.fold_directory if Path(model).is_dir() else folding.fold_model
        made, report, written = fold_it(asked)
        keep_plan(made, save_plan)
        if report is None:
            return render_fold.plan(made, as_json)
        render_fold.report(report, as_json, written)
        raise typer.Exit(report.exit_code)


app.command()(export)
app.command()(verify)
app.command()(blame)


@app.command()
def norms(as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """List every norm that a site can become."""
    with one_sentence_errors(debug):
        from normsurgery.spec import broken_plugins

        from . import catalog

        entries, broken = catalog.entries(), broken_plugins()
        render.norms(entries, broken, as_json)


@app.command()
def explain(norm: o.Norm, as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """Tell what a norm computes.

    And when to use it, what a swap to it keeps, and what becomes of it in inference and in ONNX.
    """
    with one_sentence_errors(debug):
        from normsurgery.spec import canonical

        from . import catalog

        name = canonical(norm)
        entry = next(entry for entry in catalog.entries() if entry.name == name)
        render.explanation(entry, catalog.documentation(name), as_json)


def run() -> None:
    """Run the command line on `sys.argv`; ends the process with its exit code."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly where `| head` has seen enough
    quiet_libraries()
    app(prog_name="normsurgery")


if __name__ == "__main__":
    run()
