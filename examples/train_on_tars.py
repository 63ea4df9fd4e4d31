"""Train on your own webdataset tars, starting from the demo's recipe.

    python examples/train_on_tars.py "shards/*.tar" runs/mine --steps 2000

A sample is an image and its caption with the same key: `0001.jpg` with `0001.txt`, or with a `0001.json` whose text fields are captions under
their own names. Run the command again to resume an interrupted run, bit for bit.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ov3fast.data.config import SourceConfig
from ov3fast.recipes import Stage, get_recipe
from ov3fast.training import train


def main(shards: str, run_dir: str, caption: str = "txt", steps: int = 2000, batch_size: int = 128) -> Path:
    recipe = get_recipe("demo")
    recipe = replace(
        recipe,
        data=replace(recipe.data, sources=(SourceConfig(path=shards, captions=((caption, 1.0),)),)),
        stages=(Stage("train", image_size=64, batch_size=batch_size, base_lr=1e-3, lr_rule="absolute", steps=steps),),
        compare_impl=None,
        run_dir=Path(run_dir),
    )
    train(recipe, resume=True)
    return recipe.run_dir / "model"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("run_dir")
    parser.add_argument("--caption", default="txt", help="key of the captions: txt, or a field of the .json")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    print(main(**vars(parser.parse_args())))
