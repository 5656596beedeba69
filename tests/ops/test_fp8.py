"""FP8: scale rules, what quantisation keeps, and the emulated product against torch's own kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megallm.ops import fp8
from megallm.ops.fp8 import LARGEST, Quantised, amax_of, dequantise, emulated, native, quantise, scale_of
from megallm.ops.low_precision import RECIPES

SCALED = ("tensor", "row", "block", "square")  # square: BLOCK x BLOCK, of weights
SHAPES = [(16, 16, 16), (16, 48, 32), (64, 128, 96), (128, 256, 64), (32, 1024, 48)]
RAGGED = [(3, 40, 21), (17, 7, 2), (130, 300, 5)]  # no multiples of what kernels take
VECTORS = [(1, 16, 16), (17, 7, 1)]  # which libraries have kernels of their own for
PRODUCTS = {  # formats of the two operands, and what shares a scale
    "row by row": (("e4m3", "e4m3"), "row"),
    "gradient by weight": (("e5m2", "e4m3"), "tensor"),
    "input by weight": (("e4m3", "e4m3"), "tensor"),
}


def quantise_now(x: Tensor, form: str, scaled: str, powers: bool = False) -> Quantised:
    """With scales from the matrix itself."""
    return quantise(x, form, scale_of(amax_of(x, scaled), LARGEST[form], powers=powers))


def matrix(rows: int, columns: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Numbers of very different size, by row and by column."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(rows, 1, generator=draw)) * torch.exp(torch.randn(columns, generator=draw))
    return torch.randn(rows, columns, generator=draw) * sizes


# --- scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LARGEST)
@pytest.mark.parametrize("margin", [0, 2])
def test_the_scale_is_that_of_transformer_engine(form, margin):
    """Documented there: the largest magnitude of the tensor becomes 2^-margin times the largest of the format."""
    for amax in (1e-6, 0.37, 448.0, 3e5):
        scale = scale_of(torch.tensor(amax), LARGEST[form], margin)
        assert float(scale) == pytest.approx(LARGEST[form] / amax / 2**margin, rel=1e-6)


def test_no_scale_from_zero_or_from_what_is_not_finite():
    bad = torch.tensor([0.0, math.inf, math.nan, 2.0])
    assert scale_of(bad, 448.0).tolist() == [1.0, 1.0, 1.0, 224.0]
    assert float(scale_of(torch.tensor(1e-40), 448.0)) == torch.finfo(torch.float32).max, "not infinity"


def test_powers_of_two_are_rounded_down_so_that_nothing_overflows():
    for amax in (0.1, 0.875, 1.0, 1.75, 3.0, 447.0, 448.0, 449.0):
        plain = float(scale_of(torch.tensor(amax), 448.0))
        power = float(scale_of(torch.tensor(amax), 448.0, powers=True))
        assert math.log2(power).is_integer() and power <= plain < 2 * power
        assert amax * power <= 448.0


def test_amax_of_each_granularity_and_ragged_blocks():
    x = matrix(130, 300)
    assert amax_of(x, "tensor") == x.abs().max()
    assert torch.equal(amax_of(x, "row")[:, 0], x.abs().max(1).values)
    assert amax_of(x, "block").shape == (130, 3) and amax_of(x, "square").shape == (2, 3)
    assert torch.equal(amax_of(x, "block")[:, 2], x[:, 256:].abs().max(1).values)
    assert amax_of(x, "square")[1, 1] == x[128:, 128:256].abs().max()


# --- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LARGEST)
@pytest.mark.parametrize("scaled", SCALED)
def test_what_is_stored_is_within_half_a_step(form, scaled):
    """Relative error at most 2^-4 (2^-3 for e5m2), or half the smallest subnormal step below the scale's reach."""
    x = matrix(130, 300)
    stored = quantise_now(x, form, scaled)
    bits, tiny = {"e4m3": (3, 2.0**-9), "e5m2": (2, 2.0**-16)}[form]
    bound = torch.maximum(x.abs() * 2.0 ** -(bits + 1), fp8.expand_scale(stored.inverse, x.shape) * tiny / 2)
    assert ((dequantise(stored, torch.float32) - x).abs() <= bound * 1.0001).all()
    assert stored.data.float().abs().max() == LARGEST[form]


def test_finer_scales_lose_less():
    x = matrix(256, 384)
    error = {}
    for scaled in ("tensor", "row", "block"):
        stored = quantise_now(x, "e4m3", scaled)
        error[scaled] = ((dequantise(stored, torch.float32) - x) / x.abs()).abs().median()
    assert error["block"] <= error["row"] < error["tensor"]


def test_too_small_a_history_clips_instead_of_overflowing():
    x = torch.tensor([[1.0, 100.0, -100.0]])
    stored = quantise(x, "e4m3", scale_of(torch.tensor(1.0), 448.0))
    assert dequantise(stored, torch.float32).tolist() == [[1.0, 1.0, -1.0]]


@pytest.mark.parametrize("scaled", ["tensor", "square"])
def test_turned_is_the_transpose(scaled):
    x = matrix(130, 300)
    stored = quantise_now(x, "e4m3", scaled, True)
    assert torch.equal(dequantise(stored.transposed(), torch.float32), dequantise(stored, torch.float32).t())


