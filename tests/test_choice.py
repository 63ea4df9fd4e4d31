"""Automatic choice of CPU backends: by chip, by committed measurements, by measurements on this machine."""

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch

from benches import rule
from ov3fast import ops
from ov3fast.ops import _calls, _chip, _choice, _dispatch, _trials

CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
flags\t\t: fpu avx2 {flags}

processor\t: 1
vendor_id\t: other
"""


def test_chips_are_told_by_vendor_family_and_flags():
    def identify(vendor, family, model, flags):
        return _chip.identify(CPUINFO.format(vendor=vendor, family=family, model=model, name="A CPU", flags=flags))

    assert identify("AuthenticAMD", 25, 17, "avx512f avx512_bf16") == _chip.Chip("zen4", "A CPU family 25 model 17")
    assert identify("AuthenticAMD", 26, 2, "avx512f avx512_bf16").name == "zen5"
    assert identify("AuthenticAMD", 25, 1, "").name == "unknown", "Zen 3"
    assert identify("GenuineIntel", 6, 207, "avx512_bf16 amx_bf16 amx_tile amx_int8").name == "amx"
    assert identify("GenuineIntel", 6, 207, "avx512_bf16").name == "unknown", "a virtual machine that hides the tiles"
    assert identify("GenuineIntel", 6, 106, "avx512f").name == "unknown"
    assert _chip.identify("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n").name == _chip.identify("").name == "unknown"


@pytest.fixture
def chip(monkeypatch, tmp_path):
    """Call it to simulate a chip, with the kernels of its widest instruction set and no tuning."""
    if not ops.cpu.available_isas():
        pytest.skip("the CPU kernels were not built")
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("OV3FAST_TUNED", raising=False)
    monkeypatch.setattr(_dispatch, "_override", None)
    monkeypatch.setattr(ops.cpu, "best_isa", ops.cpu.isa)

    def be(name):
        monkeypatch.setattr(_chip, "current", lambda: _chip.Chip(name, "A CPU"))
        _dispatch.forget_choices()

    yield be
    monkeypatch.undo()
    _choice._tuned.cache_clear()
    _dispatch.forget_choices()


def linear_choice(rows=2048, impl=""):
    x, weight = torch.empty(rows, 768), torch.empty(2304, 768)
    return _dispatch.chosen("linear", impl, x, weight, None)


# ---- the rule and its evidence


@pytest.mark.parametrize("name", sorted(rule.evidence()))
def test_no_choice_is_one_that_the_evidence_shows_slower(name):
    assert slower(rule.evidence()[name], _choice.committed()[name]) == []


def slower(rows, table):
    """The measured calls for which the table chooses a backend more than 1.5 % further from the fastest callable one than another, or for a backward one that
    with the forward before it takes a tenth more time than another."""
    found = []
    for row in rows:
        times, op = timed(row), row["operator"].split()[0]
        if not row["size"] or len(times) < 2:
            continue
        first, _, second = rule.taken(row, table).partition(" + ")
        pair = {r["direction"]: timed(r) for r in rows if call(r) == call(row)}
        within = _trials.WITHIN
        if op != "linear_cross_entropy" and row["direction"] == "both":  # of the backward calls after this forward
            within, forward = _trials.MIXED_WITHIN, pair.get("forward", {})
            mixed = {name: times[name] - forward[name] + forward[first] for name in times if forward and name != first}
            if row["chosen"].startswith(f"{first} + "):
                mixed[row["chosen"].partition(" + ")[2]] = float(row["ms"])
            times = {**mixed, first: times[first]}
        elif op != "linear_cross_entropy" and row["direction"] == "forward" and "both" in pair:  # alone and with its backward
            shares = [{name: value / min(of.values()) for name, value in of.items()} for of in (times, pair["both"])]
            pytorch = [min((share[name] for name in ("sdpa", "eager") if name in share), default=math.inf) for share in shares]
            times = {name: [share[name] for share in shares] for name in times if name in shares[1]}
            quick = {
                name: both
                for name, both in times.items()
                if all(_trials.WITHIN * a <= b for a, b in zip(both, pytorch, strict=True))
            }
            times = {name: max(both) for name, both in (quick or times).items()}
        if within * times.get(second or first, math.inf) > min(times.values()) * 1.0001:
            found.append((op, row["direction"], row["shape"], row["dtype"], first, second))
    return found


def timed(row):
    """Of a row, the backends that could be called; of older ones, those among the peers."""
    times, peers = rule.milliseconds(row["backends"]), rule.milliseconds(row["peers"])
    return times | {name: peers[name] for name in ("sdpa", "eager") if set(times) == {"cpu"} and name in peers}


def measured(choice, rows):
    """The directions in which this choice's call was timed, alone or as the backward after this forward."""
    size = " ".join(map(str, choice.size))
    found = {
        r["direction"]
        for r in rows
        if (r["operator"].split()[0], r["dtype"], r["size"]) == (choice.operator, choice.dtype, size)
    }
    return {"backward"} if found == {"forward", "both"} else {"forward", *found}


