"""Finds and loads the compiled kernels, and calls them with torch tensors.

The C interface is csrc/halfbyte.h; the structs below mirror it field by field (a test compares the sizes and the
tables). Not here: checks of shapes (arguments.py has made them), choosing between devices (op_kernels.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Any, Final, cast

import torch

from quant import formats, pages, reference
from quant.errors import NativeError

ABI_VERSION: Final = 7
MAX_THREADS: Final = 1024
MAX_ELEMENTS: Final = 1 << 46
"""Of any tensor."""
DTYPE_CODES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STORE_CODES: Final = {**DTYPE_CODES, torch.int8: 3}
"""Of what a cache keeps keys and values in."""
FORMAT_CODES: Final = {"nf4": 0, "fp4": 1}
CUDA_KERNEL_CODES: Final = {"mma": 0, "hopper": 1}
OUTLIER_CODES: Final = {"value": 0, "batch": 1, "all": 2}
TABLE_CODES: Final = {
    "nf4": 0,
    "fp4": 1,
    "nf4_thresholds": 2,
    "fp4_thresholds": 3,
    "nf4_ranks": 4,
    "fp4_ranks": 5,
    "dynamic": 6,
    "dynamic_midpoints": 7,
    "nf4_int8": 8,
    "fp4_int8": 9,
    "int8_steps": 10,
}
LEVEL_VARIABLE: Final = "HALFBYTE_CPU_LEVEL"
"""Names the instruction set level that the CPU library runs at, where it is not to choose for itself."""
CUDA_KERNEL_VARIABLE: Final = "HALFBYTE_CUDA_KERNEL"
"""Names the kernel of the 4-bit matmul on CUDA, one of CUDA_KERNEL_CODES; mma where it is not set."""
_OK: Final = 0
_I64: Final = ctypes.c_int64
_PTR: Final = ctypes.c_void_p
_BUILD_HINT: Final = {
    "cpu": "build and install it with `pip install -e .` (or `make install`) in the source tree",
    "cuda": "build it where nvcc is, with `pip install -e . -C cmake.define.HALFBYTE_CUDA=ON`",
}


class Call(ctypes.Structure):
    """hb_call: what every call carries."""

    _fields_ = (
        ("struct_bytes", _I64),
        ("stream", _PTR),
        ("workspace", _PTR),
        ("workspace_bytes", _I64),
        ("threads", _I64),
        ("batch_invariant", _I64),
        ("cuda_kernel", _I64),
    )


def _struct(name: str, pointers_and_sizes: str) -> type[ctypes.Structure]:
    """An args struct: `call`, then the named fields; `*name` is a pointer, `%name` a double, the rest int64."""
    kinds = {"*": _PTR, "%": ctypes.c_double}
    fields: list[tuple[str, Any]] = [("call", Call)]
    fields += [(word.lstrip("*%"), kinds.get(word[0], _I64)) for word in pointers_and_sizes.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


MATMUL_BEGIN: Final = Struct("=10q")
"""hb_call, x, x_dtype and M: what stands first in the struct of a matmul."""
MATMUL_END: Final = Struct("=q")
"""out: what stands last in it."""
_LINEAR4: Final = _struct(
    "Linear4",
    "*x x_dtype M N K *packed format blocksize *absmax *nested_absmax *offset nested_blocksize *bias bias_dtype *out",
)
STRUCTS: Final = {
    "hb_quantize4": _struct("Quantize4", "*x x_dtype n format blocksize *packed *absmax"),
    "hb_encode4": _struct("Encode4", "*x x_dtype n format blocksize *scales *packed"),
    "hb_search4": _struct("Search4", "*x x_dtype n format blocksize *scales"),
    "hb_dequantize4": _struct("Dequantize4", "*packed *absmax n format blocksize *out out_dtype"),
    "hb_quantize_absmax": _struct("QuantizeAbsmax", "*absmax blocks *offset nested_blocksize *codes *nested_absmax"),
    "hb_dequantize_absmax": _struct(
        "DequantizeAbsmax", "*codes blocks *nested_absmax *offset nested_blocksize *absmax"
    ),
    "hb_linear4": _LINEAR4,
    "hb_linear4_int8": _LINEAR4,
    "hb_linear4_experts": _struct(
        "Linear4Experts",
        "*x x_dtype M E P N K *ends *packed packed_bytes format blocksize *absmax *nested_absmax *offset"
        " nested_blocksize *bias bias_dtype *out",
    ),
    "hb_quantize8": _struct("Quantize8", "*w w_dtype N K *codes *absmax"),
    "hb_dequantize8": _struct("Dequantize8", "*codes *absmax N K *out out_dtype"),
    "hb_linear8": _struct("Linear8", "*x x_dtype M N K *codes *absmax %threshold outlier_rule *bias bias_dtype *out"),
    "hb_linear8_experts": _struct(
        "Linear8Experts", "*x x_dtype M E N K *ends *codes *absmax %threshold outlier_rule *bias bias_dtype *out"
    ),
    "hb_paged_attention": _struct(
        "PagedAttention",
        "*query query_row_stride query_head_stride *keys *values store_dtype *scales dtype T H G D E blocks"
        " block_tokens *tables S max_blocks *offsets *starts %scale window %softcap *sinks sinks_dtype *out",
    ),
    "hb_rms_norm": _struct("RmsNorm", "*x dtype M K *weight %eps *out"),
    "hb_argmax": _struct("Argmax", "*x dtype M K *out"),
    "hb_swiglu": _struct("Swiglu", "*gate *up dtype n *out"),
    "hb_rotary": _struct("Rotary", "*query *key dtype T H G D *cos *sin"),
    "hb_add": _struct("Add", "*a *b dtype n *out"),
    "hb_cache_write": _struct(
        "CacheWrite",
        "*key key_row_stride key_head_stride *value value_row_stride value_head_stride dtype T G D E"
        " *slots slot_count store_dtype *keys *values *scales",
    ),
}
"""The argument struct of each entry."""
GROUPS: Final = ("hb_linear4", "hb_linear8")
"""Entries that have a twin for several products of one x, `<entry>_group`."""
MAX_GROUP: Final = 8
ENTRIES_WITH_WORKSPACE: Final = (
    "hb_linear4",
    "hb_linear4_int8",
    "hb_linear4_experts",
    "hb_linear8",
    "hb_linear8_experts",
    "hb_paged_attention",
)
CPU_ONLY: Final = frozenset({"hb_linear4_int8", "hb_argmax"})
"""Entries that libhalfbyte_cuda.so does not have; nor has it groups and hb_run."""
STEP_CODES: Final = {
    "hb_linear4": 0,
    "hb_linear8": 1,
    "hb_linear4_int8": 2,
    "hb_paged_attention": 3,
    "hb_cache_write": 4,
    "hb_rms_norm": 5,
    "hb_swiglu": 6,
    "hb_rotary": 7,
    "hb_add": 8,
}
"""The entries that hb_run calls; those in GROUPS with groups."""


class Step(ctypes.Structure):
    """hb_step: an entry with its arguments."""

    _fields_ = (("entry", _I64), ("args", _PTR), ("count", _I64))


def library_path(device_type: str) -> Path:
    """Where the library of "cpu" or "cuda" is installed; raises NativeError that says how to build it."""
    name = f"libhalfbyte_{device_type}.so"
    candidates = [Path(__file__).parent / "lib" / name]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution("halfbyte")
        candidates.append(Path(str(distribution.locate_file(f"quant/lib/{name}"))))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise NativeError(
        f"The compiled {device_type} kernels are missing (looked for {' and '.join(map(str, candidates))}); "
        f"{_BUILD_HINT[device_type]}."
    )


def load_library(path: Path) -> ctypes.CDLL:
    """The library with its entries typed; raises NativeError when it can't be loaded or has another ABI."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"The compiled kernels at {path} cannot be loaded: {error}.") from error
    found = library.hb_abi_version()
    if found != ABI_VERSION:
        raise NativeError(f"{path} has ABI version {found} but this Halfbyte needs {ABI_VERSION}; reinstall Halfbyte.")
    library.hb_status_text.restype = ctypes.c_char_p
    library.hb_level.restype = ctypes.c_char_p
    library.hb_levels.argtypes = (ctypes.POINTER(ctypes.c_char_p), _I64)
    library.hb_levels.restype = _I64
    if library.hb_level() is None:
        raise NativeError(
            f"{LEVEL_VARIABLE} is {os.environ.get(LEVEL_VARIABLE)!r}; accepted on this machine are "
            f"{', '.join(levels(library))}."
        )
    if hasattr(library, "hb_run"):
        library.hb_run.argtypes = (ctypes.POINTER(Step), _I64, _I64)
    library.hb_table.argtypes = (ctypes.c_int32, _PTR, _I64)
    library.hb_table.restype = _I64
    for name, struct in STRUCTS.items():
        if name in CPU_ONLY and not hasattr(library, name):
            continue
        getattr(library, name).argtypes = (ctypes.POINTER(struct),)
        if name in ENTRIES_WITH_WORKSPACE:
            getattr(library, f"{name}_workspace").argtypes = (ctypes.POINTER(struct), ctypes.POINTER(_I64))
        if name in GROUPS and hasattr(library, f"{name}_group"):
            getattr(library, f"{name}_group").argtypes = (ctypes.POINTER(struct), _I64)
            workspace = getattr(library, f"{name}_group_workspace")
            workspace.argtypes = (ctypes.POINTER(struct), _I64, ctypes.POINTER(_I64))
    return library


