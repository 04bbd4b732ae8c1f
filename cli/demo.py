"""``fastdiff demo``: from a folder of images to new samples, in about three minutes on any machine."""

import time
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import DebugFlag, path_option
from fastdiff.cli.sample import sample
from fastdiff.cli.train import run_training

IMAGES, SIZE = 2000, 16
_TRAIN = {"image_size": SIZE, "class_cond": True, "minutes": 3, "log_interval": 50, "preview_interval": 500}
_SAMPLE = {"num_samples": 32, "batch_size": 32}

_MADE = {
    "shapes/": "the training images",
    "samples.png": "the samples, and samples.npz, the same as an array",
    "previews/": "preview grids drawn during training",
    "progress.csv": "the loss during training",
    "ema_*.safetensors": "the model: fastdiff sample runs/demo",
}


def demo(
    run_dir: Annotated[Path, path_option(help="Folder for everything the demo makes.")] = Path("runs/demo"),
    debug: DebugFlag = False,
) -> None:
    """Try training and sampling on drawn shapes, in about three minutes.

    Draws a small labelled set of PNG files, trains a model on it for three minutes and samples a grid. Nothing is
    downloaded.
    """
    began = time.perf_counter()
    data = run_dir / "shapes"
    from fastdiff.data.shapes import SHAPES, write_shapes
    from fastdiff.training.run_folder import refuse_other_run

    refuse_other_run(run_dir, "name another folder with --run-dir, or delete this one")
    write_shapes(data, IMAGES, SIZE, seed=0)
    typer.echo(f"drew {IMAGES} images of {', '.join(SHAPES)} in {data}")
    status = run_training({**_TRAIN, "data_dir": str(data), "run_dir": str(run_dir)})
    if status:
        raise typer.Exit(status)
    out = run_dir / "samples.npz"
    try:
        sample(checkpoint=run_dir, out=out, **_SAMPLE)
    except typer.Exit as ended:
        if ended.exit_code:
            raise
    typer.echo(f"\nThe picture: {out.with_suffix('.png').resolve()}")
    typer.echo(f"Each column is one of {', '.join(SHAPES)}; {time.perf_counter() - began:.0f} s in all. Beside it:")
    for name, what in _MADE.items():
        typer.echo(f"  {run_dir / name!s:<40} {what}")
