import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops import _dispatch, cpu, random, triton

# counter, key -> words: philox4x32-10 in Random123's kat_vectors.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parse(text: str) -> list[torch.Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


@pytest.mark.backend_independent
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert [int(word) for word in random.philox(parse(counter), parse(key))] == [int(word) for word in parse(expected)]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The rounds with Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.backend_independent
@pytest.mark.parametrize("seed", [0, -7, 2**32 + 1, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 2**32 - 2, 2**40 + 5, 2**64 - 3])
def test_words_are_indexed_by_element(seed, offset):
    expected = []
    for block in range(5):
        position = (offset + block) % 2**64
        key = [seed % 2**32, (seed % 2**64) >> 32]
        expected += plain_philox([position % 2**32, position >> 32, 0, 0], key)
    assert random.words(18, random.make_rng(seed, offset)).tolist() == expected[:18]


@pytest.mark.backend_independent
def test_normal_is_box_muller_on_word_pairs():
    rng = random.make_rng(11, 2**33)
    words = random.words(4096, rng).double().view(-1, 2)
    u = torch.where(words < 2**31, words, 2**32 - 1 - words) * 4.6566127342e-10
    radius, theta = (-2 * u[:, 0].clamp(min=1e-7).log()).sqrt(), 2 * torch.pi * u[:, 1]
    exact = torch.stack((radius * theta.cos(), radius * theta.sin()), dim=1).reshape(-1)
    assert (random.normal((4096,), rng).double() - exact).abs().max() < 2e-6


def test_statistics():
    n = 1 << (16 if triton.INTERPRETED else 20)
    x = random.normal((n,), random.make_rng(2024)).double()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(((x - x.mean()) ** 3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for lag in (1, 2, 3, 4, 64, 4096):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / n**0.5, lag
    for seed, offset in ((2025, 0), (2024 + 2**32, 0), (2024, 2**32), (2024, n // 4)):
        other = random.normal((n,), random.make_rng(seed, offset)).double()
        assert abs((x * other).mean()) < 5 / n**0.5, (seed, offset)


@pytest.mark.backend_independent
def test_uniform_statistics():
    n = 1 << 18
    u = random.uniform((n // 4, 4), random.make_rng(3))
    assert u.shape == (n // 4, 4) and u.min() >= 0 and u.max() < 1
    assert abs(u.double().mean() - 0.5) < 5 / (12 * n) ** 0.5
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * 126**0.5


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 63, 1001, 70_003])
def test_prefix_and_advance(n):
    rng = random.make_rng(9, 5)
    whole = random.normal((80_000,), rng)
    assert torch.equal(random.normal((n,), rng), whole[:n])
    assert torch.equal(random.uniform((n,), rng), random.uniform((80_000,), rng)[:n])
    behind = random.advance(rng, n)
    start = -(-n // 4) * 4
    assert behind.tolist() == [9, 5 + start // 4]
    assert torch.equal(random.normal((100,), behind), whole[start : start + 100])
    assert rng.tolist() == [9, 5]


def test_shape_and_dtype_do_not_change_the_stream():
    rng = random.make_rng(1)
    flat = random.normal((210,), rng)
    assert torch.equal(random.normal((5, 6, 7), rng), flat.view(5, 6, 7))
    assert random.normal((3, 0, 2), rng).shape == (3, 0, 2)
    assert random.normal((), rng) == flat[0]
    assert torch.equal(random.normal((210,), rng, torch.bfloat16), flat.bfloat16())
    # float64 runs on the reference, whose normals differ by a few ulps.
    torch.testing.assert_close(random.normal((210,), rng, torch.float64), flat.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(random.reference((210,), rng), flat, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 2**32 - 7, 2**64 - 5])
@pytest.mark.parametrize("seed", [0, -7, 2**63 + 12345])
@pytest.mark.parametrize("n", [1, 3, 64, 1001])
def test_kernels_have_the_same_words(implementation, seed, offset, n):
    if implementation == "reference":
        pytest.skip("only the kernels")
    rng, words = random.make_rng(seed, offset), torch.empty(n, dtype=torch.int32)
    if implementation == "triton":
        words = triton.launch("random_normal", "words")(n, rng)
    else:
        cpu.KERNELS["random_words"](torch.float32, rng, words, n)
    assert torch.equal(words.long() & (2**32 - 1), random.words(n, rng))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 63, 64, 65, 16_385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_the_reference(n, dtype):
    rng = random.make_rng(77, 2**32 - 9)
    torch.testing.assert_close(
        random.normal((n,), rng, dtype),
        random.reference((n,), rng, dtype),
        atol=1e-6,
        rtol=1e-6 if dtype == torch.float32 else 8e-3,
    )


def test_the_kernels_are_chosen(implementation):
    kernels = "triton" if implementation == "triton" else "cpu"
    for dtype, name in ((torch.float32, kernels), (torch.bfloat16, kernels), (torch.float64, "eager")):
        assert implementation == "reference" or _dispatch.chosen("random_normal", "", [3], random.make_rng(1), dtype) == name


def test_threads_do_not_change_the_stream():
    rng = random.make_rng(4)
    testing.assert_same_bits_on_threads(lambda: [random.normal((20_001 if triton.INTERPRETED else 200_001,), rng)])


@pytest.mark.backend_independent
def test_make_rng():
    assert random.make_rng(3).tolist() == [3, 0]
    assert random.make_rng(2**64 - 1, 2**63).tolist() == [-1, -(2**63)]


@pytest.mark.backend_independent
def test_opcheck():
    torch.library.opcheck(torch.ops.ov3fast.random_normal, ([3, 5], random.make_rng(1, 2), torch.bfloat16, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    compiled = torch.compile(lambda rng: random.normal((6, 7), rng) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(random.make_rng(8)), random.normal((6, 7), random.make_rng(8)) + 1)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: random.make_rng(2**64), ValueError, "seed must be in"),
        (lambda: random.make_rng(0, -(2**63) - 1), ValueError, "offset must be in"),
        (lambda: random.normal((2,), 3), TypeError, "rng must be an int64 tensor .* got int; see ops.random.make_rng"),
        (lambda: random.normal((2,), torch.zeros(2)), TypeError, "rng must be an int64 tensor .* got float32"),
        (lambda: random.normal((-1,), random.make_rng(0)), ValueError, "no negative size"),
        (lambda: random.normal(4, random.make_rng(0)), TypeError, "shape must be a tuple of sizes, got int"),
        (lambda: random.normal((2,), random.make_rng(0), torch.int32), TypeError, "dtype must be"),
        (lambda: random.normal((2,), random.make_rng(0), impl="x"), ValueError, "impl must be one of triton, cpu, eager"),
        (lambda: random.advance(3, 1), TypeError, "advance: rng must be"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.backend_independent
def test_listed():
    assert ops.table()["random_normal"]["eager"] == "ready"
