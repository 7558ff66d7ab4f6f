"""The command line ``tlmc``: run the study, fine-tune on your own data, evaluate, fetch, label, look things up."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

# What is slow to import (torch, ASE, matplotlib) is imported by the commands that need it: --help answers at once.
from tlmc.errors import ConfigError, TlmcError, missing_extra
from tlmc.files import atomic_path, write_json
from tlmc.paths import cache_dir, mirror_dir, reports_dir

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.evaluation.comparison import Stage
    from tlmc.evaluation.metrics import Metric
    from tlmc.potentials.model import Potential

EPILOG = """
[bold]Environment[/bold]

TLMC_DATA_DIR: folder with public data sets already downloaded (<collection>/<name>.traj), looked at before the network

TORCHANI_DATA_DIR: folder of torchani that holds StateDicts/ani2x_state_dict.pt

TLMC_CACHE_DIR: downloads and descriptor caches (default: the user's cache folder)

TLMC_CACHE_GB: size of all descriptor caches beyond which the oldest go (default: 10)

TLMC_REPORTS_DIR: metrics, figures, runs and the report (default: reports/ of the checkout, ./tlmc-runs without one)

TLMC_COMPILED: off to compute with torch operations alone, without the compiled C code (default: on)

TLMC_TRUST_LABELS: 1 is --trust-labels for every command and notebook

TLMC_THREADS: threads that a command and the notebooks it runs may use (default: one per core)

[bold]Exit status[/bold]

0 done; 2 the input cannot be used, or a training diverged: one sentence says why; 130 interrupted by Ctrl-C, 143 by the
SIGTERM of a scheduler: a training has kept its last whole epoch, the same command goes on from there
"""

TABLE_QUANTITIES = {
    "force_rmse_vector": ("F vector (eV/A)", 1.0),
    "force_rmse_component": ("F component (eV/A)", 1.0),
    "energy_rmse_per_atom": ("E (meV/atom)", 1000.0),
}
_UNITS_HELP = (
    "Units of the labels: eV, Hartree/Bohr, Hartree/Angstrom or kcal/mol. [default: what the file says, else eV]"
)

out = Console()
err = Console(stderr=True)


class _Commands(TyperGroup):
    """Turn errors that a user can act on into one sentence, and Ctrl-C into advice."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.obj = list(args)  # for a command that starts itself several times
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TlmcError, OSError) as error:
            sentence = str(error)
            if isinstance(error, OSError) and error.filename is not None:
                # disk full, no permission, file not there
                sentence = f"{error.filename}: {error.strerror}"
            rank = os.environ.get("RANK", "0")
            if rank != "0":
                sentence = f"process {rank}: {sentence}"
            err.print(f"[red]{escape(sentence)}[/red]", soft_wrap=True)
            raise typer.Exit(2) from error
        except ModuleNotFoundError as error:
            sentence = missing_extra(error) or ""
            if not sentence:
                raise
            err.print(f"[red]{escape(sentence)}[/red]", soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            if os.environ.get("RANK", "0") == "0":
                sentence = str(error) or "interrupted: what is finished is kept, the same command goes on from there"
                err.print(f"[yellow]{escape(sentence)}[/yellow]", soft_wrap=True)
            raise typer.Exit(128 + getattr(error, "number", signal.SIGINT)) from None


app = typer.Typer(
    cls=_Commands,
    help="Transfer learning of interatomic potentials, from molecules to crystals.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

sweep_app = typer.Typer(
    help="Many runs from one description: plan them, carry one out, collect the results. The Snakefile does all three.",
    no_args_is_help=True,
)
app.add_typer(sweep_app, name="sweep")


def _home(path: Path | None) -> Path | None:
    """Return a path in which ~ means the home folder also where no shell said so, as in --output=~/results."""
    try:
        return path and path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such home folder") from error


Mapped = Annotated[
    list[str] | None, typer.Option("--map", metavar="NEW=DONOR", help="Let an element borrow a network, e.g. Si=C.")
]
Borrow = Annotated[
    Literal["relabel", "extend"],
    typer.Option(
        "--borrow",
        help="How --map works: treat the new element as its donor, or give it a copy of the donor's network and "
        "channels that learns by itself.",
    ),
]
EnergyKey = Annotated[str | None, typer.Option(help="Name of the energies in the file, e.g. REF_energy.")]
ForcesKey = Annotated[str | None, typer.Option(help="Name of the forces in the file, e.g. REF_forces.")]
StressKey = Annotated[
    str | None, typer.Option(help="Name of the stress in the file, or of the virial: that has virial in its name.")
]
CrystalsOnly = Annotated[
    bool,
    typer.Option(
        "--crystals-only",
        help="Leave isolated molecules out. A model trained without them has no meaningful lattice energies.",
    ),
]
Recipe = Annotated[str, typer.Option(help="thesis, short, quick, rich, thorough, scratch or frozen.")]
Units = Annotated[str | None, typer.Option(help=_UNITS_HELP)]
TrustLabels = Annotated[
    bool,
    typer.Option(
        "--trust-labels", help="Go on although the start model shows that labels are not those of the frames."
    ),
]


@app.callback()
def _main(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, debugging messages too.")] = False,
) -> None:
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    if os.environ.get("RANK", "0") != "0":
        level = logging.ERROR  # of the processes that train together the first one speaks for all
    handler: logging.Handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="[%X]")
    if not err.is_terminal:
        # rich would break the lines of a log file
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if not verbose:
        # papermill announces every cell twice
        handler.addFilter(lambda record: not record.getMessage().startswith(("Executing Cell", "Ending Cell")))
    for name in ("tlmc", "papermill"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
    threads = os.environ.get("TLMC_THREADS", "").strip()
    if threads:
        if not (threads.isdecimal() and int(threads) > 0):
            raise ConfigError(f"TLMC_THREADS must be a positive integer, got {threads!r}")
        # read by torch when it is imported, later than this, and inherited by notebooks
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(int(threads))


@app.command()
def study(
    profile: Annotated[str, typer.Option(help="smoke, laptop, full, or a folder of notebooks/profiles.")] = "laptop",
    notebook: Annotated[
        list[str] | None, typer.Option("--notebook", "-n", help="Only this notebook, by name or number; repeatable.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter", "-p", metavar="NAME=VALUE", help="A parameter, for all notebooks that have it; repeatable."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(callback=_home, help="Reports folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also run notebooks that are complete and unchanged.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of labelled trajectories, 27.traj, 28.traj, ...: notebooks 05 to 09 study them."),
    ] = None,
    trust_labels: TrustLabels = False,
) -> None:
    """Run the notebooks of a profile headless and write the report, reports/index.html.

    A notebook that is complete and whose source, parameters, data and code are unchanged is not run again, so an
    interrupted study goes on where it was.

    [bold]Examples[/bold]

    tlmc study

    tlmc study --profile smoke --notebook 07

    tlmc study -n 07 -p dataset=my.extxyz -p epochs=30 --output my-report

    tlmc study --data my-crystals
    """
    from tlmc.study.runner import run_study

    if trust_labels:
        # inherited by the kernels of the notebooks
        os.environ["TLMC_TRUST_LABELS"] = "1"
    pairs = _pairs(parameter, "--parameter")
    parameters = {key: _value(value, f"--parameter {key}={value}") for key, value in pairs.items()}
    index = run_study(profile, notebook, parameters=parameters, output=output, force=force, data=data)
    out.print(f"report: {index}", soft_wrap=True)


@app.command()
def finetune(
    ctx: typer.Context,
    dataset: Annotated[str, typer.Argument(help="Name (tlmc fetch --list) or any file that ASE reads.")],
    start_model: Annotated[str, typer.Option(help="ani2x, ani2xt, or a model.safetensors to go on from.")] = "ani2xt",
    recipe: Recipe = "short",
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the training.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Structures per step. Default: the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: the recipe's.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of FinetuneConfig, e.g. lambda_=0.5."),
    ] = None,
    mapped: Mapped = None,
    borrow: Borrow = "relabel",
    split: Annotated[
        Literal["random", "blocks", "energy_groups"],
        typer.Option(help="How frames are parted, 70/10/20, crystals and molecules each."),
    ] = "random",
    crystals_only: CrystalsOnly = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    units: Units = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(callback=_home, help="Default: a folder under <reports>/runs, named after data, model, settings."),
    ] = None,
    study_name: Annotated[
        str | None, typer.Option("--record", metavar="STUDY", help="Add the test errors to metrics/summary.parquet.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    processes: Annotated[
        int,
        typer.Option(min=1, help="Train with so many processes, which share every batch: cores, or GPUs with cuda."),
    ] = 1,
    trust_labels: TrustLabels = False,
) -> None:
    """Fine-tune a start model on labelled structures and evaluate it on the test part.

    The run folder gets model.safetensors, history.csv, split.json, metrics.json and parity.png. A run that was
    interrupted (Ctrl-C, SIGTERM) goes on from its last whole epoch, to the weights it would have had anyway. One that
    diverges leaves no model. A training is continued beyond its end with --start-model RUN/model.safetensors.

    On several machines, start it with torchrun: the result is that of one process with the same batch size, to
    rounding, so raise the batch size with the number of processes. Run and cache folders must be shared.

    [bold]Examples[/bold]

    tlmc finetune naphthalene

    tlmc finetune molcrys-mace/21_urea --start-model ani2x --recipe thesis

    tlmc finetune 27-like --map Si=C --map I=Cl --borrow extend

    tlmc finetune my.extxyz --map Si=C --energy-key REF_energy --forces-key REF_forces --set keep=best

    tlmc finetune my.extxyz --device cuda --set batch_atoms=4000

    tlmc finetune my.extxyz --processes 2 --batch-size 16

    torchrun --nproc-per-node 4 -m tlmc.cli finetune my.extxyz --device cuda --batch-size 64
    """
    from tlmc.data.splits import only_crystals
    from tlmc.devices import find_device
    from tlmc.evaluation.label_check import check_labels
    from tlmc.experiments.experiment import run_experiment
    from tlmc.training import distributed
    from tlmc.training.config import recipe as named_recipe

    named = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    changes = _settings(setting, {"seed": "--seed"} | _options(named))
    config = named_recipe(recipe, **(changes | {key: value for key, value in named.items() if value is not None}))
    launched = distributed.launched_processes()
    if processes > 1 and launched not in (1, processes):
        raise ConfigError(f"--processes {processes} contradicts the launcher, which started {launched}")

    def inputs() -> tuple[Dataset, Potential]:
        data = _load(dataset, energy_key, forces_key, stress_key, units)
        return only_crystals(data) if crystals_only else data, _model(start_model, mapped, borrow)

    if processes > launched:
        # what is wrong with the input is said once, before the processes start
        distributed.check_backend(find_device(device).type)
        check_labels(*inputs(), trust=trust_labels)
        status = distributed.launch(processes, ["-m", "tlmc.cli", *ctx.obj])
        if status:
            raise typer.Exit(status)
        return
    with distributed.processes(device) as group:
        with group.first_alone():
            data, model = inputs()
        experiment = run_experiment(
            model, data, config, split=split, study=study_name or "", run_dir=run_dir, tensorboard=tensorboard,
            device=device, group=group, trust_labels=trust_labels,
        )  # fmt: skip
    if not group.is_first:
        return
    _parity(experiment.run_dir / "parity.png", experiment.test, experiment.stages, config.recipe)
    title = f"{data.name}: errors on {len(experiment.test)} test frames, trained on {len(experiment.split.train)}"
    _print_metrics(title, experiment.stages)
    _warn_if_worse(experiment.stages, config.recipe, config.lr)
    out.print(f"run: {experiment.run_dir}", soft_wrap=True)


@app.command()
def casestudy(
    crystals: Annotated[str, typer.Argument(help="A folder of trajectories, or names and files parted by commas.")],
    start_model: Annotated[Literal["ani2x", "ani2xt"], typer.Option(help="Start model.")] = "ani2xt",
    recipe: Recipe = "short",
    seeds: Annotated[int, typer.Option(min=1, help="Splits and trainings per crystal.")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of FinetuneConfig.")
    ] = None,
    mapped: Mapped = None,
    borrow: Annotated[
        Literal["relabel", "extend", "both"],
        typer.Option(help="How elements that the start model lacks are borrowed; one model for several takes relabel."),
    ] = "relabel",
    sizes: Annotated[str, typer.Option(help="Numbers of training frames for learning curves, e.g. 20,40.")] = "",
    shared: Annotated[bool, typer.Option("--shared", help="Also train one model for all crystals.")] = False,
    left_out: Annotated[str, typer.Option(help="Crystals to leave out of a shared model in turn, or all.")] = "",
    folds: Annotated[int, typer.Option(min=0, help="Leave packings out in so many folds; 0 for not at all.")] = 0,
    study_name: Annotated[
        str, typer.Option("--record", metavar="STUDY", help="Name of the record and begin of all file names.")
    ] = "casestudy",
    trust_labels: TrustLabels = False,
) -> None:
    """Fine-tune on each of several crystals: error tables, parity plots and rankings, as in chapter 4 of the thesis.

    Elements that the start model lacks are borrowed as in the thesis (Si from C, I from Cl, Cu from S); --map adds
    others. All files are checked before the first training. What is trained already is read, so an interrupted call
    goes on where it was. Tables, figures and metrics go to the reports folder.

    [bold]Examples[/bold]

    tlmc casestudy my-crystals

    tlmc casestudy molcrys-mace/21_urea,molcrys-mace/06_benzene --start-model ani2x --seeds 3 --shared --record public
    """
    _draw_without_window()
    from tlmc.potentials.borrowing import THESIS_DONORS
    from tlmc.potentials.registry import load_start_model
    from tlmc.thesis.casestudy import CaseStudy, format_errors, load_crystals, sources, write_results

    changes = _settings(setting, {"seed": "--seeds", "recipe": "--recipe"} | _options({"epochs": epochs}))
    numbers = [_whole_number(part) for part in sizes.split(",") if part.strip()]
    case = CaseStudy(
        load_start_model(start_model),
        load_crystals(sources(crystals)),
        recipe,
        changes if epochs is None else changes | {"epochs": epochs},
        borrowings=("relabel", "extend") if borrow == "both" else (borrow,),
        donors={**THESIS_DONORS, **_pairs(mapped, "--map")},
        seeds=tuple(range(seeds)),
        study=study_name,
        trust_labels=trust_labels,
    )
    table = write_results(
        case,
        study_name,
        sizes=numbers,
        shared=shared,
        left_out=[part.strip() for part in left_out.split(",") if part.strip()],
        n_folds=folds,
    )
    text = format_errors(table)
    # a narrow terminal breaks lines, and cuts no number short
    columns = [
        *(Column(str(name), overflow="fold") for name in text.index.names),
        *(Column(name, justify="right", overflow="fold") for name in text.columns),
    ]
    shown = Table(*columns, title="RMSE, test part", box=None)
    for key, row in zip(text.index, text.to_numpy(), strict=True):
        shown.add_row(*key, *row)
    out.print(shown)
    out.print(f"tables and figures: {reports_dir()}", soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="ani2x, ani2xt, or a model.safetensors.")],
    dataset: Annotated[str, typer.Argument(help="Name (tlmc fetch --list) or any file that ASE reads.")],
    split: Annotated[
        Path | None, typer.Option(callback=_home, help="split.json of a run: evaluate on one part only.")
    ] = None,
    part: Annotated[Literal["train", "validation", "test"], typer.Option(help="The part of --split.")] = "test",
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the energy offset first: on the training part of --split.")
    ] = False,
    mapped: Mapped = None,
    borrow: Borrow = "relabel",
    crystals_only: CrystalsOnly = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    units: Units = None,
    output: Annotated[
        Path | None, typer.Option(callback=_home, help="Folder for metrics.json and per_frame.csv.")
    ] = None,
    study_name: Annotated[
        str | None,
        typer.Option("--record", metavar="STUDY", help="Add the errors on --part to metrics/summary.parquet."),
    ] = None,
    label: Annotated[
        str, typer.Option(metavar="NAME", help="Name that --record files them under. Default: the model's.")
    ] = "",
    trust_labels: TrustLabels = False,
) -> None:
    """Compare a model's energies and forces with labels.

    Without --split all frames count, and --refit fits the offset on the same frames.

    [bold]Examples[/bold]

    tlmc evaluate ani2xt naphthalene --refit

    tlmc evaluate reports/runs/my-run/model.safetensors my.extxyz --split reports/runs/my-run/split.json
    """
    from tlmc.data.splits import only_crystals
    from tlmc.evaluation import by_kind, per_frame
    from tlmc.evaluation import evaluate as errors_of
    from tlmc.evaluation.comparison import refit_offset
    from tlmc.evaluation.label_check import check_labels
    from tlmc.evaluation.metrics import as_json
    from tlmc.experiments.records import UNKNOWN, append_records, identity, rows_from_metrics
    from tlmc.potentials.calculator import predict
    from tlmc.training.identity import start_hash

    if output is not None:
        _check_evaluation(output)
    if study_name and split is None:
        raise ConfigError("--record needs the --split of a run, which says what the model was trained on")
    data, potential = _load(dataset, energy_key, forces_key, stress_key, units), _model(model, mapped, borrow)
    start = start_hash(potential)  # of a published model; what a fine-tuned one began with, its file does not say
    if crystals_only:
        data = only_crystals(data)
    check_labels(data, potential, trust=trust_labels)
    chosen, fitted_on = data, data
    if split is not None:
        parts = _read_split(split, data)
        chosen, fitted_on = data.subset(getattr(parts, part)), data.subset(parts.train)
    if refit:
        potential = refit_offset(potential, fitted_on)
    predictions = predict(potential, chosen.frames)
    metrics = errors_of(chosen, predictions)
    columns = {**by_kind(chosen, predictions), "all": metrics}
    if output is not None:
        content: dict[str, Any] = {
            "model": model,
            "dataset": data.name,
            "hash": data.hash,
            "part": part if split else "all",
        }
        content |= {"offset_refitted": refit, "metrics": as_json(metrics)}
        if len(columns) > 1:
            content["metrics_by_kind"] = {kind: as_json(found) for kind, found in columns.items() if kind != "all"}
        write_json(output / "metrics.json", content)
        with atomic_path(output / "per_frame.csv") as temporary:
            per_frame(chosen, predictions).to_csv(temporary, index=False)
    if study_name:
        rows = rows_from_metrics(
            metrics, study=study_name, dataset=data.name, start_model=potential.name, recipe=label or Path(model).stem,
            seed=parts.seed, split=part, n_train=len(parts.train), run_key=_weights_id(model),
            identity=identity(data, parts, part, UNKNOWN if Path(model).is_file() else start),
        )  # fmt: skip
        append_records(rows)
    table = Table(title=f"{model} on {len(chosen)} frames of {data.name}")
    values = list(columns) if len(columns) > 1 else ["value"]
    for heading in ("quantity", *values, "unit"):
        table.add_column(heading, justify="right" if heading in values else "left")
    for name, metric in metrics.items():
        found = (kind.get(name) for kind in columns.values())
        table.add_row(name, *("" if one is None else f"{one.value:.5g}" for one in found), metric.unit)
    out.print(table)


