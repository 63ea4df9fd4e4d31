"""Training a language model on a tower's tokens: exact resume, masks, towers, LoRA, and inference."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from ov3fast.recipes.understand import UNDERSTAND_RECIPES, SmallLanguageModel, UnderstandStage
from ov3fast.training.run_folder import RECIPE
from ov3fast.understanding import training
from ov3fast.understanding.batches import collate
from ov3fast.understanding.conversations import IGNORED, Encoder
from ov3fast.understanding.lora import LowRankLinear, add_lora, merge_lora
from ov3fast.understanding.model import Understander, build_language_model, small_tokenizer
from ov3fast.understanding.saved import Answerer
from ov3fast.understanding.towers import load_tower

transformers = pytest.importorskip("transformers")


def trainer_of(recipe) -> training.Trainer:
    tower = load_tower(recipe.tower, layer=recipe.feature_layer, aspect=recipe.image_aspect)
    sources = [training.source_of(stage, tower) for stage in recipe.stages]
    texts = [text for source in sources for one in source.conversations for turn in one.turns for text in turn[:2]]
    language_model, tokenizer = build_language_model(recipe, texts)
    torch.manual_seed(recipe.seed)
    return training.Trainer(recipe, Understander(language_model, tower.width), tokenizer, tower, sources)


def weights(run_dir) -> dict[str, torch.Tensor]:
    return dict(Answerer.load(run_dir).model.named_parameters())


def lora_stage(recipe) -> tuple:
    first, second = recipe.stages
    return (first, dataclasses.replace(second, trains="lora", packed=False, micro_batch=2))


@pytest.mark.parametrize(("kind", "stop"), [("both", 1), ("both", 3), ("both", 5), ("lora", 4)])
def test_a_stopped_run_goes_on_to_the_same_bits(recipe, trained, tmp_path, kind, stop):
    """Within a stage, between stages, and with LoRA on the language model."""
    if kind == "lora":
        recipe = dataclasses.replace(recipe, stages=lora_stage(recipe), run_dir=tmp_path / "whole", lora_rank=2)
        training.train_understanding(recipe)
    half = dataclasses.replace(recipe, run_dir=tmp_path / "half")
    trainer = trainer_of(half)
    for _ in range(stop):
        trainer.step()
        if trainer.progress.stage_step == trainer.steps:
            trainer.end_stage()
    half.run_dir.mkdir()
    trainer.save(half.run_dir / training.CHECKPOINT)
    (half.run_dir / RECIPE).write_text(json.dumps(dataclasses.asdict(half), default=str))
    # Log rows past the checkpoint, as a killed run leaves them.
    (half.run_dir / "log.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, stop + 2)))
    assert training.train_understanding(half, resume=True)
    one, other = weights(recipe.run_dir), weights(half.run_dir)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [json.loads(line)["step"] for line in (half.run_dir / "log.jsonl").read_text().splitlines()] == [*range(1, 7)]


def test_stages_train_what_they_say(recipe, trained):
    """The first stage trains only the projector, the second both; the tower is not saved."""
    trainer = trainer_of(recipe)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    while trainer.progress.stage == 0:
        trainer.step()
        if trainer.progress.stage_step == trainer.steps:
            trainer.end_stage()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if name.startswith("projector.")}
    end = weights(trained)
    assert all(not torch.equal(end[name], start[name]) for name in start)
    assert not any("tower" in name for name in end)


def test_loss_is_that_of_transformers(recipe):
    """Over the answer tokens only; the reference uses the language model's own head on the whole row."""
    trainer = trainer_of(recipe)
    encoder = Encoder(trainer.tokenizer, "short", trainer.tower.tokens)
    examples = [encoder(one) for one in trainer.sources[0].conversations[:3]]
    batch = collate([[one] for one in examples])
    features = trainer.features(batch.images)
    model = trainer.model
    found = model.loss(batch, features)
    logits = model.language_model(
        inputs_embeds=model.embed(batch.ids, features), attention_mask=batch.mask, position_ids=batch.positions
    ).logits  # fmt: skip
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(found, expected)
    # In a packed row, each conversation keeps the loss it has on its own.
    alone = sum(model.loss(collate([[one]]), trainer.features([one.image])) for one in examples)
    torch.testing.assert_close(model.loss(collate([examples]), features), alone)


def test_micro_batches_add_up_to_the_batch(recipe):
    whole = trainer_of(recipe).step()
    stages = (dataclasses.replace(recipe.stages[0], micro_batch=2), recipe.stages[1])
    parts = trainer_of(dataclasses.replace(recipe, stages=stages)).step()
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5) and parts["grad_norm"] == pytest.approx(
        whole["grad_norm"], rel=1e-4
    )


def test_an_image_has_all_of_its_tokens(recipe):
    trainer = trainer_of(recipe)
    with pytest.raises(ValueError, match="4 places for image tokens, and 8 features"):
        trainer.model.embed(torch.tensor([[-200] * 4]), torch.zeros(2, 4, 24))


def test_a_run_answers(trained, pictures):
    answerer = Answerer.load(trained)
    questions = ["which colour?", "is it green?", "hello"]
    images = [pictures / "0.png", pictures / "1.png", None]
    found = answerer.answer(images, questions, max_new_tokens=4)
    assert len(found) == 3 and all(isinstance(text, str) for text in found)
    # Answers do not depend on batching.
    assert [
        answerer.answer([image], [text], max_new_tokens=4)[0] for image, text in zip(images, questions, strict=True)
    ] == found
    with pytest.raises(ValueError, match="broken_image"):
        (trained / "x.png").write_bytes(b"no image")
        answerer.answer([trained / "x.png"], ["?"])


