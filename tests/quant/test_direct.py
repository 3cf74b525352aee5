"""Calls past torch's dispatcher: the same bits as through it, never with a pointer that has gone stale."""

from __future__ import annotations

import concurrent.futures
import copy
import ctypes
import pickle
import weakref

import pytest
import torch
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, native
from quant.direct import Direct, DirectGroup, _Plan, is_direct
from quant.errors import ShapeError
from quant.linear import PackedLinear

CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4-dq-bf16": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "nf4-stored-as-bf16": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "nf4-int8-activations": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_activations="int8"
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8-all": BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers="all"),
    "int8-batch": BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers="batch", llm_int8_threshold=1.0),
}


def make(name: str, bias: bool = True) -> PackedLinear:
    config = CONFIGS[name]
    kind = Linear8bit if config.load_in_8bit else Linear4bit
    return kind.from_float(nn.Linear(130, 70, bias=bias), config)


def dispatched(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """Through torch.library: gradients are enabled, so nothing is left out."""
    with torch.enable_grad():
        assert not is_direct(x)
        return layer(x).detach()


def misaligned(count: int) -> torch.Tensor:
    """float32 values at an odd address, as a tensor in a mapped file may be."""
    memory = bytearray(4 * count + 1)
    values = torch.frombuffer(memory, dtype=torch.float32, count=count, offset=1)
    return values.copy_(torch.randn(count))


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bits_are_the_dispatched_ones(name: str, bias: bool, dtype: torch.dtype) -> None:
    layer = make(name, bias)
    for shape in [(130,), (1, 130), (3, 5, 130), (0, 130), (300, 130)]:
        x = (torch.randn(shape) * 3).to(dtype)
        assert is_direct(x)
        out = layer(x)
        assert isinstance(layer._direct, Direct)
        assert out.dtype == dtype
        assert torch.equal(out, dispatched(layer, x)), shape
        spread = torch.stack([x, x], dim=-1)[..., 0]  # neither contiguous
        assert torch.equal(layer(spread), out)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_struct_has_between_its_ends_what_no_call_changes(name: str) -> None:
    layer = make(name)
    layer(torch.randn(1, 130))
    assert layer._direct is not None
    struct, (begin, end) = layer._direct.struct, (native.MATMUL_BEGIN.size, native.MATMUL_END.size)
    fields = [field[0] for field in struct._fields_]
    assert fields[:4] == ["call", "x", "x_dtype", "M"]
    assert struct.M.offset + struct.M.size == begin
    assert fields[-1] == "out"
    assert ctypes.sizeof(struct) - struct.out.offset == end


@pytest.mark.parametrize("name", CONFIGS)
def test_a_struct_has_each_field_in_its_place(name: str) -> None:
    layer = make(name)
    layer(torch.randn(1, 130))
    direct = layer._direct
    assert direct is not None
    plan = _Plan((2,), M=2, dtype_code=3, threads=4, batch_invariant=5, workspace_bytes=6)
    args = direct.struct.from_buffer_copy(direct.packed(plan, 7, 8, 9))
    call = args.call
    assert (args.M, args.x_dtype, args.x, args.out, args.N, args.K) == (2, 3, 7, 8, 70, 130)
    assert (call.threads, call.batch_invariant, call.workspace_bytes, call.workspace) == (4, 5, 6, 9)
    assert (call.struct_bytes, call.stream, call.cuda_kernel) == (ctypes.sizeof(args), None, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_whether_rows_are_invariant_may_change_between_calls(name: str, batch_invariant: None) -> None:
    layers = [make(name) for _ in range(2)]
    x = torch.randn(2, 130).bfloat16()
    for layer in layers:
        layer.compute_dtype = torch.bfloat16  # the only one that has a faster way for few rows
    directs = [layer.direct_for(x) for layer in layers]
    assert all(direct is not None for direct in directs)
    group = DirectGroup(directs) if DirectGroup.may_be_grouped(directs) else None
    for is_invariant in (True, False, True, False):
        native.set_batch_invariant(is_invariant)
        wanted = [dispatched(layer, x) for layer in layers]
        assert all(torch.equal(layer(x), out) for layer, out in zip(layers, wanted, strict=True))
        if group is not None:
            assert all(map(torch.equal, group(x), wanted))


@pytest.mark.parametrize("name", CONFIGS)
def test_torchs_defaults_do_not_matter(name: str) -> None:
    layer, x = make(name), torch.randn(2, 130)
    wanted = make(name)
    wanted.load_state_dict(layer.state_dict())
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        out = layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(out, wanted(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_columns_give_the_bias(name: str) -> None:
    config = CONFIGS[name]
    layer = (Linear8bit if config.load_in_8bit else Linear4bit)(0, 70, nn.Parameter(torch.randn(70)), config=config)
    assert layer.bias is not None
    rounded = layer.bias if config.load_in_8bit else layer.bias.to(config.bnb_4bit_compute_dtype).float()
    assert torch.equal(layer(torch.empty(4, 0)), rounded.expand(4, -1))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_replaced_tensor_is_noticed(name: str) -> None:
    layer, other = make(name), make(name)
    x = torch.randn(2, 130)
    wanted = other(x)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), wanted)
    layer.load_state_dict(make(name).state_dict(), assign=True)
    layer(x)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(x), wanted)
    assert layer.bias is not None
    layer.bias = nn.Parameter(torch.zeros(70))
    assert torch.equal(layer(x), dispatched(layer, x))
    layer.bias.data = torch.ones(70, dtype=torch.bfloat16)
    assert torch.equal(layer(x), dispatched(layer, x))
    layer.half()
    assert torch.equal(layer(x), dispatched(layer, x))
    layer.to("meta")
    assert layer(torch.empty(2, 130, device="meta")).is_meta


@pytest.mark.parametrize("how", ["data", "set_", "another"])
@pytest.mark.parametrize("name", CONFIGS)
def test_replaced_statistics_are_noticed(name: str, how: str) -> None:
    """Each of them, also where only its memory is another."""
    layer, x = make(name), torch.randn(2, 130)
    statistics = ("absmax", "nested_absmax", "nested_offset", "SCB")
    for statistic in [one for one in statistics if getattr(layer, one, None) is not None]:
        before = layer(x)
        held = getattr(layer, statistic)
        other = held.flip(0) if held.dim() else held * 3 + 1
        if how == "data":
            held.data = other
        elif how == "set_":
            held.set_(other)
        else:
            setattr(layer, statistic, other)
        after = layer(x)
        assert torch.equal(after, dispatched(layer, x))
        assert not torch.equal(after, before) or held.numel() == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tensor_that_the_kernel_cannot_read_as_it_is_goes_through_torch(name: str) -> None:
    layer, x = make(name), torch.randn(2, 130)
    layer.bias = nn.Parameter(torch.randn(140)[::2])
    assert torch.equal(layer(x), dispatched(layer, x))
    layer.bias = nn.Parameter(misaligned(70))
    assert layer.bias.data_ptr() % 4
    assert torch.equal(layer(x), dispatched(layer, x))


def test_vmap_goes_through_torch() -> None:
    x = torch.randn(3, 130)
    assert is_direct(x)
    torch.vmap(lambda row: row if not is_direct(row) else pytest.fail("a batched tensor has no address"))(x)


def test_a_bias_read_as_another_dtype_is_noticed() -> None:
    """Where it was, and as large."""
    layer = make("int8").half()
    x = torch.randn(2, 130)
    layer(x)
    assert layer.bias is not None
    layer.bias.data = layer.bias.data.view(torch.bfloat16)
    assert torch.equal(layer(x), dispatched(layer, x))


@pytest.mark.parametrize("name", CONFIGS)
def test_moving_lets_go_of_what_was_moved(name: str) -> None:
    layer = make(name)
    layer(torch.randn(2, 130))
    assert layer._direct is not None
    held = weakref.ref(layer._direct)
    layer.to("meta")
    assert held() is None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "nf4-stored-as-bf16"])
