"""The headline: the few metrics that tell whether a run went well, with targets and chance levels; and the tables on the
terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ov3fast import terminal

DEMO_TARGETS = {
    "style/image_to_text/R@1": 0.45,
    "style/image_to_text/R@10": 0.80,
    "style/text_to_image/R@1": 0.45,
    "style/text_to_image/R@10": 0.80,
    "unseen/image_to_text/R@10": 0.30,
    "unseen/text_to_image/R@10": 0.30,
    "pictures/psnr": 22.0,
    "photos/psnr": 19.5,
}
"""What the demo recipe must reach on the demo's held-out data."""

SET_LABELS = {"style": "Known concepts in an unseen style", "unseen": "Unseen concepts", "data": "Retrieval"}
SHORT_LABELS = {"style": "unseen style", "unseen": "unseen concepts", "data": "pictures"}
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


@dataclass(frozen=True)
class HeadlineMetric:
    """One number: fractions are in [0, 1] with unit "%", PSNR has unit "dB". target and chance are None if there is none."""

    id: str
    group: str
    label: str
    value: float | None
    unit: str = "%"
    target: float | None = None
    chance: float | None = None
    baseline: str = ""
    """The value to compare it with, such as that of the VAE alone."""

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None without a target."""
        return None if self.target is None else self.value is not None and self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def headline(tables: dict[str, Any]) -> list[HeadlineMetric]:
    """The headline metrics of an evaluation's tables; with targets only for the demo set."""
    targets = DEMO_TARGETS if tables["data"]["name"] == "demo" else {}
    metrics = []
    for name, table in tables["retrieval"].items():
        group = f"{SET_LABELS.get(name, name)}, {table['texts']} texts"
        for direction, words in DIRECTIONS.items():
            for k in ("R@1", "R@5", "R@10"):
                id = f"{name}/{direction}/{k}"
                metrics.append(
                    HeadlineMetric(
                        id, group, f"{words}, {k}", table[direction][k], "%", targets.get(id), table["chance"][direction][k]
                    )
                )
    for name, table in tables["zero_shot"].items():
        group = f"Zero-shot over {table['classes']} names"
        for k in ("top1", "top5"):
            label = f"{SHORT_LABELS.get(name, name)}, top-{k[3:]}"
            metrics.append(HeadlineMetric(f"{name}/zero_shot/{k}", group, label, table[k], "%", None, table["chance"][k]))
    for name, table in tables["reconstruction"].items():
        group = f"Reconstruction, {tables['data']['image_size']} px"
        alone = format_value(table["vae"]["psnr"]["mean"], "dB")
        id = f"{name}/psnr"
        metrics.append(
            HeadlineMetric(
                id,
                group,
                f"{name} ({table['count']}), PSNR",
                table["model"]["psnr"]["mean"],
                "dB",
                targets.get(id),
                None,
                f"VAE alone {alone}",
            )
        )
        for metric, label in (("ssim", "SSIM"), ("lpips_style", "LPIPS-style")):
            if metric in table["model"]:
                baseline = f"VAE alone {format_value(table['vae'][metric]['mean'], '')}"
                metrics.append(
                    HeadlineMetric(
                        f"{name}/{metric}", group, f"{name}, {label}", table["model"][metric]["mean"], "", baseline=baseline
                    )
                )
    if tables["probe"]:
        table = tables["probe"]
        group = f"Linear probe, {table['dataset']}, {table['train']} / {table['test']}"
        baseline = f"raw pixels {format_value(table['pixels'], '%')}"
        metrics.append(
            HeadlineMetric("probe/accuracy", group, "accuracy", table["accuracy"], "%", None, table["chance"], baseline)
        )
    return metrics


def print_tables(tables: dict[str, Any], console: Any = None) -> None:
    """The headline and the captions as rich tables."""
    from rich.markup import escape
    from rich.table import Table

    console = console or terminal.console()
    console.print(
        f"\n[bold]Held-out data: {escape(tables['data']['name'])}, {tables['data']['image_size']} px[/bold]", highlight=False
    )
    groups = dict.fromkeys(metric["group"] for metric in tables["metrics"])
    for group in groups:
        # One table per group with the same widths: rich has no cell that spans columns.
        layout = {"box": None, "show_header": False, "padding": (0, 1, 0, 0)}
        table = Table(title=escape(group), title_justify="left", title_style="bold", **layout)
        table.add_column(width=27)
        table.add_column(width=9, justify="right", no_wrap=True)
        table.add_column(width=19, no_wrap=True)
        table.add_column()
        for metric in (row for row in tables["metrics"] if row["group"] == group):
            unit = metric["unit"]
            verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[metric["passed"]]
            target = "" if metric["target"] is None else f">= {format_value(metric['target'], unit)}"
            chance = [] if metric["chance"] is None else [f"chance {format_value(metric['chance'], unit)}"]
            comparison = "; ".join([*chance, *filter(None, [metric["baseline"]])])
            table.add_row(
                f"  {escape(metric['label'])}", format_value(metric["value"], unit), f"{target} {verdict}", comparison
            )
        console.print(table)
    if tables["captions"]:
        captions = Table(title="Captions of held-out pictures", title_justify="left")
        for column in ("picture", "caption by the model", "its own caption"):
            captions.add_column(column, overflow="fold")
        for row in tables["captions"]:
            captions.add_row(*(escape(row[name]) for name in ("key", "caption", "reference")))
        console.print(captions)


def format_value(value: float | None, unit: str) -> str:
    """A value as it is printed: 45.5 %, 22.31 dB, 0.812; "infinite" for None."""
    if value is None:
        return "infinite"
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.2f} dB" if unit == "dB" else f"{value:.3f}"
