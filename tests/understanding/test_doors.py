"""A trained run in other libraries: transformers' LlavaForConditionalGeneration and lmms-eval's model class."""

import dataclasses
import sys
import types

import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.interop import lmms_eval
from ov3fast.understanding.saved import Answerer

transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
QUESTION = "which colour?"


@pytest.fixture(scope="module")
def image(pictures):
    return Image.open(pictures / "0.png").resize((32, 32))


def test_llava_has_the_same_logits_and_answers(capsys, trained, image, tmp_path):
    """Ours from the run's own parts (prompt, features, projector, language model), transformers' from the exported folder."""
    import ov3fast.interop.transformers  # noqa: F401

    with pytest.warns(UserWarning, match="pads images to squares"):
        assert cli.main(["export", "llava", str(trained), "--out", str(tmp_path / "hf")]) == 0
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.LlavaProcessor.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    answerer = Answerer.load(trained)
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == answerer.tower.tokens == 4
    with torch.no_grad():
        found = model(**inputs).logits[0]
        example = answerer.encoder.prompt(QUESTION, "x")
        embedded = answerer.model.embed(
            torch.tensor([example.ids]), answerer.tower.features(answerer.tower.view(image)[None]).clone()
        )  # fmt: skip
        expected = answerer.model.language_model(inputs_embeds=embedded).logits[0]
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, **CLOSE)
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    words = processor.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert words == answerer.answer([image], [QUESTION], max_new_tokens=4)[0]


def test_what_export_refuses(capsys, trained, tmp_path):
    answerer = Answerer.load(trained)
    blind = dataclasses.replace(answerer, about={**answerer.about, "image_tokens": 0})
    from ov3fast.interop import llava_transformers

    with pytest.raises(ValueError, match="a control without images"):
        llava_transformers.from_answerer(blind)
    assert cli.main(["export", "llava", str(trained), "--out", str(tmp_path / "hf"), "--image-size", "64"]) == 2
    assert "not for llava" in capsys.readouterr().err


def test_lmms_evals_model(monkeypatch, trained, image):
    """Against a stub of what lmms-eval calls: base class, manifest, and requests as its tasks issue them."""

    class lmms:
        def __init__(self):
            self.task_dict = {}

    @dataclasses.dataclass
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, value in (("lmms_eval.api.model", lmms), ("lmms_eval.models.registry_v2", ModelManifest)):
        module = types.ModuleType(name)
        setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ov3fast.interop.lmms_eval.model", raising=False)
    path = lmms_eval.manifest().simple_class_path
    module, _, name = path.rpartition(".")
    import importlib

    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, lmms) and kind.is_simple
    model = kind(pretrained=str(trained), batch_size="2")
    docs = [{"image": image}, {"image": None}, {"image": image}]
    model.task_dict = {"pope": {"test": docs}}

    def visual(doc):
        return [doc["image"]] if doc["image"] else []

    def request(number, question, **options):
        return types.SimpleNamespace(args=(question, {"max_new_tokens": 4, **options}, visual, number, "pope", "test"))

    requests = [request(0, f"<image>\n{QUESTION}"), request(1, "hello"), request(2, QUESTION)]
    found = model.generate_until(requests)
    answerer = Answerer.load(trained)
    assert found == answerer.answer([image, None, image], [QUESTION, "hello", QUESTION], max_new_tokens=4)
    first = found[0][:1]
    assert model.generate_until([request(0, QUESTION, until=[first])]) == [""] if first else True
    with pytest.raises(ValueError, match="model_args has colour"):
        kind(pretrained=str(trained), colour="red")
    docs[0]["image"] = image
    two = types.SimpleNamespace(args=(QUESTION, {}, lambda doc: [image, image], 0, "pope", "test"))
    with pytest.raises(ValueError, match="one image a question, pope has 2"):
        model.generate_until([two])
    with pytest.raises(NotImplementedError, match="likelihoods"):
        model.loglikelihood([])
