"""Starts a run's processes, and joins them to one process group.

`python train.py trainer.devices=4 parallel=...` starts torchrun's agent, which starts this program once for each
device; under torchrun or SLURM the processes are there already.
"""

import datetime
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from dsv3.config.compose import job_of_sweep
from dsv3.config.part import part
from dsv3.distributed.parallel import Sizes
from dsv3.paths import ROOT
from dsv3.runtime import OUT_OF_TIME, device_named

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from dsv3.distributed.mesh import Mesh

TIMEOUT = datetime.timedelta(minutes=30)
"""For a rank that waits for the others."""

SAID = (2, OUT_OF_TIME, 130, 143)
"""Exit statuses of ranks that have told why they end: a mistake of the user's, time that is up, a signal."""


def sizes_of(config: DictConfig) -> Sizes:
    """Ranks along each axis of the mesh.

    Raises:
        ValueError: the devices cannot be divided so.
    """
    sizes: Sizes = part(config.parallel).sizes(config.trainer.devices, config.trainer.num_nodes)
    return sizes


def started() -> bool:
    """Whether this process is one of several that torchrun or SLURM started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or int(os.environ.get("SLURM_NTASKS", 1)) > 1


def environment() -> "ClusterEnvironment":
    """What started this process."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    return TorchElasticEnvironment() if "WORLD_SIZE" in os.environ else SLURMEnvironment(auto_requeue=False)


def start_ranks(config: DictConfig) -> int:
    """Run this program, or the job of a sweep that it is at, once for each device of one node; return the exit status.

    Raises:
        ValueError: the run needs several nodes, whose processes only a launcher on each of them can start.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from dsv3.checkpoint.run_folder import RunFolder
    from dsv3.training.frozen import name_frozen

    if config.trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={config.trainer.num_nodes}: start one process for each device by `torchrun "
            f"--nnodes={config.trainer.num_nodes} --nproc-per-node={config.trainer.devices} ... train.py` on every "
            "node, or by srun"
        )
    job = job_of_sweep()
    program = sys.argv if job is None else [str(ROOT / "train.py"), *job]
    program = [*program, "run.on_end=[]"]  # this process calls it, however the ranks end
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.trainer.devices)))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # `told` says how it ended
    launch = LaunchConfig(
        run_id=str(os.getpid()),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.trainer.devices,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(launch, sys.executable)("-u", *program)
    except ChildFailedError as error:
        name_frozen(RunFolder(config.run.dir))
        return told(error)
    except Exception as error:  # the agent's, of a signal that it was sent and has passed on
        number = getattr(error, "sigval", None)
        if number is None:
            raise
        return OUT_OF_TIME if number == signal.SIGUSR1 else 128 + int(number)
    return 0


def told(error: "ChildFailedError") -> int:
    """Say which rank ended how, and return the exit status of the first that failed."""
    rank, failure = error.get_first_failure()
    status = failure.exitcode
    if status < 0:
        name = signal.Signals(-status).name
        print(f"rank {rank} was ended by {name}; the others were stopped", file=sys.stderr)
        return 128 - status
    if status not in SAID:
        print(f"rank {rank} ended with status {status}; the others were stopped", file=sys.stderr)
    return status


def join(config: DictConfig) -> "Mesh | None":
    """Join the process group; the meshes of a run with several ranks, or None.

    Raises:
        ValueError: another number of processes was started than the configuration asks for.
    """
    sizes = sizes_of(config)
    if sizes.world == 1:
        return None
    import torch
    import torch.distributed as dist

    from dsv3.distributed.mesh import make_mesh

    device = device_named(config.trainer.accelerator, key="trainer.accelerator")
    if not dist.is_initialized():
        around = environment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = around.main_address, str(around.main_port)
        if device.type == "cuda":
            torch.cuda.set_device(around.local_rank())
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=around.global_rank(),
            world_size=around.world_size(),
            timeout=TIMEOUT,
        )
    return make_mesh(sizes, device)


def is_first_of_node() -> bool:
    """Whether this process prepares what those of its node share, such as a cache of token ids."""
    return not started() or environment().local_rank() == 0


def needs_ranks(config: DictConfig) -> bool:
    """Whether this process has to start those that train."""
    return sizes_of(config).world > 1 and not started()
