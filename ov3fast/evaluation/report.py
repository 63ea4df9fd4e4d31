"""report.html: one self-contained page of an evaluation and of the run behind it.

    write_report("runs/demo/report.html", result, run_dir="runs/demo")

Nothing is asked of a network: style, charts and pictures are in the file. The same input gives the same bytes: no clock, no
random ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from ov3fast.evaluation import page
from ov3fast.evaluation.curves import curves, read_log, throughput
from ov3fast.evaluation.evaluate import Evaluation, Ranking
from ov3fast.evaluation.figures import SET_LABELS, WAYS, figure_text
from ov3fast.evaluation.palette import ERROR_RANGE, error_map, png_data
from ov3fast.evaluation.pictures import Pictures, spread
from ov3fast.evaluation.reconstruction import Reconstruction
from ov3fast.evaluation.retrieval import nearest, ranks
from ov3fast.io import atomic_write

LOG_FILE, SUMMARY_FILE = "log.jsonl", "summary.json"
RECONSTRUCTIONS = 8
QUERIES = 6


def write_report(
    path: str | Path,
    result: Evaluation,
    *,
    run_dir: str | Path | None = None,
    config: dict[str, Any] | None = None,
    title: str = "OpenVision 3",
    subtitle: str = "",
) -> Path:
    """Writes the page atomically and returns its path.

    run_dir: a training run, whose log.jsonl gives the curves and summary.json where the time went. config: what to show as the configuration, such as
    the recipe's or the model's to_dict().
    """
    path = Path(path).expanduser()
    rows = [] if run_dir is None else read_log(Path(run_dir) / LOG_FILE)
    summary = None if run_dir is None else _read_summary(Path(run_dir) / SUMMARY_FILE)
    html = report_html(result, rows, config, title, subtitle, summary)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def report_html(
    result: Evaluation,
    rows: Sequence[dict[str, Any]] = (),
    config: dict[str, Any] | None = None,
    title: str = "OpenVision 3",
    subtitle: str = "",
    summary: dict[str, Any] | None = None,
) -> str:
    """The page as text. rows: the training log's; summary: the run's, with its length and seconds_by_part."""
    tables = result.tables
    sets = ", ".join(f"{count} {name}" for name, count in tables["data"]["pictures"].items())
    about = f"Held-out data: {tables['data']['name']} ({sets}) at {tables['data']['image_size']} px"
    sections = [
        page.section(
            "Figures",
            figures(tables["figures"]),
            "All on held-out data. A figure is met or missed where the recipe asks for one.",
        ),
        *(reconstruction_section(name, *found) for name, found in result.reconstructions.items()),
        page.section("Training", curves(rows), f"{_length(summary or {})}Faint: the log's rows. Strong: their moving average."),
        *(retrieval_section(name, ranking, tables["retrieval"][name]) for name, ranking in result.rankings.items()),
        captions_section(result),
        page.section("Throughput", throughput(rows, tables, summary or {})),
        page.section(
            "Configuration", "" if not config else page.details("All fields", json.dumps(config, indent=2, ensure_ascii=False))
        ),
        page.section("Protocols", protocols(tables), "Two figures compare only where these agree."),
    ]
    return page.page(title, f"{subtitle} {about}".strip(), sections)


def figures(rows: Sequence[dict[str, Any]]) -> str:
    """The headline table."""
    cells: list[list[str]] = []
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            cells.append([group])
        target, chance = (figure_text(row[n], row["unit"]) if row[n] is not None else "" for n in ("target", "chance"))
        verdict = {True: "met", False: "missed", None: ""}[row["passed"]]
        cells.append(
            [
                row["label"],
                figure_text(row["value"], row["unit"]),
                f"≥ {target}" if target else "",
                verdict,
                chance,
                row["beside"],
            ]
        )
    html = page.table(("", "value", "asked", "", "chance", "beside it"), cells, numbers=(1, 2, 4))
    for verdict in ("met", "missed"):
        html = html.replace(f"<td>{verdict}</td>", f'<td class="{verdict}">{verdict}</td>')
    return html


# ---- pictures --------------------------------------------------------------------------------------------------------


def reconstruction_section(name: str, pictures: Pictures, found: Reconstruction) -> str:
    """Originals beside both reconstructions and their error maps: from the best PSNR over the median to the worst."""
    psnr = found.values["model"]["psnr"]
    order = psnr.argsort(descending=True, stable=True).tolist()
    last = len(order) - 1
    # An odd number of places, so that the middle one is the median, and the second worst.
    places = sorted({round(i * last / (RECONSTRUCTIONS - 2)) for i in range(RECONSTRUCTIONS - 1)} | {max(0, last - 1)})
    words = {round(last / 2): "median", last: "worst", 0: "best"}
    items = []
    for place in places:
        i = order[place]
        alone = found.values["vae"]["psnr"][i].item()
        items.append(
            page.grid(
                "triple",
                [
                    page.picture(png_data(found.originals[i]), f"original {words.get(place, '')}".strip(), pictures.keys[i]),
                    page.picture(png_data(found.model[i]), f"model {_db(psnr[i].item())}"),
                    page.picture(png_data(error_map(found.model[i], found.originals[i])), "its error"),
                    page.picture(png_data(found.vae[i]), f"VAE {_db(alone)}"),
                    page.picture(png_data(error_map(found.vae[i], found.originals[i])), "its error"),
                ],
            )
        )
    scale = f'<p class="note">Error, mean over the channels: 0<span class="scale"></span>{ERROR_RANGE:.0%} of the range and more.</p>'
    rows = [
        [label, *(_spread(found, by, metric, unit) for by in ("model", "vae"))]
        for metric, label, unit in (
            ("psnr", "PSNR", "dB"),
            ("ssim", "SSIM", ""),
            ("ssim_uniform", "SSIM, uniform window", ""),
            ("lpips_style", "LPIPS-style", ""),
        )
        if metric in found.values["vae"]
    ]
    summary = page.table((f"mean (lowest … highest) of {len(order)}", "model", "VAE alone"), rows, numbers=(1, 2))
    return page.section(
        f"Reconstruction of {name}",
        summary + scale + page.grid("triples", items),
        "Sorted by PSNR, best first; chosen evenly over the ranks.",
    )


def retrieval_section(name: str, ranking: Ranking, found: dict[str, Any]) -> str:
    """Queries both ways with their five nearest answers; the right one is framed. Half of them found, half missed, where there are.

    found: the set's retrieval table; where it has several styles, each gets a row.
    """
    texts_of_pictures = nearest(ranking.scores, 5)
    pictures_of_texts = nearest(ranking.scores.T, 5)
    text_ids = torch.arange(len(ranking.texts))
    to_text = ranks(ranking.scores, ranking.answer, text_ids)
    asked = torch.isin(text_ids, ranking.answer).nonzero()[:, 0]
    to_picture = ranks(ranking.scores.T[asked], asked, ranking.answer)
    by_text = []
    for row in _mixed(to_picture):
        text = int(asked[row])
        answers = [
            page.picture(
                png_data(ranking.pictures.images[i]),
                ranking.texts[int(ranking.answer[i])],
                right=int(ranking.answer[i]) == text,
            )
            for i in pictures_of_texts[text].tolist()
        ]
        query = f'<p><b>“{escape(ranking.texts[text])}”</b><br><span class="note">rank {int(to_picture[row]) + 1}</span></p>'
        by_text.append(f'<div class="query">{query}{page.grid("five", answers)}</div>')
    by_picture = []
    for i in _mixed(to_text):
        own = int(ranking.answer[i])
        answers = "".join(
            f"<li{' class=right' if j == own else ''}>{escape(ranking.texts[j])}</li>" for j in texts_of_pictures[i].tolist()
        )
        query = page.picture(png_data(ranking.pictures.images[i]), f"rank {int(to_text[i]) + 1}", ranking.texts[own])
        truth = f'<p class="note">It is: {escape(ranking.texts[own])}</p>'
        by_picture.append(f'<div class="query">{query}<div><ol class="answers">{answers}</ol>{truth}</div></div>')
    styles = sorted(set(ranking.pictures.column("style")) - {""})
    style = f" ({', '.join(styles)})" if styles else ""
    recalls = [(way, k) for way in WAYS for k in ("R@1", "R@10")]
    by_style = [
        [
            name,
            *(figure_text(table[way][k], "%") for way, k in recalls),
            f"{table['image_to_text']['median_rank']:g} / {table['text_to_image']['median_rank']:g}",
        ]
        for name, table in found["styles"].items()
    ]
    columns = ("style", *(f"{WAYS[way]}, {k}" for way, k in recalls), "median ranks")
    body = (
        (page.table(columns, by_style, range(1, len(columns))) if len(by_style) > 1 else "")
        + "<h3>Text to picture: the five nearest pictures</h3>" + page.grid("queries", by_text)
        + "<h3>Picture to text: the five nearest texts</h3>" + page.grid("queries", by_picture)
    )  # fmt: skip
    note = f"{len(ranking.pictures)} pictures{style} and {len(ranking.texts)} texts. Queries are chosen evenly, found ones and missed ones."
    return page.section(f"Retrieval: {SET_LABELS.get(name, name).lower()}", body, note)


def captions_section(result: Evaluation) -> str:
    """Pictures with the caption that the model wrote and their own."""
    if result.captioned is None:
        return ""
    items = []
    for image, row in zip(result.captioned.images, result.tables["captions"], strict=True):
        words = f"<figcaption><b>{escape(row['caption'] or '(nothing)')}</b><br>its own: {escape(row['reference'] or '-')}</figcaption>"
        items.append(page.picture(png_data(image), alt=row["key"]).replace("</figure>", words + "</figure>"))
    return page.section(
        "Captions of held-out pictures", page.grid("captions", items), "Written by the model from the picture alone."
    )


def protocols(tables: dict[str, Any]) -> str:
    """What each figure was taken by."""
    rows = [["preparation", f"{tables['data']['preprocess']}, {tables['data']['image_size']} px"]]
    rows += [[name, protocol] for name, protocol in tables["protocols"].items()]
    for task in ("retrieval", "zero_shot"):
        rows += [[task, protocol] for protocol in dict.fromkeys(of["protocol"] for of in tables[task].values())]
    if tables["probe"]:
        probe = tables["probe"]
        rows.append(
            [
                "linear probe",
                f"logistic regression on {probe['features']} pooled features, L-BFGS, l2 = {probe['l2']:g} chosen on a fifth of the training pictures",
            ]
        )
    if "lpips_style" in tables["protocols"]:
        rows.append(
            [
                "LPIPS-style",
                "a perceptual distance in LPIPS' form with other backbone weights: not comparable with published LPIPS",
            ]
        )
    for name, skipped in tables["data"]["skipped"].items():
        rows.append([f"skipped in {name}", ", ".join(f"{count} {reason}" for reason, count in skipped.items())])
    return page.table(("", "protocol"), rows)


def _read_summary(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _length(summary: dict[str, Any]) -> str:
    if not {"step", "images", "seconds"} <= set(summary):
        return ""
    return f"{summary['step']:,} steps, {summary['images']:,} images, {summary['seconds'] / 60:.1f} minutes. "


def _mixed(places: torch.Tensor) -> list[int]:
    """QUERIES rows: half with their answer among the first five, half without, each evenly over the set."""
    found, missed = ((places < 5).nonzero()[:, 0].tolist(), (places >= 5).nonzero()[:, 0].tolist())
    half = max(QUERIES // 2, QUERIES - len(missed))
    chosen = [found[i] for i in spread(len(found), half)]
    return chosen + [missed[i] for i in spread(len(missed), QUERIES - len(chosen))]


def _db(value: float) -> str:
    return f"{value:.1f} dB"


def _spread(found: Reconstruction, by: str, metric: str, unit: str) -> str:
    values = found.values[by][metric]
    mean, low, high = (figure_text(v.item(), unit) for v in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} … {high})"
