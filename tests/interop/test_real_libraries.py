"""Against the real timm and open_clip, if installed (`make test-doors`): their code runs with our models, and `optimize` with theirs."""

import copy

import pytest
import torch

import ov3fast
from ov3fast.interop import open_clip as open_clip_door
from ov3fast.interop import timm as timm_door
from ov3fast.testing import assert_within_budget


def within_budget(model, fast, dtype, x, call):
    with torch.no_grad():
        exact = call(copy.deepcopy(model).double(), x.double())
        eager = call(copy.deepcopy(model).to(dtype), x.to(dtype))
        assert_within_budget(call(fast, x.to(dtype)), eager, exact, "output")


def shaken(model):
    """Randomises norms, biases and layer scales, so that they matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestTimm:
    SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}

    @pytest.fixture(autouse=True)
    def library(self):
        self.timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        self.x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def vit(self, **fields):
        from timm.models.vision_transformer import VisionTransformer

        return shaken(VisionTransformer(**{**self.SIZES, **fields}))

    @pytest.mark.parametrize("fields", [{}, {"init_values": 0.1}, {"class_token": False, "global_pool": "avg"}])
    def test_optimize(self, dtype, fields):
        model = self.vit(**fields)
        fast = ov3fast.optimize(model, dtype=dtype, mode="ours")
        assert {"blocks.0", "blocks.1"} <= set(fast.report.choices) and list(fast.state_dict()) == list(model.state_dict())
        within_budget(model, fast, dtype, self.x, lambda m, x: m(x))
        within_budget(model, fast, dtype, self.x, lambda m, x: m.forward_features(x))

    def test_norms_of_queries_are_not_known(self, dtype):
        with pytest.raises(ValueError, match="optimize: VisionTransformer is not supported; it takes .*timm's"):
            ov3fast.optimize(self.vit(qk_norm=True), dtype=dtype)

    def test_int8(self, dtype):
        model = self.vit(embed_dim=128)
        fast = ov3fast.optimize(model.to(dtype), dtype=torch.int8, calibration=self.x)
        assert fast.report.choices["blocks.0"] == "int8" and fast.report.accuracy["least cosine, pooled"] > 0.99

    def test_features_only(self, dtype, model):
        """timm's own getter, on our model."""
        from timm.models._features import FeatureInfo

        door = timm_door.TimmModel(copy.deepcopy(model).to(dtype))
        info = FeatureInfo(door.feature_info, (0, 1))
        assert info.channels() == [32, 32] and info.reduction() == [16, 16]
        with torch.no_grad():
            found = door.forward_intermediates(self.x, list(info.out_indices), intermediates_only=True)
        assert [tuple(state.shape) for state in found] == [(2, 32, 2, 2)] * 2 and found[0].dtype == dtype

    def test_the_same_words_as_a_vit_of_timm(self, dtype, model):
        door, vit = timm_door.TimmModel(model), self.vit()
        for name in (
            "forward_features", "forward_head", "forward_intermediates", "get_intermediate_layers", "set_input_size",
            "num_features", "embed_dim", "head_hidden_size", "num_prefix_tokens", "feature_info", "num_classes",
        ):  # fmt: skip
            assert hasattr(vit, name) and hasattr(door, name), name


class TestOpenClip:
    @pytest.fixture(autouse=True)
    def library(self):
        self.open_clip = pytest.importorskip("open_clip")

    def test_its_zero_shot_classifier_takes_our_model(self, model):
        clip, _, _ = open_clip_door.create_model_and_transforms(model)
        tokenizer = open_clip_door.get_tokenizer(model)
        classifier = self.open_clip.build_zero_shot_classifier(
            clip, tokenizer, ["red", "square"], [lambda name: f"a {name}", lambda name: name], num_classes_per_batch=2
        )
        with torch.no_grad():
            texts = clip.encode_text(tokenizer(["a red", "red"]), normalize=True).mean(0)
        torch.testing.assert_close(classifier[:, 0], texts / texts.norm(), rtol=1e-5, atol=1e-5)

    def test_the_same_words_as_a_clip_of_its(self, model):
        clip, _, preprocess = open_clip_door.create_model_and_transforms(model)
        theirs = self.open_clip.model.CLIP
        assert all(hasattr(theirs, name) and hasattr(clip, name) for name in ("encode_image", "encode_text", "forward"))
        assert callable(preprocess)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("fields", [{}, {"ls_init_value": 0.1}])
    def test_optimize(self, dtype, fields):
        torch.manual_seed(0)
        vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32, **fields}
        text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2}
        model = shaken(self.open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text))
        fast = ov3fast.optimize(model, dtype=dtype, mode="ours")
        assert "visual.transformer.resblocks.0" in fast.report.choices
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        within_budget(model, fast, dtype, x, lambda m, x: m.encode_image(x))
        ids = torch.randint(1, 50, (2, 8))
        with torch.no_grad():
            expected = copy.deepcopy(model).to(dtype).encode_text(ids)
            torch.testing.assert_close(fast.encode_text(ids), expected, rtol=1e-2, atol=1e-2)
