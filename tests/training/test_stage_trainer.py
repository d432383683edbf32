"""A stage keeps whole states alone, stops before it spoils one, and goes on as if it had never stopped."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from twn_kernels.errors import CheckpointError, OptionError, TrainingError
from twn_kernels.training.stage_trainer import LOG_FILE, StageTrainer, stage_arguments
from twn_kernels.training.states import WEIGHTS_FILE, newest_state

STEPS = 6


class Model(nn.Module):
    """Something frozen and something that learns."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.base = nn.Linear(width, 3)
        self.base.requires_grad_(False)
        self.up = nn.Parameter(torch.randn(width, width, generator=draw))
        self.shift = nn.Parameter(torch.zeros(width))


class Toy(StageTrainer):
    """Learns to map noise to rows; ``spoil`` is called with the step and the model before each backward."""

    spoil = staticmethod(lambda step, model: 1.0)

    def step(self, model, batch):
        batch = batch["rows"]
        noisy = batch + 0.1 * torch.randn(batch.shape)  # of the global generator, whose state is part of a state
        loss = (noisy @ model.up + model.shift - batch.flip(1)).square().mean()
        loss = loss * self.spoil(self.state.global_step + 1, model)
        self.accelerator.backward(loss)
        return {"loss": loss, "largest": batch.max()}


def collate(rows) -> dict[str, torch.Tensor]:
    return {"rows": torch.stack(rows)}


def trainer(out, spoil=None, *, model=None, say=None, **changes) -> Toy:
    values = {
        "steps": STEPS,
        "batch_size": 2,
        "learning_rate": 0.05,
        "warmup_steps": 1,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "save_steps": 3,
        "log_steps": 2,
    }
    draw = torch.Generator().manual_seed(1)
    rows = list(torch.randn(STEPS * 2, 4, generator=draw))
    made = Toy(model or Model(), out, SimpleNamespace(**values | changes), rows, collate, seed=5, say=say)
    if spoil is not None:
        made.spoil = spoil
    return made


def stopped_at(step: int, error: type[BaseException] = KeyboardInterrupt):
    def spoil(now, model):
        if now == step:
            raise error
        return 1.0

    return spoil


def rows(out) -> list[dict]:
    """The log without what the clock says."""
    told = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in told]


def learned(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture
def whole(tmp_path):
    """A run that nobody stopped: its learned tensors and its log."""
    made = trainer(tmp_path / "whole")
    made.run()
    return SimpleNamespace(learned=learned(made), rows=rows(tmp_path / "whole"))


def test_a_log_row_is_the_mean_since_the_row_before(tmp_path):
    said = []
    made = trainer(tmp_path, log_steps=4, say=said.append)
    made.run()
    every = trainer(tmp_path / "every", log_steps=1)
    every.run()
    single, told = rows(tmp_path / "every"), rows(tmp_path)
    assert [row["step"] for row in single] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in told] == [4, 6]  # the last row is of what is left
    for row, of in zip(told, (single[:4], single[4:]), strict=True):
        for name in ("loss", "largest"):
            assert row[name] == pytest.approx(sum(one[name] for one in of) / len(of), rel=1e-12)
    assert set(told[0]) == {"step", "loss", "largest", "grad_norm", "learning_rate"}
    assert told[0]["learning_rate"] == single[3]["learning_rate"] == pytest.approx(0.05 * 0.65451, rel=1e-4)
    assert len(said) == 2 and said[0].startswith("step 4  loss ")


def test_examples_are_read_in_order(tmp_path):
    made = trainer(tmp_path, log_steps=1)
    made.run()
    read = torch.stack(made.train_dataset).view(STEPS, 2, 4)
    assert [row["largest"] for row in rows(tmp_path)] == read.amax((1, 2)).tolist()


def test_a_state_holds_what_learns_and_no_more(tmp_path):
    made = trainer(tmp_path)
    made.run()
    stored = load_file(tmp_path / "checkpoint-6" / WEIGHTS_FILE)
    assert same(stored, learned(made)) and set(stored) == {"up", "shift"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6", LOG_FILE]
    assert not list(tmp_path.rglob("*.bin")) and len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_two_states_are_kept(tmp_path):
    trainer(tmp_path, save_steps=1).run()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6])
