"""report.html: one self-contained page about an evaluation and its training run.

    write_report("runs/demo/report.html", result, run_dir="runs/demo")

Nothing is loaded from a network: style, charts and pictures are in the file. The same input gives the same bytes: no clock, no
random ids. The page's layout is assets/report/report.html; this file collects its contents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ov3fast.evaluation.curves import curves, read_log, throughput
from ov3fast.evaluation.evaluate import Evaluation, Ranking
from ov3fast.evaluation.headline import DIRECTIONS, SET_LABELS, format_value
from ov3fast.evaluation.palette import ERROR_RANGE, error_map, png_data, scale_css
from ov3fast.evaluation.pictures import Pictures, spread
from ov3fast.evaluation.reconstruction import Reconstruction
from ov3fast.evaluation.retrieval import nearest, ranks
from ov3fast.evaluation.templates import template
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

    run_dir: a training run, whose log.jsonl gives the curves and summary.json the time per part. config: the configuration to show, such as
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
    import markupsafe

    tables = result.tables
    sets = ", ".join(f"{count} {name}" for name, count in tables["data"]["pictures"].items())
    about = f"Held-out data: {tables['data']['name']} ({sets}) at {tables['data']['image_size']} px"
    return template("report.html").render(
        title=title,
        subtitle=f"{subtitle} {about}".strip(),
        error_scale=scale_css(),
        error_range=f"{ERROR_RANGE:.0%}",
        metrics=metric_rows(tables["metrics"]),
        reconstructions=[reconstruction(name, *found) for name, found in result.reconstructions.items()],
        charts=[markupsafe.Markup(chart) for chart in curves(rows)],
        run_length=_length(summary or {}),
        retrievals=[retrieval(name, ranking, tables["retrieval"][name]) for name, ranking in result.rankings.items()],
        captions=captions(result),
        throughput=throughput(rows, tables, summary or {}),
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
        protocols=protocols(tables),
    )


def metric_rows(metrics: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The headline's table; a row of one cell is a group's heading."""
    rows: list[list[str]] = []
    group = None
    for metric in metrics:
        if metric["group"] != group:
            group = metric["group"]
            rows.append([group])
        target, chance = (
            format_value(metric[n], metric["unit"]) if metric[n] is not None else "" for n in ("target", "chance")
        )
        verdict = {True: "met", False: "missed", None: ""}[metric["passed"]]
        value = format_value(metric["value"], metric["unit"])
        rows.append([metric["label"], value, f"≥ {target}" if target else "", verdict, chance, metric["baseline"]])
    return rows


# ---- pictures --------------------------------------------------------------------------------------------------------


def reconstruction(name: str, pictures: Pictures, found: Reconstruction) -> dict[str, Any]:
    """Originals with both reconstructions and their error maps, from the best PSNR over the median to the worst."""
    psnr = found.values["model"]["psnr"]
    order = psnr.argsort(descending=True, stable=True).tolist()
    last = len(order) - 1
    # An odd number of places, so that the middle one is the median.
    places = sorted({round(i * last / (RECONSTRUCTIONS - 2)) for i in range(RECONSTRUCTIONS - 1)} | {max(0, last - 1)})
    words = {round(last / 2): "median", last: "worst", 0: "best"}
    rows = []
    for place in places:
        i = order[place]
        alone = found.values["vae"]["psnr"][i].item()
        rows.append([
            (png_data(found.originals[i]), f"original {words.get(place, '')}".strip(), pictures.keys[i]),
            (png_data(found.model[i]), f"model {_db(psnr[i].item())}", ""),
            (png_data(error_map(found.model[i], found.originals[i])), "its error", ""),
            (png_data(found.vae[i]), f"VAE {_db(alone)}", ""),
            (png_data(error_map(found.vae[i], found.originals[i])), "its error", ""),
        ])  # fmt: skip
    summary = [
        [label, *(_spread(found, by, metric, unit) for by in ("model", "vae"))]
        for metric, label, unit in (
            ("psnr", "PSNR", "dB"), ("ssim", "SSIM", ""), ("ssim_uniform", "SSIM, uniform window", ""), ("lpips_style", "LPIPS-style", "")
        )
        if metric in found.values["vae"]
    ]  # fmt: skip
    return {"name": name, "count": len(order), "summary": summary, "rows": rows}


def retrieval(name: str, ranking: Ranking, found: dict[str, Any]) -> dict[str, Any]:
    """Queries in both directions with their five nearest answers; half of them hits, half misses, if there are enough.

    found: the set's retrieval table; if it has several styles, each gets a row.
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
            {
                "data": png_data(ranking.pictures.images[i]),
                "text": ranking.texts[int(ranking.answer[i])],
                "right": int(ranking.answer[i]) == text,
            }
            for i in pictures_of_texts[text].tolist()
        ]
        by_text.append({"text": ranking.texts[text], "rank": int(to_picture[row]) + 1, "answers": answers})
    by_picture = []
    for i in _mixed(to_text):
        own = int(ranking.answer[i])
        answers = [{"text": ranking.texts[j], "right": j == own} for j in texts_of_pictures[i].tolist()]
        data = png_data(ranking.pictures.images[i])
        by_picture.append({"data": data, "text": ranking.texts[own], "rank": int(to_text[i]) + 1, "answers": answers})
    recalls = [(direction, k) for direction in DIRECTIONS for k in ("R@1", "R@10")]
    by_style = [
        [
            style,
            *(format_value(table[direction][k], "%") for direction, k in recalls),
            f"{table['image_to_text']['median_rank']:g} / {table['text_to_image']['median_rank']:g}",
        ]
        for style, table in found["styles"].items()
    ]
    styles = ", ".join(sorted(set(ranking.pictures.column("style")) - {""}))
    pictures = f"{len(ranking.pictures)} pictures" + (f" ({styles})" if styles else "")
    return {
        "name": SET_LABELS.get(name, name).lower(),
        "note": f"{pictures} and {len(ranking.texts)} texts. Queries are evenly spaced among hits and among misses.",
        "columns": ["style", *(f"{DIRECTIONS[direction]}, {k}" for direction, k in recalls), "median ranks"],
        "styles": by_style if len(by_style) > 1 else [],
        "by_text": by_text,
        "by_picture": by_picture,
    }


def captions(result: Evaluation) -> list[dict[str, Any]]:
    """Pictures with the model's caption and their own."""
    if result.captioned is None:
        return []
    rows = zip(result.captioned.images, result.tables["captions"], strict=True)
    return [{"data": png_data(image), **row} for image, row in rows]


def protocols(tables: dict[str, Any]) -> list[list[str]]:
    """The protocol of each metric."""
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
                "a perceptual distance of LPIPS' form with other backbone weights: not comparable with published LPIPS",
            ]
        )
    for name, skipped in tables["data"]["skipped"].items():
        rows.append([f"skipped in {name}", ", ".join(f"{count} {reason}" for reason, count in skipped.items())])
    return rows


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
    mean, low, high = (format_value(v.item(), unit) for v in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} … {high})"
