# Sweeps: every run = a file of parameters -> the notebook 10_single_run -> metrics.json.
#
#   snakemake -c2 ablations                                              two runs at a time on this machine
#   snakemake --workflow-profile notebooks/sweeps/slurm ablations        every run is a job of a Slurm cluster
#   snakemake --workflow-profile notebooks/sweeps/kubernetes ablations   ... or of a Kubernetes cluster
#   snakemake -n ablations                                               only tell what would be run
#
# A target is the name of a description in notebooks/sweeps (--config sweeps=FOLDER: elsewhere). Results go to
# reports/sweeps/TARGET (TLMC_REPORTS_DIR moves reports/), the table of a finished sweep is table.csv there. A run that
# fails is repeated once; if it fails again the others go on, and its name and the reason are told at the end. The same
# command then carries out what is missing. A run is repeated when its parameters, the notebook, its data, package
# versions, or code that it uses have changed (comments and docstrings do not count). To keep results all the same: --touch.
import os
import sys
from pathlib import Path

from tlmc.files import listed
from tlmc.paths import project_root, reports_dir

DESCRIPTIONS = Path(config.get("sweeps", project_root() / "notebooks" / "sweeps")).resolve()
NAMES = [path.stem for path in listed(DESCRIPTIONS, "*.yml")]
RESULTS = str(reports_dir() / "sweeps")
# A storage provider (Kubernetes) wants paths relative to its prefix, the checkout, and hands copies to the jobs; these
# leave their results in RESULTS all the same, where a second try finds them, and keep() makes the copy that is asked for.
STORED = workflow.storage_settings.default_storage_provider is not None
FOLDER = os.path.relpath(RESULTS, project_root()) if STORED else RESULTS
RUN = "{RESULTS:q}/{wildcards.sweep:q}/results/{wildcards.run:q}"
SWEEP = "{RESULTS:q}/{wildcards.sweep:q}"
TLMC = f"{sys.executable} -m tlmc.cli"
PLANNED = set()


def keep(folder, name):
    """Return the shell command that copies a result to where Snakemake wants it, if that is elsewhere."""
    return f"[ {folder}/{name} -ef {{output:q}} ] || cp {folder}/{name} {{output:q}}"


def planned(wildcards):
    """Plan the sweep and return what its runs leave."""
    from tlmc.study import sweep as sweeps  # slow to import, and the jobs of a cluster read this file too

    folder = Path(RESULTS, wildcards.sweep)
    names = sweeps.plan(DESCRIPTIONS / f"{wildcards.sweep}.yml", folder)
    PLANNED.add(folder)
    return [f"{FOLDER}/{wildcards.sweep}/results/{name}/metrics.json" for name in names]


wildcard_constraints:
    sweep="[^/]+",
    run="[^/]+",


localrules:
    table,


# the first of them by the alphabet is what a plain `snakemake` does, so the smoke sweep comes first
for name in sorted(NAMES, key=lambda name: (name != "smoke", name)):

    rule:
        name:
            name
        localrule: True
        input:
            f"{FOLDER}/{name}/table.csv",


rule run:
    input:
        f"{FOLDER}/{{sweep}}/parameters/{{run}}.yml",
    output:
        f"{FOLDER}/{{sweep}}/results/{{run}}/metrics.json",
    log:
        f"{FOLDER}/{{sweep}}/logs/{{run}}.log",
    retries: 1
    threads: 1
    resources:
        # a run that the system killed for lack of memory gets more the second time, and goes on where it was
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 120 * attempt,  # minutes
        gpu=0,  # --set-resources run:gpu=1 trains on one
    shell:
        "TLMC_THREADS={threads} {TLMC} sweep run {input:q} -o " + RUN +
        " --device $([ {resources.gpu} = 0 ] && echo cpu || echo cuda) > {log:q} 2>&1; " + keep(RUN, "metrics.json")


rule table:
    input:
        planned,
    output:
        f"{FOLDER}/{{sweep}}/table.csv",
    shell:
        "{TLMC} sweep collect " + SWEEP + "; " + keep(SWEEP, "table.csv")


onstart:
    # as --keep-going: a failed run must not hold up the others
    workflow.scheduler.keepgoing = True


onerror:
    for folder in sorted(PLANNED):
        shell("{TLMC} sweep collect {folder:q} >&2 || true")
