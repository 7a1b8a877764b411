"""ONNX's own node tests of its normalization operators, computed by the formulas of our norms.

The tests are those that the installed onnx brings; their names and their number stand below, so
that a version that adds, renames or drops one is seen. None is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from normsurgery import spec
from normsurgery.verifying.judge import judge

AXES = (
    *("4d_axis0", "4d_axis_negative_4", "4d_axis1", "4d_axis_negative_3", "4d_axis2"),
    *("4d_axis_negative_2", "4d_axis3", "4d_axis_negative_1", "default_axis"),
    *("2d_axis0", "2d_axis_negative_2", "2d_axis1", "2d_axis_negative_1"),
    *("3d_axis0_epsilon", "3d_axis_negative_3_epsilon", "3d_axis1_epsilon"),
    *("3d_axis_negative_2_epsilon", "3d_axis2_epsilon", "3d_axis_negative_1_epsilon"),
)
TESTS: Mapping[str, tuple[str, ...]] = {
    "BatchNormalization": (
        "test_batchnorm_example",
        "test_batchnorm_epsilon",
        "test_batchnorm_example_training_mode",
        "test_batchnorm_epsilon_training_mode",
    ),
    "LayerNormalization": tuple(f"test_layer_normalization_{axis}" for axis in AXES),
    "GroupNormalization": ("test_group_normalization_example", "test_group_normalization_epsilon"),
    "InstanceNormalization": ("test_instancenorm_example", "test_instancenorm_epsilon"),
    "RMSNormalization": tuple(f"test_rms_normalization_{axis}" for axis in AXES),
    "LpNormalization": (
        "test_l2normalization_axis_0",
        "test_l2normalization_axis_1",
        "test_l1normalization_axis_0",
        "test_l1normalization_axis_1",
        "test_l1normalization_axis_last",
        "test_lpnormalization_default",
    ),
    "MeanVarianceNormalization": ("test_mvn",),
    "LRN": ("test_lrn", "test_lrn_default"),
}
NUMBER = 55

Attributes = Mapping[str, Any]
Arrays = list[Tensor]


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """Every node test of onnx whose graph is one of the operators above, by name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    return {
        case.name: case
        for case in collected
        if case.model is not None and {node.op_type for node in case.model.graph.node} & set(TESTS)
    }


def test_the_list_is_that_of_onnx(cases: dict[str, Any]) -> None:
    assert set(cases) == {name for names in TESTS.values() for name in names}
    assert len(cases) == NUMBER
    assert all(len(case.model.graph.node) == len(case.data_sets) == 1 for case in cases.values())


@pytest.mark.parametrize("name", [name for names in TESTS.values() for name in names])
def test_our_formula_gives_what_onnx_expects(cases: dict[str, Any], name: str) -> None:
    node, inputs, outputs = parts(cases[name])
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    ours = FORMULAS[node.op_type](inputs, attributes)
    verdict = judge(outputs[0], ours, rounded=FORMULAS[node.op_type](moved(inputs), attributes))
    assert verdict.passed is True, verdict
    assert verdict.compared == outputs[0].numel() > 0


def parts(case: Any) -> tuple[onnx.NodeProto, Arrays, Arrays]:
    (inputs, outputs), node = case.data_sets[0], case.model.graph.node[0]
    assert node.op_type in TESTS
    return node, [torch.from_numpy(x) for x in inputs], [torch.from_numpy(y) for y in outputs]


def moved(inputs: Arrays) -> Arrays:
    """The first input by one rounding of float32, every other element up: numpy's float32 result,
    which onnx expects, may be as far from the truth as that."""
    x = inputs[0]
    up = (torch.arange(x.numel()) % 2 == 0).reshape(x.shape)
    towards = torch.where(up, torch.inf, -torch.inf).float()
    return [torch.nextafter(x, towards), *inputs[1:]]


def computed(
    kind: str, x: Tensor, settings: Mapping[str, Any], training: bool = False, **tensors: Tensor
) -> Tensor:
    """The float64 formula of a registered norm."""
    doubles = {role: tensor.double() for role, tensor in tensors.items()}
    return spec.get(kind).formula(x.double(), doubles, settings, training)


def batchnorm(inputs: Arrays, attributes: Attributes) -> Tensor:
    x, weight, bias, mean, variance = inputs
    settings = {"eps": attributes.get("epsilon", 1e-5), "channel_axis": 1, "features": x.shape[1]}
    return computed(
        "batchnorm",
        x,
        settings,
        bool(attributes.get("training_mode", 0)),
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=variance,
    )


def over_last(x: Tensor, attributes: Attributes) -> dict[str, Any]:
    """Settings of a norm over the dimensions from `axis` on."""
    sizes = list(x.shape)[attributes.get("axis", -1) :]
    eps = attributes.get("epsilon", 1e-5)
    return {"eps": eps, "channel_axis": -1, "features": sizes[-1], "normalized_shape": sizes}


