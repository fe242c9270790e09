"""What a direct launch hands to the driver, read back from the memory it is given."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import pytest

from quant_core.errors import KernelError
from quant_kernels_triton import direct, launch
from quant_kernels_triton.direct import Direct
from quant_kernels_triton.machine_code import Code, Map

MAP = b"tensor map of "


class Driver:
    """Stands for libcuda: notes launches, writes a text where a tensor map belongs."""

    def __init__(self) -> None:
        self.launches: list[dict] = []
        self.encoded: list[tuple] = []
        self.result = 0

    def cuTensorMapEncodeTiled(self, at, kind, rank, address, sizes, pitches, box, *rest):
        self.encoded.append((kind, rank, list(sizes), list(pitches), list(box), rest[1:]))
        text = MAP + str(address.value).encode()
        ctypes.memmove(at.value, text + b"\0", len(text) + 1)
        assert at.value % 64 == 0
        return 0

    def cuGetErrorString(self, result, text):
        text._obj.value = b"made up"
        return 0

    def start(self, config, function, params, extra):
        head = struct.unpack("@7IQQI4x", ctypes.string_at(config, 56))
        self.launches.append({"config": head, "function": function, "params": params})
        return self.result

    def parameter(self, index: int, size: int) -> bytes:
        params = self.launches[-1]["params"]
        at = ctypes.c_void_p.from_address(params + 8 * index).value
        return ctypes.string_at(at, size)


def made(driver: Driver, kinds: list[str | None], boxes: tuple[list[int], ...] = ()) -> Direct:
    maps = [direct._Maps(driver, "bf16", box, 3) for box in boxes]
    check = lambda result: direct._check(driver, result, "launching a kernel")  # noqa: E731
    return Direct(kinds, maps, 0xF00, 128, 4096, True, driver.start, check)


def test_arguments_lie_where_the_parameters_point():
    driver = Driver()
    run = made(driver, ["*bf16", "i32", None, "fp32", "i64", "i1", "*i32"])
    run((5, 7), 0xABC, (1 << 40, -3, "a constant", 0.25, -(1 << 40), True, 64))
    head = driver.launches[0]["config"]
    assert head[:7] == (5, 7, 1, 128, 1, 1, 4096)
    assert head[7] == 0xABC
    assert head[9] == 1  # one attribute
    assert struct.unpack("@iii60x", ctypes.string_at(head[8], 72)) == (6, 0, 1)
    assert driver.launches[0]["function"] == 0xF00
    formats = ("@Q", "@i", "@f", "@q", "@b", "@Q")
    want = (1 << 40, -3, 0.25, -(1 << 40), 1, 64)
    for i, (form, value) in enumerate(zip(formats, want, strict=True)):
        assert struct.unpack(form, driver.parameter(i, struct.calcsize(form))) == (value,)
    assert driver.parameter(6, 8) == driver.parameter(7, 8) == bytes(8)  # no scratch memory


def _tensor(address: int, shape: list[int]) -> SimpleNamespace:
    base = SimpleNamespace(data_ptr=lambda: address)
    return SimpleNamespace(base=base, shape=shape, strides=[shape[1], 1])


def test_a_tensor_map_is_made_once_per_address_and_sizes():
    driver = Driver()
    run = made(driver, ["tensordesc<bf16[64,128],L>", None, "i32"], ([64, 128],))
    for address, rows in ((4096, 7), (4096, 7), (8192, 7), (4096, 9), (4096, 7)):
        run((1, 1), 0, (_tensor(address, [rows, 512]), "constant", 11))
        text = MAP + str(address).encode()
        assert driver.parameter(0, len(text) + 1) == text + b"\0"
        values = [struct.unpack(f, driver.parameter(1 + i, struct.calcsize(f)))[0]
                  for i, f in enumerate(("@i", "@i", "@q", "@q", "@i"))]  # fmt: skip
        assert values == [rows, 512, 512, 1, 11]
    assert len(driver.encoded) == 3
    # kind bf16, sizes and box innermost first, pitch in bytes, swizzle of 128 bytes
    assert driver.encoded[0] == (9, 2, [512, 7], [1024, 0], [128, 64], (0, 3, 2, 0))


def test_a_number_that_does_not_fit_is_refused_and_an_error_of_the_driver_raised():
    driver = Driver()
    run = made(driver, ["i32"])
    with pytest.raises(struct.error):
        run((1, 1), 0, (1 << 31,))
    driver.result = 700
    with pytest.raises(KernelError, match=r"700 \(made up\)") as err:
        run((1, 1), 0, (3,))
    assert err.value.code == "Q-KERNEL-LAUNCH"


class Loader(Driver):
    """Also loads: machine code is kept as it was given, parameters are as many bytes as told."""

    def __init__(self, sizes: list[int], context: int = 7) -> None:
        super().__init__()
        self.sizes, self.context, self.loaded, self.allowed = sizes, context, [], []

    def cuCtxGetCurrent(self, held):
        held._obj.value = self.context
        return 0

    def cuDevicePrimaryCtxRetain(self, held, device):
        held._obj.value = 100 + device.value
        return 0

    def cuCtxSetCurrent(self, held):
        self.context = held.value
        return 0

    def cuModuleLoadData(self, module, cubin):
        self.loaded.append(cubin)
        module._obj.value = 1
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.loaded.append(name)
        function._obj.value = 0xF00
        return 0

    def cuFuncSetCacheConfig(self, function, config):
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        self.allowed.append((attribute, value))
        return 0

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def cuLaunchKernelEx(self, *args):
        return 0


def code(kinds: list[str | None], maps: tuple[Map, ...] = (), shared: int = 1024) -> Code:
    return Code(name="kernel", kinds=tuple(kinds), maps=maps, threads=128, shared=shared,
                dependent=True, cubin=b"machine code")  # fmt: skip


BOX = Map(kind="bf16", box=(64, 128), swizzle=3)
DESCRIPTOR = "tensordesc<bf16[64,128],L>"


@pytest.mark.parametrize(
    ("made", "sizes"),
    [
        (code(["*fp32", None, "i32", "fp32", "u1"]), [8, 4, 4, 1, 8, 8]),
        (code([DESCRIPTOR, "*u8"], (BOX,)), [128, 4, 4, 8, 8, 8, 8, 8]),
    ],
)
def test_what_agrees_with_the_driver_is_launched_directly(made, sizes, monkeypatch):
    driver = Loader(sizes)
    monkeypatch.setattr(direct, "_driver", lambda: driver)
    monkeypatch.setattr(direct.ctypes, "PYFUNCTYPE", lambda *types: lambda at: driver.start)
    run = direct.prepare(made, 0)
    assert isinstance(run, Direct)
    assert driver.loaded == [b"machine code", b"kernel"]
    assert driver.allowed == []


def test_what_is_not_known_is_left_to_triton(monkeypatch):
    monkeypatch.setattr(direct, "_driver", lambda: None)
    assert direct.prepare(code(["*fp32"]), 0) is None
    driver = Loader([8, 8])
    monkeypatch.setattr(direct, "_driver", lambda: driver)
    assert direct.prepare(code(["fp64"]), 0) is None
    assert direct.prepare(code(["tensordesc<fp64[64]>"], (Map(kind="fp64", box=(64,), swizzle=0),)),
                          0) is None  # fmt: skip
    assert driver.loaded == []
    assert direct.prepare(code(["*fp32"]), 0) is None  # the driver says: two parameters, not three


def test_loading_takes_the_context_of_the_device_and_allows_large_shared_memory(monkeypatch):
    driver = Loader([8, 8], context=0)
    monkeypatch.setattr(direct, "_driver", lambda: driver)
    direct.prepare(code(["*fp32"], shared=200 << 10), 3)
    assert driver.context == 103
    assert driver.allowed == [(8, 200 << 10)]


def test_nothing_is_compiled_for_a_driver_that_does_not_know_parameters(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    monkeypatch.setattr(launch, "code_of", lambda *how: asked.append(how))
    build = launch.Build(constants={}, options={})
    monkeypatch.setattr(direct, "_driver", lambda: None)
    assert launch._own(None, (), build, 0) is None
    assert asked == []
    monkeypatch.setattr(direct, "_driver", lambda: Loader([]))
    assert launch._own(None, (), build, 0) is None  # nor does Triton leave a code
    assert len(asked) == 1
