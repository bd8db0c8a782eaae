"""onnxruntime keeps a session of Microsoft's telemetry, in a file of the temporary folder, unless it is told not to."""

import os
import subprocess
import sys
from pathlib import Path

from dsv3.paths import ROOT

MAKE_A_SESSION = """
from onnx import TensorProto, helper
from dsv3.inference.onnx_step import session_of
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
session_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
"""


def test_a_session_leaves_no_file_of_telemetry(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", MAKE_A_SESSION], env=environment, check=True)
    assert not [path.name for path in tmp_path.iterdir() if path.is_file()]
