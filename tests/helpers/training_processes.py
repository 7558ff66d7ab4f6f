"""What test_distributed.py starts several times over: a training per case, whose end every process writes down."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from helpers.training import labelled, quick, student
from tlmc.data.splits import split_dataset
from tlmc.potentials.model_files import save_model
from tlmc.training.config import FinetuneConfig
from tlmc.training.distributed import processes
from tlmc.training.fine_tuning import finetune

CASES = {
    "even": {"batch_size": 4, "precision": "float64"},
    "uneven": {"batch_size": 3, "precision": "float64"},
    "one left": {"batch_size": 13, "precision": "float64"},
    "one each": {"batch_size": 1, "precision": "float64"},
    "all options": {
        "batch_size": 5, "clip_norm": 0.1, "ema_decay": 0.9, "loss": "huber", "warm_start": "ridge", "keep": "best",
        "schedule": "plateau", "plateau_patience": 0, "precision": "float64",
    },
    "low rank and replay": {
        "batch_size": 3, "rank": 2, "replay": 0.5, "richer": {"kind": "soap"}, "precision": "float64",
    },
    "by atoms": {"batch_atoms": 20, "precision": "float64"},
    "single precision": {"batch_size": 4},
    "killed": {"batch_size": 3, "precision": "float64", "epochs": 40},
}  # fmt: skip


def settings(case: str) -> FinetuneConfig:
    return quick(**({"epochs": 3} | CASES[case]))


def main(folder: Path, cases: list[str]) -> None:
    data = labelled()
    parts = split_dataset(data, seed=0)
    with processes() as group:
        (folder / f"pid-{group.rank}").write_text(str(os.getpid()))
        for case in cases:
            run_dir = folder / "runs" / case
            result = finetune(student(), data, parts, settings(case), run_dir, group=group, checkpoint_seconds=0.0)
            target = folder / f"{case}-{group.rank}.safetensors"
            save_model(result.potential, target, {"resumed_from": result.resumed_from, "run_dir": str(result.run_dir)})
            result.history.drop(columns="seconds").to_csv(target.with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