def test_a_stopped_run_goes_on_bit_for_bit(step, whole, tmp_path):
    """Saved after step 3, stopped in any step, with rows after the state already in the log."""
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, stopped_at(step)).run()
    assert newest_state(tmp_path) == (tmp_path / "checkpoint-3" if step > 3 else None)
    again = trainer(tmp_path)
    again.run(resume=True)
    assert same(learned(again), whole.learned)
    assert rows(tmp_path) == whole.rows


def test_rows_after_the_state_are_written_once(tmp_path):
    trainer(tmp_path / "whole", log_steps=1).run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, stopped_at(6), log_steps=1).run()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    with (tmp_path / LOG_FILE).open("a") as log:
        log.write('{"step": 6, "lo')  # the machine went down here
    trainer(tmp_path, log_steps=1).run(resume=True)
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_seconds_go_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, stopped_at(5)).run()
    kept = [json.loads(line) | {"seconds": 100.0} for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    (tmp_path / LOG_FILE).write_text("".join(json.dumps(row) + "\n" for row in kept))
    trainer(tmp_path).run(resume=True)
    told = [json.loads(line)["seconds"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert len(told) == 3 and all(value >= 100 for value in told)


def test_a_finished_run_has_nothing_to_add(whole, tmp_path):
    for log_steps in (2, 4):
        out = tmp_path / str(log_steps)
        trainer(out, log_steps=log_steps).run()
        before = rows(out)
        again = trainer(out, stopped_at(1), log_steps=log_steps)
        again.run(resume=True)
        assert same(learned(again), whole.learned) and rows(out) == before


def test_a_run_does_not_start_over_anothers_states(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(OptionError) as caught:
        trainer(tmp_path).run()
    assert str(caught.value) == (
        f'"{tmp_path}" holds states of a run, the newest is checkpoint-6. '
        "Resume that run, or train into an empty folder."
    )


def test_a_log_without_a_state_is_begun_anew(tmp_path, whole):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 3.0, "seconds": 9.0}\n')
    trainer(tmp_path).run()
    assert rows(tmp_path) == whole.rows


@pytest.mark.parametrize("step", [1, 3, 4, 6])
@pytest.mark.parametrize(
    ("factor", "what"),
    [(float("nan"), "loss is nan"), (float("inf"), "loss is inf"), (None, "a gradient is not finite")],
)
def test_what_is_not_finite_stops_the_run_before_it_is_learned(step, factor, what, whole, tmp_path):
    """The state before that step is kept, bit for bit; with the cause gone, the run ends as if nothing had been."""
    before = {}

    def spoil(now, model):
        if now != step:
            return 1.0
        before.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        if factor is None:
            model.up.register_hook(lambda grad: grad * float("nan"))
            return 1.0
        return factor

    made = trainer(tmp_path, spoil)
    with pytest.raises(TrainingError) as caught:
        made.run()
    state = tmp_path / f"checkpoint-{step - 1}"
    assert str(caught.value) == (
        f'step {step}: {what}. Stopped; the state after step {step - 1} is kept in "{state}". '
        "Look at that batch and resume, or train anew with a lower learning_rate."
    )
    assert same(learned(made), before) and same(load_file(state / WEIGHTS_FILE), before)
    assert newest_state(tmp_path) == state
    again = trainer(tmp_path)
    again.run(resume=True)
    assert same(learned(again), whole.learned) and rows(tmp_path) == whole.rows


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    """An update that overflows shows in the next loss; the state before it is the last good one."""

    def spoil(now, model):
        if now == 5:
            model.shift.data.fill_(float("inf"))
        return 1.0

    with pytest.raises(TrainingError) as caught:
        trainer(tmp_path, spoil).run()
    assert str(caught.value).startswith("step 6: loss is ") and str(caught.value).endswith(
        "Stopped; what was learned is not finite either after step 5, so the newest saved state is "
        f'"{tmp_path / "checkpoint-3"}". Look at that batch and resume, or train anew with a lower learning_rate.'
    )
    assert newest_state(tmp_path) == tmp_path / "checkpoint-3"
    with pytest.raises(TrainingError, match="so no state was saved before. Look"):
        trainer(tmp_path / "new", spoil, save_steps=10).run()


@pytest.mark.parametrize("saver", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_run_that_stops_while_it_saves_goes_on_from_the_state_before(saver, whole, tmp_path, monkeypatch):
    """Whatever was being written when the power went: the half of a state is no state."""
    made = trainer(tmp_path)
    write = getattr(made, saver)

    def half(*args, **kwargs):
        write(*args, **kwargs)
        if made.state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(made, saver, half)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert newest_state(tmp_path) == tmp_path / "checkpoint-3" and (tmp_path / "saving" / "checkpoint-6").is_dir()
    again = trainer(tmp_path)
    again.run(resume=True)
    assert same(learned(again), whole.learned) and rows(tmp_path) == whole.rows
    assert not (tmp_path / "saving").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", WEIGHTS_FILE, "sums.json"])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_damaged_state_is_named_and_not_used(name, damage, whole, tmp_path):
    """Nothing silently starts with a fresh optimiser. Without the folder, the run goes on from the state before."""
    trainer(tmp_path).run()
    file = tmp_path / "checkpoint-6" / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path).run(resume=True)
    what = "is missing" if damage == "removed" else "is not as it was written"
    assert str(caught.value) == (
        f'"{tmp_path / "checkpoint-6"}" is damaged: its file {name} {what}. '
        "Remove the folder to go on from the state before it, or from the start where there is none."
    )
    for path in (tmp_path / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "checkpoint-6").rmdir()
    again = trainer(tmp_path)
    again.run(resume=True)
    assert same(learned(again), whole.learned) and rows(tmp_path) == whole.rows


def test_a_state_of_somebody_else_is_refused(tmp_path):
    """HuggingFace's own trainer writes folders of the same name."""
    quiet = {"report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, **quiet)

    class Plain(Trainer):
        def compute_loss(self, model, inputs, **_):
            return model.up.sum()

    Plain(Model(), arguments, train_dataset=[0, 1], data_collator=lambda of: {"x": torch.tensor(of)}).train()
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path).run(resume=True)
    assert str(caught.value) == (
        f'"{tmp_path / "checkpoint-1"}" is no state of this stage: sha256.json, which lists its files, is missing or '
        "damaged. Remove the folder to go on from the state before it, or from the start where there is none."
    )


@pytest.mark.parametrize("other", ["shape", "names"])
def test_a_state_of_another_model_is_refused(other, tmp_path):
    trainer(tmp_path).run()
    model = Model(width=5) if other == "shape" else Model()
    if other == "names":
        model.more = nn.Parameter(torch.zeros(2))
    first, count = ("up", 2) if other == "shape" else ("more", 1)
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path, model=model).run(resume=True)
    assert str(caught.value) == (
        f'"{tmp_path / "checkpoint-6" / WEIGHTS_FILE}" belongs to another model: {count} of its tensors do not fit, '
        f'the first is "{first}". Train into an empty folder, or with the configuration that wrote it.'
    )


@pytest.mark.parametrize("name", ["world_size", "n_gpu"])
def test_more_than_one_device_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, name, property(lambda self: 2))
    with pytest.raises(TrainingError) as caught:
        trainer(tmp_path)
    assert str(caught.value) == (
        "training runs on one device, the first, got 2 of them. "
        "Start one process, with CUDA_VISIBLE_DEVICES naming one GPU."
    )


def test_a_model_stays_where_it_is(tmp_path):
    """A machine with a GPU does not take a model that is on the CPU."""
    made = trainer(tmp_path)
    assert made.args.use_cpu and made.args.device == torch.device("cpu")
    assert not stage_arguments(tmp_path, made.settings, 0, torch.device("cuda")).use_cpu


def test_a_state_before_what_is_not_finite_is_kept_beside_the_others(tmp_path):
    """A loss may have been lost for some steps by then: what was saved in good time is not thrown out for it."""

    def spoil(now, model):
        return float("nan") if now == 6 else 1.0

    with pytest.raises(TrainingError, match="the state after step 5 is kept"):
        trainer(tmp_path, spoil, save_steps=2).run()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 5)]