@app.command()
def average(
    models: Annotated[list[str], typer.Argument(help="Two or more model.safetensors of one start model.")],
    output: Annotated[Path, typer.Option("--output", "-o", callback=_home, help="Model file to write.")],
) -> None:
    """Write the mean of several fine-tuned models as one model, to be used like any other.

    Models with other columns err in part independently, so that their mean is often better than either; it costs as
    much as both. The mean is one prediction, no committee: it has no spread. Models that were trained on different data
    are averaged, and named. An output file that exists is replaced if it is such a mean.

    [bold]Examples[/bold]

    tlmc average reports/runs/one/model.safetensors reports/runs/other/model.safetensors -o mean.safetensors

    tlmc evaluate mean.safetensors my.extxyz --split reports/runs/one/split.json
    """
    from tlmc.families.ani.averaging import average as mean_of
    from tlmc.files import sha256_file
    from tlmc.potentials.model_files import load_model, save_model

    if output.suffix != ".safetensors":
        raise ConfigError(f"{output} must end in .safetensors, so that it is known as a model file")
    if output.exists() and "mean_of" not in load_model(output)[1]:
        raise ConfigError(f"{output} is no mean of models, and would be replaced: name another file")
    if output.exists() and any(output.samefile(model) for model in models if Path(model).exists()):
        raise ConfigError(f"{output} is one of the models to average, and would be replaced: name another file")
    loaded = [load_model(model) for model in models]
    mean = mean_of([potential for potential, _ in loaded])
    sets = {}
    for _, metadata in loaded:
        data = metadata.get("data")
        if isinstance(data, dict):
            sets[data.get("hash")] = f"{data.get('name')} ({data.get('frames')} frames)"
    if len(sets) > 1:
        err.print(f"[yellow]trained on different data: {escape(', '.join(sets.values()))}[/yellow]", soft_wrap=True)
    save_model(mean, output, {"mean_of": {model: sha256_file(Path(model)) for model in models}})
    out.print(f"mean of {len(models)} models, {mean.members} members: {output}", soft_wrap=True)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Start models and data sets.", show_default=False)] = None,
    show: Annotated[bool, typer.Option("--list", help="List what can be fetched.")] = False,
) -> None:
    """Download start models and public data sets into the cache and check their SHA-256.

    [bold]Examples[/bold]

    tlmc fetch --list

    tlmc fetch ani2xt molcrys-mace/21_urea
    """
    from tlmc.data.loading import available, load_dataset
    from tlmc.potentials.registry import start_models, weights_path

    models, datasets = start_models(), available()
    if show:
        table = Table(Column("name", no_wrap=True), "what", "frames", "level of theory", box=None)
        for name, text in models.items():
            table.add_row(name, text, "", "")
        for name, facts in datasets.items():
            text = str(facts.get("formula", "embedded"))
            table.add_row(name, text, str(facts.get("frames", "")), str(facts.get("level_of_theory", "")))
        out.print(table)
        return
    if not names:
        raise ConfigError("name what to fetch, or see tlmc fetch --list")
    unknown = [name for name in names if name not in models and name not in datasets]
    if unknown:
        raise ConfigError(f"nothing to fetch under the name {', '.join(unknown)}: see tlmc fetch --list")
    for name in names:
        if name in models:
            fingerprint = _model(name, None).fingerprint
            out.print(f"{name}: {weights_path(name)}, weights {fingerprint[:16]}", soft_wrap=True)
        else:
            data = load_dataset(name)
            out.print(f"{name}: {len(data)} frames from {data.source}, hash {data.hash[:16]}", soft_wrap=True)


