"""A set of tiny runs end to end, and the statistics in its table."""

import dataclasses
import json
import statistics

import pytest
import torch
import torch.nn.functional as F

from ov3fast.ablation import VARIANTS, ablate, report, runs, write_ablation_report
from ov3fast.losses import Objective, ObjectiveConfig
from ov3fast.models.vae import FrozenVAE
from ov3fast.recipes.config import leaves


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_what_it_says(tiny, data, tmp_path, name):
    recipe = tiny.recipe(data, tmp_path)
    changed = VARIANTS[name].apply(recipe)
    expected = {"full": 0, "pixels": 2}.get(name, 1)
    own, theirs = (dict(leaves(r.to_dict())) for r in (recipe, changed))
    different = {key for key in own if own[key] != theirs[key]}
    assert len(different) == (0 if name in ("tau-0.8", "caption-1", "encoder-shallow", "decoder-shallow") else expected), (
        different
    )


def test_an_unknown_field_is_named(tiny, data, tmp_path):
    with pytest.raises(ValueError, match="no field 'model.taau'"):
        dataclasses.replace(VARIANTS["full"], changes={"model.taau": 1}).apply(tiny.recipe(data, tmp_path))


@pytest.mark.full
def test_a_set_of_runs_resumes_and_reports(tiny, data, tmp_path, monkeypatch):
    recipe = tiny.recipe(data, tmp_path / "unused", stages=((6, 32),))
    arguments = dict(seeds=2, steps=6, out=tmp_path / "set", data=str(data / "pairs"), note=lambda line: None)
    names = ["no-rec", "no-und", "pixels", "tau-0.8"]
    facts = ablate(recipe, names, **arguments)
    assert [run["variant"] for run in facts["runs"][:5]] == ["full", *names] and len(facts["runs"]) == 10
    page = write_ablation_report(tmp_path / "set", facts)
    text = page.read_text()
    assert all(f"<code>{name}</code>" in text for name in ("full", *names)) and text.count("<svg") >= 7
    assert len(set(ids := [part.split('"')[0] for part in text.split(' id="')[1:]])) == len(ids)
    logs = {
        (run["variant"], run["seed"]): report.read_log(tmp_path / "set" / run["run"] / "log.jsonl") for run in facts["runs"]
    }
    cells = [cell for _, of_variant in report.table(facts, logs)[0] for cell in of_variant]
    assert text.count('class="bold"') == sum(cell["bold"] for cell in cells) < sum(bool(cell["difference"]) for cell in cells)
    # tau 0.8 is the recipe's own setting: one run serves both variants.
    assert "own setting" in facts["variants"][-1]["what"]
    assert not (tmp_path / "set" / "tau-0.8").exists()
    # A detached branch's losses are still measured, and its gradient at the tokens is zero.
    rows = [json.loads(line) for line in (tmp_path / "set/no-rec/seed-0/log.jsonl").read_text().splitlines()]
    assert all(row["pixel"] > 0 for row in rows) and all(row["rec_grad_norm"] == 0 for row in rows if "rec_grad_norm" in row)
    # Finished runs are not retrained; a set from another recipe is rejected.
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("a finished run was trained again"))
    assert ablate(recipe, names, **arguments) == facts
    with pytest.raises(ValueError, match="holds another set"):
        ablate(dataclasses.replace(recipe, seed=5), names, **arguments)


def test_a_stopped_set_says_so(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda *_, **__: {"interrupted": True})
    recipe = tiny.recipe(data, tmp_path / "unused", stages=((2, 32),))
    with pytest.raises(runs.Interrupted, match="complete up to run 0"):
        ablate(recipe, ["tau-0"], seeds=2, steps=2, out=tmp_path / "set", data=str(data / "pairs"), note=lambda line: None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"seeds": 1}, "seeds must be at least 2"), ({"names": ["nope"]}, "no variant 'nope'"), ({"steps": 0}, "steps")],
)
def test_what_is_refused(tiny, data, tmp_path, changes, says):
    arguments = {"names": ["tau-0"], "seeds": 2, "steps": 2, "out": tmp_path, "data": "", **changes}
    with pytest.raises(ValueError, match=says):
        ablate(tiny.recipe(data, tmp_path), arguments.pop("names"), **arguments)


