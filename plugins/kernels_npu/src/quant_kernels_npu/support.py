"""Which operations the operators can run: an ``OpSpec`` becomes a ``Form``, or a reason why not.

    Form.weight   "int8"  int8 [N, K]             codes of 8 bits, or of 4 bits one a byte
                  "int4"  int32 [N, K/8]          eight codes a word, the first lowest
                  "fp8"   float8_e4m3fn [N, K]
    Form.acts     ""      float16 or bfloat16     "int8", "int4" per token     "static" int8
                  "mxfp8" blocks of 32

Limits are those of the operators' pages (torch_npu 7.0.0 and later): K and N at most 65535, groups
of a multiple of 32 columns, int4 in whole words, MX blocks in pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant_core.kernels.base import Rejected
from quant_core.spec import CANONICAL, CHANNEL, TENSOR, OpSpec, QuantSpec, Scale

__all__ = ["Form", "describe"]

_MOST = 65535
_FLOATS = ("float16", "bfloat16")
_WIDE = ("f32", "bf16", "f16")
_SIDES = frozenset({"bias", "acc_bias", "out_scale", "input_scale", "input_zero"})
_STATIC = frozenset({"acc_bias", "out_scale", "input_scale", "input_zero"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How one operation is stored and run.

    Attributes:
        signed: subtracted from a canonical code to give the stored, signed one.
        group: columns of one scale; 0 = a row.
        zeros: zero points are stored, one for each scale.
        bias: dtype name of the layer's float bias; "" = none.
        experts: matrices of a stack; 0 = one plain layer.
        scale_alg: of ``npu_dynamic_mx_quant``.
        after: scales of rows multiply the result instead of the codes.
        differs: how the result differs from the reference beyond rounding order; "" = it does not.
    """

    n: int
    k: int
    dtype: str
    weight: str
    acts: str
    signed: int = 0
    group: int = 0
    zeros: bool = False
    bias: str = ""
    experts: int = 0
    scale_alg: int = 0
    after: bool = False
    differs: str = ""


def _reject(axis: str, have: str, need: str) -> Rejected:
    return Rejected(axis=axis, have=have, need=need)


def _sizes(op: OpSpec) -> Rejected | None:
    n, k = op.size("n"), op.size("k")
    if op.packing != CANONICAL:
        return _reject("packing", "another order", "codes in order along K")
    if op.weight.gather or op.size("k_stored", k) != k:
        return _reject("gather", "reordered columns", "columns in order")
    if max(n, k) > _MOST or min(n, k) < 1:
        return _reject("sizes", f"{n} x {k}", f"at most {_MOST} each")
    if op.act_dtype not in _FLOATS:
        return _reject("act_dtype", op.act_dtype, " or ".join(_FLOATS))
    odd = {f for f in op.features if not f.startswith(("bias", "transform"))} - _SIDES
    return _reject("features", ", ".join(sorted(odd)), "none of them") if odd else None


def _scale_problem(spec: QuantSpec, k: int) -> Rejected | None:
    if len(spec.scales) != 1:
        return _reject("scales", spec.label, "one scale")
    scale = spec.scales[0]
    rows, cols = scale.grain
    if scale.element not in _WIDE or scale.inverse or scale.add:
        return _reject("scales", spec.label, f"a factor in {', '.join(_WIDE)}")
    if rows != 1 or (cols and (cols % 32 or k % cols or cols >= k)):
        return _reject("scales", spec.label, "one of a row, or of a multiple of 32 columns")
    return None


def _integer_weight(op: OpSpec) -> tuple[str, int] | Rejected:
    """(stored form, what is subtracted from a code)."""
    spec = op.weight
    e, zero = spec.element, spec.zero
    if spec.blocks or e.kind not in ("int", "uint") or e.bits not in (4, 8):
        return _reject("element", spec.label, "integer codes of 4 or 8 bits")
    half = 0 if e.kind == "int" else 1 << (e.bits - 1)
    if e.kind == "int" and (e.bits != 8 or zero is not None):
        return _reject("element", spec.label, "signed codes of 8 bits without a zero")
    if zero is not None and zero.kind == "offset":
        return _reject("zero", "an offset", "a zero point")
    if zero is not None and zero.kind == "code" and not zero.element.startswith("uint"):
        return _reject("zero", zero.element, "integer zero points")
    if zero is not None and zero.kind == "const" and zero.value != half:
        return _reject("zero", str(zero.value), f"{half}, or a zero point for each scale")
    if zero is None and half:
        return _reject("zero", "none", f"{half} for unsigned codes")
    return ("int8" if e.bits == 8 else "int4"), half


def _per_token(spec: QuantSpec) -> bool:
    """max|x| / largest code of each token, nothing else."""
    scale = spec.scales[0]
    largest = (1 << (spec.element.bits - 1)) - 1
    plain = scale == Scale(element="f32", grain=CHANNEL, static=False, peak=scale.peak)
    return (
        len(spec.scales) == 1
        and plain
        and scale.peak in (0, largest)
        and spec.zero is None
        and spec.element.kind == "int"
        and spec.ties == "even"
    )


