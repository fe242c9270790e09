"""Which scheme one module has: the description names its type, the stored tensors give its sizes.

type in the description, codes stored      -> the scheme of that type
FLOAT or not listed, plain floats stored   -> Unquantized
anything else                              -> an error naming both
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.ledger import missing_error
from quant_core.spec import CHANNEL, FormatMatch, Grain, LayerDesc, TensorInfo, Unquantized, group
from quant_plugin_modelslim_npu.config import WEIGHTS, MsConfig
from quant_plugin_modelslim_npu.detect import ATTENTION, KV_LEAVES, KV_RULE
from quant_plugin_modelslim_npu.kinds import KINDS, Kind
from quant_plugin_modelslim_npu.scheme import BLOCK, FLAT, MsScheme, input_spec, weight_spec

__all__ = ["scheme_for"]

_PLUGIN = "modelslim_npu"
Leaves = Mapping[str, TensorInfo]


def _paths(layer: LayerDesc) -> list[str]:
    """Stored module paths: one, or one for each expert of a stack."""
    if layer.experts and "{expert}" in layer.stored:
        return [layer.stored.replace("{expert}", str(e)) for e in layer.experts]
    return [layer.stored]


def _mismatch(checkpoint: Checkpoint, config: MsConfig, tensor: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(checkpoint.path)}: {printable(tensor)!r} {found}, expected the weights and "
        f"{config.file} to agree. Use the description that belongs to these weights.",
        code="Q-CKPT-MISMATCH",
        path=checkpoint.path,
        tensor=tensor,
        actual=found,
        plugin=_PLUGIN,
    )


def _weight(leaves: Leaves) -> TensorInfo | None:
    return next((leaves[name] for name in WEIGHTS if name in leaves), None)


def _unquantized(config: MsConfig, path: str, leaves: Leaves) -> Unquantized:
    if path.rpartition(".")[2] in ATTENTION:
        held = frozenset({"scale", "offset"} & leaves.keys())
        return Unquantized(rule=KV_RULE, evidence=", ".join(sorted(held)), ignored=held)
    said = "FLOAT" if path in config.floats else "not listed"
    cache = frozenset(KV_LEAVES & leaves.keys())
    if cache:  # the rule must name why these are left out
        return Unquantized(rule=KV_RULE, evidence=f"{said} in {config.file}", ignored=cache)
    return Unquantized(rule=f"{said} in the description", evidence=config.file)


def _type(
    config: MsConfig, layer: LayerDesc, modules: Mapping[str, Leaves], checkpoint: Checkpoint
) -> str:
    """The one type of all matrices of a member; "" = float."""
    found: dict[str, str] = {}
    for path, leaves in modules.items():
        text = config.types.get(path, "")
        weight = _weight(leaves)
        if weight is not None and len(weight.shape) > 1:
            plain = weight.dtype in FLOAT_DTYPES
            if text and plain:
                raise _mismatch(checkpoint, config, weight.name, f"is {weight.dtype}, not {text}")
            if not text and not plain:
                said = "FLOAT" if path in config.floats else "not listed"
                raise _mismatch(checkpoint, config, weight.name, f"is {weight.dtype} but {said}")
        found.setdefault(text, path)
    if len(found) > 1:
        raise ConfigError(
            f"{config.file}: experts of {printable(layer.name)!r} have the types "
            f"{', '.join(t or 'FLOAT' for t in found)} ({', '.join(map(printable, found.values()))}"
            "), expected one type for a whole stack. Quantize all experts alike.",
            code="Q-CFG-CONFLICT",
            path=config.file,
            tensor=layer.name,
            actual=sorted(found),
            plugin=_PLUGIN,
        )
    return next(iter(found))


def _bad_shape(info: TensorInfo, expected: str) -> LayoutError:
    return LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} has shape {info.shape}, expected "
        f"{expected}. The tensor was cut or belongs to another type; export it again.",
        code="Q-LAYOUT-SHAPE",
        path=info.file,
        tensor=info.name,
        expected=expected,
        actual=info.shape,
        plugin=_PLUGIN,
    )


def _group_of(config: MsConfig, info: TensorInfo, kind: Kind, k: int) -> int:
    """Columns of one scale, 0 for one scale a row, from the stored scales [N, G]."""
    groups = info.shape[1]
    size = BLOCK if kind.mx else config.group_size
    if not kind.mx and groups == 1:
        return 0
    if size and -(-k // size) == groups:
        return size
    implied = k // groups if groups and k % groups == 0 else 0
    if implied and not kind.mx and not config.one_group_size:
        return implied
    hint = f" The shape implies group_size={implied}." if implied else ""
    raise LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} has {groups} groups, expected "
        f"{-(-k // size) if size else 'a divisor'} for in_features={k}, group_size={size}.{hint} "
        f"Check group_size in {config.file}.",
        code="Q-LAYOUT-GROUP",
        path=info.file,
        tensor=info.name,
        expected=size,
        actual=groups,
        plugin=_PLUGIN,
    )


def _columns(kind: Kind, stored: int) -> int:
    return {"fp4": 2, "int4_words": 8}.get(kind.store, 1) * stored


def _sizes(
    config: MsConfig, kind: Kind, leaves: Leaves, weight: TensorInfo
) -> tuple[tuple[int, int], int, bool]:
    """(N, K), columns of one scale (0 = a row), whether rows are stored in pairs."""
    if len(weight.shape) != 2:
        raise _bad_shape(weight, "two axes")
    n, k = weight.shape[0], _columns(kind, weight.shape[1])
    if kind.acts == "static":
        return (n, k), 0, False
    scale = leaves["weight_scale"]
    grouped = leaves.get("weight_scale_second", scale)
    for info in (scale, grouped):
        if len(info.shape) != 2 or 0 in info.shape:
            raise _bad_shape(info, "two axes, rows and groups")
    pairs = kind.store == "int4" and scale.shape[0] == 2 * n
    n = 2 * n if pairs else n
    return (n, k), _group_of(config, grouped, kind, k), pairs


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> MsScheme | Unquantized:
    """The scheme of one member.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (description and stored tensors disagree),
            ``Q-TENSOR-MISSING`` (too little stored to tell the sizes).
        ConfigError: ``Q-CFG-CONFLICT`` (experts of several types).
        LayoutError: ``Q-LAYOUT-GROUP``, ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-DTYPE``.
    """
    config: MsConfig = match.config
    modules = {p: checkpoint.modules.get(p, {}) for p in _paths(layer)}
    text = _type(config, layer, modules, checkpoint)
    path, leaves = next(iter(modules.items()))
    if not text:
        return _unquantized(config, path, leaves)
    kind = KINDS[text]
    weight = leaves.get("weight_packed" if kind.store == "int4_words" else "weight")
    needed = [] if kind.acts == "static" else ["weight_scale"]
    needed += ["left_trans", "right_trans"] if kind.flat else []
    lost = [f"{path}.{leaf}" for leaf in needed if leaf not in leaves]
    if weight is None or lost:
        names = lost if weight is not None else [f"{path}.weight", *lost]
        raise missing_error(checkpoint, names, f"{layer.name}, of type {text}")
    shape, size, pairs = _sizes(config, kind, leaves, weight)
    second = "weight_scale_second" in leaves and kind.acts != "static"
    dtypes = {leaf: info.dtype for leaf, info in leaves.items()}
    fine: Grain = group(size) if size else CHANNEL
    scales = [(dtypes.get("weight_scale", "float32"), fine)]
    if kind.acts == "static":
        scales = [("float32", CHANNEL)]
    elif second:
        scales = [(dtypes["weight_scale_second"], fine), (dtypes["weight_scale"], CHANNEL)]
    for dtype, _ in scales:
        _check_dtype(leaves, kind, dtype)
    operands = {"weight": weight_spec(kind, scales)}
    acts = input_spec(kind, _static_dtype(dtypes, "clip_ratio" if kind.flat else "input_scale"))
    if acts is not None:
        operands["input"] = acts
    flat = _flat_sides(leaves, shape[1]) if kind.flat else ()
    return MsScheme(
        name=kind.name,
        transforms=(FLAT,) if flat else (),
        flat=flat,
        shape=shape,
        operands=operands,
        kind=kind,
        group=size,
        second=second,
        row_pairs=pairs,
        dtypes=tuple(sorted(dtypes.items())),
    )


def _flat_sides(leaves: Leaves, k: int) -> tuple[int, int]:
    """Sides (L, R) of the matrices of FlatQuant, L * R = K."""
    sides = []
    for name in ("left_trans", "right_trans"):
        info = leaves[name]
        if len(info.shape) != 2 or info.shape[0] != info.shape[1]:
            raise _bad_shape(info, "a square matrix")
        sides.append(info.shape[0])
    left, right = sides
    if left * right != k:
        raise _bad_shape(leaves["right_trans"], f"sides with {left} * side = in_features = {k}")
    return left, right


def _static_dtype(dtypes: Mapping[str, str], leaf: str) -> str:
    found = dtypes.get(leaf, "float32")
    return (
        found if found in FLOAT_DTYPES - {"float64"} else "float32"
    )  # else the header check fails


def _check_dtype(leaves: Leaves, kind: Kind, dtype: str) -> None:
    """Dtype of the scales: bytes of exponents for blocks, floats otherwise."""
    allowed = ("uint8",) if kind.mx else ("float32", "bfloat16", "float16")
    if dtype in allowed:
        return
    info = next(i for leaf, i in leaves.items() if "scale" in leaf and i.dtype == dtype)
    raise LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} has dtype {info.dtype}, expected "
        f"{' or '.join(allowed)}. The tensor was cast after quantization; export it again.",
        code="Q-LAYOUT-DTYPE",
        path=info.file,
        tensor=info.name,
        expected=allowed,
        actual=info.dtype,
        plugin=_PLUGIN,
    )
