"""Environment of this machine: commit, packages, CPU and GPU, threads. For bug reports."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Options:
    pass


def run(options: Options) -> dict[str, Any]:
    """Print what a run would write to its `environment.json`, and return it."""
    from dsv3.distributed.rank_bytes import text_of_bytes
    from dsv3.training.provenance import provenance

    found = provenance()
    code, cpu = found["code"], found["cpu"]
    print("commit   " + (f"{code['commit']}{', changed since' * code['changed']}" if code else "outside a repository"))
    print(f"python   {found['python']} on {found['system']}")
    print(f"cpu      {cpu['model']}: {cpu['usable']} of {cpu['count']} usable, {text_of_bytes(cpu['memory_bytes'])}")
    for gpu in found["gpus"]:
        print(f"gpu      {gpu['name']}, {text_of_bytes(gpu['memory_bytes'])}, compute capability {gpu['compute']}")
    if not found["gpus"]:
        print("gpu      none that torch sees")
    print(f"cuda     {found['cuda'] or 'torch was built without it'}")
    variables = "".join(f", {name}={value}" for name, value in found["variables"].items())
    print(f"threads  {found['threads']['torch']} of torch{variables}")
    print("packages")
    print("\n".join(f"  {name}=={version}" for name, version in found["packages"].items()))
    return found
