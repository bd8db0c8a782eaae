"""Provenance of a run: commit, packages, machine, threads and command line, in `environment.json`.

Written before the first step, with the changes since the commit next to it in `environment.diff`. A run that resumes
elsewhere, or with other code, keeps the file of before as `environment-until-<tokens>.json`. Code and packages are
looked at once in a process: what it runs was loaded when it began.
"""

import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder, write_atomically, write_text_atomically
from dsv3.paths import ROOT
from dsv3.strict_json import text_of

MOST_BYTES_OF_DIFF = 10_000_000
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
OF_ONE_START = ("command",)
"""What differs between two starts of one run without a difference to what is computed."""


def provenance() -> dict[str, Any]:
    """The code, software and machine of this process. JSON-serialisable; holds no environment variables but those of
    threads and devices."""
    import torch

    return {
        "command": [sys.executable, *sys.argv],
        "code": code(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {"model": cpu_model(), "count": os.cpu_count(), "usable": usable_cpus(), "memory_bytes": memory_bytes()},
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "packages": packages(),
    }


def write_provenance(folder: RunFolder, config: DictConfig, *, tokens: int) -> None:
    """Write `environment.json`, and the changes since the commit.

    config: of the run, which has chosen device and numeric format. tokens: from where it resumes.
    """
    precision = OmegaConf.to_container(config.precision, resolve=True)
    found = provenance() | {"device": config.trainer.accelerator, "precision": precision}
    path, patch = folder.path / "environment.json", folder.path / "environment.diff"
    changes = diff()
    if path.exists() and not _is_same(path, patch, found, changes):
        path.rename(path.with_name(f"environment-until-{tokens:015d}.json"))
        if patch.exists():
            patch.rename(patch.with_name(f"environment-until-{tokens:015d}.diff"))
    write_text_atomically(path, text_of(found) + "\n")
    if changes:
        write_atomically(patch, lambda file: file.write_bytes(changes))


def _is_same(path: Path, patch: Path, found: dict[str, Any], changes: bytes) -> bool:
    """Whether the environment of before, if it can be read, is that of now."""
    try:
        before = json.loads(path.read_text())
    except ValueError:
        return False
    now = json.loads(text_of(found))
    keys = (before.keys() | now.keys()) - {*OF_ONE_START}
    same_code = (patch.read_bytes() if patch.exists() else b"") == changes
    return same_code and all(before.get(key) == now.get(key) for key in keys)


@cache
def code() -> dict[str, Any] | None:
    """The commit, whether files were changed since, and new files that Python or Hydra may read; None outside a
    repository."""
    try:
        head = git("rev-parse", "HEAD").decode().strip()
        new = git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.yaml").decode().split("\0")
        return {"commit": head, "changed": bool(git("status", "--porcelain", "--untracked-files=no")), "new": new[:-1]}
    except (OSError, subprocess.CalledProcessError):
        return None


def git_commit() -> str | None:
    """The commit that the code stands at, with "+" where files were changed since; None outside a repository."""
    found = code()
    return None if found is None else found["commit"] + "+" * found["changed"]


@cache
def diff() -> bytes:
    """What was changed since the commit, staged or not; cut where it is very long."""
    try:
        changes = git("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color")
    except (OSError, subprocess.CalledProcessError):
        return b""
    if len(changes) <= MOST_BYTES_OF_DIFF:
        return changes
    return changes[:MOST_BYTES_OF_DIFF] + f"\n(cut: {len(changes):,} bytes in all)\n".encode()


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


@cache
def packages() -> dict[str, str]:
    """Every installed package with its version."""
    all_metadata = [each.metadata for each in distributions()]  # parsed anew each time it is asked for
    found = {metadata["Name"]: metadata["Version"] for metadata in all_metadata if metadata["Name"]}
    return dict(sorted(found.items(), key=lambda each: each[0].lower()))


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def usable_cpus() -> int | None:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_bytes() -> int:
    """Of the machine, whatever part of it a container may use."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "compute": f"{gpu.major}.{gpu.minor}"} for gpu in found
    ]
