"""A sweep through a real Slurm: one node, this machine, started for the purpose and stopped again.

    python tests/cluster/slurm_sweep.py        (or make test-cluster)

A munged, a slurmctld and a slurmd with a configuration of their own run in a scratch folder, on free ports, until the
script ends, be it by an error or a signal. Snakemake sends a small sweep there, one run of which must fail. Checked
are: every run was a job of this Slurm, on this node; the failing one was tried twice, the second time with more memory,
and is reported by name; the others finished; without it nothing but the table is made, and then nothing at all.

Debian's packages slurmctld, slurmd, slurm-client and munge are installed if they are missing, this is root and apt is
there.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel", "munged", "setpriv")
START_SECONDS = 60
SWEEP_SECONDS = 900

DESCRIPTION = """\
study: cluster-test
base: {start_model: ani2xt, settings: {epochs: 1}, n_train: 6}
runs:
  - {dataset: naphthalene}
  - {dataset: 27-like, crystals_only: true, element_map: {Si: C, I: Cl}}
"""
# the start model knows neither silicon nor iodine
FAILING = "  - {dataset: 27-like, label: no map}\n"

CONFIGURATION = """\
ClusterName=tlmc
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={scratch}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={scratch}/state
SlurmdSpoolDir={scratch}/spool
SlurmctldPidFile={scratch}/slurmctld.pid
SlurmdPidFile={scratch}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,batch_sched_delay=1
ReturnToService=2
MinJobAge=86400
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def main() -> int:
    began = time.monotonic()
    install()
    # a terminated script stops its daemons too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tlmc-slurm-")))
        environment = os.environ | {"TLMC_REPORTS_DIR": str(scratch / "reports"), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        configuration = stack.enter_context(cluster(scratch))
        environment["SLURM_CONF"] = str(configuration)
        # Snakemake hides SLURM_* from the srun of a job, which would then look for /etc/slurm/slurm.conf
        srun = scratch / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        environment["PATH"] = f"{srun.parent}:{environment['PATH']}"
        say(f"cluster is up after {time.monotonic() - began:.0f} s")
        check_sweep(scratch, environment)
    say(f"all done in {time.monotonic() - began:.0f} s")
    return 0


def install() -> None:
    """Install what is missing, or say what to install."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    os.environ["PATH"] = path
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(
            f"{', '.join(missing)} not found: install Slurm and munge first (Debian: apt-get install "
            f"{' '.join(PACKAGES)}), or run this as root where apt-get is"
        )
    say(f"installing {', '.join(PACKAGES)}")
    quiet = {"stdout": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-q"], check=True, **quiet)
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, check=True, env=environment, **quiet)


@contextmanager
def cluster(scratch: Path) -> Iterator[Path]:
    """Run a Slurm of one node; give its configuration file."""
    host = socket.gethostname().partition(".")[0]
    # munge wants its clients to be able to reach the socket
    scratch.chmod(0o711)
    for folder in ("state", "spool"):
        (scratch / folder).mkdir()
    key = scratch / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    configuration = scratch / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host,
            scratch=scratch,
            user=getpass.getuser(),
            cpus=os.cpu_count(),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            controller_port=free_port(),
            node_port=free_port(),
        )
    )
    munged = ["munged", "--foreground", f"--socket={scratch}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={scratch}/munge.{name}" for name in ("pid", "log", "seed")]
    environment = os.environ | {"SLURM_CONF": str(configuration)}
    idle = ["sinfo", "--noheader", "--format=%T"]
    with ExitStack() as stack:
        try:
            stack.enter_context(daemon(munged, scratch / "munged.txt"))
            wait_for(lambda: (scratch / "munge.socket").exists(), "munged")
            for name in ("slurmctld", "slurmd"):
                stack.enter_context(daemon([name, "-D", "-f", str(configuration)], scratch / f"{name}.txt"))
            wait_for(lambda: output(idle, environment).strip() == "idle", "the node")
        except TimeoutError:
            for log in sorted(scratch.glob("*.txt")):
                say(f"--- {log.name}\n{log.read_text()[-2000:]}")
            raise
        try:
            yield configuration
        finally:
            # what still runs would outlive the daemons
            output(["scancel", "--user", getpass.getuser()], environment)
            wait_for(lambda: not output(["squeue", "--noheader"], environment).strip(), "the end of all jobs")


@contextmanager
def daemon(command: list[str], log: Path) -> Iterator[None]:
    """Run a program in the foreground of its own session; stop it, and nothing else, by its process id.

    The kernel stops it if this script is killed.
    """
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check_sweep(scratch: Path, environment: dict[str, str]) -> None:
    """Send the sweep to the cluster and check what becomes of it."""
    descriptions = scratch / "descriptions"
    descriptions.mkdir()
    description = descriptions / "cluster.yml"
    sweep = scratch / "reports" / "sweeps" / "cluster"
    host = socket.gethostname().partition(".")[0]

    description.write_text(DESCRIPTION + FAILING)
    code, text = snakemake(scratch, environment)
    jobs = re.findall(r"has been submitted with SLURM jobid (\d+)", text)
    require(code == 1, f"snakemake ended with {code}, not 1, although a run must fail", text)
    require(len(jobs) == 4, f"{len(jobs)} jobs were submitted, not two good ones and two tries of the bad one", text)
    states = {job: facts_of_job(job, environment) for job in jobs}
    for job, facts in states.items():
        say(
            f"Slurm job {job}: {facts['JobState']} on {facts['NodeList']}, {facts['MinMemoryNode']}, {facts['RunTime']}"
        )
    require(all(facts["NodeList"] == host for facts in states.values()), f"a job ran elsewhere than on {host}", text)
    found = sorted(facts["JobState"] for facts in states.values())
    require(found == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"], f"the jobs ended as {found}", text)
    tries = sorted(facts["MinMemoryNode"] for facts in states.values() if facts["JobState"] == "FAILED")
    require(tries == ["4000M", "8000M"], f"the tries of the failing run asked for {' and '.join(tries)}", text)
    finished = [json.loads(path.read_text()) for path in sorted(sweep.glob("results/*/metrics.json"))]
    require(len(finished) == 2, f"{len(finished)} runs finished, not 2", text)
    require({run["slurm_job"] for run in finished} <= set(jobs), "a run does not name one of the jobs", text)
    failed = re.findall(r"^failed: (\S+): .*ModelError: ani2xt has no network for", text, re.MULTILINE)
    require(len(failed) == 1 and "no_map" in failed[0], "the failing run is not reported by its name and reason", text)
    require((sweep / "unfinished.csv").is_file(), "there is no table of the finished runs", text)

    description.write_text(DESCRIPTION)
    code, text = snakemake(scratch, environment)
    require(code == 0 and "submitted with SLURM" not in text, "something was computed again", text)
    require((sweep / "table.csv").is_file(), "there is no table", text)
    code, text = snakemake(scratch, environment)
    require(code == 0 and "Nothing to be done" in text, "the third call does something", text)


def snakemake(scratch: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run the target with the profile of the project; return exit status and everything said."""
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "snakemake"]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(scratch)]
    command += ["--workflow-profile", str(ROOT / "notebooks" / "sweeps" / "slurm")]
    # no accounting here: squeue tells how jobs stand, as long as Slurm remembers them (MinJobAge)
    command += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3"]
    command += ["cluster", "--config", f"sweeps={scratch / 'descriptions'}"]
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate(timeout=SWEEP_SECONDS)
    except BaseException:
        process.terminate()
        process.wait(timeout=60)
        raise
    say(f"snakemake ended with {process.returncode} after {time.monotonic() - began:.0f} s")
    return process.returncode, with_logs(text, scratch)


def facts_of_job(job: str, environment: dict[str, str]) -> dict[str, str]:
    """Ask Slurm about a job."""
    words = output(["scontrol", "show", "job", job], environment).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} was not ready after {START_SECONDS} s")
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require(condition: bool, sentence: str, text: str) -> None:
    if not condition:
        sys.exit(f"{text}\n\n{sentence}")


def with_logs(text: str, scratch: Path) -> str:
    """Add what the jobs that failed have said to Slurm."""
    logs = sorted(scratch.glob(".snakemake/slurm_logs/**/*.log"))
    return "\n".join([text, *(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
