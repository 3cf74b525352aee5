"""Every operator in plain torch: the readable truth that each compiled kernel is compared with.

Not the way to run a model: `linear_4bit` here builds the whole weight. Functions have the names and arguments of
quant/ops.py, whose docstrings give shapes, dtypes and errors; arguments are taken as already checked.

Bit-exact everywhere: quantized codes, statistics, dequantized values and products with int8 activations. The others
agree with a kernel up to the order in which float32 sums are added, and to the last bits of an exponential.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quant import formats, kv

# A float32 block maximum below this has no finite reciprocal worth using; both it and the values are scaled up by
# SUBNORMAL_SCALE first, which is exact.
SMALLEST_DIVISOR = 2.0**-100
SUBNORMAL_SCALE = 2.0**100
SEARCH_FACTORS = tuple((20 + 5 * i) / 64 for i in range(16))
"""The scales that the search tries first, in units of a block's absmax; csrc/formats.h has them once more."""
SEARCH_STEPS = tuple((2 * i - 15) / 256 for i in range(16))
"""Added to the best of those, they are the scales that it tries then."""
SEARCH_MARGIN = 2.0**-30
"""What a scale must gain in squared error, in units of absmax squared: less may be the rounding of the division."""


def quantize_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blockwise 4-bit codes and block maxima of `x`."""
    absmax = _block_absmax(_in_blocks(x, blocksize))
    return encode_4bit(x, absmax, quant_type, blocksize), absmax


def encode_4bit(x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """Blockwise 4-bit codes of `x` divided by its blocks' scales."""
    number_format = formats.FOUR_BIT[quant_type]
    normalised = _divide(_in_blocks(x, blocksize), scales).view(-1)[: x.numel()]
    rank = _rank(normalised.abs() if number_format.signed_magnitude else normalised, number_format)
    codes = torch.tensor(number_format.code_of_rank, dtype=torch.uint8, device=x.device)[rank]
    if number_format.signed_magnitude:
        codes = codes + (normalised < 0) * torch.tensor(8, dtype=torch.uint8, device=x.device)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), number_format.zero_code)])
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << formats.HIGH_NIBBLE_SHIFT) | pairs[:, 1]


def search_scales_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """The scale of each block with the smallest squared error among those tried, in the block's own unit, its absmax.

    Every scale that is tried gives each value its nearest code. For given codes q the best scale is
    sum(x q) / sum(q q), which lowers the error by sum(x q)^2 / sum(q q), its gain; the largest gain wins, the first
    among equals. First come SEARCH_FACTORS, then those around the scale that won, and that is kept where its error is
    below that of absmax itself. Sums go over a block's values in order, each operation rounded to float32.
    """
    number_format = formats.FOUR_BIT[quant_type]
    blocks = _in_blocks(x, blocksize)
    absmax = _block_absmax(blocks)
    values = _divide(blocks, absmax)
    if number_format.signed_magnitude:
        values = values.abs()
    tried = torch.tensor(SEARCH_FACTORS, dtype=torch.float32, device=x.device)
    if not number_format.signed_magnitude:  # else the other sign gives the same values
        tried = torch.cat([tried, -tried])
    own = torch.ones_like(absmax)
    best = torch.zeros_like(absmax), own
    best = _better(best, *_fit(values, tried[:, None].expand(-1, absmax.numel()), number_format))
    steps = torch.tensor(SEARCH_STEPS, dtype=torch.float32, device=x.device)
    _, found = _better(best, *_fit(values, best[1] + steps[:, None], number_format))
    error, error_of_absmax = _errors(values, torch.stack([found, own]), number_format)
    scales = torch.where(error < error_of_absmax - SEARCH_MARGIN, found, own) * absmax
    return torch.where(scales.isfinite(), scales, absmax)


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """table[code] * absmax: one float32 product, one rounding to `dtype`."""
    count = _count(shape)
    codes = torch.stack([packed >> formats.HIGH_NIBBLE_SHIFT, packed & 15], dim=1).view(-1)[:count]
    values = formats.CODE_TABLES[quant_type].to(packed.device)[codes.long()]
    return (values * absmax.repeat_interleave(blocksize)[:count]).to(dtype).view(list(shape))


