"""Training under Ray: python docs/recipes/ray_train.py, after pip install "ray[train]" and with your own values below.

Ray places the processes on the cluster's GPUs and joins them; fastdiff trains in the process group that it finds.
"""

from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train(config: dict[str, Any]) -> None:
    """Train in one of the processes."""
    import fastdiff

    try:
        fastdiff.train(run_dir=config["run_dir"], resume=True, **config["flags"])
    except (SystemExit, KeyboardInterrupt) as stopped:
        raise RuntimeError("a signal stopped the training; the last update is saved") from stopped


def fit(flags: dict[str, Any], run_dir: str, *, workers: int, use_gpu: bool, ray_dir: str) -> None:
    """Train in ``workers`` processes, one per GPU. After a failure Ray restarts all of them, and they resume.

    ``flags`` are those of ``fastdiff train`` with underscores. All paths must be absolute. Every machine must see
    run_dir, and ray_dir, which Ray itself writes.
    """
    TorchTrainer(
        train,
        train_loop_config={"flags": flags, "run_dir": run_dir},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        # Both backends, as under torchrun; Ray's default is NCCL alone. The timeout applies to collectives on GPUs.
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=600),
        run_config=RunConfig(
            name=Path(run_dir).name, storage_path=ray_dir, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


if __name__ == "__main__":
    fit(
        {"data_dir": "/shared/photos", "image_size": 64, "batch_size": 256, "steps": 100_000},
        "/shared/runs/photos",
        workers=8,
        use_gpu=True,
        ray_dir="/shared/ray",
    )
