"""A peer to compare with: SevenNet-0, an equivariant network trained on inorganic crystals, on our splits and loss.

Needs the optional packages of ``pip install 'tlmc[peer]'``; nothing else of the package imports this one.
"""

from __future__ import annotations

from tlmc.peer.finetune import TUNED, UNMODIFIED, PeerConfig, PeerExperiment, cost_table, peer_config, run_peer
from tlmc.peer.sevennet import SevenNet, is_installed, load_sevennet, predict, refit_offset

__all__ = [
    "TUNED",
    "UNMODIFIED",
    "PeerConfig",
    "PeerExperiment",
    "SevenNet",
    "cost_table",
    "is_installed",
    "load_sevennet",
    "peer_config",
    "predict",
    "refit_offset",
    "run_peer",
]
