"""Rows of the record as an ablation leaves them."""

from __future__ import annotations


def record(recipe, seed, F=0.05, E=1.0, split="test", n_train=14, run="a", **others):
    """Rows of one evaluation."""
    cell = {
        "study": "s", "dataset": "d", "start_model": "ani2x", "recipe": recipe, "seed": seed, "split": split,
        "n_train": n_train, "run_key": run,
    } | others  # fmt: skip
    values = {"force_rmse_vector": (F, "eV/A"), "force_rmse_component": (F / 3**0.5, "eV/A")}
    values["energy_rmse_per_atom"] = (E / 1000, "eV/atom")
    return [cell | {"quantity": q, "value": value, "unit": unit} for q, (value, unit) in values.items()]
