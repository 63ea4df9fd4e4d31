"""Text towers against plain PyTorch, masks, labels, and generation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ov3fast import ops
from ov3fast.models import noise
from ov3fast.models.config import CaptionConfig, TextConfig
from ov3fast.models.generation import search
from ov3fast.models.text import CaptionDecoder, TextEncoder

TEXT = TextConfig(width=32, depth=2, heads=2, mlp_dim=48, vocab_size=50, context_length=9)
CAPTION = CaptionConfig(width=32, depth=2, heads=2, mlp_dim=48, vocab_size=20, length=8)
STYLES = {
    "autoregressive": {},
    "autoregressive with positions": {"position": "learned"},
    "queries": {"style": "queries"},
    "queries with text": {"style": "queries", "text_prefix": True},
}


def make_captioner(style: str, **fields) -> CaptionDecoder:
    torch.manual_seed(0)
    decoder = CaptionDecoder(dataclasses.replace(CAPTION, **STYLES[style], **fields), token_dim=24, text_dim=28)
    with torch.no_grad():
        decoder.head.weight.mul_(3)  # peaked distributions, so that near ties do not decide a search
    return decoder


def make_inputs(style: str, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = {"tokens": torch.randn(batch, 6, 24, generator=generator)}
    if style == "queries with text":
        inputs["text_tokens"] = torch.randn(batch, 5, 28, generator=generator)
    return inputs


def plain_block(x, block, mask, activation):
    """A pre-LN block in plain PyTorch."""
    batch, length, width = x.shape
    q, k, v = (
        block.attn.qkv(F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6))
        .view(batch, length, 3, block.attn.heads, -1)
        .permute(2, 0, 3, 1, 4)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, length, width)
    x = x + block.attn.proj(out)
    hidden = block.mlp.fc1(F.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6))
    return x + block.mlp.fc2(F.gelu(hidden, approximate=activation))


def plain_norm(x, norm):
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, 1e-6)


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_text_encoder_is_the_plain_transformer(pool):
    torch.manual_seed(0)
    encoder = TextEncoder(dataclasses.replace(TEXT, pool=pool), embed_dim=12).double()
    ids = torch.randint(50, (3, 7))
    x = encoder.embed(ids) + encoder.pos_embed[:7]
    for block in encoder.transformer.blocks:
        x = plain_block(x, block, None, "tanh")
    x = plain_norm(x, encoder.norm)
    pooled = {"last": x[:, -1], "first": x[:, 0], "mean": x.mean(1)}[pool]
    feature, tokens = encoder(ids, return_tokens=True)
    torch.testing.assert_close(feature, pooled @ encoder.head.weight.T)
    torch.testing.assert_close(tokens, x)
    assert encoder.head.bias is None


@pytest.mark.parametrize("style", STYLES)
def test_caption_decoder_is_the_plain_transformer(style):
    decoder, inputs = make_captioner(style).double(), {k: v.double() for k, v in make_inputs(style).items()}
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 8, 9, 2]])
    prefix = inputs["tokens"] @ decoder.image_proj.weight.T
    if "text_tokens" in inputs:
        prefix = torch.cat([prefix, inputs["text_tokens"] @ decoder.text_proj.weight.T], 1)
    if style.startswith("queries"):
        tail = decoder.queries[:4].expand(2, -1, -1)
    else:
        tail = decoder.embed.weight[ids[:, :-1]]
        tail = tail + decoder.pos_embed[:4] if "positions" in style else tail
    x, start = torch.cat([prefix, tail], 1), prefix.shape[1]
    length = x.shape[1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            mask[query, key] = key < start or key <= query
    for block in decoder.transformer.blocks:
        x = plain_block(x, block, mask, "tanh")
    hidden, labels = decoder(inputs["tokens"], ids, inputs.get("text_tokens"))
    torch.testing.assert_close(hidden, plain_norm(x[:, start:], decoder.norm))
    assert labels.tolist() == [[5, 6, 2, -100], [7, 8, 9, 2]]


@pytest.mark.parametrize("style", STYLES)
def test_captions_learn_through_every_parameter(style):
    decoder, inputs = make_captioner(style), make_inputs(style)
    hidden, labels = decoder(inputs["tokens"], torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]), inputs.get("text_tokens"))
    ops.linear_cross_entropy(hidden, decoder.head.weight, labels).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_labels_stop_behind_the_first_eos_whatever_the_padding_id():
    decoder = make_captioner("autoregressive")
    ids = torch.tensor([[1, 5, 0, 2, 0, 0], [1, 2, 2, 5, 5, 5], [1, 5, 6, 7, 0, 0], [1, 2, 0, 0, 0, 0]])
    assert decoder.labels(ids).tolist() == [
        [5, 0, 2, -100, -100],
        [2, -100, -100, -100, -100],
        [5, 6, 7, -100, -100],
        [2, -100, -100, -100, -100],
    ]


def test_visual_tokens_are_kept_by_the_counter():
    tokens = torch.arange(3 * 10, dtype=torch.float32).view(3, 10, 1)
    rng = ops.random.make_rng(4, 2)
    kept = noise.keep_tokens(tokens, 0.35, rng)
    assert kept.shape == (3, 3, 1)
    assert torch.equal(kept, noise.keep_tokens(tokens, 0.35, rng))
    assert not torch.equal(kept, noise.keep_tokens(tokens, 0.35, ops.random.make_rng(5, 2)))
    places = kept[..., 0] - 10 * torch.arange(3)[:, None]
    assert (places.diff(dim=1) > 0).all() and len({tuple(row) for row in places.tolist()}) > 1
    many = noise.keep_tokens(torch.arange(8.0).view(1, 8, 1).expand(4000, -1, -1), 0.25, rng)
    shares = torch.bincount(many.long().flatten(), minlength=8) / 8000
    assert (shares - 1 / 8).abs().max() < 0.015

    decoder = make_captioner("autoregressive", visual_keep=0.5)
    tokens, ids = make_inputs("autoregressive")["tokens"], torch.tensor([[1, 5, 2], [1, 6, 2]])
    drawn = decoder(tokens, ids, rng=rng)[0]
    torch.testing.assert_close(drawn, decoder(noise.keep_tokens(tokens, 0.5, rng), ids)[0])
    assert not torch.allclose(drawn, decoder(tokens, ids)[0], atol=1e-3)


def test_sigma_is_uniform_and_differs_from_the_noise():
    rng = ops.random.make_rng(11)
    own = noise.derive_rng(rng, noise.SIGMA)
    sigma = noise.sample_sigma(20000, 0.8, own)
    assert 0 <= float(sigma.min()) < 0.01 and 0.79 < float(sigma.max()) <= 0.8
    assert abs(float(sigma.mean()) - 0.4) < 0.005 and abs(float(sigma.var()) - 0.64 / 12) < 0.001
    assert torch.equal(sigma[:100], noise.sample_sigma(100, 0.8, own))
    assert abs(float(torch.corrcoef(torch.stack([sigma, ops.random.normal((20000,), rng)]))[0, 1])) < 0.03


def greedy_by_hand(decoder, inputs, length):
    """Argmax of the whole forward pass, once per word."""
    batch = inputs["tokens"].shape[0]
    ids = torch.full((batch, 1), 1)
    for place in range(length - 1):
        padded = torch.cat([ids, torch.zeros(batch, 1, dtype=torch.int64)], 1)
        hidden, _ = decoder(inputs["tokens"], padded, inputs.get("text_tokens"))
        logits = hidden[:, place] @ decoder.head.weight.T
        logits[:, :2] = -torch.inf  # neither padding nor [bos]
        following = logits.argmax(-1)
        following[(ids == 2).any(1)] = 0
        ids = torch.cat([ids, following[:, None]], 1)
        if bool((ids == 2).any(1).all()):
            break
    return ids


def sequence_score(decoder, inputs, ids):
    hidden, labels = decoder(inputs["tokens"], ids, inputs.get("text_tokens"))
    log_probs = (hidden @ decoder.head.weight.T).log_softmax(-1)
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels < 0, 0).sum(1)


@pytest.mark.parametrize("style", STYLES)
def test_one_beam_is_greedy_search(style):
    decoder, inputs = make_captioner(style), make_inputs(style, batch=4)
    expected = greedy_by_hand(decoder, inputs, 8)
    ids = decoder.generate(inputs["tokens"], beams=1, text_tokens=inputs.get("text_tokens"))
    assert ids.tolist() == expected.tolist()
    assert decoder.generate(inputs["tokens"], 3, text_tokens=inputs.get("text_tokens")).tolist() == expected[:, :3].tolist()


@pytest.mark.parametrize("style", STYLES)
def test_more_beams_score_no_worse(style):
    decoder, inputs = make_captioner(style), make_inputs(style, batch=6)
    text = inputs.get("text_tokens")
    # 20 ids, three places: 400 beams leave nothing out, so the best sequence is found.
    greedy, beam = (sequence_score(decoder, inputs, decoder.generate(inputs["tokens"], 4, k, text)) for k in (1, 400))
    assert (beam >= greedy - 1e-4).all()
    if style.startswith("autoregressive"):
        assert (beam > greedy + 1e-3).any()


@pytest.mark.parametrize("style", ["autoregressive", "autoregressive with positions"])
def test_beams_keep_their_own_past(style):
    decoder, inputs = make_captioner(style), make_inputs(style, batch=6)
    tokens = inputs["tokens"].repeat_interleave(4, 0)
    past = torch.empty(24, 0, dtype=torch.int64)

    def step(place, ids, rows):
        nonlocal past
        past = torch.cat([past[rows], ids[:, None]], 1)
        hidden, _ = decoder(tokens, torch.cat([past, ids[:, None]], 1))
        return (hidden[:, place] @ decoder.head.weight.T).log_softmax(-1)

    with torch.no_grad():
        expected = search(step, 6, 4, 7, bos=1, eos=2, pad=0)
    assert decoder.generate(inputs["tokens"], 7, beams=4).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TextEncoder(TEXT, 8)(torch.zeros(1, 10, dtype=torch.int64)),
            "TextEncoder: ids must have 1..9 columns, got 10",
        ),
        (lambda: TextEncoder(TEXT, 8)(torch.zeros(1, 4)), "TextEncoder: ids must be an int64 tensor"),
        (
            lambda: make_captioner("queries")(torch.zeros(1, 6, 24), torch.ones(1, 9, dtype=torch.int64)),
            "CaptionDecoder: caption_ids must have 2..8 columns, got 9",
        ),
        (lambda: make_captioner("queries").generate(torch.zeros(1, 6, 23)), r"tokens must be \[B, N, 24\], got \(1, 6, 23\)"),
        (lambda: make_captioner("queries").generate(torch.zeros(1, 6, 24), 9), "max_length must be in 2..8, got 9"),
        (lambda: make_captioner("queries with text").generate(torch.zeros(1, 6, 24)), "text_tokens must be given"),
        (
            lambda: make_captioner("queries").generate(torch.zeros(1, 6, 24), text_tokens=torch.zeros(1, 2, 28)),
            "text_tokens has no use",
        ),
        (
            lambda: CaptionDecoder(dataclasses.replace(CAPTION, style="queries", text_prefix=True), 24),
            "text_prefix needs text_dim",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
