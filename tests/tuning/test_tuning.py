"""The tuner: proxies, block sums, thresholds, search space, journal, whole searches, profile, command line."""

from __future__ import annotations

import json
import math

import pytest
import torch

import dynamicrad_compile as drad
from dynamicrad_compile import cli
from dynamicrad_compile.errors import DynamicRadError, OptionsError
from dynamicrad_compile.files import to_toml
from dynamicrad_compile.kernels.select_criteria import CRITERIA
from dynamicrad_compile.plans.make import make_candidates, make_plan
from dynamicrad_compile.profiles import REGIMES, load_profile
from dynamicrad_compile.tuning import choosing, search
from dynamicrad_compile.tuning.choosing import Choice, fit_thresholds
from dynamicrad_compile.tuning.journal import Journal
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.optimizer import Optimizer
from dynamicrad_compile.tuning.proxy import MASS, PROXIES, PUBLISHED_NOISE, published_proxy, video_proxy
from dynamicrad_compile.tuning.space import DEFAULTS, Space
from dynamicrad_compile.tuning.sums import BlockSums, sample_rows
from dynamicrad_compile.tuning.task import MODES, Task

GRID = (5, 6, 7)
SMALL = dict(block_size=16, heads=2, head_dim=16, budget=10, seeds=(1, 2), rows=40)


def task(**changes):
    return Task(**{"grid": GRID, **SMALL, **changes})


# Proxies


@pytest.mark.parametrize("motion", REGIMES)
def test_published_proxy_is_the_published_recursion(motion):
    q, k, v = published_proxy(GRID, motion, 3, 16, seed=4)
    assert q is k is v
    noise = PUBLISHED_NOISE[motion]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 42, 16, generator=generator)
    for frame in range(5):
        if frame:
            x = (1 - noise) * x + noise * torch.randn(3, 42, 16, generator=generator)
        expected = x / x.norm(dim=-1, keepdim=True) * 4.0
        torch.testing.assert_close(q[:, 42 * frame : 42 * (frame + 1)], expected)


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_are_deterministic_and_have_text(name):
    one, same, other = (PROXIES[name](GRID, "mid", 4, 24, seed, 3, 8) for seed in (1, 1, 2))
    for a, b, c in zip(one, same, other, strict=True):
        assert a.shape == (4, 3 + 210 + 8, 24)
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.isfinite().all()


def test_video_proxy_attention_is_as_sharp_as_stated():
    q, k, _ = video_proxy((8, 12, 12), "mid", 4, 64, seed=0)
    weights = (q @ k.transpose(1, 2) / 8.0).softmax(dim=-1)
    tenth = weights.sort(dim=-1, descending=True).values[..., :115].sum(dim=-1).mean(dim=1)
    assert tenth[:3].tolist() == pytest.approx(list(MASS.values())[:3], abs=0.05)
    # The sink head gives the first frame its share.
    assert float(weights[3, :, :144].sum(-1).mean()) > 0.3


def test_video_proxy_moves_more_in_high_motion():
    """The same place in the next frame gets less of a temporal head's attention when content moves."""
    shares = []
    for motion in REGIMES:
        q, k, _ = video_proxy((6, 16, 16), motion, 2, 64, seed=1)
        weights = (q[1] @ k[1].T / 8.0).softmax(dim=-1)
        shares.append(float(weights.diagonal(offset=256).mean()))
    assert shares[0] > shares[1] > shares[2]


def test_unknown_motion():
    with pytest.raises(DynamicRadError, match="Did you mean 'high'"):
        published_proxy(GRID, "hihg", 1, 8, 0)


# Block sums