def layernorm(inputs: Arrays, attributes: Attributes) -> Tensor:
    x, weight, bias = inputs
    return computed("layernorm", x, over_last(x, attributes), weight=weight, bias=bias)


def rmsnorm(inputs: Arrays, attributes: Attributes) -> Tensor:
    x, weight = inputs
    return computed("rmsnorm", x, over_last(x, attributes), weight=weight)


def groupnorm(inputs: Arrays, attributes: Attributes) -> Tensor:
    x, weight, bias = inputs
    settings = {
        "eps": attributes.get("epsilon", 1e-5),
        "channel_axis": 1,
        "features": x.shape[1],
        "num_groups": attributes["num_groups"],
    }
    return computed("groupnorm", x, settings, weight=weight, bias=bias)


def instancenorm(inputs: Arrays, attributes: Attributes) -> Tensor:
    x, weight, bias = inputs
    settings = {"eps": attributes.get("epsilon", 1e-5), "channel_axis": 1, "features": x.shape[1]}
    return computed("instancenorm", x, settings, weight=weight, bias=bias)


def l2norm(inputs: Arrays, attributes: Attributes) -> Tensor:
    """ONNX gives 0 for a vector of length 0, which any eps does."""
    axis = attributes.get("axis", -1)
    settings = {"eps": 1e-12, "dim": axis, "channel_axis": axis, "p": attributes.get("p", 2)}
    return computed("l2norm", inputs[0], settings)


def meanvariance(inputs: Arrays, attributes: Attributes) -> Tensor:
    """Over all axes but the second, without eps: a batch norm in training, or an instance norm of
    the batch laid end to end."""
    axes = list(attributes.get("axes", (0, 2, 3)))
    assert axes == [0, 2, 3]
    x = inputs[0]
    settings = {"eps": 0.0, "channel_axis": 1, "features": x.shape[1]}
    return computed("batchnorm", x, settings, training=True)


def localresponsenorm(inputs: Arrays, attributes: Attributes) -> Tensor:
    settings = {
        "eps": 0.0,
        "channel_axis": 1,
        "size": attributes["size"],
        "alpha": attributes.get("alpha", 1e-4),
        "beta": attributes.get("beta", 0.75),
        "k": attributes.get("bias", 1.0),
    }
    return computed("localresponsenorm", inputs[0], settings)


FORMULAS: Mapping[str, Callable[[Arrays, Attributes], Tensor]] = {
    "BatchNormalization": batchnorm,
    "LayerNormalization": layernorm,
    "GroupNormalization": groupnorm,
    "InstanceNormalization": instancenorm,
    "RMSNormalization": rmsnorm,
    "LpNormalization": l2norm,
    "MeanVarianceNormalization": meanvariance,
    "LRN": localresponsenorm,
}


@pytest.mark.parametrize("name", TESTS["BatchNormalization"][2:])
def test_onnx_trains_its_running_variance_with_the_biased_one(
    cases: dict[str, Any], name: str
) -> None:
    """The disagreement is ONNX's: its running mean is torch's, its running variance is torch's
    only once n / (n - 1), the difference between the two estimates, is taken out."""
    node, inputs, outputs = parts(cases[name])
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    x, weight, bias, mean, variance = (tensor.double() for tensor in inputs)
    kept = float(attributes.get("momentum", 0.9))
    norm = nn.BatchNorm2d(x.shape[1], attributes.get("epsilon", 1e-5), momentum=1 - kept).double()
    norm.load_state_dict(
        {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance},
        strict=False,
    )
    norm.train()(x)
    assert norm.running_mean is not None and norm.running_var is not None
    assert judge(outputs[1], norm.running_mean).passed is True
    assert judge(outputs[2], norm.running_var).passed is False
    n = x.numel() // x.shape[1]
    biased = kept * variance + (norm.running_var - kept * variance) * (n - 1) / n
    assert judge(outputs[2], biased).passed is True


@pytest.mark.parametrize("operator", TESTS)
def test_a_wrong_setting_is_seen(cases: dict[str, Any], operator: str) -> None:
    """The comparison is no formality: each operator has a test that a wrong formula fails."""
    wrong = {
        "LpNormalization": {"p": 3},
        "LRN": {"bias": 2.0},
        "MeanVarianceNormalization": {"epsilon": 0.1},
    }
    failed = []
    for name in TESTS[operator]:
        node, inputs, outputs = parts(cases[name])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        changed = {**attributes, **wrong.get(operator, {"epsilon": 0.3})}
        if operator == "MeanVarianceNormalization":
            ours = instancenorm([inputs[0], torch.ones(3), torch.zeros(3)], changed)
        else:
            ours = FORMULAS[operator](inputs, changed)
        failed.append(judge(outputs[0], ours).passed is False)
    assert any(failed)