def call(row):
    return row["operator"], row["shape"], row["dtype"]


@pytest.mark.parametrize("name", sorted(rule.evidence()))
def test_a_choice_turned_round_is_found(name):
    table, rows = _choice.committed()[name], rule.evidence()[name]
    decided = [c for choices in table.values() for c in choices if c.ratio > 1.1 and c.direction in measured(c, rows)]
    assert decided
    for choice in decided:
        turned = replace(choice, backend=choice.over)
        wrong = {key: [turned if c is choice else c for c in choices] for key, choices in table.items()}
        assert slower(rows, wrong), choice


def test_the_rule_is_what_the_evidence_makes():
    """`python -m benches.rule` writes it."""
    assert _choice.TABLE.read_text(encoding="utf-8") == rule.table()
    assert _choice.parse(rule.table()).keys() == rule.evidence().keys()


def row(direction, backends, peers="", chosen="cpu", ms="1", operator="linear", size="64 8 8"):
    words = {"operator": operator, "direction": direction, "dtype": "bf16", "shape": size, "size": size}
    return {**words, "backends": backends, "peers": peers, "chosen": chosen, "ms": ms}


def test_how_the_rule_decides():
    def decide(*rows):
        return {c.direction: c.backend for c in rule.decide(rows)}

    assert decide(row("forward", "cpu 1.01; eager 1.0")) == {"forward": "cpu"}, "a tie is ours"
    assert decide(row("forward", "cpu 1.1; eager 1.0")) == {"forward": "eager"}
    both = row("forward", "cpu 1; eager 2"), row("both", "cpu 5; eager 5")
    assert decide(*both) == {"forward": "cpu", "backward": "eager"}, "4 against 3"
    close = row("forward", "cpu 1; eager 1.3"), row("both", "cpu 5; eager 5")
    assert decide(*close) == {"forward": "cpu", "backward": "cpu"}, "4 against 3.7"
    tie = row("forward", "cpu 1; eager 1"), row("both", "cpu 5; eager 4")
    assert decide(*tie) == {"forward": "eager", "backward": "eager"}, (
        "a forward that ties goes to what is faster with the backward"
    )
    never = row("forward", "cpu 1; eager 1.1"), row("both", "cpu 5.2; eager 5")
    assert decide(*never) == {"forward": "eager", "backward": "eager"}, (
        "never slower than PyTorch, though cpu is nearer to the fastest of both"
    )
    lost = row("both", "cpu 5; eager 5", chosen="cpu + eager", ms="5.5")
    assert decide(both[0], lost) == {"forward": "cpu", "backward": "cpu"}, "the two together were measured, and slower"
    won = row("both", "cpu 5; eager 5", chosen="cpu + eager", ms="4.1")
    assert decide(both[0], won) == {"forward": "cpu", "backward": "eager"}
    only_ours = row("forward", "cpu 5", peers="F.linear 1")
    assert decide(only_ours) == {"forward": "eager"}, "PyTorch's own products, though nobody timed the backend"
    memory = row("both", "cpu 5", peers="eager 1", operator="contrastive_loss", size="64 8")
    assert decide(memory) == {"forward": "cpu", "backward": "cpu"}, "the peer keeps N x N numbers and can't be called"
    assert rule.stale([only_ours], _choice.index(rule.decide([only_ours]))) == [only_ours]


