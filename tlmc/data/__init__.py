"""Labelled frames: reading files of any program, checking what they hold, splitting and describing them."""

from __future__ import annotations

from tlmc.data.dataset import Dataset
from tlmc.data.loading import available, dataset_from_frames, load_dataset, read_frames
from tlmc.data.splits import Split, split_dataset

__all__ = ["Dataset", "Split", "available", "dataset_from_frames", "load_dataset", "read_frames", "split_dataset"]
