import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError
from foveate.meter import by_module, count_flops, flops, register

PICTURE = torch.rand(2, 3, 8, 12)
TOKENS = torch.rand(2, 5, 16)
HEADS = torch.rand(2, 4, 5, 8)
ATTENTION = 2 * 2 * 4 * 5 * 5 * (8 + 8)
PROJECTIONS = 4 * 2 * 2 * 5 * 16 * 16


def resize(mode: str, size: int | tuple[int, ...], x: torch.Tensor = PICTURE, **options):
    return lambda: F.interpolate(x, size=size, mode=mode, **options)


def sample(mode: str):
    return lambda: F.grid_sample(PICTURE, torch.zeros(2, 5, 6, 2), mode=mode, align_corners=False)


def attend(**options):
    return lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS, **options)


MHA = nn.MultiheadAttention(16, 4, batch_first=True).eval()
LSTM = nn.LSTM(16, 8, batch_first=True)
GRU = nn.GRU(16, 8, batch_first=True, bidirectional=True)
CASES = {
    "linear": (lambda: nn.Linear(16, 7)(TOKENS), 2 * 10 * 16 * 7),
    "linear without bias": (lambda: nn.Linear(16, 7, bias=False)(TOKENS), 2 * 10 * 16 * 7),
    "matmul": (lambda: HEADS @ HEADS.mT, 2 * 8 * 5 * 5 * 8),
    "einsum": (lambda: torch.einsum("bnc,bmc->bnm", TOKENS, TOKENS), 2 * 2 * 5 * 5 * 16),
    "matrix times vector": (lambda: TOKENS @ torch.rand(16), 2 * 10 * 16),
    "dot": (lambda: torch.rand(5) @ torch.rand(5), 2 * 5),
    "addmv": (lambda: torch.addmv(torch.rand(4), torch.rand(4, 5), torch.rand(5)), 2 * 20),
    "addbmm": (lambda: torch.addbmm(torch.zeros(5, 5), TOKENS, TOKENS.mT), 2 * 2 * 5 * 5 * 16),
    "cdist by products": (lambda: torch.cdist(torch.rand(30, 8), torch.rand(40, 8)), 2 * 30 * 40 * 8),
    "cdist in L1": (lambda: torch.cdist(torch.rand(30, 8), torch.rand(40, 8), p=1), 2 * 30 * 40 * 8),
    "conv": (lambda: F.conv2d(PICTURE, torch.rand(4, 3, 3, 3), padding=1, stride=2), 2 * 2 * 4 * 6 * 4 * 27),
    "conv same": (lambda: F.conv2d(PICTURE, torch.rand(4, 3, 3, 3), padding="same"), 2 * 2 * 96 * 4 * 27),
    "depthwise": (lambda: F.conv2d(PICTURE, torch.rand(3, 1, 3, 3), groups=3), 2 * 2 * 6 * 10 * 3 * 9),
    "unbatched conv": (lambda: F.conv2d(PICTURE[0], torch.rand(4, 3, 3, 3)), 2 * 6 * 10 * 4 * 27),
    "transposed conv": (lambda: F.conv_transpose2d(PICTURE, torch.rand(3, 4, 4, 4), stride=2), 2 * 2 * 96 * 12 * 16),
    "conv 1d": (lambda: F.conv1d(TOKENS, torch.rand(3, 5, 3)), 2 * 2 * 14 * 3 * 15),
    "attention": (attend(), ATTENTION),
    "masked attention": (attend(attn_mask=torch.zeros(5, 5)), ATTENTION),
    "boolean mask": (attend(attn_mask=torch.ones(5, 5, dtype=torch.bool)), ATTENTION),
    "causal attention": (attend(is_causal=True), ATTENTION),
    "attention with dropout": (attend(dropout_p=0.1), ATTENTION),
    "attention in bfloat16": (lambda: F.scaled_dot_product_attention(*[HEADS.bfloat16()] * 3), ATTENTION),
    "attention in rank 3": (lambda: F.scaled_dot_product_attention(TOKENS, TOKENS, TOKENS), 2 * 2 * 25 * 32),
    "narrow values": (lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS[..., :3]), 2 * 8 * 25 * 11),
    "cross attention": (lambda: F.scaled_dot_product_attention(HEADS, *[HEADS[:, :, :2]] * 2), 2 * 8 * 10 * 16),
    "grouped heads": (
        lambda: F.scaled_dot_product_attention(HEADS, HEADS[:, :2], HEADS[:, :2], enable_gqa=True),
        ATTENTION,
    ),
    "multi-head": (lambda: MHA(TOKENS, TOKENS, TOKENS, need_weights=False), PROJECTIONS + 2 * 2 * 25 * 32),
    "multi-head with weights": (lambda: MHA(TOKENS, TOKENS, TOKENS), PROJECTIONS + 2 * 2 * 25 * 32),
    "lstm": (lambda: LSTM(TOKENS), 2 * 10 * 4 * 8 * (16 + 8)),
    "gru": (lambda: GRU(TOKENS), 2 * 2 * 10 * 3 * 8 * (16 + 8)),
    "sample bilinear": (sample("bilinear"), 2 * 4 * 2 * 3 * 30),
    "sample bicubic": (sample("bicubic"), 2 * 16 * 2 * 3 * 30),
    "sample nearest": (sample("nearest"), 0),
    "resize linear": (resize("linear", 9, TOKENS), 2 * 2 * 2 * 5 * 9),
    "resize bilinear": (resize("bilinear", (16, 24)), 2 * 4 * 2 * 3 * 16 * 24),
    "resize bicubic": (resize("bicubic", (16, 24)), 2 * 16 * 2 * 3 * 16 * 24),
    "resize trilinear": (resize("trilinear", (4, 8, 12), PICTURE[None]), 2 * 8 * 2 * 4 * 8 * 12),
    "resize nearest": (resize("nearest", (16, 24)), 0),
    "antialiased down": (resize("bicubic", (4, 3), antialias=True), 2 * 6 * (8 * 3 * 16 + 4 * 3 * 8)),
    "antialiased up": (resize("bilinear", (16, 24), antialias=True), 2 * 6 * (8 * 24 * 2 + 16 * 24 * 2)),
    "fft": (lambda: torch.fft.fft2(PICTURE.to(torch.complex64)), round(5 * 6 * 96 * math.log2(96))),
    "real fft": (lambda: torch.fft.rfft2(PICTURE), round(2.5 * 6 * 96 * math.log2(96))),
    "inverse real fft": (lambda: torch.fft.irfft(torch.zeros(3, 9) + 0j), round(2.5 * 3 * 16 * 4)),
    "elementwise": (lambda: F.layer_norm((PICTURE * 2 + 1).relu(), (12,)).softmax(-1).sum(), 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_closed_formulas_hold_in_every_gradient_mode(name, mode):
    fn, expected = CASES[name]
    with mode():
        assert count_flops(fn) == expected


@settings(deadline=None, max_examples=25)
@given(
    groups=st.integers(1, 3), wide=st.integers(1, 3), narrow=st.integers(1, 3), kernel=st.integers(1, 3),
    stride=st.integers(1, 2), transposed=st.booleans(),
)  # fmt: skip
def test_a_convolution_costs_three_times_itself_when_trained(groups, wide, narrow, kernel, stride, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(groups * wide, groups * narrow, kernel, stride=stride, groups=groups, bias=False)
    x = torch.rand(2, groups * wide, 5, 6, requires_grad=True)
    positions = 5 * 6 if transposed else math.prod(conv(x).shape[2:])
    forward = 2 * 2 * positions * groups * wide * narrow * kernel**2
    assert count_flops(conv, x) == forward
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * forward


def test_backward_of_attention_and_resizing_is_counted():
    q = HEADS.clone().requires_grad_()
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == ATTENTION * 7 // 2
    x = PICTURE.clone().requires_grad_()
    for mode in ("bilinear", "bicubic"):
        for antialias in (False, True):
            enlarge = resize(mode, (16, 6), x, antialias=antialias)
            assert count_flops(lambda run=enlarge: run().sum().backward()) == 2 * count_flops(enlarge)
    grid = torch.zeros(2, 4, 4, 2, requires_grad=True)
    draw = lambda: F.grid_sample(x, grid, align_corners=False)  # noqa: E731
    assert count_flops(lambda: draw().sum().backward()) == 3 * count_flops(draw)


def test_fused_attention_knows_keys_and_values_of_other_sizes():
    query, key, value = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)
    assert flops._attention(query, key, value) == 2 * 2 * 4 * (5 * 7 * 8 + 5 * 7 * 3)
    products = 3 * 5 * 7 * 8 + 2 * 5 * 7 * 3
    assert flops._attention_backward((2, 4, 5, 3), query, key, value) == 2 * 2 * 4 * products


def test_products_grouped_over_experts_cost_what_the_rows_cost():
    rows, experts = torch.rand(32, 16).bfloat16(), torch.rand(4, 16, 8).bfloat16()
    ends = torch.tensor([8, 8, 24, 32], dtype=torch.int32)
    assert count_flops(torch._grouped_mm, rows, experts, offs=ends) == 2 * 32 * 16 * 8


def test_a_registered_operator_is_counted():
    @torch.library.custom_op("foveate_test::blur", mutates_args=())
    def blur(x: torch.Tensor, taps: int) -> torch.Tensor:
        return x.clone()

    assert count_flops(blur, PICTURE, 5) == 0
    try:
        register(
            torch.ops.foveate_test.blur.default, lambda x, taps, out_shape: 2 * taps * math.prod(x) + len(out_shape)
        )
        assert count_flops(blur, PICTURE, 5) == 2 * 5 * PICTURE.numel() + 4
    finally:
        flops._formulas.pop(torch.ops.foveate_test.blur, None)


def test_modules_add_up_to_the_whole():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    net = nn.Sequential(block, nn.Conv2d(4, 2, 1), nn.Identity())
    counts = by_module(net, PICTURE)
    assert list(counts) == ["", "0", "0.0", "0.1", "1", "2"]
    assert counts["0"] == counts["0.0"] == 2 * 2 * 96 * 12
    assert counts["1"] == 2 * 2 * 96 * 8
    assert counts["0.1"] == counts["2"] == 0
    assert counts[""] == counts["0"] + counts["1"] == count_flops(net, PICTURE)


def test_the_fused_path_is_as_it_was_even_after_an_error():
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 / 0)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: count_flops(3), "got 3"),
        (lambda: by_module(len, PICTURE), "count_flops"),
        (lambda: register("blur", len), "torch.ops"),
        (lambda: register(torch.ops.aten.mm, 2.0), "function of shapes"),
    ],
)
def test_errors_say_what_to_do(call, words):
    with pytest.raises(InputError, match=words):
        call()