def masked_attention(q, k, v, mask, block, compensate):
    """fp64 attention with a block mask, dropped blocks represented by their means; mask [H', Mq, Mk]."""
    q, k, v = q.double(), k.double(), v.double()
    _, tokens, dim = q.shape
    spread = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :tokens, :tokens]
    logits = (q @ k.transpose(1, 2) / math.sqrt(dim)).masked_fill(~spread, -math.inf)
    values = v
    if compensate:
        parts = [(k[:, low : low + block], v[:, low : low + block]) for low in range(0, tokens, block)]
        counts = torch.tensor([part[0].shape[1] for part in parts]).double()
        k_mean, v_mean = (torch.stack([part[i].mean(1) for part in parts], dim=1) for i in (0, 1))
        pooled = q @ k_mean.transpose(1, 2) / math.sqrt(dim) + counts.log() + math.log(compensate)
        dropped = ~mask.repeat_interleave(block, 1)[:, :tokens]
        logits = torch.cat([logits, pooled.masked_fill(~dropped, -math.inf)], dim=2)
        values = torch.cat([v, v_mean], dim=1)
    return logits.softmax(dim=-1) @ values


@pytest.mark.parametrize("compensate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("own_masks", [False, True])
def test_block_sums_are_attention(compensate, own_masks):
    q, k, v = video_proxy(GRID, "mid", 3, 20, seed=2, text_before=3, text_after=4)
    rows = sample_rows(q.shape[1], 50, seed=0)
    sums = BlockSums(q, k, v, 16, rows)
    mask = torch.rand(3 if own_masks else 1, 14, 14, generator=torch.Generator().manual_seed(1)) < 0.4
    mask |= torch.eye(14, dtype=torch.bool)
    expected = masked_attention(q, k, v, mask, 16, compensate)[:, rows]
    torch.testing.assert_close(sums.output(mask, compensate).double(), expected, rtol=2e-4, atol=2e-4)
    dense = masked_attention(q, k, v, torch.ones_like(mask), 16, 0.0)[:, rows]
    torch.testing.assert_close(sums.dense.double(), dense, rtol=2e-4, atol=2e-4)
    error = float((expected - dense).square().mean() / (dense.var(correction=0) + 1e-6))
    assert sums.error(mask, compensate) == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("compensate", [0.0, 0.6])
def test_error_is_that_of_the_op(compensate):
    """All rows: the objective's error is what `block_sparse_attention` gives on the same tensors."""
    q, k, v = video_proxy(GRID, "high", 2, 16, seed=3)
    plan = make_plan("dynamicrad", GRID, 16, sparsity=0.6, compensate=compensate)
    out = drad.block_sparse_attention(q[None], k[None], v[None], plan, compensate=compensate)[0]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = float((out - dense).square().mean() / (dense.var(correction=0) + 1e-6))
    sums = BlockSums(q, k, v, 16, sample_rows(210, None, 0))
    assert sums.error(plan.block_mask()[0], compensate) == pytest.approx(error, rel=1e-3)


def test_sampled_rows_are_an_unbiased_spread():
    rows = torch.stack([sample_rows(1000, 64, seed) for seed in range(300)])
    assert (rows.diff(dim=1) >= 0).all()
    assert float(rows.double().mean()) == pytest.approx(499.5, abs=1.0)
    assert torch.equal(sample_rows(1000, 64, 5), sample_rows(1000, 64, 5))
    assert torch.equal(sample_rows(10, 64, 0), torch.arange(10))


def test_subsampled_error_is_near_the_whole():
    whole = Objective(task(rows=None), "mid").evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7})
    few = Objective(task(rows=100), "mid").evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7})
    assert few.error == pytest.approx(whole.error, rel=0.25)
    assert few.sparsity == whole.sparsity


# dynamic_threshold


