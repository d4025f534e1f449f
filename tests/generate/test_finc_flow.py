import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.data import pictures
from foveate.errors import InputError
from foveate.generate.finc_flow import ActNorm, AffineCoupling, ChannelMix, FInCFlow, FInCUnit, FlowStep
from foveate.meter import count_parameters
from foveate.ops import use


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow(**settings):
    """A small flow in float64 whose couplings have left zero."""
    torch.manual_seed(0)
    model = FInCFlow(**{"channels": 1, "levels": 1, "steps": 2, "hidden": 8, "size": (8, 8), **settings}).double()
    for module in model.modules():
        if isinstance(module, AffineCoupling):
            nn.init.normal_(module.last.weight, std=0.2)
            nn.init.normal_(module.gain, std=0.1)
        if isinstance(module, ActNorm):
            nn.init.normal_(module.log_scale, std=0.2)
            nn.init.normal_(module.shift, std=0.2)
    return model.eval()


def log_abs_det(transform, x):
    jacobian = torch.autograd.functional.jacobian(transform, x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


# ---------------------------------------------------------------------- the unit


@pytest.mark.parametrize(("channels", "kernel"), [(4, 3), (8, 2), (12, 3), (16, 5)])
def test_a_unit_has_as_many_parameters_as_free_weights(channels, kernel):
    c = channels // 4
    assert count_parameters(FInCUnit(channels, kernel)) == 4 * (c**2 * kernel**2 - c * (c + 1) // 2)


def test_the_kernel_keeps_its_form_whatever_the_parameters():
    unit = FInCUnit(12)
    nn.init.normal_(unit.free, std=3.0)
    last = unit.weight[..., -1, -1]
    assert torch.equal(last.triu(), torch.eye(3).expand(4, 3, 3))
    others = unit.weight.flatten(3)[..., :-1]
    assert others.numel() + 4 * 3 == unit.free.numel()
    assert torch.equal(
        torch.cat([others.flatten(), last[:, *torch.tril_indices(3, 3, -1)].flatten()]).sort()[0],
        unit.free.flatten().sort()[0],
    )


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 3, 5]), st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_a_unit_is_inverted(h, w, kernel, seed):
    torch.manual_seed(seed)
    unit, x = FInCUnit(8, kernel), torch.randn(2, 8, h, w)
    torch.testing.assert_close(unit.inverse(unit(x)), x, atol=1e-5, rtol=0)


def test_the_four_groups_see_the_four_corners():
    unit = FInCUnit(4)
    x = torch.zeros(1, 4, 7, 7)
    x[..., 3, 3] = 1.0
    seen = unit(x)[0] != 0
    for group, rows, columns in ((0, (3, 6), (3, 6)), (1, (3, 6), (1, 4)), (2, (1, 4), (3, 6)), (3, (1, 4), (1, 4))):
        expected = torch.zeros(7, 7, dtype=torch.bool)
        expected[slice(*rows), slice(*columns)] = True
        assert torch.equal(seen[group], expected)


@pytest.mark.parametrize(("channels", "kernel", "said"), [(6, 3, "got 6"), (0, 3, "got 0"), (4, 1, "got 1")])
def test_a_unit_that_cannot_be_is_refused(channels, kernel, said):
    with pytest.raises(InputError, match=said):
        FInCUnit(channels, kernel)


# ---------------------------------------------------------------------- the other layers


@pytest.mark.parametrize("make", [lambda: ActNorm(4), lambda: ChannelMix(4), lambda: AffineCoupling(4, 6)])
def test_layers_invert_and_tell_their_log_determinant(make):
    torch.manual_seed(0)
    layer = make().double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = noise(1, 4, 3, 2)
    y, log_det = layer(x)
    torch.testing.assert_close(layer.inverse(y), x)
    torch.testing.assert_close(log_det.sum(), log_abs_det(lambda v: layer(v)[0], x))


def test_actnorm_takes_its_values_from_the_first_batch_in_training():
    layer, x = ActNorm(3), 5 + 3 * torch.randn(4, 3, 6, 6)
    assert torch.equal(layer.eval()(x)[0], x)
    y = layer.train()(x)[0]
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    kept = layer.shift.clone()
    layer(x + 1)
    assert torch.equal(layer.shift, kept)


def test_a_coupling_keeps_the_first_half_and_starts_as_the_identity():
    layer, x = AffineCoupling(4, 8), torch.randn(2, 4, 5, 5)
    y, log_det = layer(x)
    assert torch.equal(y, x)
    assert torch.equal(log_det, torch.zeros(2))
    nn.init.normal_(layer.last.weight, std=100.0)
    y, log_det = layer(x)
    assert torch.equal(y[:, :2], x[:, :2])
    assert log_det.abs().max() <= 2 * 2 * 25  # log s lies in -2..2


# ---------------------------------------------------------------------- the flow