@app.command()
def info(
    subject: Annotated[
        str | None, typer.Argument(help="A data set, a file, a start model, or nothing.", show_default=False)
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    units: Units = None,
    start_model: Annotated[
        str | None,
        typer.Option(help="Compare the labels with this model's predictions. Default: ani2xt, if it is here already."),
    ] = None,
    mapped: Mapped = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object, of a model in full.")] = False,
) -> None:
    """Describe the installation, or a data set, or a model.

    Of a data set: what is read, checked as for a training, in eV and Angstrom; warnings say what is left out.

    Of a model: what it is, its training data, test errors if the run's metrics.json lies beside it, how to use it, and
    what it does not know.

    [bold]Examples[/bold]

    tlmc info

    tlmc info my.extxyz

    tlmc info my.extxyz --energy-key REF_energy --forces-key REF_forces --stress-key REF_virial

    tlmc info my.extxyz --start-model ani2x --map Si=C

    tlmc info reports/runs/my-run/model.safetensors

    tlmc info model.safetensors --json
    """
    from tlmc.potentials.registry import start_models

    is_model = subject is not None and (subject in start_models() or Path(subject).suffix == ".safetensors")
    if (subject is None or is_model) and any((energy_key, forces_key, stress_key, units)):
        raise ConfigError("--energy-key, --forces-key, --stress-key and --units go with a data set")
    if subject is None:
        facts = _installation()
    elif is_model:
        from tlmc.experiments.model_card import model_facts, model_page

        known = model_facts(subject)
        facts = known if as_json else model_page(known)
    else:
        data = _load(subject, energy_key, forces_key, stress_key, units)
        facts = _dataset_facts(data) | _against_model(data, start_model, mapped)
    if as_json:
        out.print(json.dumps(facts, indent=2), soft_wrap=True, highlight=False, markup=False)
        return
    table = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    out.print(table)


@app.command()
def label(
    structures: Annotated[
        str | None,
        typer.Argument(
            help="Any file that ASE reads, all of its frames; with --recipe also smiles:SMILES.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=_home, help="Labelled file, .extxyz or .extxyz.xz.")
    ] = Path("labelled.extxyz"),
    method: Annotated[
        str | None, typer.Option(help="gfn2-xtb, gfn1-xtb, module:function or file.py:function. [default: gfn2-xtb]")
    ] = None,
    level_of_theory: Annotated[str, typer.Option(help="What to call a method of your own in the frames.")] = "",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Make a set as the embedded one of this name was made. STRUCTURES takes the place of its crystal, or, "
            "for a recipe that packs molecules, of its molecule."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the recipe's.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Calculations at a time.")] = 1,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Compute frames again that failed in an earlier run.")
    ] = False,
) -> None:
    """Label structures with energies, forces and stresses by any ASE calculator, or make a training set from scratch.

    From scratch means: of a crystal, or of a molecule, which is packed into candidate crystals first. An interrupted
    run goes on where it was; failed calculations are counted and named. A method of your own is a function that returns
    an ASE calculator, of VASP, CP2K, GPAW or whatever your cluster has; if it takes an argument, it gets the frame.

    Frames state charge and spin in info (charge, total_charge; multiplicity, spin, unpaired_electrons) or by initial
    charges and magnetic moments of their atoms; statements that contradict each other are refused. Everything is kept
    in OUTPUT.parts: when the file of a method or a setting in it changes, frames are labelled anew. A file that another
    command wrote is never replaced.

    [bold]Examples[/bold]

    tlmc label candidates.extxyz -o labelled.extxyz --processes 2

    tlmc label my_crystal.cif --recipe naphthalene -o my_crystal.extxyz

    tlmc label --recipe 32-like -o 32-like.extxyz.xz --processes 2

    tlmc label "smiles:OC(=O)CCC(O)=O" --recipe 32-like -o packings_of_succinic_acid.extxyz

    tlmc label frames.traj --method my_vasp.py:calculator --level-of-theory "r2SCAN, 440 eV"
    """
    from tlmc import labelling
    from tlmc.data.loading import read_frames

    if recipe is not None:
        if recipe not in labelling.RECIPES:
            raise ConfigError(f"unknown recipe {recipe!r}; known are {', '.join(labelling.RECIPES)}")
        plan = labelling.RECIPES[recipe]
        if structures is not None:
            plan = labelling.for_structure(plan, structures)
        if seed is not None:
            plan = replace(plan, seed=seed)
        if method is not None:
            plan = replace(plan, method=method)
        if level_of_theory:
            raise ConfigError("--level-of-theory goes with a --method of your own, not with --recipe")
        report = labelling.build(plan, output, processes, retry_failed=retry_failed)
    elif structures is not None:
        if output.exists() and Path(structures).exists() and output.samefile(structures):
            raise ConfigError(f"{output} holds the structures to label: choose another --output")
        chosen = labelling.method(method or "gfn2-xtb", level_of_theory)
        frames = read_frames(Path(structures))
        report = labelling.label(frames, chosen, output, processes, retry_failed=retry_failed, source=structures)
    else:
        raise ConfigError("name a file of structures, or a recipe with --recipe")
    out.print(
        f"{report.target}: {report.labelled} frames labelled with {report.level_of_theory} ({report.reused} of them "
        f"before), {len(report.failed)} failed, {len(report.rejected)} left out, "
        f"{len(report.discarded)} packings discarded, SHA-256 {report.sha256}",
        soft_wrap=True,
    )


@sweep_app.command("plan")
def sweep_plan(
    description: Annotated[Path, typer.Argument(help="YAML file, as those in notebooks/sweeps.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=_home, help="Folder of the sweep. [default: <reports>/sweeps/<name>]"),
    ] = None,
) -> None:
    """Write one parameters file per run; those that would not change are left alone.

    [bold]Example[/bold]

    tlmc sweep plan notebooks/sweeps/smoke.yml -o my-sweep
    """
    from tlmc.study.sweep import parameters_file, plan

    folder = (output or reports_dir() / "sweeps" / description.stem).resolve()
    for name in plan(description, folder):
        out.print(str(parameters_file(folder, name)), soft_wrap=True)


@sweep_app.command("run")
def sweep_run(
    parameters: Annotated[Path, typer.Argument(help="A parameters file of a plan.")],
    output: Annotated[Path, typer.Option("--output", "-o", callback=_home, help="Folder of this run's results.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Carry out one run: execute the notebook 10_single_run, leave metrics.json.

    A training that was interrupted goes on from its last epoch. The folder must be new, empty, or this run's own; when
    parameters, data or code have changed, the files that the run wrote there before are removed, and no others.

    [bold]Example[/bold]

    tlmc sweep run my-sweep/parameters/RUN.yml -o my-sweep/results/RUN
    """
    from tlmc.study.sweep import carry_out

    out.print(str(carry_out(parameters, output, device)), soft_wrap=True)


@sweep_app.command("collect")
def sweep_collect(folder: Annotated[Path, typer.Argument(help="Folder of the sweep.")]) -> None:
    """Gather the finished runs: a table in the folder, test errors in the record of the reports; name the failed.

    The table is table.csv if all runs are finished, else unfinished.csv, and the exit status is 2.

    [bold]Example[/bold]

    tlmc sweep collect my-sweep
    """
    from tlmc.experiments.records import append_records, comparison_table, told_apart
    from tlmc.study.sweep import collect, write_table

    state = collect(folder)
    if state.finished:
        append_records(state.records)
        table = comparison_table(told_apart(state.records))
        target = write_table(table, folder, not (state.failed or state.waiting))
        out.print(f"{len(state.finished)} runs finished: {target}", soft_wrap=True)
    for name, sentence in state.failed.items():
        err.print(f"[red]failed: {name}: {escape(sentence)}[/red]", soft_wrap=True)
    for name in state.waiting:
        err.print(f"[yellow]not done: {name}[/yellow]", soft_wrap=True)
    if state.failed or state.waiting:
        raise typer.Exit(2)


def _pairs(items: list[str] | None, option: str) -> dict[str, str]:
    """Split NAME=VALUE arguments."""
    pairs = {}
    for item in items or []:
        key, separator, value = item.partition("=")
        if not (separator and key and value):
            raise ConfigError(f"{option} takes NAME=VALUE, got {item!r}")
        pairs[key] = value
    return pairs


def _settings(items: list[str] | None, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of --set as YAML reads them; what an option says is not said twice."""
    changes = {}
    for key, value in _pairs(items, "--set").items():
        if key in options:
            raise ConfigError(f"--set {key}={value} is overruled by {options[key]}: set it there alone")
        changes[key] = _value(value, f"--set {key}={value}")
    return changes


def _options(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the options that were given."""
    return {key: f"--{key.replace('_', '-')}" for key, value in given.items() if value is not None}


def _value(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _whole_number(text: str) -> int:
    if not (text.strip().isdigit() and int(text) > 0):
        raise ConfigError(f"a number of training frames must be a positive integer, got {text.strip()!r}")
    return int(text)


def _load(
    source: str, energy_key: str | None, forces_key: str | None, stress_key: str | None, units: str | None
) -> Dataset:
    from tlmc.data.loading import load_dataset

    return load_dataset(source, energy_key=energy_key, forces_key=forces_key, stress_key=stress_key, units=units)


def _model(name: str, mapped: list[str] | None, borrow: Literal["relabel", "extend"] = "relabel") -> Potential:
    """Load a start model by name or a model file, with borrowed elements."""
    from tlmc.potentials.model_files import load_model
    from tlmc.potentials.registry import load_start_model

    if Path(name).suffix == ".safetensors":
        model, _ = load_model(name)
    else:
        model = load_start_model(name)
    return model.with_elements(_pairs(mapped, "--map"), borrow)


def _check_evaluation(output: Path) -> None:
    """Refuse a folder in which an evaluation would replace other files, those of a run for instance."""
    metrics, table = output / "metrics.json", output / "per_frame.csv"
    if metrics.is_file():
        try:
            content = json.loads(metrics.read_text(encoding="utf-8"))
        except ValueError:  # no JSON, or no text
            content = None
        if not (isinstance(content, dict) and "offset_refitted" in content):
            raise ConfigError(
                f"{metrics} is not of tlmc evaluate, which would replace it: name another --output folder"
            )
    elif table.exists():
        raise ConfigError(f"{table} is not of tlmc evaluate, which would replace it: name another --output folder")


def _weights_id(model: str) -> str:
    """Return the name of the run that made a model, as the record has it; of others, what tells them apart."""
    from tlmc.files import sha256_file
    from tlmc.potentials.model_files import load_model

    if Path(model).suffix != ".safetensors":
        return model
    return str(load_model(model)[1].get("run_key") or sha256_file(Path(model))[:12])


def _read_split(path: Path, data: Dataset) -> Any:
    from tlmc.data.splits import Split
    from tlmc.errors import DataError

    try:
        split = Split.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, DataError) as error:  # no text, no JSON, another JSON, no split
        raise ConfigError(f"{path} is not a split: {error}") from error
    run = path.with_name("run.json")
    try:
        trained_on = json.loads(run.read_text(encoding="utf-8"))["data"] if run.exists() else None
        known = trained_on and (trained_on["hash"], trained_on["frames"], trained_on["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{run}, beside the split, does not describe a run: {error}") from error
    if known and known[0] != data.hash:
        raise ConfigError(
            f"{path} belongs to a run on {known[1]} frames of {known[2]}, not on these "
            f"{len(data)} of {data.name}: is --crystals-only the difference?"
        )
    largest = max(int(indices.max(initial=0)) for indices in (split.train, split.validation, split.test))
    if largest >= len(data):
        raise ConfigError(f"{path} names frame {largest}, but {data.name} holds {len(data)}")
    return split


def _print_metrics(title: str, stages: Mapping[str, Stage]) -> None:
    """Print the errors of stages; of crystals and molecules apart, too, where there are both."""
    headings = [Column(heading, justify="right") for heading, _ in TABLE_QUANTITIES.values()]
    table = Table("RMSE", *headings, title=title)

    def add(name: str, metrics: Mapping[str, Metric]) -> None:
        values = (metrics[quantity].value * factor for quantity, (_, factor) in TABLE_QUANTITIES.items())
        table.add_row(name, *(f"{value:.4f}" for value in values))

    for name, stage in stages.items():
        add(name, stage.metrics)
        for kind, metrics in stage.by_kind.items():
            add(f"  {kind}", metrics)
    out.print(table)


def _warn_if_worse(stages: Mapping[str, Stage], recipe: str, lr: float) -> None:
    """Say below the table, where nobody misses it, that a training did harm."""
    from tlmc.evaluation.comparison import REFITTED

    worse = [
        heading
        for quantity, (heading, _) in TABLE_QUANTITIES.items()
        if quantity != "force_rmse_component"  # says what the vector says
        and stages[recipe].metrics[quantity].value > stages[REFITTED].metrics[quantity].value
    ]
    if worse:
        err.print(
            f"[bold yellow]worse than the start model with its offset refitted: {', '.join(worse)}. If that is no "
            f"accident of few test frames, lower --lr ({lr})[/bold yellow]",
            soft_wrap=True,
        )


def _draw_without_window() -> None:
    """Let figures go to files, whatever the shell's backend is; before the plots are imported."""
    import matplotlib as mpl

    mpl.use("Agg")


def _parity(target: Path, data: Dataset, stages: Mapping[str, Stage], recipe: str) -> None:
    _draw_without_window()
    from tlmc.evaluation.comparison import START
    from tlmc.plots import parity_grid

    figure = parity_grid(data, stages[START].predictions, stages[recipe].predictions)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=200)


def _installation() -> dict[str, str]:
    import torch

    from tlmc.potentials.registry import reachable, start_models, weights_path
    from tlmc.provenance import git_revision, package_versions

    facts = package_versions()
    facts["git revision"] = git_revision() or "not a git checkout"
    facts["machine"] = f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["GPUs"] = ", ".join(gpus) or "none"
    facts["cache"] = str(cache_dir())
    facts["data mirror"] = str(mirror_dir() or "none (TLMC_DATA_DIR)")
    facts["reports"] = str(reports_dir())
    for name in start_models():
        path = weights_path(name)
        state = "here" if path.is_file() else "can be fetched" if reachable(name) else "not reachable"
        facts[f"start model {name}"] = f"{state}: {path}"
    return facts


def _dataset_facts(data: Dataset) -> dict[str, str]:
    import numpy as np

    from tlmc.data.geometry import element_counts

    per_atom = data.energies / data.n_atoms
    forces = np.linalg.norm(np.concatenate(data.forces), axis=1)
    crystals = int(data.is_crystal.sum())
    states = Counter(
        ", ".join(f"{name} {value:g}" for name, value in state.items()) or "not said" for state in data.charge_states
    )
    more = {}
    if [*states] != ["not said"]:
        more["charge states"] = "; ".join(f"{state}: {count} frames" for state, count in states.items())
    if data.free_atoms:
        energies = ", ".join(f"{symbol} {energy:.6f}" for symbol, energy in data.free_atoms.items())
        more["free atoms"] = f"{energies} eV, from isolated atoms in the file, which are no frames of the set"
    return {
        "name": data.name,
        "source": data.source,
        "hash": data.hash,
        "level of theory": data.level_of_theory or "unknown",
        "units of the file": data.units,
        "frames": f"{len(data)}: {crystals} of crystals, {len(data) - crystals} of isolated molecules",
        "atoms per frame": f"{data.n_atoms.min()} to {data.n_atoms.max()}",
        "elements": ", ".join(f"{symbol} ({count} atoms)" for symbol, count in element_counts(data.frames).items()),
        "energy": f"{per_atom.min():.4f} to {per_atom.max():.4f} eV/atom",
        "force": f"median |F| {np.median(forces):.3f}, largest {forces.max():.3f} eV/A",
        "stress": f"in {sum(stress is not None for stress in data.stresses)} frames",
        **more,
    }


def _against_model(data: Dataset, start_model: str | None, mapped: list[str] | None) -> dict[str, str]:
    """Compare labels with a start model; without a name with ani2xt, if its weights are here already."""
    from tlmc.errors import ModelError
    from tlmc.evaluation.label_check import check_labels
    from tlmc.potentials.registry import weights_path

    if start_model is None and not weights_path("ani2xt").is_file():
        return {}
    model = _model(start_model or "ani2xt", mapped)
    try:
        report = check_labels(data, model, trust=True)
    except ModelError:
        if start_model is not None:
            raise
        lacking = ", ".join(sorted(set(data.elements) - set(model.elements)))
        return {f"forces against {model.name}": f"not compared: it has no network for {lacking} (--map)"}
    return {f"forces against {model.name}": report.line}