# ---- what a call takes


def test_the_nearest_size_decides(chip, monkeypatch):
    def at(rows, backend):
        return _choice.Choice("linear", "forward", "fp32", (rows, 768, 2304), backend, 1.5, "cpu")

    chip("zen4")
    monkeypatch.setattr(_choice, "committed", lambda: {"zen4": _choice.index([at(64, "eager"), at(4096, "cpu")])})
    assert [linear_choice(rows) for rows in (1, 64, 500, 600, 100000)] == ["eager", "eager", "eager", "cpu", "cpu"]
    assert _choice.backend_for("linear", "backward", "fp32", (64, 768, 2304)) == "eager", "no row: as the forward"
    assert _choice.backend_for("mlp", "forward", "fp32", (64, 768, 2304)) == "eager", "no row at all: PyTorch's product"
    assert _choice.backend_for("layer_norm", "forward", "fp32", (64, 768)) == "cpu", "no row at all: bound by memory"


def test_an_unknown_chip_takes_pytorchs_products_and_our_other_kernels(chip):
    chip("unknown")
    assert _choice.rule() == ({}, _choice.WITHOUT_EVIDENCE)
    assert linear_choice() == "eager"
    q = torch.empty(1, 8, 2, 16)
    assert _dispatch.chosen("flash_attention", "", q, q, q, False, 0, 1.0) == "sdpa"
    assert _dispatch.chosen("layer_norm", "", torch.empty(8, 16), torch.empty(16), None, None, 1e-6) == "cpu"
    features = torch.empty(8, 16)
    assert _dispatch.chosen("contrastive_loss", "", features, features, torch.ones(()), None, "softmax", "", "gather") == "cpu"
    for op, backend in _choice.PRODUCTS.items():
        assert (op, backend) not in _trials.OUT_OF_BOUNDS


def test_a_chip_without_figures_takes_its_relatives(chip):
    chip("zen5")
    assert _choice.rule() == (_choice.committed()["zen4"], "benches/results/operators-cpu-zen4.csv")


def test_a_narrower_instruction_set_than_was_measured(chip, monkeypatch):
    chip("zen4")
    monkeypatch.setattr(ops.cpu, "best_isa", lambda: "wider")
    assert _choice.rule() == ({}, _choice.NARROWER) and linear_choice() == "eager"


@pytest.mark.parametrize("name", ["unknown", "amx"])
def test_what_is_asked_for_runs(chip, name):
    chip(name)
    assert linear_choice(impl="cpu") == "cpu" and linear_choice(impl="eager") == "eager"
    with ops.use("cpu"):
        assert linear_choice(impl=_dispatch.request("linear", None)) == "cpu"


def test_a_choice_is_looked_up_once_per_kind_of_call(chip, monkeypatch):
    chip("zen4")
    asked = []
    look_up = _choice.backend_for
    monkeypatch.setattr(_choice, "backend_for", lambda *call: asked.append(call) or look_up(*call))
    x, weight = torch.ones(4, 8), torch.ones(16, 8)
    for _ in range(3):
        ops.linear(x, weight)
    assert len(asked) == len(set(asked)), "forward and backward"


@pytest.mark.parametrize(
    "trial",
    [t for t in _trials.trials() if math.prod(t.size) < 2**31],
    ids=lambda t: "-".join((t.call.name, t.dtype, *map(str, t.size))),
)
def test_a_trials_size_is_what_its_call_is_looked_up_by(trial, chip, monkeypatch):
    chip("zen4")
    asked = []
    monkeypatch.setattr(_choice, "backend_for", lambda *call: asked.append(call) or "cpu")
    monkeypatch.setattr(_dispatch.Selector, "_selected", lambda self, *call: (_ for _ in ()).throw(InterruptedError))
    function, leaves = _trials.prepare(trial)
    with pytest.raises(InterruptedError):
        function(*leaves)
    assert asked == [(trial.operator, "forward", trial.dtype, trial.size)]


# ---- what was measured on this machine