def _acts(op: OpSpec) -> str | Rejected:
    """How activations are quantized: "" "int8" "int4" "static"."""
    spec = op.operand("input")
    if spec is None:
        return ""
    if spec.element.kind != "int" or spec.element.bits not in (4, 8):
        return _reject("input", spec.label, "int8 or int4 codes")
    scale = spec.scales[0]
    if scale.static:
        one = len(spec.scales) == 1 and scale.grain == TENSOR and not scale.inverse
        if spec.element.bits != 8 or not one or not op.features >= _STATIC:
            return _reject("input", spec.label, "int8 with a stored scale, zero and output scale")
        return "static"
    if not _per_token(spec):
        return _reject("input", spec.label, "max|x| / largest code of each token")
    return f"int{spec.element.bits}"


def _float_activations(op: OpSpec, form: str, half: int) -> Form | Rejected:
    if op.op != "linear":
        return _reject("op", op.op, "linear for float activations")
    spec, k = op.weight, op.size("k")
    if form == "int4" and k % 8:
        return _reject("sizes", f"K = {k}", "a multiple of 8 for 4-bit codes")
    element = {"float16": "f16", "bfloat16": "bf16"}[op.act_dtype]
    same, group = spec.scales[0].element == element, spec.scales[0].grain[1]
    after = not same and not group and op.act_dtype == "bfloat16"  # float16 would overflow
    return Form(
        n=op.size("n"), k=k, dtype=op.act_dtype, weight=form, acts="", signed=half, group=group,
        zeros=spec.zero is not None and spec.zero.kind == "code", after=after,
        differs="" if same or after else f"scales rounded to {op.act_dtype}",
    )  # fmt: skip


def _integers(op: OpSpec) -> Form | Rejected:
    found = _integer_weight(op)
    problem = found if isinstance(found, Rejected) else _scale_problem(op.weight, op.size("k"))
    if problem is not None:
        return problem
    assert not isinstance(found, Rejected)
    form, half = found
    acts = _acts(op)
    if isinstance(acts, Rejected):
        return acts
    if not acts:
        return _float_activations(op, form, half)
    k, zero = op.size("k"), op.weight.zero
    if op.weight.scales[0].grain != CHANNEL or (zero is not None and zero.kind == "code"):
        return _reject("weight", op.weight.label, "one scale a row, no zero points")
    if acts == "int4":
        if op.op != "linear" or form != "int4" or k % 8:
            return _reject("weight", op.weight.label, "a linear layer of int4, K a multiple of 8")
        differs = "products of a token pass through float16" if op.act_dtype != "float16" else ""
    else:
        form, differs = "int8", ""  # 4-bit codes one a byte: the operator takes equal types
    if acts == "static" and op.op != "linear":
        return _reject("op", op.op, "linear for stored activation scales")
    return Form(
        n=op.size("n"), k=k, dtype=op.act_dtype, weight=form, acts=acts, signed=half,
        experts=op.size("experts", 0), differs=differs,
    )  # fmt: skip


def _blocks(op: OpSpec) -> Form | Rejected:
    """MXFP8 times MXFP8."""
    weight, acts, k = op.weight, op.operand("input"), op.size("k")
    fine = Scale(element="e8m0", grain=(1, 32))
    if op.op != "linear" or weight.scales != (fine,) or acts is None or k % 64:
        return _reject("weight", weight.label, "a linear layer in blocks of 32, K a multiple of 64")
    scale = acts.scales[0]
    plain = Scale(element="e8m0", grain=(1, 32), static=False, rule=scale.rule)
    if acts.element != weight.element or acts.scales != (plain,) or acts.zero is not None:
        return _reject("input", acts.label, "fp8_e4m3 in blocks of 32")
    algorithms = {"floor": 0, "rceil": 1, "": 1}
    if scale.rule not in algorithms:
        return _reject("input", f"rule {scale.rule}", "floor or rceil")
    ties = "" if acts.ties == "even" else "values halfway between two codes go to the even one"
    return Form(
        n=op.size("n"), k=k, dtype=op.act_dtype, weight="fp8", acts="mxfp8", group=32,
        scale_alg=algorithms[scale.rule], differs=ties,
    )  # fmt: skip


def describe(op: OpSpec) -> Form | Rejected:
    """How ``op`` would run, or why it cannot."""
    if op.op not in ("linear", "grouped_linear"):
        return _reject("op", op.op, "linear or grouped_linear")
    if "weight" not in dict(op.operands):
        return _reject("operands", "no weight", "a weight")
    problem = _sizes(op)
    if problem is not None:
        return problem
    form = _blocks(op) if op.weight.element.name == "fp8_e4m3" else _integers(op)
    if isinstance(form, Rejected):
        return form
    if form.experts and "bias" in op.features:
        return _reject("features", "bias of experts", "none")
    if form.acts != "static" and op.features & _STATIC:
        return _reject("features", "stored activation scales", "none")
    bias = next((f.partition(":")[2] for f in op.features if f.startswith("bias:")), "")
    if form.acts == "static" and bias:
        return _reject("features", "bias beside acc_bias", "one of them")

    return replace(form, bias=bias)