@pytest.mark.parametrize("criterion", CRITERIA)
def test_choice_is_that_of_select_blocks(criterion):
    from dynamicrad_compile.kernels.select_reference import select_blocks_reference

    q, k, v = video_proxy(GRID, "mid", 2, 16, seed=5, text_after=5)
    sums = BlockSums(q, k, v, 16, sample_rows(q.shape[1], 8, 0))
    candidates = make_candidates(GRID, 16, 0, 5, sparsity=0.3)
    for near, far in ((0.2, 0.7), (0.5, 0.31), (1.0, 0.0)):
        plan = candidates.plan
        counts, indices = select_blocks_reference(
            q[None],
            k[None],
            plan.kv_counts,
            plan.kv_indices,
            candidates.kv_forced,
            candidates.kv_near,
            torch.tensor([[near, far]]),
            None,
            16,
            16,
            criterion,
        )
        chosen = drad.BlockPlan(counts, indices, 16, 16, 215, 215).block_mask()[0]
        assert torch.equal(Choice(sums, candidates, criterion).mask(near, far), chosen)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("balance", [-1.5, 0.0, 0.7])
def test_thresholds_spend_the_budget(criterion, balance):
    choices = []
    for seed, heads in ((1, 2), (2, 4)):
        sums = BlockSums(*video_proxy((8, 8, 8), "mid", heads, 16, seed), 16, torch.arange(4))
        choices.append(Choice(sums, make_candidates((8, 8, 8), 16, sparsity=0.4), criterion))
    near, far = fit_thresholds(choices, 0.3, balance)
    kept = [float(choice.mask(near, far).float().mean()) for choice in choices]
    assert sum(kept) / 2 <= 0.3 + 1e-9
    # With "ratio" all rows with groups of one size flip together.
    assert sum(kept) / 2 > (0.2 if criterion == "ratio" else 0.295)
    assert fit_thresholds(choices, 1.0, balance) == choosing.KEEP_ALL[criterion]
    at_all = choices[0].mask(*choosing.KEEP_ALL[criterion])
    assert torch.equal(at_all[0], make_plan("dynamicrad", (8, 8, 8), 16, sparsity=0.4).block_mask()[0, 0])


# Objective and space


def test_objective_counts_compensation_and_the_constraint():
    objective = Objective(task(proxies=("published",)), "mid")
    plain = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7, "compensate": 0.0})
    plan = make_plan("dynamicrad", GRID, 16, **{**DEFAULTS, "sparsity": 0.7, "compensate": 0.4})
    paid = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7, "compensate": 0.4})
    assert paid.sparsity == pytest.approx(plan.sparsity)
    assert plain.loss == pytest.approx(1000 * plain.error + 10000 * (0.8 - plain.sparsity))
    met = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.85})
    assert met.loss == 1000 * met.error
    assert [draw[:2] for draw in met.draws] == [("published", 1), ("published", 2)]


def test_invalid_points_are_pruned_with_a_reason():
    objective = Objective(task(), "low")
    found = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8, "decay_factor": 1e9})
    assert found.status == "pruned"
    assert "decay_factor must be in" in found.reason
    assert found.loss == math.inf
    with pytest.raises(KeyError):  # a defect is not an invalid point
        objective.evaluate("static_ratio", {"sparsity": 0.8})


@pytest.mark.parametrize("mode", MODES)
def test_points_of_the_space_meet_the_target(mode):
    chosen = task(grid=(8, 8, 8), sparsity=0.65)  # forced blocks and compensation alone take a quarter
    space, objective = Space(chosen, mode), Objective(chosen, "mid")
    generator = torch.Generator().manual_seed(0)
    points = [torch.rand(len(space.dimensions), generator=generator).tolist() for _ in range(8)]
    static = {**DEFAULTS, "sparsity": 0.65}
    for point in points + space.known_points(static):
        found = space.evaluate(objective, point)
        assert found.status == "ok"
        assert 0.65 <= found.sparsity < 0.75
        again = objective.evaluate(mode, found.parameters)  # what a profile would hold
        assert (again.loss, again.sparsity) == (found.loss, found.sparsity)


