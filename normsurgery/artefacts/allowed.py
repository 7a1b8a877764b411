"""Which names of a pickle are known to be harmless, and what may be done with them.

Packages are matched by their exact first name: `transformers_modules` is not `transformers`.
"""

from __future__ import annotations

# Packages that ship models. Of torch itself only the parts that hold layers are importable.
PACKAGES = frozenset(
    [
        "diffusers",
        "e3nn",
        "efficientnet_pytorch",
        "monai",
        "normsurgery",
        "open_clip",
        "segmentation_models_pytorch",
        "sentence_transformers",
        "timm",
        "torch",
        "torch_geometric",
        "torchaudio",
        "torchvision",
        "transformers",
        "ultralytics",
    ]
)
TORCH_LAYERS = ("torch.nn", "torch.ao.nn")

# Classes whose state is code, or whose loading starts something, by the module that holds them.
CODE = {
    "torch.fx": "is a fx.GraphModule: its state is code. Save the model it was traced from",
    "torch.jit": "is a TorchScript module: its state is code. Save the model it was made from",
    "torch._dynamo": "is a torch.compile'd model: its state is code. Save `model._orig_mod`",
    "torch.export": "is a part of an exported program. Save it with torch.export.save as .pt2",
    "torch.nn.parallel.distributed": (
        "is DistributedDataParallel: loading it needs a process group. Save `model.module` instead"
    ),
    "torch.distributed": "starts a process group when it is loaded. Save the plain model instead",
}

STORAGES = frozenset(
    f"torch.{kind}Storage"
    for kind in [
        "Float",
        "Double",
        "Half",
        "BFloat16",
        "Long",
        "Int",
        "Short",
        "Char",
        "Byte",
        "Bool",
        "ComplexDouble",
        "ComplexFloat",
        "QInt8",
        "QInt32",
        "QUInt8",
        "QUInt4x2",
        "QUInt2x4",
    ]
) | {"torch.storage.UntypedStorage", "torch.storage.TypedStorage"}

TENSOR_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
REBUILD_WITH_STATE = "torch._tensor._rebuild_from_type_v2"
TENSOR_REBUILDERS = frozenset(
    f"torch._utils.{name}"
    for name in [
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_qtensor",
        "_rebuild_sparse_tensor",
        "_rebuild_meta_tensor_no_storage",
    ]
)

# Constructors of plain values: they compute nothing but the value.
VALUES = frozenset(
    [
        "builtins.bytearray",
        "builtins.complex",
        "builtins.frozenset",
        "builtins.range",
        "builtins.set",
        "builtins.slice",
        "collections.Counter",
        "collections.OrderedDict",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
    ]
)
DEFAULT_DICT = "collections.defaultdict"
ENCODE = "_codecs.encode"
PARTIAL = "functools.partial"

# Types that appear as values, for example as the factory of a defaultdict.
PLAIN_TYPES = frozenset(
    f"builtins.{name}"
    for name in [
        "bool",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "set",
        "str",
        "tuple",
    ]
)

# Pure functions that ordinary models keep as attributes.
_ACTIVATIONS = [
    "celu",
    "elu",
    "gelu",
    "glu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "log_softmax",
    "logsigmoid",
    "mish",
    "normalize",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
]
FUNCTIONS = frozenset(
    [f"torch.nn.functional.{name}" for name in _ACTIVATIONS]
    + [f"torch._C._nn.{name}" for name in _ACTIVATIONS]
    + ["torchvision.ops.boxes.box_iou"]
)

# What torch itself wraps some hooks in; the hook inside is judged as any other.
WRAPPED_HOOK = "torch.nn.modules.module._WrappedHook"

# Plain classes with plain state, created without `__init__`.
PLAIN_CLASSES = frozenset(
    [
        "argparse.Namespace",
        WRAPPED_HOOK,
        "types.SimpleNamespace",
        "torch.nn.utils.weight_norm.WeightNorm",
        "torch.nn.utils.spectral_norm.SpectralNorm",
        "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
        "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.Matcher",
    ]
)

# Configurations: objects that only hold settings. Their subclasses in an allowed package count.
CONFIGURATIONS = frozenset(
    {
        "transformers.configuration_utils.PreTrainedConfig",
        "transformers.configuration_utils.PretrainedConfig",
        "transformers.generation.configuration_utils.GenerationConfig",
    }
)
