import pytest
import torch
import torch.nn.functional as F

from ov3fast.evaluation.retrieval import chance, concept_ids, nearest, ranks, recalls, retrieval, similarity, zero_shot


def brute_force_rank(row, concept, gallery):
    """The rank of the best correct answer if every tie counts against it."""
    order = sorted(range(len(gallery)), key=lambda j: (-row[j], gallery[j] == concept))
    return next(place for place, j in enumerate(order) if gallery[j] == concept)


def test_ranks_equal_a_sorted_list():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 6, (30, 25), generator=generator).double()  # few values: many ties
    gallery = torch.randint(0, 12, (25,), generator=generator)
    queries = gallery[torch.randint(0, 25, (30,), generator=generator)]
    expected = [brute_force_rank(s.tolist(), q, gallery.tolist()) for s, q in zip(scores, queries.tolist(), strict=True)]
    assert ranks(scores, queries, gallery).tolist() == expected


def test_a_collapsed_model_gets_nothing():
    ids = torch.arange(20)
    table = retrieval(torch.ones(20, 4), torch.ones(20, 4), ids, ids)
    assert table["image_to_text"]["R@10"] == table["text_to_image"]["R@10"] == 0.0
    assert zero_shot(torch.ones(20, 4), torch.ones(20, 4), ids)["top5"] == 0.0


def test_a_perfect_model_gets_all_of_it():
    ids = torch.arange(20)
    table = retrieval(torch.eye(20) * 3, torch.eye(20), ids, ids)
    assert table["image_to_text"] == {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0}
    assert table["chance"]["text_to_image"] == pytest.approx({"R@1": 0.05, "R@5": 0.25, "R@10": 0.5})


def test_known_places():
    texts = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=1)
    images = torch.tensor([[0.9, 0.2], [0.1, 0.9], [0.2, 1.0]])
    ids = torch.arange(3)
    table = retrieval(images, texts, ids, ids, ks=(1, 2))
    # Image 0 -> text 0; image 1 -> text 2 before text 1; image 2 -> text 2.
    assert table["image_to_text"] == {"R@1": pytest.approx(2 / 3), "R@2": 1.0, "median_rank": 1.0}
    # Text 1 scores 0.91, 0.68, 0.75: its own image 1 is last. Text 2 scores 0.22, 0.99, 0.98.
    assert ranks(similarity(texts, images), ids, ids).tolist() == [0, 2, 1]


def test_several_pictures_of_a_concept():
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0], [0, 0, 1.0]])
    of_images, of_texts = torch.tensor([0, 0, 1, 2]), torch.arange(3)
    table = retrieval(images, texts, of_images, of_texts, ks=(1,))
    assert table["image_to_text"]["R@1"] == 0.75
    # Text 2's picture ties with a wrong one, so it is lost.
    assert table["text_to_image"]["R@1"] == pytest.approx(2 / 3)


def test_a_text_without_picture_is_a_distractor_only():
    table = retrieval(torch.eye(3)[:2], torch.eye(3), torch.arange(2), torch.arange(3), ks=(1,))
    assert table["texts"] == 3 and table["text_to_image"]["R@1"] == 1.0
    assert table["chance"]["image_to_text"]["R@1"] == pytest.approx(1 / 3)
    assert table["chance"]["text_to_image"]["R@1"] == pytest.approx(1 / 2)


def test_chance_is_what_random_scores_give():
    generator = torch.Generator().manual_seed(0)
    gallery = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
    queries = torch.tensor([0, 1, 2] * 2000)
    places = ranks(torch.rand(len(queries), len(gallery), generator=generator), queries, gallery)
    expected, got = chance(queries, gallery), recalls(places)
    for name in expected:
        assert got[name] == pytest.approx(expected[name], abs=0.02)
    assert expected["R@10"] == 1.0


def test_zero_shot_counts_the_top():
    classes = torch.eye(6)
    images = torch.tensor([[3.0, 2, 1, 0, 0, 0], [3.0, 2, 1, 0, 0, 0]])
    table = zero_shot(images, classes, torch.tensor([0, 1]), ks=(1, 2))
    assert (table["top1"], table["top2"], table["classes"]) == (0.5, 1.0, 6)
    assert table["chance"] == {"top1": 1 / 6, "top2": 2 / 6}


def test_concept_ids_are_shared():
    first, second = concept_ids(["a", "b", "a"], ["b", "c"])
    assert first.tolist() == [0, 1, 0] and second.tolist() == [1, 2]


def test_nearest_keeps_the_earlier_of_equals():
    assert nearest(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), 3).tolist() == [[1, 2, 0]]


def test_errors():
    ids = torch.arange(2)
    with pytest.raises(ValueError, match=r"query 1 \(concept 7\) has no correct answer in the gallery"):
        ranks(torch.zeros(2, 2), torch.tensor([0, 7]), ids)
    with pytest.raises(ValueError, match="gallery holds non-finite embeddings"):
        similarity(torch.ones(1, 2), torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="must have the same width, got 3 and 2"):
        similarity(torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"queries must be \[N, E\] with N of at least 1, got \(0, 3\)"):
        similarity(torch.ones(0, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"labels must be \[2\] in 0\.\.1"):
        zero_shot(torch.eye(2), torch.eye(2), torch.tensor([0, 2]))
