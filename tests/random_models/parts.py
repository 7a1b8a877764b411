"""Random layers: each is a Layer and the code that calls it."""

from __future__ import annotations

from random import Random

from .program import Layer

EPS = (1e-5, 1e-3, 0.1)
PADDING_MODES = ("zeros", "reflect", "replicate", "replicate", "circular")


def convolution(
    rng: Random,
    name: str,
    channels: int,
    spatial: tuple[int, ...],
    *,
    same_shape: bool = False,
) -> tuple[Layer, str, int, tuple[int, ...]]:
    """The layer, its call, and the channels and the spatial size of what comes out."""
    dims = len(spatial)
    if not same_shape and rng.random() < 0.3 and max(spatial) <= (8 if dims == 1 else 6):
        return _transposed(rng, name, channels, spatial)
    groups = rng.choice([g for g in (1, 1, 2, 2, channels) if channels % g == 0])
    out = channels if same_shape else groups * rng.choice([1, 2] if groups > 2 else [1, 2, 3])
    out = out + 1 if out == 1 else out
    kernel = rng.choice([1, 3] if same_shape else [1, 2, 3]) if min(spatial) >= 4 else 1
    dilation = 2 if kernel == 2 and rng.random() < 0.3 else 1
    mode = rng.choice(PADDING_MODES)
    padding: int | str = rng.choice([0, "valid", 1 if kernel > 1 or rng.random() < 0.2 else 0])
    stride = rng.choice([1, 1, 2]) if min(spatial) >= 5 else 1
    if same_shape or (stride == 1 and kernel == 3 and rng.random() < 0.15):
        padding, stride = "same", 1
    if padding == "valid":
        mode = "zeros"
    settings = {
        "dims": dims,
        "channels": channels,
        "transposed": False,
        "groups": groups,
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "mode": mode,
    }
    bias = rng.random() < 0.5
    arguments = (
        f"stride={stride}, padding={padding!r}, dilation={dilation}, groups={groups}, bias={bias}, "
        f"padding_mode={mode!r}"
    )
    make = f"nn.Conv{dims}d({channels}, {out}, {kernel}, {arguments})"
    span = dilation * (kernel - 1)
    margin = span if padding == "same" else 0 if padding == "valid" else 2 * int(padding)
    size = tuple((s + margin - span - 1) // stride + 1 for s in spatial)
    kind = f"conv{dims}d"
    if mode == "zeros" and rng.random() < 0.12:
        layer, call = _functional(kind, name, (out, channels // groups, *[kernel] * dims), bias)
        call = f"F.{kind}({call}, {stride}, {padding!r}, {dilation}, {groups})"
        return _with(layer, settings), call, out, size
    layer = Layer(name, kind, (f"self.{name} = {make}",), _roles(bias))
    return _with(layer, settings, bias_size=out), f"self.{name}({{0}})", out, size


def branch(name: str, channels: int, dims: int, kernel: int) -> tuple[Layer, str]:
    """A convolution as parallel branches have them: dense, zero padding, of the input's size."""
    padding = kernel // 2
    make = f"nn.Conv{dims}d({channels}, {channels}, {kernel}, padding={padding}, bias=False)"
    settings = {"dims": dims, "channels": channels, "transposed": False, "groups": 1}
    settings |= {"kernel": kernel, "stride": 1, "dilation": 1, "padding": padding}
    settings |= {"mode": "zeros", "bias_size": channels}
    layer = Layer(name, f"conv{dims}d", (f"self.{name} = {make}",), ("weight",), settings)
    return layer, f"self.{name}({{0}})"


def batch_norm(name: str, channels: int, spatial: tuple[int, ...]) -> Layer:
    """A plain batch norm."""
    make = f"self.{name} = nn.BatchNorm{max(len(spatial), 1)}d({channels})"
    roles = ("weight", "bias", "running_mean", "running_var")
    return Layer(name, "batchnorm", (make,), roles, {"after": len(spatial), "eps": 1e-5})


def _transposed(
    rng: Random, name: str, channels: int, spatial: tuple[int, ...]
) -> tuple[Layer, str, int, tuple[int, ...]]:
    dims = len(spatial)
    groups = rng.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
    out = groups * rng.choice([1, 2])
    out = out + 1 if out == 1 else out
    kernel, stride = rng.choice([(1, 1), (2, 2), (3, 1)])
    padding = 1 if kernel == 3 else 0
    settings = {
        "dims": dims,
        "channels": channels,
        "transposed": True,
        "groups": groups,
        "kernel": kernel,
    }
    settings |= {"stride": stride, "dilation": 1, "padding": padding, "mode": "zeros"}
    bias = rng.random() < 0.5
    arguments = f"stride={stride}, padding={padding}, groups={groups}, bias={bias}"
    make = f"nn.ConvTranspose{dims}d({channels}, {out}, {kernel}, {arguments})"
    size = tuple((s - 1) * stride - 2 * padding + kernel for s in spatial)
    layer = Layer(name, f"convtranspose{dims}d", (f"self.{name} = {make}",), _roles(bias))
    return _with(layer, settings, bias_size=out), f"self.{name}({{0}})", out, size


def linear(rng: Random, name: str, features: int, out: int) -> tuple[Layer, str]:
    """A linear layer, or a call on the model's own weight."""
    bias = rng.random() < 0.5
    if rng.random() < 0.12:
        layer, call = _functional("linear", name, (out, features), bias)
        return layer, f"F.linear({call})"
    make = f"self.{name} = nn.Linear({features}, {out}, bias={bias})"
    layer = Layer(name, "linear", (make,), _roles(bias), {"bias_size": out})
    return layer, f"self.{name}({{0}})"


def embedding(name: str, vocabulary: int, width: int) -> tuple[Layer, str]:
    make = f"self.{name} = nn.Embedding({vocabulary}, {width})"
    return Layer(name, "embedding", (make,), ("weight",)), f"self.{name}({{0}})"


def channel_norm(rng: Random, name: str, channels: int, spatial: tuple[int, ...]) -> Layer:
    """A norm whose channels are axis 1."""
    dims = len(spatial)
    kinds = ["batchnorm"] * 9 + ["syncbatchnorm", "frozenbatchnorm"] * 3
    if dims:
        kinds += ["instancenorm_statistics", "instancenorm"] * 4 + ["groupnorm"] * 3
        kinds += ["batchnorm_no_statistics", "batchnorm_train"]
    kind = rng.choice(kinds) if rng.random() < 0.96 else "affine"
    eps = rng.choice(EPS)
    affine = rng.random() < 0.85
    settings = {"after": dims, "eps": eps}
    statistics = ("running_mean", "running_var")
    roles: tuple[str, ...] = ("weight", "bias") if affine else ()
    batch = f"nn.BatchNorm{max(dims, 1)}d({channels}, eps={eps}, affine={affine}"
    if kind in ("batchnorm", "batchnorm_train"):
        make = f"{batch})"
        roles += statistics
    elif kind == "batchnorm_no_statistics":
        make = f"{batch}, track_running_stats=False)"
    elif kind == "syncbatchnorm":
        make = f"nn.SyncBatchNorm({channels}, eps={eps}, affine={affine})"
        roles += statistics
    elif kind == "frozenbatchnorm":
        make = f"FrozenBatchNorm({channels}, {dims}, {eps})"
        roles = ("weight", "bias", *statistics)
    elif kind == "affine":
        make = f"Affine({channels}, {dims})"
        roles = ("weight", "bias")
    elif kind == "groupnorm":
        groups = rng.choice([g for g in (1, 2, channels) if channels % g == 0])
        make = f"nn.GroupNorm({groups}, {channels}, eps={eps}, affine={affine})"
        settings["groups"] = groups
    else:
        tracks = kind == "instancenorm_statistics"
        more = f"affine={affine}, track_running_stats={tracks}"
        make = f"nn.InstanceNorm{dims}d({channels}, eps={eps}, {more})"
        roles += statistics if tracks else ()
    return Layer(name, kind, (f"self.{name} = {make}",), roles, settings)


def last_axis_norm(rng: Random, name: str, size: int) -> Layer:
    """A norm over the last axis, or an affine of it."""
    kind = rng.choice(["layernorm"] * 4 + ["rmsnorm", "rmsnorm_hand", "rmsnorm_one"])
    kind = "affine" if rng.random() < 0.02 else kind
    eps = rng.choice(EPS)
    affine = kind in ("rmsnorm_hand", "rmsnorm_one", "affine") or rng.random() < 0.88
    classes = {
        "layernorm": f"nn.LayerNorm({size}, eps={eps}, elementwise_affine={affine})",
        "rmsnorm": f"nn.RMSNorm({size}, eps={eps}, elementwise_affine={affine})",
        "rmsnorm_hand": f"HandRMSNorm({size}, {eps})",
        "rmsnorm_one": f"OnePlusRMSNorm({size}, {eps})",
        "affine": f"Affine({size}, 0)",
    }
    roles: tuple[str, ...] = ("weight", "bias") if kind in ("layernorm", "affine") else ("weight",)
    make = f"self.{name} = {classes[kind]}"
    return Layer(name, kind, (make,), roles if affine else (), {"after": 0, "eps": eps})


def functional_batch_norm(
    rng: Random, name: str, channels: int, spatial: tuple[int, ...]
) -> tuple[Layer, str]:
    """F.batch_norm on the model's own tensors, and its call."""
    eps = rng.choice(EPS)
    lines = [f"self.{name}_{r} = nn.Parameter(torch.ones({channels}))" for r in ("weight", "bias")]
    lines += [
        f'self.register_buffer("{name}_{r}", torch.ones({channels}))'
        for r in ("running_mean", "running_var")
    ]
    roles = ("weight", "bias", "running_mean", "running_var")
    settings = {"after": len(spatial), "eps": eps}
    layer = Layer(name, "batchnorm", tuple(lines), roles, settings, functional=True)
    own = {role: f"self.{name}_{role}" for role in roles}
    statistics = f"{own['running_mean']}, {own['running_var']}"
    if rng.random() < 0.5:
        call = f"F.batch_norm({{0}}, {statistics}, {own['weight']}, {own['bias']}, eps={eps})"
    else:
        call = (
            f"F.batch_norm({{0}}, {statistics}, weight={own['weight']}, bias={own['bias']}, "
            f"training=False, eps={eps})"
        )
    return layer, call


def _functional(kind: str, name: str, shape: tuple[int, ...], bias: bool) -> tuple[Layer, str]:
    lines = [f"self.{name}_weight = nn.Parameter(torch.ones({shape}))"]
    if bias:
        lines.append(f"self.{name}_bias = nn.Parameter(torch.ones({shape[0]}))")
    call = f"{{0}}, self.{name}_weight, {f'self.{name}_bias' if bias else None}"
    return Layer(name, kind, tuple(lines), _roles(bias), functional=True), call


def _roles(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _with(layer: Layer, settings: dict[str, object], **more: object) -> Layer:
    return Layer(
        layer.name, layer.kind, layer.lines, layer.roles, {**settings, **more}, layer.functional
    )
