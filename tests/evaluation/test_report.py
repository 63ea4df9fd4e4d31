import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.evaluation import evaluate, palette, write_report
from ov3fast.evaluation.curves import boundaries, curves, read_log, throughput
from ov3fast.evaluation.report import report_html

SUMMARY = {
    "step": 200, "images": 57600, "seconds": 90.0, "seconds_by_part": {"vae": 30.0, "encoder": 10.0}, "peak_memory_gib": 1.5,
}  # fmt: skip
VOID = {"meta", "img", "br", "path"}


class Checker(HTMLParser):
    """Checks that tags are properly nested; collects text, pictures and URLs."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images, self.addresses = [], [], [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                (self.images if value.startswith("data:image/png;base64,") else self.addresses).append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def rows(steps: int = 200):
    for step in range(1, steps + 1):
        row = {"step": step, "stage": "small" if step <= 150 else "large", "images_per_s": 100.0 + step % 3, "lr": 1e-3 / step}
        row |= {
            "loss": 5.0 / step,
            "contrastive": 3.0 / step,
            "caption": None if step == 7 else 2.0,
            "latent": 0.5,
            "grad_norm": 1.0,
        }
        if step > 150:
            row["lpips"] = 0.3
        if step % 10 == 0:
            row |= {"rec_grad_norm": 0.1, "und_grad_norm": 0.2, "grad_cosine": -0.1}
        yield row


@pytest.fixture(scope="module")
def result(model, demo):
    return evaluate(model, demo, progress=False, pictures=20, captions=4, probe_train=40, probe_test=20)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()) + '{"step": 201, "lo')
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


@pytest.fixture
def page(result, run_dir, tmp_path):
    path = write_report(tmp_path / "out" / "report.html", result, run_dir=run_dir, config={"name": "<demo>", "stages": []})
    return path.read_text(encoding="utf-8")


def parsed(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_it_is_one_well_formed_file_without_addresses(page):
    found = parsed(page)
    assert found.addresses == [] and len(found.images) > 30
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    assert len(page) < 4e6


def test_every_part_is_there(page):
    text = " ".join(parsed(page).text)
    for words in (
        "Metrics", "Known concepts in an unseen style, 6 texts", "Zero-shot over 11 names", "raw pixels", "Reconstruction of pictures",
        "Reconstruction of photos", "original best", "original median", "original worst", "Total loss", "Contrastive", "LPIPS-style",
        "Learning rate", "understanding", "Retrieval: known concepts in an unseen style", "Retrieval: unseen concepts", "rank ",
        "Captions of held-out pictures", "Throughput", "Training, where 40 s went", "75.0 %", "1.50 GiB",
        "200 steps, 57,600 images, 1.5 minutes.", "image to text, R@10", "style0", "style1", "median ranks", "Configuration", '"<demo>"',
        "psnr/range=1/8-bit-rounded/mean-of-images", "pessimistic-ties", "logistic regression",
    ):  # fmt: skip
        assert words in text, words


def test_the_same_input_gives_the_same_bytes(result, run_dir, tmp_path):
    first, second = (write_report(tmp_path / name, result, run_dir=run_dir).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert sorted(p.name for p in tmp_path.glob("*.html*")) == ["a.html", "b.html"]


def test_pictures_in_it_are_the_pixels(page, result):
    pictures, found = result.reconstructions["photos"]
    best = int(found.values["model"]["psnr"].argmax())
    for image in (found.originals[best], found.model[best], found.vae[best]):
        data = palette.png_data(image)
        assert data in page
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))))
        assert (torch.from_numpy(decoded.copy()).permute(2, 0, 1) == image).all()


def test_captions_and_names_are_escaped(result):
    tables = {**result.tables, "captions": [{**row, "caption": "<b>&"} for row in result.tables["captions"]]}
    changed = type(result)(tables, result.reconstructions, result.rankings, result.captioned)
    page = report_html(changed, title="<title>")
    assert "<b>&lt;b&gt;&amp;</b>" in page and "<h1>&lt;title&gt;</h1>" in page
    parsed(page)


def test_the_right_answer_is_framed_and_ranked(result):
    page = report_html(result)
    section = page[page.index("Retrieval: known concepts") : page.index("Retrieval: unseen")]
    ranking = result.rankings["style"]
    seen = 0
    for i, text in enumerate(ranking.texts):
        query = re.search(rf"“{text}”.*?rank (\d+)</span>(.*?)</div></div>", section)
        if query is None:
            continue
        seen += 1
        order = ranking.scores[:, i].argsort(descending=True).tolist()
        assert int(query[1]) == order.index(i) + 1
        framed = [m == "right" for m in re.findall(r'<figure(?: class="(right)")?>', query[2])]
        assert framed == [j == i for j in order[:5]]
    assert seen >= 5


def test_it_works_without_a_run_or_anything_else(model, demo):
    bare = evaluate(model, demo.photos_heldout, progress=False, pictures=1, captions=0)
    page = report_html(bare)
    text = " ".join(parsed(page).text)
    assert (
        "Reconstruction of pictures" in text
        and "Training" not in text
        and "Captions" not in text
        and "Configuration" not in text
    )


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_panels_follow_the_log():
    charts = curves(list(rows()))
    assert len(charts) == 10 and all(chart.startswith("<svg") for chart in charts)  # no pixel loss, no logit scale
    assert curves([]) == [] and len(curves([{"step": 1, "loss": 2.0}])) == 1


def test_stage_boundaries():
    assert [(b.x, b.name) for b in boundaries(list(rows()))] == [(1, "small"), (151, "large")]
    assert boundaries([{"step": 1, "stage": "only"}, {"step": 2, "stage": "only"}]) == []


def test_throughput_is_the_median_by_stage():
    tables = {"images_per_s": {"embed": 12.0}, "seconds": {"embed": 3.0}}
    log = [{"step": i, "stage": "a", "images_per_s": v} for i, v in enumerate([10.0, 1000.0, 30.0])]
    rows = throughput(log, tables, {})
    assert ["a", "30.0", "3 rows"] in rows and ["embed", "12.0", "3.0 s"] in rows and len(rows) == 4


def test_a_log_cut_short_is_read_and_a_broken_one_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_log(path)] == [1, 2]
    path.write_text('{"step": 1}\nhello\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl is not JSON"):
        read_log(path)
    assert read_log(tmp_path / "none.jsonl") == []


# ---- error maps ------------------------------------------------------------------------------------------------------


def test_error_maps_share_one_scale():
    reference = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images = reference.clone()
    images[1] = 32
    images[2] = 255
    maps = palette.error_map(images, reference)
    assert maps.dtype == torch.uint8 and maps.shape == images.shape
    assert maps[0, :, 0, 0].tolist() == [0, 0, 4] and maps[2, :, 0, 0].tolist() == [252, 255, 164]
    # 32 / 255 is slightly above half of the range: between the fourth and fifth of eight colours.
    assert 159 <= maps[1, 0, 0, 0] <= 212
    lightness = palette.error_map(
        torch.arange(64, dtype=torch.uint8).expand(3, 1, 64), torch.zeros(3, 1, 64, dtype=torch.uint8)
    )
    grey = lightness.float()[:, 0].T @ torch.tensor([0.21, 0.72, 0.07])
    assert (grey.diff() > 0).all()
