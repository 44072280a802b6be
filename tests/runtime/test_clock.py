"""The step clock, the latch and the account of what was computed."""

from __future__ import annotations

import math

import pytest
import torch

from dynamicrad_compile.runtime import account, beside, clock, regimes

FALLING = [1000.0, 900.0, 500.0, 100.0]
SCHEDULES = {
    "0..1000": FALLING,
    "0..1": [t / 1000 for t in FALLING],
    "log sigma": [0.25 * math.log(t) for t in (80.0, 10.0, 1.0, 0.01)],
    "reversed": [0.0, 100.0, 500.0, 900.0],
}


def steps_of(timesteps, ticks=None):
    ticks = clock.new_clock() if ticks is None else ticks
    return [int(clock.advance(torch.tensor([float(t)]), ticks)[clock.STEP]) for t in timesteps]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("calls", [1, 2, 3], ids=lambda n: f"{n} calls a step")
def test_steps_are_counted_and_start_again_with_each_generation(name, calls):
    timesteps = [t for t in SCHEDULES[name] for _ in range(calls)]
    expected = [step for step in range(4) for _ in range(calls)]
    assert steps_of(timesteps * 3) == expected * 3


def test_a_generation_of_one_step_stays_at_it():
    assert steps_of([999, 999, 999]) == [0, 0, 0]


@pytest.mark.parametrize("shape", [(), (2,), (1, 5), (1, 240), (1, 1, 5, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_timesteps_of_any_shape_and_dtype(shape, dtype):
    ticks = clock.new_clock()
    found = [int(clock.advance(torch.full(shape, t).to(dtype), ticks)[clock.STEP]) for t in (900, 900, 500)]
    assert found == [0, 0, 1]


def test_clean_tokens_do_not_count():
    ticks = clock.new_clock()
    timestep = torch.tensor([[0.0, 0.0, 900.0, 900.0]])
    assert clock.advance(timestep, ticks)[clock.LAST] == 900


def test_the_first_steps_stay_dense():
    ticks = clock.new_clock()
    dense = [bool(clock.stays_dense(clock.advance(torch.tensor(t), ticks), 2, None)) for t in FALLING * 2]
    assert dense == [True, True, False, False] * 2


@pytest.mark.parametrize(
    ("name", "limit"), [("0..1000", 600.0), ("0..1", 0.6), ("log sigma", 0.1), ("reversed", 300.0)]
)
def test_the_noisy_side_of_a_timestep_stays_dense(name, limit):
    ticks = clock.new_clock()
    states = [clock.advance(torch.tensor(t), ticks) for t in SCHEDULES[name] * 2]
    dense = [bool(clock.stays_dense(state, 0, limit)) for state in states]
    assert dense[4:] == [True, True, False, False]
    assert dense[:2] == [True, True]  # in the first generation the direction shows at the third step
    assert dense[3] is False


def test_an_odd_call_before_the_first_generation_never_makes_noisy_steps_sparse():
    ticks = clock.new_clock()
    states = [clock.advance(torch.tensor(t), ticks) for t in (500.0, 1000.0, 980.0, 960.0, 940.0, 100.0)]
    dense = [bool(clock.stays_dense(state, 0, 600.0)) for state in states]
    assert dense == [True, True, True, True, True, False]


def test_blocks_are_refreshed_at_the_first_call_of_every_nth_step_after_dense_ones():
    ticks = clock.new_clock()
    timesteps = [float(t) for t in (900, 800, 700, 600, 500, 400) for _ in range(2)]
    states = [clock.advance(torch.tensor(t), ticks) for t in timesteps]
    refreshed = [bool(clock.is_refresh(state, 1, 2)) for state in states]
    assert [i for i, fresh in enumerate(refreshed) if fresh] == [2, 6, 10]


def test_the_regime_of_the_first_call_is_kept_for_the_negative_prompt():
    ticks, latched = clock.new_clock(), regimes.new_regimes()
    found = []
    for t, routed in [(900, 2), (900, 0), (500, 2), (500, 0), (900, 1), (900, 0), (500, 0)]:
        now = clock.advance(torch.tensor(float(t)), ticks)
        found.append(int(regimes.latch(torch.tensor([routed]), now, latched)))
    assert found == [2, 2, 2, 2, 1, 1, 1]


def test_the_share_that_was_computed_counts_mean_keys():
    stats = torch.zeros(2, dtype=torch.float64)
    counts = torch.tensor([[[8, 2, 4, 2]]], dtype=torch.int32)  # of 8; one row is dense
    indices = torch.zeros(1, 1, 4, 4, dtype=torch.int32)
    account.record(stats, counts, None, indices, 8, 16)
    account.record(stats, counts, torch.tensor([0.5]), indices, 8, 16)
    account.record(stats, counts, torch.tensor([0.0]), indices, 8, 16)
    assert stats.tolist() == pytest.approx([3 * 0.5 + 0.75 / 16, 3])


class _Router:
    embedding_dim, masked = 4, False

    def predict(self, embeds, mask):
        assert mask is None
        return embeds[:, 0, 0].long()


def test_state_beside_the_graphs():
    notes = beside.CallNotes(_Router())
    prompts = torch.tensor([[[0.0] * 4], [[1.0] * 4]])
    kept = notes.note(torch.tensor([900]), prompts, torch.ones(2, 1))
    assert kept.regimes[:4].tolist() == [0, 1, 1, 1]  # a larger batch of queries gets the safest
    assert notes.note(torch.tensor([900]), prompts + 1, None).regimes[:2].tolist() == [0, 1]
    assert notes.note(torch.tensor([700]), None, None).regimes[:2].tolist() == [0, 1]
    assert notes.note(torch.tensor([500]), torch.zeros(regimes.MAX_BATCH + 1, 1, 4), None).regimes is None
    assert notes.note(None, prompts, None) == beside.CallState()