def levels(library: ctypes.CDLL) -> list[str]:
    """The instruction set levels that a library can run at on this machine, the widest last."""
    names = (ctypes.c_char_p * 8)()
    count = library.hb_levels(names, len(names))
    return [name.decode() for name in names[:count] if name is not None]


@functools.lru_cache(maxsize=2)  # a failure is not kept: the library may be built while the process runs
def kernels(device_type: str) -> Kernels:
    """The kernels for tensors on "cpu" or "cuda", loaded once; raises NativeError."""
    library = load_library(library_path(device_type))
    if device_type == "cpu":
        share_threads(library)
    return Kernels(library, device_type, cuda_kernel())


def cuda_kernel() -> str:
    """The kernel of the 4-bit matmul on CUDA that the environment names; raises NativeError for an unknown one."""
    name = os.environ.get(CUDA_KERNEL_VARIABLE, "mma")
    if name not in CUDA_KERNEL_CODES:
        raise NativeError(f"{CUDA_KERNEL_VARIABLE} is {name!r}; accepted are {', '.join(CUDA_KERNEL_CODES)}.")
    return name


def share_threads(library: ctypes.CDLL) -> bool:
    """Lets a CPU library run on the threads of torch's OpenMP runtime; False where torch has none that can be found.

    The operators between ours then find the same threads awake. With threads of our own beside torch's, which spin
    after each operator, every change from one to the other costs a wake-up or a core.
    """
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        start = torch_library.GOMP_parallel  # looked up in what torch links, which is loaded already
    except (OSError, AttributeError):
        return False
    library.hb_use_parallel.argtypes = (_PTR,)
    library.hb_use_parallel.restype = None
    library.hb_use_parallel(ctypes.cast(start, _PTR))
    return True


