"""Fingerprints of what the project computes: weights, averaged weights, routing state, metrics, texts and scores.

    python tests/golden/fingerprints.py make OUT      the default run cut to 60 steps, and what follows from it
    python tests/golden/fingerprints.py compare A B   tensors bit for bit, metrics 1e-6, ids equal, scores 1e-5

For changes that must not change a number: make one before, one after, on one machine, and compare.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("FINGERPRINTS_OF", Path(__file__).resolve().parents[2]))
QUIET = ["benchmarks=none", "logger=none"]
RUNS = {
    "bf16": ["trainer.max_steps=60", "precision=bf16"],
    "fp32": ["trainer.max_steps=60", "precision=fp32"],
    "fp8_blockwise": ["trainer.max_steps=20", "precision=fp8_blockwise"],
}
ARM = ["experiment=attention", "study.only=[gqa]", "study.seeds=[1]", "run.tokens=81920", "precision=bf16"]
PROMPTS = ["def add(a, b):", "The ", "import os\n", "What is 3 plus 4?"]
TEXTS = {
    "greedy": [],
    "sampled": ["temperature=0.8", "top_p=0.9", "seed=3"],
    "drafted": ["speculative=true"],
    "drafted_sampled": ["speculative=true", "temperature=1.0", "seed=5", "drafts=3"],
    "filled": ["suffix=\n    return c\n"],
    "averaged": ["weights=ema"],
}
SCORES = ["tasks=[stdlib_infilling,rg_arithmetic]", "limit=12"]


def make(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, overrides in RUNS.items():
        call("train.py", *overrides, *QUIET, f"run.dir={out / name}")
    call("train.py", *ARM, *QUIET, f"run.dir={out}/arm")
    call("-m", "dsv3", "export", f"checkpoint={out / 'bf16'}", f"out={out / 'export'}")
    texts = {}
    for name, settings in TEXTS.items():
        for prompt in PROMPTS:
            arguments = [f"checkpoint={out / 'fp32'}", f"prompt={prompt}", "max_tokens=48", *settings]
            answer = call("-m", "dsv3", "generate", *arguments, "format=json")
            texts[f"{name}: {prompt}"] = json.loads(answer)["text"]
    (out / "texts.json").write_text(json.dumps(texts, indent=1))
    call("evaluate.py", f"checkpoint={out / 'fp32'}", *SCORES, f"out={out / 'scores.json'}")


def call(*arguments: str) -> str:
    print(*arguments, file=sys.stderr, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: exit status {done.returncode}")
    return done.stdout


def compare(one: Path, other: Path) -> int:
    different = []
    for run in sorted(path.parent for path in one.rglob("checkpoints")):
        name = run.relative_to(one)
        a, b = tensors(run), tensors(other / name)
        wrong = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        print(f"{name}: {len(a)} tensors, {len(wrong)} different")
        different += [f"{name}: {key}" for key in wrong]
        different += [f"{name}: {key}" for key in metrics(run, other / name)]
    for file in sorted((one / "export").glob("*.safetensors")):
        if file.read_bytes() != (other / "export" / file.name).read_bytes():
            different.append(f"export/{file.name}")
    a, b = (json.loads((folder / "texts.json").read_text()) for folder in (one, other))
    different += [f"text {key!r}: {a[key]!r} {b.get(key)!r}" for key in a if a[key] != b.get(key)]
    a, b = (dict(leaves(json.loads((folder / "scores.json").read_text()))) for folder in (one, other))
    compared = [key for key in a if isinstance(a[key], float)]
    different += [f"score {key}: {a[key]} {b.get(key)}" for key in compared if not close(a[key], b.get(key), 1e-5)]
    print(f"texts and {len(compared)} scores compared")
    print("\n".join(different) or "equal")
    return bool(different)


def tensors(run: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint's weights, averages and routing state."""
    import torch

    state = torch.load(sorted((run / "checkpoints").glob("tokens-*.ckpt"))[-1], weights_only=True)
    kept = {"": state["state_dict"], "ema ": state["callbacks"]["EMA"]["weights"]}
    return {
        prefix + name: hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for prefix, tensors in kept.items()
        for name, tensor in tensors.items()
    }


def metrics(one: Path, other: Path) -> list[str]:
    import pandas as pd

    def read(run: Path, table: str) -> Any:
        return pd.concat([pd.read_parquet(part) for part in sorted((run / "metrics" / table).glob("part-*"))])

    wrong = []
    for table in sorted(path.name for path in (one / "metrics").iterdir()):
        a, b = read(one, table), read(other, table)
        for column in a.columns:
            pairs = zip(a[column], b[column], strict=True) if column in b and len(a) == len(b) else [(0.0, 1.0)]
            bad = sum(not same(x, y) for x, y in pairs)
            wrong += [f"metrics/{table}.{column}: {bad} rows"] if bad else []
    return wrong


def same(x: Any, y: Any) -> bool:
    if hasattr(x, "__len__") and not isinstance(x, str):
        return len(x) == len(y) and all(map(same, x, y))
    return close(x, y, 1e-6) if isinstance(x, float) else x == y


def close(x: float, y: Any, tolerance: float) -> bool:
    if y is None or math.isnan(x) or math.isnan(y):
        return y is not None and math.isnan(x) and math.isnan(y)
    return x == y or abs(x - y) <= tolerance * max(abs(x), abs(y), 1.0)


def leaves(node: Any, prefix: str = "") -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield f"{prefix}{key}", value
        yield from leaves(value, f"{prefix}{key}.")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]).resolve())
    else:
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])))