def test_a_trace_holds_the_operator(name: str) -> None:
    """And not its result, as a constant."""
    layer, x = make(name), torch.randn(2, 130)
    layer(x)
    traced = torch.jit.trace(layer, torch.randn(2, 130))
    assert torch.equal(traced(x), layer(x))
    assert is_direct(x)


def test_changed_options_are_noticed() -> None:
    layer = make("int8")
    x = torch.randn(2, 130) * 5
    layer(x)
    layer.threshold, layer.outliers = 1.0, "batch"
    assert torch.equal(layer(x), dispatched(layer, x))


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_and_pickles_leave_pointers_behind(name: str) -> None:
    layer = make(name)
    x = torch.randn(2, 130)
    wanted = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - what this test has made
        assert twin._direct is None
        assert torch.equal(twin(x), wanted)
        assert twin._direct is not layer._direct


def test_bad_input_is_refused_in_a_sentence() -> None:
    layer = make("nf4")
    layer(torch.randn(1, 130))
    with pytest.raises(ShapeError, match="last size must be 130"):
        layer(torch.randn(1, 131))
    with pytest.raises(ShapeError, match="float32, float16 and bfloat16"):
        make("int8")(torch.zeros(1, 130, dtype=torch.int64))


@pytest.mark.parametrize("name", CONFIGS)
def test_threads_share_a_layer(name: str) -> None:
    layer = make(name)
    inputs = [torch.randn(rows, 130) for rows in (1, 2, 40, 3) * 25]
    wanted = [layer(x) for x in inputs]

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # a mode of each thread
            return layer(x)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