def unavailable_because(device_type: str) -> str | None:
    """None where the library of this device type loads, else the sentence that says why it does not."""
    try:
        kernels(device_type)
    except NativeError as error:
        return str(error)
    return None


def filled(entry: str, **fields: Any) -> Any:
    """The argument struct of an entry; tensors among `fields` are given by address, None as null."""
    struct = STRUCTS[entry]
    args = struct(**{k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
    cast(Any, args).call.struct_bytes = ctypes.sizeof(struct)
    return args


_batch_invariant = 0


def set_batch_invariant(wanted: bool) -> None:
    """Whether a row of a matmul has the same bits in a batch of any size, in this process from now on; False at first.

    Without it, on processors with BF16 vectors or AMX, a 4-bit layer that computes in bfloat16 adds up one to three
    rows in another, faster order than more rows; with AMX an int8 layer that rounds no activations does too. Whatever
    the other rows hold, they never matter.
    """
    global _batch_invariant
    _batch_invariant = int(wanted)


def batch_invariant() -> int:
    """1 where set_batch_invariant() asked for it, as hb_call has it."""
    return _batch_invariant


def thread_count() -> int:
    """Threads that a call may use: torch's."""
    return allowed(torch.get_num_threads())


def allowed(threads: int) -> int:
    """So many threads, or the most that a call may ask for."""
    return min(threads, MAX_THREADS)


class Kernels:
    """The operators of one loaded library under the names that quant/ops.py gives them; arguments are checked.

    `cuda_kernel`, one of CUDA_KERNEL_CODES, matters to 4-bit matmuls of the CUDA library alone.
    """

    def __init__(self, library: ctypes.CDLL, device_type: str, cuda_kernel: str = "mma") -> None:
        self.library = library
        self.device_type = device_type
        self.cuda_kernel = cuda_kernel

    def table(self, name: str) -> list[float]:
        """A table of csrc/formats.h as Python floats: one of TABLE_CODES."""
        buffer = (ctypes.c_float * 256)()
        length = self.library.hb_table(TABLE_CODES[name], buffer, len(buffer))
        return list(buffer[:length])

    @property
    def level(self) -> str:
        """The instruction set level that the library runs at."""
        return cast(bytes, self.library.hb_level()).decode()

    def status_text(self, status: int) -> str:
        """The library's sentence for a status."""
        return cast(bytes, self.library.hb_status_text(status)).decode()

    def call(self, entry: str, device: torch.device, **fields: Any) -> None:
        """Calls an entry; tensors among `fields` are passed by address, None as null. Raises NativeError."""
        args = filled(entry, **fields)
        args.call.threads = thread_count()
        args.call.batch_invariant = batch_invariant()
        args.call.cuda_kernel = CUDA_KERNEL_CODES[self.cuda_kernel]
        workspace = None
        if entry in ENTRIES_WITH_WORKSPACE:
            needed = self.workspace_bytes(entry, args)
            if needed:
                workspace = torch.empty(needed, dtype=torch.uint8, device=device)
                args.call.workspace = workspace.data_ptr()
                args.call.workspace_bytes = needed
        if self.device_type == "cuda":
            with torch.cuda.device(device):
                args.call.stream = torch.cuda.current_stream(device).cuda_stream
                status = getattr(self.library, entry)(ctypes.byref(args))
        else:
            status = getattr(self.library, entry)(ctypes.byref(args))
        self.check_status(entry, status)

    def taking_bytes(self, entry: str) -> Any:
        """The entry as a function of the struct's bytes, or of a group's and their number: faster than of a struct."""
        function = self.library[entry]  # another object than the attribute, whose argtypes are others
        function.argtypes = (ctypes.c_char_p, _I64) if entry.endswith("_group") else (ctypes.c_char_p,)
        return function

    def workspace_bytes(self, entry: str, args: Any, *count: int) -> int:
        """The scratch memory that an entry needs for a struct, or a group of `count`, with shapes and threads."""
        needed = _I64()
        first = args if count else ctypes.byref(args)
        status = getattr(self.library, f"{entry}_workspace")(first, *count, ctypes.byref(needed))
        self.check_status(entry, status)
        return needed.value

    def check_status(self, entry: str, status: int) -> None:
        """Raises NativeError with the library's sentence unless the call succeeded."""
        if status != _OK:
            raise NativeError(f"{entry} in the {self.device_type} library refused: {self.status_text(status)}")

    def quantize_4bit(self, x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = ready(x)
        count = x.numel()
        packed = pages.empty((formats.packed_bytes(count),), torch.uint8, x.device)
        absmax = torch.empty(formats.block_count(count, blocksize), dtype=torch.float32, device=x.device)
        self.call(
            "hb_quantize4",
            x.device,
            x=x,
            x_dtype=DTYPE_CODES[x.dtype],
            n=count,
            format=FORMAT_CODES[quant_type],
            blocksize=blocksize,
            packed=packed,
            absmax=absmax,
        )
        return packed, absmax

    def encode_4bit(self, x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
        x, scales = ready(x), ready(scales)
        packed = pages.empty((formats.packed_bytes(x.numel()),), torch.uint8, x.device)
        self.call(
            "hb_encode4",
            x.device,
            x=x,
            x_dtype=DTYPE_CODES[x.dtype],
            n=x.numel(),
            format=FORMAT_CODES[quant_type],
            blocksize=blocksize,
            scales=scales,
            packed=packed,
        )
        return packed

    def search_scales_4bit(self, x: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
        x = ready(x)
        scales = torch.empty(formats.block_count(x.numel(), blocksize), dtype=torch.float32, device=x.device)
        self.call(
            "hb_search4",
            x.device,
            x=x,
            x_dtype=DTYPE_CODES[x.dtype],
            n=x.numel(),
            format=FORMAT_CODES[quant_type],
            blocksize=blocksize,
            scales=scales,
        )
        return scales

    def dequantize_4bit(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        quant_type: str,
        blocksize: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        packed, absmax = ready(packed), ready(absmax)
        out = torch.empty(list(shape), dtype=dtype, device=packed.device)
        self.call(
            "hb_dequantize4",
            packed.device,
            packed=packed,
            absmax=absmax,
            n=out.numel(),
            format=FORMAT_CODES[quant_type],
            blocksize=blocksize,
            out=out,
            out_dtype=DTYPE_CODES[dtype],
        )
        return out

    def quantize_absmax(
        self, absmax: torch.Tensor, nested_blocksize: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        absmax = ready(absmax)
        blocks = absmax.numel()
        offset = reference.mean_absmax(absmax)
        codes = pages.empty((blocks,), torch.uint8, absmax.device)
        nested_blocks = formats.block_count(blocks, nested_blocksize)
        nested_absmax = torch.empty(nested_blocks, dtype=torch.float32, device=absmax.device)
        self.call(
            "hb_quantize_absmax",
            absmax.device,
            absmax=absmax,
            blocks=blocks,
            offset=offset,
            nested_blocksize=nested_blocksize,
            codes=codes,
            nested_absmax=nested_absmax,
        )
        return codes, nested_absmax, offset

    def dequantize_absmax(
        self, codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor, nested_blocksize: int
    ) -> torch.Tensor:
        codes, nested_absmax, offset = ready(codes), ready(nested_absmax), ready(offset)
        absmax = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
        self.call(
            "hb_dequantize_absmax",
            codes.device,
            codes=codes,
            blocks=codes.numel(),
            nested_absmax=nested_absmax,
            offset=offset,
            nested_blocksize=nested_blocksize,
            absmax=absmax,
        )
        return absmax

    def linear_4bit(self, *operands: Any) -> torch.Tensor:
        return self._linear_4bit("hb_linear4", *operands)

    def linear_4bit_int8(self, *operands: Any) -> torch.Tensor:
        return self._linear_4bit("hb_linear4_int8", *operands)

    def _linear_4bit(
        self,
        entry: str,
        x: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        quant_type: str,
        blocksize: int,
        shape: Sequence[int],
        nested_absmax: torch.Tensor | None,
        offset: torch.Tensor | None,
        nested_blocksize: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        x, packed, absmax = ready(x), ready(packed), ready(absmax)
        nested_absmax, offset, bias = ready_or_none(nested_absmax), ready_or_none(offset), ready_or_none(bias)
        N, K = shape
        out = torch.empty([*x.shape[:-1], N], dtype=x.dtype, device=x.device)
        self.call(
            entry,
            x.device,
            x=x,
            x_dtype=DTYPE_CODES[x.dtype],
            M=_rows(x),
            N=N,
            K=K,
            packed=packed,
            format=FORMAT_CODES[quant_type],
            blocksize=blocksize,
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=offset,
            nested_blocksize=nested_blocksize,
            bias=bias,
            bias_dtype=0 if bias is None else DTYPE_CODES[bias.dtype],
            out=out,
        )
        return out

    def linear_4bit_experts(
        self,
        x: torch.Tensor,
        ends: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        quant_type: str,
        blocksize: int,
        shape: Sequence[int],
        nested_absmax: torch.Tensor | None,
        offset: torch.Tensor | None,
        nested_blocksize: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        x, ends, packed, absmax = ready(x), ready(ends), ready(packed), ready(absmax)
        nested_absmax, offset, bias = ready_or_none(nested_absmax), ready_or_none(offset), ready_or_none(bias)
        N, K = shape
        E, P, packed_bytes = packed.shape
        out = torch.empty((x.shape[0], P * N), dtype=x.dtype, device=x.device)
        self.call(
            "hb_linear4_experts",
            x.device,
            x=x,
            x_dtype=DTYPE_CODES[x.dtype],
            M=x.shape[0],
            E=E,
            P=P,
            N=N,
            K=K,
            ends=ends,
            packed=packed,
            packed_bytes=packed_bytes,
            format=FORMAT_CODES[quant_type],
            blocksize=blocksize,
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=offset,
            nested_blocksize=nested_blocksize,
            bias=bias,
            bias_dtype=0 if bias is None else DTYPE_CODES[bias.dtype],
            out=out,
        )
        return out

    def quantize_8bit(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = ready(w)
        N, K = w.shape
        CB = pages.empty((N, K), torch.int8, w.device)
        SCB = torch.empty(N, dtype=torch.float32, device=w.device)
        self.call("hb_quantize8", w.device, w=w, w_dtype=DTYPE_CODES[w.dtype], N=N, K=K, codes=CB, absmax=SCB)
        return CB, SCB

    def dequantize_8bit(self, CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        CB, SCB = ready(CB), ready(SCB)
        N, K = CB.shape
        out = torch.empty((N, K), dtype=dtype, device=CB.device)
        self.call("hb_dequantize8", CB.device, codes=CB, absmax=SCB, N=N, K=K, out=out, out_dtype=DTYPE_CODES[dtype])
        return out

    def linear_8bit(
        self,
        x: torch.Tensor,
        CB: torch.Tensor,
        SCB: torch.Tensor,
        threshold: float,
        outliers: str,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        x, CB, SCB, bias = ready(x), ready(CB), ready(SCB), ready_or_none(bias)
        N, K = CB.shape
        out = torch.empty([*x.shape[:-1], N], dtype=x.dtype, device=x.device)
        self.call(
            "hb_linear8",
            x.device,
            x=x,
            x_dtype=DTYPE_CODES[x.dtype],
            M=_rows(x),
            N=N,
            K=K,
            codes=CB,
            absmax=SCB,
            threshold=threshold,
            outlier_rule=OUTLIER_CODES[outliers],
            bias=bias,
            bias_dtype=0 if bias is None else DTYPE_CODES[bias.dtype],
            out=out,
        )
        return out

    def linear_8bit_experts(
        self,
        x: torch.Tensor,
        ends: torch.Tensor,
        CB: torch.Tensor,
        SCB: torch.Tensor,
        threshold: float,
        outliers: str,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        x, ends, CB, SCB, bias = ready(x), ready(ends), ready(CB), ready(SCB), ready_or_none(bias)
        E, N, K = CB.shape
        out = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
        self.call(
            "hb_linear8_experts",
            x.device,
            x=x,
            x_dtype=DTYPE_CODES[x.dtype],
            M=x.shape[0],
            E=E,
            N=N,
            K=K,
            ends=ends,
            codes=CB,
            absmax=SCB,
            threshold=threshold,
            outlier_rule=OUTLIER_CODES[outliers],
            bias=bias,
            bias_dtype=0 if bias is None else DTYPE_CODES[bias.dtype],
            out=out,
        )
        return out

    def paged_attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: torch.Tensor,
        offsets: torch.Tensor,
        starts: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        if query.stride(2) != 1 or min(query.stride()) < 0 or query.data_ptr() % query.element_size():
            query = query.clone(memory_format=torch.contiguous_format)
        keys, values, tables = ready(keys), ready(values), ready(tables)
        offsets, starts, sinks, scales = ready(offsets), ready(starts), ready_or_none(sinks), ready_or_none(scales)
        T, H, D = query.shape
        blocks, block_tokens, G, E = values.shape
        out = torch.empty((T, H, E), dtype=query.dtype, device=query.device)
        self.call(
            "hb_paged_attention",
            query.device,
            query=query,
            query_row_stride=query.stride(0),
            query_head_stride=query.stride(1),
            keys=keys,
            values=values,
            store_dtype=STORE_CODES[keys.dtype],
            scales=scales,
            dtype=DTYPE_CODES[query.dtype],
            T=T,
            H=H,
            G=G,
            D=D,
            E=E,
            blocks=blocks,
            block_tokens=block_tokens,
            tables=tables,
            S=tables.shape[0],
            max_blocks=tables.shape[1],
            offsets=offsets,
            starts=starts,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            sinks_dtype=0 if sinks is None else DTYPE_CODES[sinks.dtype],
            out=out,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, weight = ready(x), ready(weight)
        out = torch.empty_like(x)
        self.call(
            "hb_rms_norm",
            x.device,
            x=x,
            dtype=DTYPE_CODES[x.dtype],
            M=_rows(x),
            K=x.shape[-1],
            weight=weight,
            eps=eps,
            out=out,
        )
        return out

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        x = ready(x)
        out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
        self.call("hb_argmax", x.device, x=x, dtype=DTYPE_CODES[x.dtype], M=_rows(x), K=x.shape[-1], out=out)
        return out

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = ready(gate), ready(up)
        out = torch.empty_like(gate)
        self.call("hb_swiglu", gate.device, gate=gate, up=up, dtype=DTYPE_CODES[gate.dtype], n=gate.numel(), out=out)
        return out

    def rotary(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turned = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (query, key)]
        T, H, D = query.shape
        sizes = {"dtype": DTYPE_CODES[query.dtype], "T": T, "H": H, "G": key.shape[1], "D": D}
        self.call("hb_rotary", query.device, query=turned[0], key=turned[1], cos=ready(cos), sin=ready(sin), **sizes)
        return turned[0], turned[1]

    def cache_write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:
        self.call("hb_cache_write", key.device, **cache_write_fields(key, value, keys, values, slots, scales))


def cache_write_fields(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None,
) -> dict[str, Any]:
    """The fields of hb_cache_write's struct for checked tensors; the caller keeps them."""
    T, G, D = key.shape
    return {
        "key": key,
        "key_row_stride": key.stride(0),
        "key_head_stride": key.stride(1),
        "value": value,
        "value_row_stride": value.stride(0),
        "value_head_stride": value.stride(1),
        "dtype": DTYPE_CODES[key.dtype],
        "T": T,
        "G": G,
        "D": D,
        "E": value.shape[2],
        "slots": slots,
        "slot_count": keys.shape[0] * keys.shape[1],
        "store_dtype": STORE_CODES[keys.dtype],
        "keys": keys,
        "values": values,
        "scales": scales,
    }


def _rows(x: torch.Tensor) -> int:
    """M: the product of all sizes but the last."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def ready(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and aligned to its element, as the C interface asks (a tensor mapped from a file may be neither)."""
    return tensor if is_ready(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def is_ready(tensor: torch.Tensor) -> bool:
    """Whether it is."""
    return tensor.is_contiguous() and tensor.data_ptr() % tensor.element_size() == 0


def ready_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same for a tensor that may be missing."""
    return None if tensor is None else ready(tensor)
