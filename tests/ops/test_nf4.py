"""NF4 with double quantisation is bitsandbytes', bit for bit, and does not depend on the division."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megallm.ops.nf4 import BLOCK, LEVELS, OUTER_BLOCK, MatrixRange, Nf4, dynamic_table

functional = pytest.importorskip("bitsandbytes.functional")
SHAPES = [(64, 64), (48, 96), (7, 13), (1, 64), (300, 70), (256, 344)]


def matrix(shape: tuple[int, int], std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=draw) * std).to(dtype)


def whole(values: Tensor) -> Nf4:
    full = tuple(values.shape)
    return Nf4.of(values, MatrixRange((0, full[0]), (0, full[1]), full))


def reference(name: str, *args: object) -> Tensor | tuple[Tensor, Tensor]:
    """bitsandbytes' own definition of an operation. Its CPU kernel takes the neighbour of the
    nearest 8-bit code for one scale in 500, and reads wrong scales where rows are no whole blocks.
    """
    op = getattr(torch.ops.bitsandbytes, name).default
    with torch.compiler.set_stance("force_eager"):
        return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantises_and_dequantises_as_bitsandbytes(shape, dtype):
    for std in (1.0, 0.02):
        values = matrix(shape, std, dtype)
        ours = whole(values)
        codes, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        assert torch.equal(ours.codes, codes.flatten())
        mean = state.absmax.mean()
        table = functional.create_dynamic_map()
        scales, outer = reference("quantize_blockwise", state.absmax - mean, table, OUTER_BLOCK)
        assert torch.equal(ours.scales.flatten(), scales)
        torch.testing.assert_close(ours.outer, outer, rtol=0, atol=1e-37)  # a block of zeros
        largest = reference("dequantize_blockwise", scales, outer, table, OUTER_BLOCK, torch.float32) + mean
        want = reference("dequantize_4bit", codes, largest, BLOCK, "nf4", shape, dtype)
        assert torch.equal(ours.dequantize(dtype), want)
        if shape[1] % BLOCK == 0:  # as its CPU kernel, with the same scales
            state.absmax = largest
            assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(codes, state))


def test_tables():
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    assert torch.equal(levels, functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(dynamic_table(torch.device("cpu")), functional.create_dynamic_map())


def test_error_on_normal_numbers():
    values = matrix((512, 512))
    error = (whole(values).dequantize(torch.float32) - values).abs().mean()
    assert 0.0725 < float(error) < 0.0745  # 0.0734 in bitsandbytes


@pytest.mark.parametrize("shape", [*SHAPES, (128, 256)])
def test_a_piece_has_the_values_of_the_whole(shape):
    values, (rows, columns) = matrix(shape), shape
    want = whole(values).dequantize(torch.float64)
    for some in ((0, rows), (rows // 2, rows), (rows // 3, rows - 1)):
        for across in ((0, columns), (0, columns // 2), (columns // 2, columns)):
            if some[0] < some[1]:
                got = Nf4.of(values, MatrixRange(some, across, shape)).dequantize(torch.float64)
                assert torch.equal(got, want[slice(*some), slice(*across)])
    if shape == (128, 256):  # negative control: quantising the piece itself gives other scales
        assert not torch.equal(whole(values[:, :128]).dequantize(torch.float64), want[:, :128])


def test_bytes():
    values = matrix((256, 1024))
    assert whole(values).num_bytes <= 0.517 * values.numel()
    pieces = [Nf4.of(values, MatrixRange((0, 256), at, (256, 1024))) for at in ((0, 512), (512, 1024))]
    assert sum(piece.num_bytes for piece in pieces) <= 0.517 * values.numel()