def test_first_dynamic_point_is_the_static_winner():
    chosen = task(fixed={"sink_frames": 0})
    objective = Objective(chosen, "high")
    static, dynamic = (Space(chosen, mode) for mode in MODES)
    winner = static.evaluate(objective, [0.3] * len(static.dimensions))
    first = dynamic.evaluate(objective, dynamic.known_points(winner.parameters)[0])
    assert first.error == pytest.approx(winner.error, rel=1e-6)
    assert winner.parameters["sink_frames"] == 0


BAD_TASKS = {
    "grid": (dict(grid=(5, 6)), "grid must be"),
    "zero": (dict(grid=(5, 0, 6)), "each size of the grid"),
    "sparsity": (dict(sparsity=1.0), "between 0 and 1"),
    "proxy": (dict(proxies=("vidoe",)), "Did you mean 'video'"),
    "mode": (dict(modes=("dynamic_threshold",)), "static_ratio"),
    "budget": (dict(budget=3), "budget must be an integer of at least 10"),
    "fixed": (dict(fixed={"compensat": 0}), "Did you mean 'compensate'"),
    "seeds": (dict(seeds=()), "at least one integer"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_bad_tasks(changes, message):
    with pytest.raises(OptionsError, match=message):
        task(**changes)


def test_optimizer_is_deterministic_and_named():
    def points(seed):
        optimizer = Optimizer("TwoPointsDE", 3, 12, seed, 1, [[0.1, 0.2, 0.3]])
        found = []
        for number in range(6):
            candidate, point = optimizer.ask()
            optimizer.tell(candidate, math.inf if number == 1 else 1.0 + sum(point))
            found.append(point)
        return found

    assert points(0)[0] == pytest.approx([0.1, 0.2, 0.3])
    assert points(0) == points(0) != points(1)
    assert all(0.0 <= u <= 1.0 for point in points(0) for u in point)
    with pytest.raises(OptionsError, match="Did you mean 'TwoPointsDE'"):
        Optimizer("TwoPointDE", 3, 12, 0, 1, [])


# Journal and whole searches


def test_journal_survives_a_crash_and_refuses_others(tmp_path):
    path = tmp_path / "a.jsonl"
    journal = Journal(path, task(), {}, resume=False)
    objective = Objective(task(), "low")
    ok = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8})
    pruned = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8, "decay_factor": 1e9})
    journal.write("search", "low", "static_ratio", 0, [0.25], ok)
    journal.write("search", "low", "static_ratio", 1, [0.5], pruned)
    with path.open("a") as file:
        file.write('{"stage": "search", "regi')
    again = Journal(path, task(), {}, resume=True)
    assert again.find("search", "low", "static_ratio", 0) == ([0.25], ok)
    assert again.find("search", "low", "static_ratio", 1) == ([0.5], pruned)
    assert again.find("search", "low", "static_ratio", 2) is None
    assert path.read_text().endswith("}\n")
    with pytest.raises(OptionsError, match="resume=True"):
        Journal(path, task(), {}, resume=False)
    with pytest.raises(OptionsError, match=r"another task: sparsity was 0\.8, now 0\.7"):
        Journal(path, task(sparsity=0.7), {}, resume=True)
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(OptionsError, match="not a journal"):
        Journal(tmp_path / "b.jsonl", task(), {}, resume=True)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A whole small search: (profile, folder)."""
    folder = tmp_path_factory.mktemp("tuned")
    match = {"heads": [2], "layers": 4}
    profile = drad.tune(GRID, folder / "small.toml", progress=False, match=match, header={"dense_layers": 1}, **SMALL)
    return profile, folder


def test_tune_writes_a_profile(tuned):
    profile, folder = tuned
    assert load_profile(folder / "small.toml") == profile
    assert profile.name == "small"
    assert profile.block_size == 16
    assert profile.dense_layers == 1
    assert profile.match.grid == list(GRID)
    provenance = profile.provenance
    assert provenance.budget == 10
    assert set(provenance.packages) >= {"nevergrad", "torch"}
    for regime in REGIMES:
        static, dynamic = (provenance.loss[f"{regime}_{mode}"] for mode in MODES)
        assert dynamic <= static + 1e-3
        assert provenance.sparsity[f"{regime}_static_ratio"] >= 0.8
        assert profile.regime(regime).dynamic_threshold is not None
    for name in ("small_convergence.png", "small_pareto.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    make_plan("dynamicrad", GRID, 16, profile=profile, regime="high")


def test_each_regime_wins_at_home(tuned):
    profile, _ = tuned
    for regime in REGIMES:
        objective = Objective(task(), regime)
        losses = {
            other: objective.evaluate("static_ratio", profile.regime(other).static_ratio.model_dump()).loss
            for other in REGIMES
        }
        assert losses[regime] <= min(losses.values()) + 1e-6


def test_budget_is_kept_and_every_evaluation_is_recorded(tuned):
    _, folder = tuned
    lines = [json.loads(line) for line in (folder / "small.jsonl").read_text().splitlines()]
    assert lines[0]["task"]["grid"] == list(GRID)
    for regime in REGIMES:
        for mode in MODES:
            of_search = [e for e in lines[1:] if (e["stage"], e["regime"], e["mode"]) == ("search", regime, mode)]
            assert sorted(entry["index"] for entry in of_search) == list(range(10))


def test_interrupted_search_resumes_to_the_same_profile(tuned, tmp_path, monkeypatch):
    profile, _ = tuned
    run_job, done = search.run_job, []

    def interrupted(job):
        if len(done) == 33:
            raise KeyboardInterrupt
        done.append(job)
        return run_job(job)

    settings = dict(progress=False, pictures=False, match={"heads": [2], "layers": 4}, header={"dense_layers": 1})
    monkeypatch.setattr(search, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drad.tune(GRID, tmp_path / "small.toml", **settings, **SMALL)
    assert len((tmp_path / "small.jsonl").read_text().splitlines()) == 1 + 33
    monkeypatch.setattr(search, "run_job", run_job)
    assert drad.tune(GRID, tmp_path / "small.toml", resume=True, **settings, **SMALL) == profile


def test_search_in_processes(tmp_path):
    settings = {**SMALL, "modes": ("static_ratio",), "proxies": ("published",), "seeds": (1,)}
    profile = drad.tune(GRID, tmp_path / "two.toml", workers=2, progress=False, pictures=False, **settings)
    assert profile.regime("low").dynamic_threshold is None
    assert profile.mode == "static_ratio"


# Output and command line


def test_toml_is_read_back_as_written():
    import sys

    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    tables = {"a": 1, "b": {"text": 'say "é"', "x": [1, 2.5], "small": 1e-7, "e": {}, "c d": {"yes": True, "f": 3.0}}}
    assert toml.loads(to_toml(tables)) == tables


def test_command(capsys, tmp_path):
    output = tmp_path / "cli.toml"
    small = ["--grid", "5", "6", "7", "--block-size", "16", "--heads", "2", "--head-dim", "16", "--budget", "10"]
    small += ["--seeds", "1", "--rows", "20", "--modes", "static_ratio", "--fix", "compensate=0", "--no-pictures"]
    assert cli.main(["tune", *small, "-o", str(output)]) == 0
    assert load_profile(output).regime("mid").static_ratio.compensate == 0.0
    assert cli.main(["tune", *small, "-o", str(output)]) == 2
    assert "holds a journal already" in capsys.readouterr().err
    assert cli.main(["tune", *small, "-o", str(output), "--resume"]) == 0
    for wrong, message in ((["--fix", "compensate"], "KEY=NUMBER"), (["--optimizer", "CMAA"], "Did you mean 'CMA'")):
        assert cli.main(["tune", *small, "-o", str(tmp_path / "x.toml"), *wrong]) == 2
        assert message in capsys.readouterr().err
