"""Which scheme one module has: stored tensors decide together with the config, both must agree.

    codes or scales stored   -> the algorithm of the config; excluded or not listed = error
    plain float weight       -> Unquantized, unless the config lists it or its siblings disagree
    only scales of a cache   -> not loaded, by a named rule

The dtypes of ``weight`` and ``weight_scale`` tell the algorithms apart, so a config that belongs to
other weights is found from the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import PLAIN_DTYPES
from quant_core.errors import CheckpointError, ConfigError, printable
from quant_core.intspec import SCALE_ELEMENTS, check_whole_groups, unsized
from quant_core.presence import check_stacked, stored_modules, unquantized
from quant_core.resolve import numberless
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_nvfp4.algos import ALGOS, Algo
from quant_plugin_nvfp4.config import LayerAlgo, ModelOptConfig
from quant_plugin_nvfp4.detect import KV_LEAVES, is_quantized
from quant_plugin_nvfp4.scheme import KV_RULE, SMOOTH, ModelOptScheme

__all__ = ["scheme_for"]

_ELEMENTS = {**SCALE_ELEMENTS, "float8_e4m3fn": "fp8_e4m3", "uint8": "e8m0"}
Leaves = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """One module (one expert of a stack) as it is stored, and what the config says of it."""

    config: ModelOptConfig
    found: LayerAlgo
    layer: LayerDesc
    checkpoint: Checkpoint
    path: str
    leaves: Leaves

    def dtype(self, leaf: str) -> str:
        """Stored dtype of a float scale (core reports an absent or odd one)."""
        info = self.leaves.get(leaf)
        return info.dtype if info is not None and info.dtype in SCALE_ELEMENTS else "float32"

    def sizes(self) -> tuple[int, int]:
        """(N, K): the engine's where known, else from the stored weight.

        Raises:
            CheckpointError: ``Q-TENSOR-MISSING`` if there is no weight matrix.
        """
        info, layer = self.leaves.get("weight"), self.layer
        if info is None or len(info.shape) != 2:
            raise unsized(
                self.checkpoint, self.path, self.leaves, "weight",
                expected="a matrix 'weight'", plugin="nvfp4",
            )  # fmt: skip
        algo = self.found.algo
        n, k = info.shape
        per = 8 // algo.element.bits
        if algo.packing.axis == "out":
            n *= per
        else:
            k *= per
        return layer.out_features or n, layer.in_features or k

    def check_dtypes(self) -> None:
        """The stored dtypes are those of the algorithm, or of none that is known.

        Raises:
            ConfigError: ``Q-CFG-CONFLICT`` if they are those of other algorithms.
        """
        weight, scale = self.leaves.get("weight"), self.leaves.get("weight_scale")
        if weight is None or scale is None:
            return
        stored = (weight.dtype, "float" if scale.dtype in SCALE_ELEMENTS else scale.dtype)
        fitting = [a.name for a in ALGOS.values() if a.stored == stored]
        if self.found.algo.name in fitting or not fitting:
            return
        raise ConfigError(
            f"{self.config.file}: quant_algo of {printable(self.path)!r} is "
            f"{self.found.algo.name}, but its weight is {weight.dtype} with {scale.dtype} scales, "
            f"as of {', '.join(fitting)}; expected both to agree. "
            "Restore the config that belongs to these weights.",
            code="Q-CFG-CONFLICT",
            path=self.config.file,
            tensor=f"{self.path}.weight",
            expected=fitting,
            actual=self.found.algo.name,
            plugin="nvfp4",
        )

    def group_size(self, k: int) -> int:
        """The size of groups, checked by the shapes; 0 = none.

        Raises:
            LayoutError: ``Q-LAYOUT-GROUP`` if another size was used, with the one implied.
        """
        algo, size = self.found.algo, self.found.group_size
        if algo.weight not in ("nvfp4", "mxfp8", "mxfp4", "int4"):
            return algo.group_size
        info = self.leaves.get("weight_scale")
        stored = info.shape[1] if info is not None and len(info.shape) == 2 else 0
        implied = k // stored if stored and k % stored == 0 else 0
        size = size or implied or 128
        check_whole_groups(
            info, 1, k, size, module=self.path, source=self.config.file, plugin="nvfp4"
        )
        return size

    def smoothed(self) -> bool:
        """Whether ``pre_quant_scale`` belongs to this module: all of one name have it, or none."""
        return self.found.algo.smooth and numberless(self.path) in self.config.smoothed


def _scheme(header: _Header) -> ModelOptScheme:
    header.check_dtypes()
    algo: Algo = header.found.algo
    n, k = header.sizes()
    size = header.group_size(k)
    wide = algo.stored[1] == "float"
    scale_dtype = header.dtype("weight_scale") if wide else algo.stored[1]
    shapes = algo.scale_shapes(n, k, size)
    info = header.leaves.get("weight_scale")
    spec = algo.input_spec(_ELEMENTS[header.dtype("input_scale")])
    weight = algo.weight_spec(size, _ELEMENTS[scale_dtype])
    smoothed = header.smoothed()
    singles = ("weight_scale_2", "input_scale")
    return ModelOptScheme(
        name=algo.scheme,
        shape=(n, k),
        operands={"weight": weight, **({} if spec is None else {"input": spec})},
        transforms=(SMOOTH,) if smoothed else (),
        algo=algo,
        group_size=size,
        scale_dtype=scale_dtype,
        input_dtype=header.dtype("input_scale"),
        scale_shape=info.shape if info is not None and info.shape in shapes else shapes[0],
        vectors=frozenset(
            name for name in singles if name in header.leaves and header.leaves[name].shape == (1,)
        ),
        smoothed=smoothed,
        cache=frozenset(KV_LEAVES & header.leaves.keys()),
        source=header.config.file,
    )


def _mismatch(
    config: ModelOptConfig, checkpoint: Checkpoint, tensor: str, found: str, fix: str
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {printable(tensor)!r} {found}, expected {config.file} and the stored "
        f"tensors to agree. {fix}",
        code="Q-CKPT-MISMATCH",
        path=checkpoint.path,
        tensor=tensor,
        actual=found,
        plugin="nvfp4",
    )


def _floats(config: ModelOptConfig, layer: LayerDesc, checkpoint: Checkpoint) -> Unquantized:
    """The rule by which a module is not quantized; an error if the config says otherwise."""
    path, leaves = next(iter(stored_modules(layer, checkpoint).items()))
    odd = [t for t in leaves.values() if t.dtype not in PLAIN_DTYPES]
    if odd:
        fix = "Experts stacked in one tensor are not supported; export them one by one."
        found = f"is {odd[0].dtype} and no weight of a linear layer"
        raise _mismatch(config, checkpoint, odd[0].name, found, fix)
    cache = frozenset(KV_LEAVES & leaves.keys())
    if cache and "weight" not in leaves:
        return Unquantized(rule=KV_RULE, evidence=", ".join(sorted(cache)), ignored=cache)
    if config.mixed is not None:
        if "weight" in leaves and path in config.mixed:
            fix = "Correct quantized_layers, or export the checkpoint again."
            found = f"is a plain {leaves['weight'].dtype} weight, but quantized_layers lists it"
            raise _mismatch(config, checkpoint, leaves["weight"].name, found, fix)
        answer = Unquantized(rule="not in quantized_layers", evidence=path)
    else:
        answer = unquantized(
            layer,
            checkpoint,
            config.quantized,
            config.skip.patterns,
            source=config.file,
            plugin="nvfp4",
        )
    if not cache:
        return answer
    return replace(answer, rule=f"{answer.rule}; {KV_RULE}", ignored=cache)


def _layer_algo(
    config: ModelOptConfig, modules: Mapping[str, Leaves], checkpoint: Checkpoint
) -> LayerAlgo:
    """The one algorithm of all matrices of a quantized layer."""
    found: dict[LayerAlgo, str] = {}
    for path in modules:
        answer = config.layer(path)
        if answer is None:
            fix = "Restore the config that belongs to these weights."
            found_text = "is quantized, but no layer of the config names it"
            raise _mismatch(config, checkpoint, path, found_text, fix)
        if entry := config.skip.strict(path):
            fix = "Correct the list, or export the checkpoint again."
            named = f"is quantized, but {config.purpose} names it ({printable(entry)!r})"
            raise _mismatch(config, checkpoint, path, named, fix)
        found.setdefault(answer, path)
    if len(found) > 1:
        shown = ", ".join(f"{a.algo.name} ({printable(p)})" for a, p in found.items())
        raise ConfigError(
            f"{config.file}: experts of one stack are {shown}, expected one algorithm for all. "
            "Quantize all experts alike.",
            code="Q-CFG-CONFLICT",
            path=config.file,
            tensor=next(iter(modules)),
            actual=[a.algo.name for a in found],
            plugin="nvfp4",
        )
    return next(iter(found))


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> ModelOptScheme | Unquantized:
    """The scheme of one member.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (config and stored names disagree),
            ``Q-TENSOR-MISSING`` (too little stored to tell the sizes).
        ConfigError: ``Q-CFG-CONFLICT``.
        LayoutError: ``Q-LAYOUT-GROUP``.
    """
    config: ModelOptConfig = match.config
    modules = stored_modules(layer, checkpoint)
    quantized = {p: leaves for p, leaves in modules.items() if is_quantized(p, leaves)}
    if not quantized:
        return _floats(config, layer, checkpoint)
    check_stacked(modules, is_quantized, checkpoint, plugin="nvfp4")
    found = _layer_algo(config, modules, checkpoint)
    path, leaves = next(iter(quantized.items()))
    return _scheme(
        _Header(
            config=config, found=found, layer=layer, checkpoint=checkpoint, path=path, leaves=leaves
        )
    )
