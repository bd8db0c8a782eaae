"""The manifest of a folder of ONNX graphs, read without importing onnx."""

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = "dsv3-onnx-1"


def is_onnx_export(checkpoint: str | Path) -> bool:
    """Whether this is a folder that `export_onnx` wrote."""
    return (Path(checkpoint) / MANIFEST).is_file() and (Path(checkpoint) / "model.onnx").is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError where the folder's manifest is not one of this format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: must have the format {FORMAT}; export the run again")
    return manifest