# --- products ------------------------------------------------------------------------------------------------------


# The order of a sum is a library's own and differs between kinds of CPU. True on all of them: sums without rounding
# are equal bit for bit, other sums are as near the exact ones as their number of roundings allows.


def whole_numbers(shape: tuple[int, int, int], product: str) -> tuple[Quantised, Quantised]:
    """Whole numbers of -8 to 8 times powers of two: fp32 holds every partial sum in every order."""
    draw = torch.Generator().manual_seed(5)
    forms, scaled = PRODUCTS[product]
    operands = []
    for form, rows in zip(forms, (shape[0], shape[2]), strict=True):
        data = torch.randint(-8, 9, (rows, shape[1]), generator=draw).float().to(fp8.FORMATS[form])
        inverse = 2.0 ** torch.randint(-9, 10, (rows, 1) if scaled == "row" else (), generator=draw)
        operands.append(Quantised(data, inverse))
    return operands[0], operands[1]


def numbers(shape: tuple[int, int, int], product: str) -> tuple[Quantised, Quantised]:
    """Numbers of very different size, whose sums are rounded."""
    (first, second), scaled = PRODUCTS[product]
    a = quantise_now(matrix(shape[0], shape[1], 1), first, scaled, scaled == "row")
    return a, quantise_now(matrix(shape[2], shape[1], 2), second, scaled, scaled == "row")


def exact(a: Quantised, b: Quantised) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far one of K terms in fp32 may be from it: (K + 3) 2^-24 sum |a||b|.

    Each operand is scaled and each product rounded at most once, then there are K - 1 additions: K + 2 roundings of at
    most 2^-24 in any order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); one more stands for
    the squares of those.
    """
    x, w = dequantise(a, torch.float64), dequantise(b, torch.float64)
    return x @ w.t(), (x.abs() @ w.abs().t()) * (x.shape[1] + 3) * 2.0**-24


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES + RAGGED + VECTORS, ids=str)
def test_both_products_equal_the_exact_one_bit_for_bit_where_no_sum_is_rounded(shape, product):
    """And bf16 is that number rounded once."""
    a, b = whole_numbers(shape, product)
    wanted = exact(a, b)[0]
    for multiply in (emulated, native):
        assert torch.equal(multiply(a, b, torch.float32).double(), wanted)
        assert torch.equal(multiply(a, b, torch.bfloat16), wanted.float().bfloat16())


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES + RAGGED + VECTORS, ids=str)
def test_both_products_are_within_the_rounding_of_their_sums(shape, product):
    a, b = numbers(shape, product)
    wanted, bound = exact(a, b)
    for multiply in (emulated, native):
        assert ((multiply(a, b, torch.float32).double() - wanted).abs() <= bound).all()
        rounded = (multiply(a, b, torch.bfloat16).double() - wanted).abs()
        assert (rounded <= bound + 2.0**-8 * (wanted.abs() + bound)).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_one_bit_of_one_stored_number_is_noticed(product):
    """The control of the two above, and that rounding does occur in the second."""
    for operands, place in ((whole_numbers((16, 48, 32), product), None), (numbers((16, 48, 32), product), "largest")):
        a, b = operands
        at = (3, 5) if place is None else divmod(int(dequantise(a, torch.float32).abs().argmax()), 48)
        other = a.data.clone().view(torch.uint8)
        other[at] ^= 1
        changed = Quantised(other.view(a.data.dtype), a.inverse)
        wanted, bound = exact(a, b)
        for multiply in (emulated, native):
            found = multiply(changed, b, torch.float32).double()
            assert not torch.equal(found, wanted) and not ((found - wanted).abs() <= bound).all()
    assert not torch.equal(emulated(a, b, torch.float32).double(), wanted)


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("shape", [(0, 200), (130, 0), (0, 0)], ids=str)
def test_nothing_has_no_magnitude_and_adds_nothing(shape, scaled):
    """The rows of an expert that no token chose, and their transpose."""
    x = torch.zeros(shape, dtype=torch.bfloat16)
    stored = quantise_now(x, "e4m3", scaled)
    assert stored.data.shape == shape and (stored.inverse == 1).all()
    other = quantise_now(matrix(6, shape[1]), "e4m3", "square" if scaled == "block" else scaled)
    assert torch.equal(fp8.product(stored, other, torch.float32), torch.zeros(shape[0], 6))


def test_every_recipe_is_near_the_product_of_what_it_was_given():
    a, b = matrix(64, 256, 1, 1.0), matrix(96, 256, 2, 1.0)
    exact = a.double() @ b.double().t()
    found = {}
    for name, recipe in RECIPES.items():
        forms = {"row": ("row", "row"), "tensor": ("tensor", "tensor"), "block": ("block", "square")}[recipe.scaled]
        x, w = (quantise_now(m, "e4m3", s, recipe.powers) for m, s in zip((a, b), forms, strict=True))
        error = emulated(x, w, torch.float32).double() - exact
        found[name] = float(error.norm() / exact.norm())
    assert all(error < 0.05 for error in found.values()), found
    assert found["rowwise"] < found["tensorwise"] * 1.05