def quantize_absmax(
    absmax: torch.Tensor, nested_blocksize: int = formats.NESTED_BLOCKSIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: 8-bit codes of absmax minus its mean."""
    offset = mean_absmax(absmax)
    centred = _in_blocks(absmax - offset, nested_blocksize)
    nested_absmax = _block_absmax(centred)
    normalised = _divide(centred, nested_absmax).view(-1)[: absmax.numel()]
    midpoints = formats.DYNAMIC_MIDPOINTS.to(absmax.device)
    codes = torch.bucketize(normalised, midpoints)  # the number of midpoints strictly below; 255 for NaN
    return codes.to(torch.uint8), nested_absmax, offset


def dequantize_absmax(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    offset: torch.Tensor,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
) -> torch.Tensor:
    """map[code] * nested_absmax + offset, rounded after the product and after the sum (no fused multiply-add)."""
    values = formats.DYNAMIC_TABLE.to(codes.device)[codes.long()]
    groups = torch.arange(codes.numel(), device=codes.device) // nested_blocksize
    return values * nested_absmax[groups] + offset


def linear_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times the transposed weight in float32, plus bias, rounded once to x's dtype."""
    if nested_absmax is not None and offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset, nested_blocksize)
    weight = dequantize_4bit(packed, absmax, quant_type, blocksize, shape, torch.float32)
    out = x.float() @ weight.t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_4bit_int8(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact int8 products of groups of columns, each scaled in float32 and added in the order of the columns.

    A piece is what lies in one group of a row of x and in one block of the weight; blocks may end anywhere.
    """
    if nested_absmax is not None and offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset, nested_blocksize)
    number_format = formats.FOUR_BIT[quant_type]
    N, K = shape
    groups = -(-K // formats.ACTIVATION_GROUP)
    rows = x.float().reshape(x.shape[:-1].numel(), K)
    padded = torch.nn.functional.pad(rows, (0, groups * formats.ACTIVATION_GROUP - K))
    padded = padded.view(rows.shape[0] * groups, formats.ACTIVATION_GROUP)
    largest = _row_absmax(padded)
    codes = _round_to_int8(padded, largest).float().view(rows.shape[0], groups * formats.ACTIVATION_GROUP)
    scales = (largest * number_format.int8_step).view(rows.shape[0], groups)
    table = torch.tensor(number_format.int8_table, dtype=torch.float32, device=x.device)
    weights = table[torch.stack([packed >> formats.HIGH_NIBBLE_SHIFT, packed & 15], dim=1).view(-1)[: N * K].long()]
    weights = weights.view(N, K)
    row_begins = torch.arange(N, device=x.device) * K
    total = rows.new_zeros(rows.shape[0], N)
    for group in range(groups):
        begin, end = group * formats.ACTIVATION_GROUP, min((group + 1) * formats.ACTIVATION_GROUP, K)
        blocks = (row_begins[:, None] + torch.arange(begin, end, device=x.device)) // blocksize
        for piece in range((formats.ACTIVATION_GROUP - 1) // blocksize + 2):
            block = blocks[:, 0] + piece
            own = weights[:, begin:end].masked_fill(blocks != block[:, None], 0.0)
            exact = codes[:, begin:end] @ own.t()  # integers below 2^24: float32 holds them exactly
            factor = absmax[torch.minimum(block, blocks[:, -1])] * scales[:, group, None]
            total = torch.where(block <= blocks[:, -1], total + exact * factor, total)
    out = total if bias is None else total + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], N)


def linear_4bit_experts(
    x: torch.Tensor,
    ends: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear_4bit of each expert's rows with each of its matrices, side by side."""
    matrices, bytes_used = packed.shape[1], formats.packed_bytes(_count(shape))
    out = x.new_zeros(x.shape[0], matrices * shape[0])
    for expert, rows in expert_rows(ends):
        for matrix in range(matrices):
            own = (expert, matrix)
            columns = slice(matrix * shape[0], (matrix + 1) * shape[0])
            out[rows, columns] = linear_4bit(
                x[rows],
                packed[own][:bytes_used],
                absmax[own],
                quant_type,
                blocksize,
                shape,
                None if nested_absmax is None else nested_absmax[own],
                None if offset is None else offset[own],
                nested_blocksize,
                None if bias is None else bias[expert, columns],
            )
    return out


def expert_rows(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with the rows it has: from the end of the one before up to its own."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def quantize_8bit(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima and int8 codes; values pass through float16 where that keeps them finite."""
    half = w.half().float()
    values = torch.where(half.isfinite(), half, w.float())
    row_absmax = _row_absmax(values)
    return _round_to_int8(values, row_absmax), row_absmax


def dequantize_8bit(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """code * row maximum / 127, in float32, rounded once to `dtype`."""
    return (CB.float() * SCB[:, None] / _int8_max(SCB)).to(dtype)


def linear_8bit(
    x: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    outliers: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """LLM.int8(): an exact int8 product of the ordinary values plus float32 outlier terms, column by column; or, with
    outliers="all", the float32 product with the dequantized weight."""
    rows = x.reshape(_count(x.shape[:-1]), x.shape[-1]).float()
    if outliers == "all":
        out = (rows @ CB.float().t()) * (SCB / _int8_max(SCB))
        out = out if bias is None else out + bias.float()
        return out.to(x.dtype).view(*x.shape[:-1], CB.shape[0])
    is_outlier = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    row_absmax = _row_absmax(rows.masked_fill(is_outlier, 0.0))
    if outliers == "batch":
        is_outlier = is_outlier.any(dim=0).expand_as(is_outlier)
    codes = _round_to_int8(rows.masked_fill(is_outlier, 0.0), row_absmax)
    exact = (codes.double() @ CB.double().t()).float()  # integers below 2^53: float64 holds them exactly
    out = exact * row_absmax[:, None] * SCB * INT8_PRODUCT_SCALE
    columns = is_outlier.any(dim=0).nonzero().flatten().tolist()
    if columns:
        total = torch.zeros_like(out)
        kept = rows.masked_fill(~is_outlier, 0.0)
        for column in columns:
            total = total + kept[:, column, None] * CB[:, column].float()
        out = out + total * (SCB / _int8_max(SCB))
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], CB.shape[0])


def linear_8bit_experts(
    x: torch.Tensor,
    ends: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    outliers: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear_8bit of each expert's rows with its matrix."""
    out = x.new_zeros(x.shape[0], CB.shape[1])
    for expert, rows in expert_rows(ends):
        own_bias = None if bias is None else bias[expert]
        out[rows] = linear_8bit(x[rows], CB[expert], SCB[expert], threshold, outliers, own_bias)
    return out


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each sequence's keys and values gathered from its blocks, scores and softmax in float32, rounded once."""
    block_tokens, kv_heads = keys.shape[1:3]
    out = query.new_empty(*query.shape[:2], values.shape[3])
    bounds = offsets.tolist()
    for table, begin, end, start in zip(tables, bounds, bounds[1:], starts.tolist(), strict=False):
        length = start + end - begin
        first = max(0, start - window + 1) // block_tokens * block_tokens if window else 0
        blocks = table[first // block_tokens : -(-length // block_tokens)]
        key, value = (store[blocks].flatten(0, 1)[: length - first].float() for store in (keys, values))
        if scales is not None:
            both = scales[blocks].flatten(0, 1)[: length - first]
            key, value = (kv.dequantize_heads(x, both[..., i], torch.float32) for i, x in enumerate((key, value)))
        grouped = query[begin:end].float().reshape(end - begin, kv_heads, -1, query.shape[2])  # [rows, G, H / G, D]
        scores = torch.einsum("rgjd,kgd->gjrk", grouped, key) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        positions = torch.arange(first, length, device=query.device)
        rows = torch.arange(start, length, device=query.device)[:, None]
        seen = positions <= rows
        if window:
            seen &= positions > rows - window
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            share = sinks.float().view(kv_heads, -1, 1, 1).expand(-1, -1, end - begin, 1)
            scores = torch.cat([scores, share], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : length - first]
        value = value.masked_fill(~seen.any(dim=0)[:, None, None], 0.0)  # nothing, times what nobody sees
        out[begin:end] = torch.einsum("gjrk,kge->rgje", weights, value).flatten(1, 2).to(query.dtype)
    return out


def embedding_4bit(
    ids: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    rows: int,
    columns: int,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the whole table; arguments are those of quant/rows.py."""
    if nested_absmax is not None and offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset, nested_blocksize)
    return dequantize_4bit(packed, absmax, quant_type, blocksize, [rows, columns], dtype)[ids.long()]


def embedding_8bit(ids: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the whole table; arguments are those of quant/rows.py."""
    return dequantize_8bit(CB, SCB, dtype)[ids.long()]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised in float32, rounded, then weighted."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (weight * values.to(x.dtype)).contiguous()


def argmax(x: torch.Tensor) -> torch.Tensor:
    """torch's own, whose greatest value is NaN where there is one."""
    if not x.shape[-1]:
        return torch.full(x.shape[:-1], -1, device=x.device)
    greatest, places = x.max(dim=-1)
    return torch.where(torch.isfinite(greatest), places, -1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu, rounded, times up."""
    values = gate.float()
    return ((values / (1.0 + torch.exp(-values))).to(gate.dtype) * up).contiguous()


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' apply_rotary_pos_emb for tokens first: two products and their sum, each rounded to the dtype."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        across = torch.cat((-second, first), dim=-1)
        return (x * cos[:, None] + across * sin[:, None]).contiguous()

    return turned(query), turned(key)


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Rows to their slots, but for those whose slot is not in the cache."""
    is_there = (slots >= 0) & (slots < keys.shape[0] * keys.shape[1])
    places = slots[is_there]
    for which, (rows, store) in enumerate(((key, keys), (value, values))):
        found = rows[is_there]
        if scales is not None:
            found, of_heads = kv.quantize_heads(found)
            scales.view(-1, *scales.shape[2:])[places, :, which] = of_heads
        store.view(-1, *store.shape[2:])[places] = found.to(store.dtype)


_ONE_THREADS_PIECE = 1 << 15
"""Values up to which torch's element-wise operations and sums stay on one thread."""
INT8_PRODUCT_SCALE = 1.0 / (formats.INT8_MAX * formats.INT8_MAX)
"""Two int8 codes multiplied stand for this times both maxima; used as a float32."""


def mean_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """The offset of double quantization: the mean, summed in float64 so that the order of addition does not show.

    On a CPU in pieces that torch sums on the calling thread: the sum is short, waking other threads for it is not.
    """
    if absmax.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=absmax.device)
    if absmax.device.type != "cpu":
        return absmax.double().mean().float()
    sums = [piece.double().sum() for piece in torch.split(absmax, _ONE_THREADS_PIECE)]
    return (torch.stack(sums).sum() / absmax.numel()).float()


def _in_blocks(x: torch.Tensor, blocksize: int) -> torch.Tensor:
    """float32 [blocks, blocksize] of the flattened values; zeros fill a short block."""
    flat = x.reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def _block_absmax(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(dim=1)


def _divide(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each block times the reciprocal of its scale; zeros where that is zero."""
    lift = torch.where(scales.abs() < SMALLEST_DIVISOR, SUBNORMAL_SCALE, 1.0)
    divisor = scales * lift
    reciprocal = torch.where(divisor == 0, 0.0, 1.0 / divisor)
    return (blocks * lift[:, None]) * reciprocal[:, None]


def _rank(ranked: torch.Tensor, number_format: formats.FourBitFormat) -> torch.Tensor:
    """How many of the format's thresholds each value exceeds; 0 for NaN."""
    thresholds = torch.tensor(number_format.thresholds, dtype=torch.float32, device=ranked.device)
    return torch.bucketize(ranked, thresholds).masked_fill(ranked.isnan(), 0)


def _nearest(values: torch.Tensor, factors: torch.Tensor, number_format: formats.FourBitFormat) -> torch.Tensor:
    """The table's value that each value divided by its factor gets, before it is multiplied with the factor again."""
    table = formats.CODE_TABLES[number_format.name][list(number_format.code_of_rank)].to(values.device)
    reciprocals = torch.where(factors == 0, 0.0, 1.0 / factors)
    return table[_rank(values * reciprocals, number_format)]


def _fit(
    values: torch.Tensor, factors: torch.Tensor, number_format: formats.FourBitFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(x q) and sum(q q) of every block at every factor.

    values: [blocks, n]; factors, and both results: [tried, blocks].
    """
    products, powers = torch.zeros_like(factors), torch.zeros_like(factors)
    for column in values.unbind(dim=1):
        chosen = _nearest(column, factors, number_format)
        products = products + column * chosen
        powers = powers + chosen * chosen
    return products, powers


def _better(
    best: tuple[torch.Tensor, torch.Tensor], products: torch.Tensor, powers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest gain of every block and the scale that has it: the best so far, or a larger one among these fits."""
    gains = torch.where(powers == 0, 0.0, products * products / powers)
    gain, winner = gains.max(dim=0)  # the first of equal ones
    scale = (products / powers).gather(0, winner[None])[0]
    return torch.where(gain > best[0], gain, best[0]), torch.where(gain > best[0], scale, best[1])


def _errors(values: torch.Tensor, factors: torch.Tensor, number_format: formats.FourBitFormat) -> torch.Tensor:
    """The squared error of every block at every factor: [tried, blocks]."""
    errors = torch.zeros_like(factors)
    for column in values.unbind(dim=1):
        difference = column - _nearest(column, factors, number_format) * factors
        errors = errors + difference * difference
    return errors


def _row_absmax(values: torch.Tensor) -> torch.Tensor:
    """float32 [M, K] -> float32 [M]; 0 for K = 0."""
    if values.shape[1] == 0:
        return values.new_zeros(values.shape[0])
    return values.abs().amax(dim=1)


def _round_to_int8(values: torch.Tensor, row_absmax: torch.Tensor) -> torch.Tensor:
    """Nearest, ties to even. Rows too small for 127 / absmax, and values that are not finite, give 0."""
    factor = row_absmax.reciprocal() * formats.INT8_MAX  # two roundings, as in bitsandbytes' own files
    factor = torch.where(factor.isfinite(), factor, 0.0)
    scaled = values * factor[:, None]
    return torch.where(scaled.isfinite(), scaled.round(), 0.0).to(torch.int8)


def _int8_max(like: torch.Tensor) -> torch.Tensor:
    """127 as a tensor: torch turns a division by a Python number, and of one, into a product with a reciprocal."""
    return like.new_full((), float(formats.INT8_MAX))


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