@pytest.mark.parametrize("settings", [{}, {"levels": 2}, {"channels": 3, "kernel": 2}])
def test_the_log_determinant_is_that_of_the_whole_jacobian(settings):
    model = flow(**settings)
    x = torch.rand(1, model.channels, 4, 4, dtype=torch.float64)
    exact = log_abs_det(lambda v: torch.cat([z.flatten() for z in model.encode(v)[0]]), x)
    torch.testing.assert_close(model.encode(x)[1][0], exact)


def test_the_density_integrates_to_1():
    model = flow(channels=1, levels=1)
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(1 << 15).double()
    with torch.no_grad():
        mass = model(points.view(-1, 1, 2, 2)).exp().mean()
    assert abs(float(mass) - 1) < 0.02


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_latents_come_back_through_pictures(path):
    model = flow(channels=3, levels=2).float()
    with use(path), torch.no_grad():
        latents, _ = model.encode(0.1 + 0.8 * torch.rand(2, 3, 8, 12))
        assert [tuple(z.shape) for z in latents] == [(2, 6, 4, 6), (2, 24, 2, 3)]
        again, _ = model.encode(model.decode(latents))
    for z, expected in zip(again, latents, strict=True):
        torch.testing.assert_close(z, expected, atol=1e-3, rtol=1e-3)


def test_a_photograph_at_two_sizes_comes_back():
    photograph = pictures.samples()["astronaut"][None].clamp(0.01, 0.99)
    model = flow(channels=3, levels=2).float()
    for side in (16, 40):
        assert model.reconstruction_error(photograph[..., 100 : 100 + side, 200 : 200 + 2 * side]) < 1e-4


def test_samples_follow_size_seed_and_temperature():
    model = flow(levels=2, size=(8, 16))
    first, second = (model.sample(3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (3, 1, 8, 16)
    assert torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    assert model.sample(2, (12, 4)).shape == (2, 1, 12, 4)
    still = model.sample(2, temperature=0.0)
    assert torch.equal(still[0], still[1])


def test_bits_per_dim_of_the_uniform_density_are_8(monkeypatch):
    model = flow()
    monkeypatch.setattr(FInCFlow, "forward", lambda self, v: torch.zeros(len(v)))
    assert torch.equal(model.bits_per_dim(torch.rand(2, 1, 4, 4)), torch.full((2,), 8.0))
    seen = []
    monkeypatch.setattr(FInCFlow, "forward", lambda self, v: seen.append(v) or torch.zeros(len(v)))
    levels = torch.randint(256, (1, 1, 4, 4))
    model.bits_per_dim(levels / 255)
    assert torch.equal((seen[0] * 256).floor().long(), levels)


def test_training_lowers_the_bits():
    model = FInCFlow(channels=1, levels=1, steps=2, hidden=8, size=(4, 4)).train()
    x = (torch.linspace(0, 1, 4) * torch.rand(64, 1, 1, 1)).expand(64, 1, 4, 4)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    dice = torch.Generator().manual_seed(0)
    before = None
    for _ in range(30):
        loss = model.bits_per_dim(x, dice).mean()
        before = loss.item() if before is None else before
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < before - 0.5
    assert model.eval().reconstruction_error(x.clamp(0.01, 0.99)) < 1e-4


def test_the_64_pixel_flow_has_about_the_published_number_of_parameters():
    step = count_parameters(FlowStep(12, 512, 3)), count_parameters(FlowStep(24, 512, 3))
    steps = 16 * sum(step)
    assert steps == pytest.approx(12.5e6, rel=0.01)  # the paper's: about 12.5 million
    whole = count_parameters(FInCFlow(levels=2, steps=16, size=(64, 64)))
    assert whole == steps + count_parameters(AffineCoupling(12, 512)) == 12_786_840


@pytest.mark.parametrize(
    ("shape", "said"),
    [((1, 3, 10, 8), "multiples of 4.*10 x 8"), ((1, 1, 8, 8), r"\[B, 3, H, W\]"), ((3, 8, 8), "got")],
)
def test_pictures_that_do_not_fit_are_refused(shape, said):
    model = flow(channels=3, levels=2)
    with pytest.raises(InputError, match=said):
        model(torch.rand(shape, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), -0.1, 255.0])
def test_values_outside_the_unit_range_are_refused(value):
    with pytest.raises(InputError, match=r"0\.\.1"):
        flow()(torch.full((1, 1, 4, 4), value))


def test_settings_that_make_no_flow_are_refused():
    for wrong in ({"levels": 0}, {"alpha": 0.5}, {"size": (30, 32), "levels": 2}):
        with pytest.raises(InputError):
            FInCFlow(**{"hidden": 4, "steps": 1, **wrong})
    model = flow()
    for wrong in ({"count": 0}, {"temperature": -1}, {"size": (5, 8)}):
        with pytest.raises(InputError):
            model.sample(**wrong)
    with pytest.raises(InputError, match="got 2"):
        model.decode([torch.zeros(1, 4, 4, 4)] * 2)