def tuned(backend, direction="forward"):
    return _choice.Choice("linear", direction, "fp32", (2048, 768, 2304), backend, 1.25, "cpu")


def test_what_was_tuned_wins_until_it_is_asked_not_to(chip, monkeypatch):
    chip("zen4")
    monkeypatch.setattr(_choice, "committed", lambda: {"zen4": _choice.index([tuned("cpu")])})
    assert linear_choice() == "cpu"
    path = _choice.save_tuned([tuned("eager")])
    assert linear_choice() == "eager" and _choice.rule()[1] == str(path)
    assert _choice.load_tuned() == [tuned("eager")]
    monkeypatch.setenv("OV3FAST_TUNED", "0")
    assert linear_choice() == "cpu" and _choice.tuned_path() is None
    with pytest.raises(RuntimeError, match="OV3FAST_TUNED=0"):
        _choice.save_tuned([tuned("eager")])


def test_tuned_files_are_for_a_chip_a_number_of_threads_and_a_build(chip, monkeypatch):
    chip("zen4")
    before, threads = _choice.tuned_path(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert _choice.tuned_path() != before
    finally:
        torch.set_num_threads(threads)
    assert _choice.tuned_path() == before
    chip("unknown")
    assert _choice.tuned_path() != before
    chip("zen4")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert _choice.tuned_path() != before
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "line 2"),
        (lambda text: "", "its first line must be"),
        (lambda text: text.replace(",eager,", ",nonsense,"), "no such operator, direction, backend"),
        (lambda text: text.replace("2048 768", "2048"), "number of dimensions"),
        (lambda text: text.replace("1.25", "fast"), "could not convert"),
    ],
)
def test_a_damaged_file_is_named_and_ignored(chip, damage, message):
    chip("zen4")
    path = _choice.save_tuned([tuned("eager")])
    path.write_text(damage(path.read_text()))
    _choice._tuned.cache_clear()
    with pytest.warns(UserWarning, match=f"{re.escape(path.name)} is damaged and ignored.*{message}"):
        assert _choice.rule()[1].startswith("benches/results")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _choice.rule()  # said once


def test_tune_measures_keeps_and_is_deterministic_afterwards(chip, monkeypatch, capsys):
    from ov3fast import cli

    chip("zen4")
    small = {"linear": (8, 16, 24), "layer_norm-residual": (8, 16)}
    calls = [replace(call, measured=(small[call.name],)) for call in _calls.every() if call.name in small]
    monkeypatch.setattr(_calls, "every", lambda: calls)
    speeds = {"cpu": 2.0, "eager": 1.0, "onednn": 3.0}
    monkeypatch.setattr(_trials, "medians", lambda run, names, budget: {name: speeds[name] for name in names})
    assert cli.main(["tune", "--device", "cpu", "--only", "linear", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "1/1 linear 8x16x24 fp32: forward eager 2.00x cpu" in out and "written: " in out
    assert linear_choice() == "eager"
    assert cli.main(["tune", "--device", "cpu", "--only", "layer_norm", "--dtype", "bf16"]) == 0
    assert {choice.operator for choice in _choice.load_tuned()} == {"linear", "layer_norm"}, "what was found before stays"
    assert cli.main(["tune", "--device", "cpu", "--only", "nonsense"]) == 2
    assert "matches no operator" in capsys.readouterr().err


def test_times_below_zero_choose_all_the_same():
    """A backward's time is a difference, which noise can make negative for short calls."""
    assert _trials.pick("linear", "backward", "fp32", (1, 1, 1), {"cpu": 2e-5, "eager": -1e-5}).backend == "eager"


def test_a_measurement_of_one_call(chip):
    chip("zen4")
    linear = next(call for call in _calls.every() if call.op == "linear")
    found = _trials.measure(_trials.Trial(linear, "mixed", (8, 16, 24)), budget=0.01)
    assert [(c.direction, c.dtype) for c in found] == [(direction, "mixed") for direction in _choice.DIRECTIONS]
    assert {c.backend for c in found} | {c.over for c in found} <= {"cpu", "eager", "onednn"} and all(
        c.ratio > 0 for c in found
    )
