"""The options of all verbs, each declared once: a name, a type, a help line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

MODEL_HELP = (
    "A .pt, .pth or .ckpt file (a whole model, or a dict around one), a .pt2 exported program, "
    "a checkpoint directory, or package.module:factory."
)

# What to operate on.
Model = Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)]
SIDE_HELP = MODEL_HELP.replace("a .pt2 exported program, ", "a .pt2 exported program, .onnx, ")
ModelA = Annotated[str, Argument(metavar="A", help="The original. " + SIDE_HELP)]
ModelB = Annotated[
    str,
    Argument(
        metavar="B",
        help="What to compare with it. The same forms, or a run saved by --save elsewhere.",
    ),
]
Norm = Annotated[str, Argument(metavar="NORM", help="A norm of `normsurgery norms`, or its alias.")]
Inputs = Annotated[
    list[str] | None,
    Option(
        "--input",
        metavar="SPEC",
        help="Example input: 1x3x224x224, int64[1,16]<30522, name=SPEC, or a tensor file. "
        "Repeat it for more. Inferred when left out.",
    ),
]
Arg = Annotated[
    list[str] | None,
    Option("--arg", metavar="NAME=VALUE", help="An argument of the factory. Repeatable."),
]
Weights = Annotated[
    Path | None, Option("--weights", metavar="FILE", help="A state_dict to load into the model.")
]
Trust = Annotated[
    list[str] | None,
    Option(
        "--trust",
        metavar="PACKAGE",
        help="Also accept module classes of this package, installed or in the current folder, in a "
        "pickled model. Repeatable.",
    ),
]
Attach = Annotated[
    Literal["norm", "weight", "layer"], Option("--attach", help="Which places to list.")
]

# Which sites, and what becomes of them.
To = Annotated[str | None, Option("--to", metavar="NORM", help="The norm to put in.")]
Rules = Annotated[
    list[str] | None,
    Option(
        "--rule",
        metavar="RULE",
        help="'batchnorm -> groupnorm num_groups=16'. Repeat it: the first that matches counts.",
    ),
]
Plan = Annotated[
    Path | None, Option("--plan", metavar="FILE", help="Carry out a plan saved by --save-plan.")
]
Kind = Annotated[
    str | None, Option("--kind", metavar="NORM", help="Only sites of this kind, as in batchnorm.")
]
Only = Annotated[
    list[str] | None,
    Option(
        "--only",
        metavar="GLOB",
        help="Only sites whose path matches, or of this index. Repeatable.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    Option("--exclude", metavar="GLOB", help="Leave out what matches this. Repeatable."),
]
Options = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="An option of the norm, as in num_groups=16."),
]
Init = Annotated[
    Literal["copy", "reset"],
    Option(
        "--init",
        help="Carry weight, bias and eps over where both norms have them, or start fresh.",
    ),
]
Require = Annotated[
    str | None,
    Option(
        "--require",
        metavar="FIDELITY",
        help="Refuse what promises less: identical, forward, eval or retrain.",
    ),
]
Calibrate = Annotated[
    list[str] | None,
    Option(
        "--calibrate",
        metavar="SPEC",
        help="A batch, spelled as for --input, on which the running statistics of the new norms "
        "are estimated. Repeatable.",
    ),
]

# How norms are folded.
RMSNorm = Annotated[
    bool,
    Option(
        "--rmsnorm",
        help="Centre what writes to a residual stream, so that its LayerNorms become RMSNorms "
        "without weight.",
    ),
]
Pad = Annotated[
    Literal["refuse", "explicit"],
    Option(
        "--pad",
        help="Where a shift meets zero padding: refuse, or pad explicitly with the constant that "
        "makes it exact.",
    ),
]
Untie = Annotated[
    bool, Option("--untie", help="Copy a tied weight that is in the way, and say what that costs.")
]
Prune = Annotated[
    bool, Option("--prune", help="Remove the Identities that are left, where nothing needs them.")
]
Drop = Annotated[
    bool,
    Option("--drop", help="Leave the neutral tensors of folded norms out of a checkpoint."),
]
Call = Annotated[
    list[str] | None,
    Option(
        "--call",
        metavar="NAME=VALUE[,NAME=VALUE]",
        help="A further call for which the fold must hold: the inputs and these arguments by name.",
    ),
]
Verify = Annotated[
    bool,
    Option("--verify/--no-verify", help="Measure the result against a float64 run of MODEL."),
]
Time = Annotated[
    bool,
    Option("--time/--no-time", help="Count the norms that run, and time both models."),
]

# What comes out.
DryRun = Annotated[bool, Option("--dry-run", help="Show the plan and write nothing but it.")]
SavePlan = Annotated[
    Path | None, Option("--save-plan", metavar="FILE", help="Write the plan as JSON.")
]
Out = Annotated[
    Path | None,
    Option("--out", "-o", metavar="OUT", help="Where to write. Beside the input when left out."),
]
Force = Annotated[bool, Option("--force", help="Replace what is already there.")]

Report = Annotated[
    Path | None,
    Option(
        "--report",
        metavar="FILE",
        help="Also write a report: a page to look at (.html), Markdown (.md) or JSON (.json).",
    ),
]

# How a model is exported.
Dynamic = Annotated[
    list[str] | None,
    Option(
        "--dynamic",
        metavar="[INPUT.]AXIS:NAME",
        help="An axis that may have any size: 0:batch for every input, input_ids.1:sequence for "
        "one. Repeatable.",
    ),
]
Opset = Annotated[
    int | None,
    Option("--opset", metavar="N", help="18 to 24. What the model needs when left out."),
]
DType = Annotated[
    Literal["fp16", "bf16"] | None,
    Option("--dtype", help="Round the weights; verified against the model as it is."),
]
FoldFirst = Annotated[
    bool, Option("--fold/--no-fold", help="Fold norms into their neighbours before.")
]
AllowBatchStats = Annotated[
    bool,
    Option(
        "--allow-batch-stats",
        help="Export a BatchNorm that has no running statistics, so that each sample's result "
        "depends on its batch.",
    ),
]
ExternalData = Annotated[
    bool | None,
    Option(
        "--external-data/--no-external-data",
        help="Weights in a file beside the graph. Above 2 GB when left out.",
    ),
]

# How two models are compared.
On = Annotated[
    str,
    Option("--on", metavar="RUNNER,...", help="Where to run: cpu, cuda, and tensorrt for ONNX."),
]
RequireRunner = Annotated[
    list[str] | None,
    Option("--require-runner", metavar="RUNNER", help="No pass unless it ran there. Repeatable."),
]
Intermediates = Annotated[
    bool,
    Option(
        "--intermediates/--no-intermediates",
        help="Judge every value inside an ONNX graph as well.",
    ),
]
Blame = Annotated[
    bool, Option("--blame", help="Where they differ, name the first operation that diverges.")
]
Save = Annotated[
    Path | None,
    Option(
        "--save",
        metavar="FILE",
        help="Write what B computed as .safetensors, to be judged on another machine.",
    ),
]
Modes = Annotated[
    str, Option("--mode", metavar="MODE,...", help="Which modes to compare: eval, train, or both.")
]
Gradients = Annotated[bool, Option("--gradients", help="Compare gradients as well.")]
Hard = Annotated[
    bool, Option("--hard/--no-hard", help="Also run inputs made to bring numerical faults out.")
]
Seed = Annotated[int, Option("--seed", help="From which the inputs are drawn.")]
Memory = Annotated[
    int | None,
    Option("--memory", metavar="BYTES", help="For the float64 run. What is free when left out."),
]

# For every verb.
AsJson = Annotated[bool, Option("--json", help="Print JSON on stdout instead of tables.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