def test_differences_are_taken_seed_by_seed():
    full, other = [1.0, 2.0, 3.0], [1.5, 2.4, 3.6]
    found = report.cell(other, full)
    assert found.difference == pytest.approx(0.5)
    # 4.303 is the quantile of Student's t for two degrees of freedom.
    assert found.half_width == pytest.approx(4.303 * statistics.stdev([0.5, 0.4, 0.6]) / 3**0.5)
    assert found.excludes_zero and not report.cell([2.0, 1.5, 3.0], full).excludes_zero


@pytest.mark.parametrize("branch", ["rec", "und"])
@pytest.mark.parametrize("pooled_norm", [True, False])
def test_a_detached_branch_trains_its_heads_alone(tiny, data, tmp_path, branch, pooled_norm):
    recipe = tiny.recipe(data, tmp_path)
    config = dataclasses.replace(recipe.model, vision=dataclasses.replace(recipe.model.vision, final_ln_after_pool=pooled_norm))
    torch.manual_seed(0)
    from ov3fast.models.openvision3 import OpenVision3

    model = OpenVision3(config)
    latents, ids = torch.randn(3, 4, 4, 4), torch.randint(3, 20, (3, 8))

    def gradients(**weights):
        model.zero_grad()
        config = ObjectiveConfig(**weights)
        out = model(latents, ids, ids, detach=config.detached)
        Objective(config)(out, latents=latents)["loss"].backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    detached, without = gradients(detached=branch), gradients(**{f"{branch}_weight": 0.0})
    both = gradients()
    blocks = [name for name in detached if name.startswith(("encoder.patch", "encoder.cls", "encoder.transformer"))]
    heads = "decoder." if branch == "rec" else "captioner."
    assert blocks
    for name in blocks:
        torch.testing.assert_close(detached[name], without[name], msg=name)
    for name in (name for name in both if name.startswith(heads) and both[name] is not None):
        torch.testing.assert_close(detached[name], both[name], msg=name)
    with pytest.raises(ValueError, match="leaves the encoder without a gradient"):
        ObjectiveConfig(detached=branch, **{f"{'und' if branch == 'rec' else 'rec'}_weight": 0.0})


def test_pixels_come_back_and_a_patch_of_two_is_one_of_sixteen():
    from ov3fast.models.config import VisionConfig
    from ov3fast.models.vit import ViTEncoder

    vae = FrozenVAE.from_pretrained("pixels")
    images = torch.rand(2, 3, 48, 32) * 2 - 1
    latents = vae.encode(images)
    assert latents.shape == (2, 192, 6, 4) and torch.equal(vae.decode(latents), images)
    encoder = ViTEncoder(VisionConfig(width=16, depth=0, heads=2, mlp_dim=8, in_channels=192, image_size=32, embed_dim=8))
    # A token depends on every one of its own 16 x 16 pixels, and on no others.
    other = images[:1].clone()
    other[:, :, :16, 16:32] += 1
    same = encoder(vae.encode(images[:1]))[1][0] == encoder(vae.encode(other))[1][0]
    assert same.all(1).tolist() == [True, False, True, True, True, True]
    single = images[:1].repeat(768, 1, 1, 1)
    single[:, :, :16, 16:32] += torch.eye(768).view(768, 3, 16, 16)
    tokens = encoder(vae.encode(single))[1][:, 1]
    assert (tokens != encoder(vae.encode(images[:1]))[1][0, 1]).any(1).all()
    assert F.l1_loss(vae.encode(images, "sample", rng=torch.tensor([1, 0])), latents) < 1e-6
