import json
from dataclasses import replace

import pytest
import torch

from benches.step import table


def test_step_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="no summary.json; give the folder of a finished run"):
        table(tmp_path)
    summary = {"step": 4, "images": 40, "seconds": 10.0, "seconds_by_part": {"text": 1.0, "backward": 5.0, "checkpoint": 9.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "recipe.json").write_text(json.dumps({"precision": "bf16", "stages": [{"batch_size": 10}]}))
    rows = [(row["part"], row["seconds_per_step"], row["images_per_s"]) for row in table(tmp_path)]
    assert rows == [("backward", "1.2500", "8"), ("text", "0.2500", "40"), ("whole step", "2.5000", "4")]


def test_a_table_without_git(monkeypatch):
    from benches import timing

    monkeypatch.setenv("PATH", "")
    assert timing.commit() == "unknown"


def test_operator_rows_hold_ours_the_best_peer_and_the_floor():
    from benches import cases, operators

    [case, *_] = cases.layer_norm("fp32")
    case.variants.pop("compile")
    row = operators.measure(case, budget=0.1, floors={"fp32": 1e11, "bf16": 1e11, "copy": 1e10})
    assert row["best_peer"] == "eager" and row["rate"].endswith("GB/s")
    assert float(row["ratio"]) == pytest.approx(float(row["peer_ms"]) / float(row["ms"]), rel=0.02, abs=0.01)
    assert float(row["of_floor"]) == pytest.approx(case.bytes / 1e10 / (float(row["ms"]) / 1e3), rel=0.05, abs=0.01)


def test_every_operator_has_a_row():
    """Its own, or the default one from its call: a new operator needs no line in benches/."""
    from benches import cases
    from ov3fast import ops

    own = cases.full(on_gpu=False)
    rows = {operator.split()[0] for operator, *_ in own + cases.rest(own)}
    assert set(ops.table()) - set(cases.SHARED) <= rows
    without = [maker for maker in own if maker[0] != "linear"]
    assert {operator for operator, *_ in cases.rest(without)} == {"linear"}
    call = replace(cases.CALLS["linear"], real=(3, 4, 5))
    found = list(cases.row_of("bf16", call))
    assert [case.direction for case in found] == ["forward", "both"] and found[0].size == (3, 4, 5)
    assert all(set(case.variants) == {"ov3fast", "eager"} for case in found)
    for run in found[1].variants.values():
        assert [grad.dtype for grad in run()] == [torch.bfloat16] * 3


def test_extra_memory_sees_an_allocation():

    from benches import timing

    used = timing.extra_memory(lambda: torch.ones(10_000_000))
    assert used is None or 35 <= used <= 60


def test_kernel_page_is_in_step_with_its_tables():
    """`make aot` (or python -m benches.kernel_page) writes it."""
    from benches import kernel_page
    from ov3fast import ops

    text = kernel_page.PAGE.read_text(encoding="utf-8")
    compiled = kernel_page.read(kernel_page.AOT)
    assert kernel_page.render(text, compiled, kernel_page.read(kernel_page.CPU)) == text
    shown = {op for names in kernel_page._BLOCK.findall(text) for op in names[1].split()}
    assert shown == set(ops.table()) | {row["op"] for row in compiled}, "every operator, and sums that several share"


def test_tuning_keeps_what_is_faster_and_right(tmp_path, monkeypatch):
    import torch

    from benches import tune
    from ov3fast.kernels.lib import config as configs
    from ov3fast.kernels.lib.config import Config

    rows = {("any", "any", "any"): Config({"BLOCK": 64}), ("bf16", "any", "sm_90"): Config({"BLOCK": 128})}
    monkeypatch.setitem(configs.TABLE, "trial", rows)
    times = {(64, 4, 2): 10.0, (64, 8, 1): 9.9, (128, 4, 1): 5.0, (128, 4, 2): 4.0, (128, 4, 3): 1.0, (128, 8, 1): 2.0}

    def run():
        config = configs.pick("trial", "bf16")
        run.place = (config.blocks["BLOCK"], config.warps, config.stages)
        if run.place == (128, 8, 1):
            raise RuntimeError("out of shared memory")
        return torch.tensor(7.0 if run.place == (128, 4, 3) else 1.0)

    key = "trial", "bf16", "any"
    found = {}
    [better] = tune.improve(run, found, lambda run: times.get((run(), run.place)[1], 20.0))
    assert better == (key, Config({"BLOCK": 128}, 4, 2), 0.4) and found == {key: better[1]}
    assert not list(tune.improve(run, found, lambda run: 1.0))

    configs.save(found, tmp_path / "tuned" / "rows.json")
    assert configs.load(tmp_path / "tuned" / "rows.json") == found
    assert configs.pick("trial", "bf16") == Config({"BLOCK": 64})
    monkeypatch.setattr(configs, "_tuned", lambda: found)
    assert configs.pick("trial", "bf16") == found[key] and configs.pick("trial", "bf16", architecture="sm_80").blocks == {
        "BLOCK": 64
    }


def test_tuning_leaves_out_a_kernel_that_writes_nothing(monkeypatch):
    """Its result is whatever lies in the memory that the allocator gives out again, such as what a candidate before it wrote there."""
    import torch

    from benches import tune

    memory = torch.ones(64)
    monkeypatch.setattr(torch, "full_like", lambda _, value: memory.fill_(value))
    with pytest.raises(AssertionError, match="not close"):
        tune.assert_agrees(lambda: memory, torch.ones(64))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_tuning_tries_descriptors_where_they_exist(architecture, monkeypatch):
    from benches import tune
    from ov3fast.kernels.attention import config as rows
    from ov3fast.kernels.lib import config as configs

    assert configs.TABLE is rows.TABLE  # which the import fills
    monkeypatch.setattr(configs, "current_architecture", lambda: architecture)
    for dtype, size in (("bf16", "64"), ("fp16", "128"), ("fp32", "64"), ("bf16", "192")):
        tried = list(tune.candidates(("flash_attention_forward", dtype, size)))
        described = [(row.blocks["TMA"], row.blocks["WARP_SPECIALIZED"]) for row in tried if row.blocks["TMA"]]
        exist = architecture != "sm_80" and dtype != "fp32" and size != "192"
        assert described == [(1, 0), (1, 1)] * exist and len(tried) > len(described)


def test_bench_and_tune_without_a_gpu(capsys):
    import torch

    from ov3fast import cli

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command in (["bench", "--device", "cuda"], ["tune"]):
        assert cli.main(command) == 2
        assert "there is no GPU" in capsys.readouterr().err


@pytest.mark.full
def test_the_parts_of_the_pretraining_table(monkeypatch):
    """On a tiny model and VAE: every part gives its figures."""
    from types import SimpleNamespace

    from benches import data, pretrain, training
    from ov3fast import recipes
    from ov3fast.models import vae

    base = recipes.get_recipe("base")
    towers = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
    model = replace(
        base.model, **{name: replace(getattr(base.model, name), **towers) for name in ("vision", "decoder", "text", "caption")}
    )
    monkeypatch.setattr(
        recipes, "get_recipe", lambda name: replace(base, model=replace(model, vision=replace(model.vision, embed_dim=16)))
    )
    monkeypatch.setattr(vae, "FLUX_VAE", {**vae.FLUX_VAE, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1})
    monkeypatch.setattr(data, "SIZES", (((96, 64), 32),))
    monkeypatch.setattr(training.timing, "gemm_rate", lambda dtype: 1e11)
    monkeypatch.setattr(training.timing, "copy_rate", lambda: 1e10)
    options = SimpleNamespace(threads=1, budget=0.0, variants=("ov3fast", "eager"))
    asked = {}
    for part in ("step-128-bf16", "step-256", "cached", "written", "decode", "resume", "checkpoint"):
        rows = pretrain.PARTS[part](options)
        assert all(row.value > 0 and set(row.columns()) == set(rows[0].columns()) for row in rows), part
        asked[part] = sum(bool(row.asked) for row in rows)
    assert asked == {"step-128-bf16": 1, "step-256": 1, "cached": 1, "written": 1, "decode": 1, "resume": 1, "checkpoint": 1}


def test_the_compiled_peer_is_the_model(monkeypatch):
    """What the step is compared with under torch.compile computes the same."""
    from benches import plain
    from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
    from ov3fast.models.openvision3 import OpenVision3
    from ov3fast.models.vae import FLUX_VAE, FrozenVAE

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    torch.manual_seed(0)
    towers = {"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
    config = OpenVision3Config(
        vision=VisionConfig(**towers, image_size=32, embed_dim=16), decoder=DecoderConfig(**towers),
        text=TextConfig(**towers, context_length=8), caption=CaptionConfig(**towers, length=10, style="autoregressive"),
    )  # fmt: skip
    model = OpenVision3(config)
    vae = FrozenVAE.from_config({**FLUX_VAE, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1})
    latents, ids, captions = torch.randn(2, 16, 4, 4), torch.randint(5, 99, (2, 8)), torch.randint(5, 99, (2, 10))

    def outputs():
        found = model(latents, ids, captions, decode=True)
        return [found.pooled, found.tokens, found.text, found.latents_hat, found.caption_hidden, vae.decode(latents)]

    expected = outputs()
    with plain.compiled(model, vae.vae, {}):
        actual = outputs()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_table_of_int8_holds_the_worst_of_all_images():
    """Relative to float32 and to bfloat16."""
    from benches import int8

    photos = torch.tensor([0.0, 0.5])[:, None, None, None].expand(2, 3, 4, 4)
    shifts = {"float32": 0.0, "bfloat16": 0.02, "int8": 0.2}
    row = int8.nearness("PSNR", shifts, photos, lambda shift, image: image + shift * (1 + image), int8.psnr, ".2f")
    assert row == {"what": "PSNR", "count": "2", "bfloat16": "36.48", "int8": "16.48", "int8_to_bfloat16": "17.39"}
    vectors = torch.eye(3)[None]
    assert int8.cosine(vectors, vectors) == 1 and int8.cosine(vectors, vectors + torch.eye(3)[0]) < 0.71


def test_a_copy_in_another_dtype_has_its_autoencoder_in_it_too():
    from benches.optimize import converted
    from ov3fast.inference.load import VisionTower
    from ov3fast.models.config import VisionConfig
    from ov3fast.models.vae import FrozenVAE
    from ov3fast.models.vit import ViTEncoder

    encoder = ViTEncoder(VisionConfig(width=32, depth=1, heads=1, mlp_dim=32, image_size=32, embed_dim=8))
    tower = VisionTower(encoder, FrozenVAE.from_pretrained("small"))
    made = converted(tower, torch.bfloat16)
    assert {made.encoder.cls_token.dtype, made.encoder.get_vae().dtype} == {torch.bfloat16}
    assert {tower.encoder.cls_token.dtype, tower.encoder.get_vae().dtype} == {torch.float32}
