"""Settings of a fine-tuning, as they are or from a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tlmc.arguments import checked
from tlmc.descriptors.enrichment import Compression
from tlmc.errors import ConfigError, nearest_first, problems_of
from tlmc.training.loss import LossKind
from tlmc.training.recipes import RECIPES as RECIPES
from tlmc.training.recipes import recipes as recipes


class RicherColumns(BaseModel):
    """Columns of another descriptor behind the AEV (:mod:`tlmc.descriptors.enrichment`), fitted on training frames."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = "soap"
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the descriptor that differ from its defaults; elements are those of the data."""
    compression: Compression = "species"
    n_columns: int = Field(128, ge=1)
    """Principal components with ``compression="pca"``."""
    scale: float = Field(0.1, gt=0.0)
    """Standard deviation of the columns: the larger, the faster they learn; from 0.4 on the first steps do harm."""


class FinetuneConfig(BaseModel):
    """How to train. The defaults are the thesis protocol (section 3.5): AdamW, 100 epochs, batches of 2, lambda 0.9."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field("thesis", min_length=1)
    """Name that results are filed under."""
    init: Literal["start", "scratch"] = "start"
    """Begin from the start model's weights, or from N(0, 0.1)."""
    members: int | None = Field(None, ge=1)
    """Keep only so many members of the start model's ensemble, the first ones: the loss looks at their mean, so that
    fewer of them are a narrower network, cheaper by far to train and to use. As for any fine-tuned ensemble, only their
    mean is a prediction: they are no committee (:attr:`tlmc.potentials.Potential.committee`)."""
    layers: Literal["all", "hidden", "last"] = "all"
    """Which layers train; ``hidden`` is the thesis' "frozen input and output"."""
    warm_start: Literal["none", "ridge"] = "none"
    """``ridge`` first fits the output layers in closed form (:mod:`tlmc.families.ani.warm_start`). The first steps of
    AdamW are as long as the rate allows, whatever the gradient: they undo the fit unless `lr` is low (1e-4) and
    `warmup_epochs` is a few."""
    ridge: float = Field(1e-2, gt=0.0)
    """Penalty per squared change of an output weight with ``warm_start="ridge"``, eV^2."""
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(2, ge=1)
    batch_atoms: int | None = Field(None, ge=1)
    """If given, decides instead of `batch_size`: in the order drawn, a batch takes structures until the next one would
    bring it above so many atoms (and one that is larger alone). The loss stays a mean over structures."""
    lambda_: float = Field(0.9, ge=0.0, le=1.0)
    """Weight of the forces in the loss."""
    loss: LossKind = "mse"
    huber_delta: float = Field(1.0, gt=0.0)
    """Where the Huber loss becomes linear, eV/A and eV/atom."""
    lr: float = Field(1e-4, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0)
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """``plateau`` halves the rate when the validation loss has not improved for `plateau_patience` epochs."""
    plateau_patience: int = Field(5, ge=0)
    warmup_epochs: float = Field(0.0, ge=0.0)
    """Linear rise of the rate at the beginning."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after so many epochs without a better validation score; None trains to the end."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay per step of an exponential average of the weights; validation then looks at the average."""
    clip_norm: float | None = Field(None, gt=0.0)
    """Largest norm of the gradient, in units of the loss per weight."""
    keep: Literal["last", "best"] = "last"
    """Which weights the result, and the run folder, holds; the others are not kept. ``best`` has the lowest
    ``sqrt(force RMSE * energy RMSE)`` of the validation part: the forces alone are a trap, since a dozen frames contain
    outliers."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Order of the batches, and the weights with ``init="scratch"``."""
    precision: Literal["float32", "float64"] = "float32"
    richer: RicherColumns | None = None
    """Columns that the model gets in addition; a model with such columns exports to our own format only."""
    rank: int | None = Field(None, ge=1)
    """Keep the start weights and learn products of thin matrices of this rank beside them
    (:mod:`tlmc.families.ani.low_rank`); weight decay then pulls towards the start model."""
    replay: float = Field(0.0, ge=0.0)
    """Weight of staying as the start model is on small isolated molecules (:mod:`tlmc.training.replay`)."""

    @model_validator(mode="after")
    def _check_combinations(self) -> FinetuneConfig:
        if self.warm_start == "ridge" and self.layers == "hidden":
            raise ValueError("warm_start = 'ridge' fits the output layers, which layers = 'hidden' keeps frozen")
        if self.warm_start == "ridge" and self.rank is not None:
            raise ValueError("warm_start = 'ridge' changes the weights that rank keeps: choose one of them")
        if self.init == "scratch" and self.replay:
            raise ValueError("replay keeps what the start model knows, which init = 'scratch' throws away")
        return self


@checked
def recipe(name: str, **changes: Any) -> FinetuneConfig:
    """Return the settings of a named recipe, with changes.

    Raises
    ------
    ConfigError
        If the recipe or a setting is unknown, or a value is of the wrong type or out of range. The sentence lists the
        names that there are, those most like an unknown one first.

    Examples
    --------
    >>> recipe("short", epochs=5).lr
    0.0003
    """
    named = recipes()
    if name not in named:
        raise ConfigError(f"there is no recipe {name!r}: choose one of {', '.join(nearest_first(name, named))}")
    try:
        return FinetuneConfig(**({"recipe": name} | dict(named[name]) | changes))
    except ValidationError as error:
        raise ConfigError(f"recipe {name}: {problems_of(error)}{_known_names(error)}") from error


def _known_names(error: ValidationError) -> str:
    """Return the settings that there are, if an unknown one is among the problems."""
    sentences = []
    for problem in error.errors():
        if problem["type"] == "extra_forbidden":
            *outer, name = map(str, problem["loc"])
            known = RicherColumns.model_fields if outer else FinetuneConfig.model_fields
            of = f" of {'.'.join(outer)}" if outer else ""
            sentences.append(f"; the settings{of} are {', '.join(nearest_first(name, known))}")
    return "".join(dict.fromkeys(sentences))
