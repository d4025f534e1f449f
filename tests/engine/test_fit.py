import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from foveate.engine.fit import fit, schedule
from foveate.learn import fit as module

TARGET = torch.tensor([1.0, -2.0, 3.0])


class Small(nn.Module):
    """A small problem: find TARGET, seen with noise that depends on the step alone."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.seen = []

    def loss(self, step):
        self.seen.append(self.w.detach().clone())
        noise = torch.randn(3, generator=torch.Generator().manual_seed(step))
        return (self.w - TARGET - 0.1 * noise).square().sum()


def quiet(_):
    pass


def test_it_finds_the_minimum_and_leaves_what_is_frozen():
    model = Small()
    done = fit(model, model.loss, 400, lr=0.1, average=0.9, log=quiet)
    torch.testing.assert_close(model.w.detach(), TARGET, atol=0.1, rtol=0)
    assert torch.equal(model.frozen, torch.ones(2))
    assert done["steps"] == 400
    assert len(model.seen) == 400


def test_only_the_parameters_asked_for_are_trained():
    model = nn.ModuleList([Small(), Small()])
    fit(model, lambda i: model[0].loss(i) + model[1].loss(i), 5, parameters=model[1].parameters(), log=quiet)
    assert not model[0].w.any()
    assert model[1].w.all()


def test_the_averaged_weights_are_kept_and_evaluated(tmp_path):
    model, evaluated = Small(), []
    file = tmp_path / "run.safetensors"

    def evaluate(m):
        evaluated.append(m.w.detach().clone())
        return {"distance": float((m.w - TARGET).norm())}

    done = fit(model, model.loss, 30, lr=0.1, average=0.8, checkpoint=file, evaluate=evaluate, every=10, log=quiet)
    own = [*model.seen[1:], load_file(file)["0.p"]]  # the weights after each step
    mean, expected = torch.zeros(3), []
    for step, w in enumerate(own):
        decay = min(0.8, (step + 1) / (step + 10))
        mean = decay * mean + (1 - decay) * w
        expected.append(mean)
    for ours, step in zip(evaluated, (9, 19, 29), strict=True):
        torch.testing.assert_close(ours, expected[step])
    torch.testing.assert_close(model.w.detach(), expected[-1])
    assert not torch.allclose(model.w.detach(), own[-1])
    assert done["distance"] == pytest.approx(float((expected[-1] - TARGET).norm()), abs=1e-6)


@pytest.mark.parametrize("killed_at", [10, 13, 29])
def test_a_killed_run_goes_on_to_the_same_weights_as_one_that_never_stopped(tmp_path, killed_at):
    file = tmp_path / "run.safetensors"
    options = {"lr": 0.1, "average": 0.9, "every": 5, "log": quiet}
    whole = Small()
    fit(whole, whole.loss, 30, **options)

    killed = Small()

    def until(step):
        if step == killed_at:
            raise KeyboardInterrupt
        return killed.loss(step)

    with pytest.raises(KeyboardInterrupt):
        fit(killed, until, 30, checkpoint=file, **options)
    resumed = Small()
    done = fit(resumed, resumed.loss, 30, checkpoint=file, **options)
    assert len(resumed.seen) == 30 - killed_at // 5 * 5
    assert torch.equal(resumed.w, whole.w)
    assert done["steps"] == 30

    again = Small()  # a finished run is not run again
    fit(again, again.loss, 30, checkpoint=file, **options)
    assert again.seen == []
    assert torch.equal(again.w, whole.w)


def test_a_checkpoint_is_written_to_another_name_first(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "run.safetensors"
    model = Small()
    fit(model, model.loss, 5, checkpoint=file, log=quiet)
    before = file.read_bytes()
    assert [f.name for f in file.parent.iterdir()] == ["run.safetensors"]

    def fails_half_way(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", fails_half_way)
    with pytest.raises(OSError, match="no space"):
        fit(model, model.loss, 10, checkpoint=file, log=quiet)
    assert file.read_bytes() == before


def test_gradients_are_clipped(monkeypatch):
    norms = []
    step = torch.optim.Adam.step

    def watched(adam, *args):
        norms.append(float(adam.param_groups[0]["params"][0].grad.norm()))
        return step(adam, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    model = Small()
    fit(model, lambda i: 1000 * model.loss(i), 3, clip=0.5, log=quiet)
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_the_log_is_json_and_its_loss_the_mean_since_the_line_before():
    model, lines = Small(), []
    fit(model, lambda _: 0 * model.w.sum() + 1, 10, every=4, evaluate=lambda _: {"score": 0.123456}, log=lines.append)
    parsed = [json.loads(line) for line in lines]
    assert [line["step"] for line in parsed] == [4, 8, 10]
    assert [line["score"] for line in parsed] == [0.1235] * 3
    assert [line["loss"] for line in parsed] == [1, 1, 1]


def test_seconds_count_the_runs_before(tmp_path):
    file = tmp_path / "run.safetensors"
    model = Small()
    fit(model, model.loss, 4, checkpoint=file, log=quiet)
    tensors = load_file(file) | {"seconds": torch.tensor(500.0)}
    module.save_file(tensors, file)
    assert fit(model, model.loss, 8, checkpoint=file, log=quiet)["seconds"] >= 500
    assert os.listdir(tmp_path) == ["run.safetensors"]


@pytest.mark.parametrize("steps", [5, 100, 6000])
def test_the_rate_warms_up_to_1_and_falls_to_its_end(steps):
    rates = [schedule(step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
    assert schedule(steps, steps) == pytest.approx(0.01)
    assert schedule(steps, steps, final=0.5) == pytest.approx(0.5)


class Counting(nn.Module):
    """A buffer that counts the steps, and a parameter that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.w, self.idle = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(()))

    def loss(self, step):
        self.count += 1
        return (self.w - 1).square().sum()


def test_a_resumed_training_has_its_buffers_and_tolerates_idle_parameters(tmp_path):
    file = tmp_path / "run.safetensors"
    first = Counting()
    fit(first, first.loss, 5, checkpoint=file, log=quiet)
    second = Counting()
    fit(second, second.loss, 8, checkpoint=file, log=quiet)
    assert second.count == 8
    assert second.idle == 1