def test_it_learns_to_see(recipe, tmp_path):
    """Red or blue can be told only from the pictures, not the questions; the control stays at one half."""
    stages = (dataclasses.replace(recipe.stages[1], steps=80, lr=2e-2, batch_size=13, packed=False),)
    recipe = dataclasses.replace(recipe, stages=stages, small=SmallLanguageModel(width=32, depth=1, heads=2, mlp_dim=64))
    for sighted in (True, False):
        run = dataclasses.replace(
            recipe, stages=stages, sighted=sighted, run_dir=tmp_path / str(sighted), log_every=60, cache_features=True
        )
        training.train_understanding(run)
        names = [f"{i}.png" for i in range(12)]
        images = [f"{recipe.stages[0].images}/{name}" if sighted else None for name in names]
        found = Answerer.load(run.run_dir).answer(images, ["which colour?"] * 12, max_new_tokens=4)
        right = sum(text == ("red", "blue")[i % 2] for i, text in enumerate(found))
        assert right == (12 if sighted else 6)


def test_what_is_refused(recipe, trained, tmp_path):
    with pytest.raises(FileExistsError, match="--resume continues it"):
        training.train_understanding(recipe)
    with pytest.raises(ValueError, match="seed is 7, but .* was started with 0"):
        training.train_understanding(dataclasses.replace(recipe, seed=7), resume=True)
    with pytest.raises(ValueError, match="feature_layer must be in"):
        load_tower(recipe.tower, layer=9)
    with pytest.raises(ValueError, match="steps, one of them"):
        UnderstandStage(steps=3, epochs=1)
    with pytest.raises(ValueError, match="warmup"):
        UnderstandStage(steps=3, warmup=1.0)
    with pytest.raises(ValueError, match="none of its 13 conversations has an answer within 1 tokens"):
        trainer_of(dataclasses.replace(recipe, stages=(dataclasses.replace(recipe.stages[0], max_length=1),)))
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        trainer_of(dataclasses.replace(recipe, stages=(dataclasses.replace(recipe.stages[0], images="nowhere"),)))
    with pytest.raises(FileNotFoundError, match="holds no model"):
        Answerer.load(tmp_path)


def test_low_rank_updates_begin_at_nothing_and_merge():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(5, 8)
    before = model(x)
    assert add_lora(model, rank=2, alpha=4.0) == ["0", "2"]
    assert torch.equal(model(x), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.down", "0.up", "2.down", "2.up"]
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            nn.init.normal_(module.up)
    changed = model(x)
    merge_lora(model)
    assert type(model[0]) is nn.Linear and not torch.allclose(changed, before)
    torch.testing.assert_close(model(x), changed)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_of_transformers(tmp_path, kind):
    """Baseline towers: CLS dropped, their own mean and std, layers indexed as in transformers."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    if kind == "clip":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    model.eval().save_pretrained(tmp_path / kind)
    (tmp_path / kind / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]})
    )
    tower = load_tower(tmp_path / kind, layer=-2)
    assert (tower.tokens, tower.width, tower.image_size) == (16, 16, 32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    expected = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower.features(images), expected[:, 1:] if kind == "clip" else expected)
    with pytest.raises(ValueError, match="vae is for OpenVision 3"):
        load_tower(tmp_path / kind, vae="small")


def test_a_tower_pads_as_llava_does(tower_folder):
    from PIL import Image

    tower = load_tower(tower_folder)
    view = tower.view(Image.new("RGB", (64, 16), (200, 10, 10)))
    assert view.shape == (3, 32, 32)
    assert view[:, 0, 16].tolist() == [128] * 3 and abs(int(view[0, 16, 16]) - 200) < 3
    cropped = load_tower(tower_folder, aspect="crop").view(Image.new("RGB", (64, 16), (200, 10, 10)))
    assert abs(int(cropped[0, 0, 16]) - 200) < 3
    expected = load_tower(tower_folder, layer=-1).features(view[None])
    from ov3fast.inference import load_model

    with torch.inference_mode():
        tokens = load_model(tower_folder).encode(view[None] / 127.5 - 1)[1]
    torch.testing.assert_close(expected, tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_language_models_of_transformers(recipe, tmp_path, kind):
    """From a folder, with their own tokenizer: Qwen2, and Llama, which is SmolLM2's architecture."""
    tokenizer = small_tokenizer(["which colour? red blue is it green? no hello good day"])
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, tie_word_embeddings=kind == "Qwen2",
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    run = dataclasses.replace(recipe, language_model=str(tmp_path / "lm"), run_dir=tmp_path / "run", precision="bf16")
    training.train_understanding(run)
    assert type(Answerer.load(run.run_dir).model.language_model).__name__ == f"{kind}ForCausalLM"


def test_the_papers_recipe():
    align, instruct = UNDERSTAND_RECIPES["understand-base"].stages
    assert (align.trains, align.batch_size, align.lr, align.template) == ("projector", 256, 1e-3, "plain")
    assert (instruct.trains, instruct.batch_size, instruct.lr, instruct.epochs) == ("both", 128, 2e-5, 1)
