"""Choosing data: structures along normal modes, where a committee disagrees, what a model should learn next."""

from __future__ import annotations

from tlmc.sampling.active_learning import (
    CalculatorPool,
    LabelledPool,
    Learner,
    LoopConfig,
    LoopResult,
    Pool,
    compare_strategies,
    final_errors,
    labels_saved,
    learn_in_order,
    mean_interval,
    run_loop,
    structures_needed,
)
from tlmc.sampling.calibration import (
    Calibration,
    Reliability,
    SpreadBins,
    calibrate,
    coverage,
    error_against_spread,
    normal_quantile,
    reliability,
)
from tlmc.sampling.committee import CommitteePredictions, bootstrap, disputed, members, predict_committee
from tlmc.sampling.diversity import cur, farthest_points, leverage_scores
from tlmc.sampling.last_layer import LastLayerCommittee
from tlmc.sampling.modes import (
    NormalModes,
    Samples,
    draw_fractions,
    exact_hessian,
    hessian,
    normal_modes,
    rigid_motions,
    sample,
)

__all__ = [
    "Calibration",
    "CalculatorPool",
    "CommitteePredictions",
    "LabelledPool",
    "LastLayerCommittee",
    "Learner",
    "LoopConfig",
    "LoopResult",
    "NormalModes",
    "Pool",
    "Reliability",
    "Samples",
    "SpreadBins",
    "bootstrap",
    "calibrate",
    "compare_strategies",
    "coverage",
    "cur",
    "disputed",
    "draw_fractions",
    "error_against_spread",
    "exact_hessian",
    "farthest_points",
    "final_errors",
    "hessian",
    "labels_saved",
    "learn_in_order",
    "leverage_scores",
    "mean_interval",
    "members",
    "normal_modes",
    "normal_quantile",
    "predict_committee",
    "reliability",
    "rigid_motions",
    "run_loop",
    "sample",
    "structures_needed",
]
