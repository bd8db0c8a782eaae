"""`export format=onnx`: plain onnxruntime gets the logits of transformers; our commands take the folder."""

import hashlib
import json
import random
import re
import runpy
import sys
from itertools import pairwise

import numpy as np
import onnxruntime
import pytest
import torch

from dsv3.checkpoint.families import Parts
from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.onnx.exported import block_of
from dsv3.cli import main
from dsv3.evaluation.benchmarks.models import OnnxModel
from dsv3.evaluation.benchmarks.session import native_model
from dsv3.inference.engine import PREFILL
from dsv3.inference.generation import generate
from dsv3.inference.onnx_backend import OnnxBackend
from dsv3.inference.sampling import Settings
from dsv3.paths import ROOT
from tests.parity.runs import VOCABULARY, write_run
from tests.parity.test_export import SMALL
from tests.parity.twins import configured, load_twin, random_model, write_twin

SHAPES = SMALL | {"dim": 48, "moe_inter_dim": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = configured("router.group_score_top=2", **SHAPES)
    return write_run(tmp_path_factory.mktemp("exported") / "run", config, random_model(config, seed=5))


def exported(run, out, *options):
    assert main(["export", f"checkpoint={run}", "format=onnx", f"out={out}", *options]) == 0
    return out


@pytest.fixture(scope="module")
def folder(run):
    return exported(run, run.parent / "none")


class Plain:
    """A graph in plain onnxruntime."""

    def __init__(self, file):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.names = [one.name for one in self.session.get_outputs()]
        self.shapes = {one.name: one.shape for one in self.session.get_inputs()}

    def begin(self, rows, room):
        widths = {name: shape[-1] for name, shape in self.shapes.items() if name.startswith("cache_")}
        self.caches = {name: np.zeros((rows, room, width), np.float32) for name, width in widths.items()}
        self.length = np.zeros(rows, np.int64)

    def __call__(self, tokens_BT, picked, **more):
        given = {"tokens": tokens_BT, "length": self.length, "picked": np.array(picked)} | more
        outputs = dict(zip(self.names, self.session.run(self.names, given | self.caches), strict=True))
        self.caches = {name: outputs[name.replace("cache", "present")] for name in self.caches}
        self.length = self.length + tokens_BT.shape[1]
        return outputs


def test_logits_are_those_of_transformers(run, folder, tmp_path):
    """100 prompts as one batch: 20 tokens at once, then 8 one by one."""
    loaded = load_run(run)
    write_twin(loaded.config, loaded.model, tmp_path, mtp=False)
    tokens = torch.randint(SHAPES["vocab_size"], (100, 28), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = load_twin(tmp_path)(tokens).logits.numpy()
    graph, ids = Plain(folder / "model.onnx"), tokens.numpy()
    graph.begin(100, 28)
    found = [graph(ids[:, :20], range(2000))["logits"].reshape(100, 20, -1)]
    found += [graph(ids[:, t : t + 1], range(100))["logits"].reshape(100, 1, -1) for t in range(20, 28)]
    assert np.abs(np.concatenate(found, 1) - theirs).max() < 1e-4


def test_the_mtp_graph_drafts_what_the_model_drafts(run, folder):
    loaded, ids = load_run(run), torch.arange(3, 25).unsqueeze(0)
    main_graph, module = Plain(folder / "model.onnx"), Plain(folder / "mtp_1.onnx")
    main_graph.begin(1, 30)
    module.begin(1, 30)
    states = main_graph(ids[:, :-1].numpy(), [0])["states"]
    drafted = module(ids[:, 1:].numpy(), range(21), states_in=states)
    model = loaded.model
    with torch.no_grad():
        h_BTD = model.norm(model.decode_states(ids[:, :-1], model.new_caches([0]))[0])
        after, hidden = model.mtp.extend(1, h_BTD, ids[:, 1:], model.embed, model.mtp.new_caches([0])[0])
        expected_of = {"states": after, "hidden": hidden, "logits": model.logits(hidden)}
    for name, expected in expected_of.items():
        assert np.abs(drafted[name] - expected[0].numpy()).max() < 1e-4


def test_the_manifest_describes_the_folder(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest["sha256"].keys() == files
    assert {"model.onnx", "mtp_1.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja"} <= files
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    for name, graph in manifest["graphs"].items():
        session = Plain(folder / f"{name}.onnx").session
        for side, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert [(one["name"], one["shape"]) for one in graph[side]] == [(one.name, one.shape) for one in values]
    assert manifest["moe_layers"] == ["layers.1", "layers.2"]
    documented = (ROOT / "docs" / "onnx.md").read_text()
    assert all(f"`{name}`" in documented for name in manifest["custom_operators"])


def test_the_program_in_the_docs(run, folder, capsys, monkeypatch, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL)
    assert "dsv3" not in program
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(sys, "argv", ["program.py", str(folder), "def f(x"])
    runpy.run_path(str(tmp_path / "program.py"))
    loaded = load_run(run)
    tokenizer = loaded.tokenizer()
    prompt = [tokenizer.bos, *tokenizer.encode("def f(x")]
    written = list(generate(loaded.model, prompt, Settings(max_tokens=100 - len(prompt), eos=(tokenizer.eos,))))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(prompt + written).rstrip("\n")


@pytest.mark.parametrize("options", [("speculative=true",), ("suffix=return x",)], ids=" ".join)
def test_generate_takes_the_folder(run, folder, options, capsys):
    texts = []
    for checkpoint, engine in ((run, "eager"), (run, "onnx"), (folder, "auto")):
        given = [f"checkpoint={checkpoint}", f"engine={engine}", "prompt=def f", "max_tokens=30"]
        assert main(["generate", *given, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("shared", [0, 1, PREFILL + 9])
def test_benchmarks_score_the_folder_as_the_run(run, folder, shared):
    """Logits of rows of unequal length, at their last positions; some reach back over what is read at once."""
    draw = random.Random(0)
    beginning = [draw.randrange(VOCABULARY) for _ in range(shared)]
    rows = [beginning + [draw.randrange(VOCABULARY) for _ in range(n)] for n in (5, PREFILL + 40, 90)]
    keep = [2, PREFILL + 30, 90]
    models = native_model(load_run(run), "live", engine="eager"), OnnxModel(str(folder), chat=False)
    ours, graph = (model.logits(rows, keep, [shared] * 3) for model in models)
    assert [tuple(logits.shape) for logits in graph] == [(n, VOCABULARY) for n in keep]
    assert max(float((a - b).abs().max()) for a, b in zip(ours, graph, strict=True)) < 1e-4
    assert models[0].encode_framed("x", 9) == models[1].encode_framed("x", 9)
    assert not models[1].backend().main.caches.lengths
    with models[1].steady():
        for _ in range(2):
            again = models[1].logits(rows, keep, [shared] * 3)
            assert max(float((a - b).abs().max()) for a, b in zip(again, graph, strict=True)) < 1e-5
            assert not models[1].backend().main.caches.lengths, "what it holds makes way for texts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["engine=eager"], "engine=eager: .* holds ONNX graphs; they run by engine=onnx"),
        (["speculative=true"], "speculative decoding needs a model with MTP modules"),
    ],
)
def test_what_a_folder_cannot(run, options, message, tmp_path, capsys):
    out = exported(run, tmp_path / "out", "mtp=false")
    with pytest.raises(SystemExit) as stopped:
        main(["generate", f"checkpoint={out}", "prompt=a", *options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("damaged", ["model.onnx", "weights.bin", "manifest.json"])
def test_a_damaged_folder_is_told_in_a_line(folder, damaged, tmp_path, capsys):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:500] if file.name == damaged else content)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", f"checkpoint={tmp_path}", "prompt=a"])
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_model_that_is_refused(tmp_path, capsys):
    message = "an ONNX graph cannot express this model: memory._target_=.*the graph has memory=none; router._target_="
    config = configured("memory=ngram", "memory.rows=97", "router=hash", **SHAPES)
    source = write_run(tmp_path / "run", config, random_model(config, seed=5))
    with pytest.raises(SystemExit) as stopped:
        main(["export", f"checkpoint={source}", "format=onnx", f"out={tmp_path / 'out'}"])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_int8(run, folder, tmp_path):
    """Near FP32, at less than half of the size; sizes that no block divides are refused."""
    out = exported(run, tmp_path / "int8", "quantise=int8", "mtp=false")
    ids = torch.randint(SHAPES["vocab_size"], (40,), generator=torch.Generator().manual_seed(2)).tolist()
    logits = []
    for path in (folder, out):
        backend = OnnxBackend.opened(path, drafts=False)
        backend.add(0, drafts=False)
        logits.append(torch.cat([backend.read([0], [[token]], [1])[0] for token in ids]).log_softmax(-1))
    p, q = logits
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.01
    sizes = [(path / "weights.bin").stat().st_size for path in (folder, out)]
    assert sizes[1] < 0.6 * sizes[0]
    with pytest.raises(ValueError, match=r"quantise=int8: model\.moe_inter_dim=24 must be a multiple of 16"):
        block_of(Parts.of(configured(**SHAPES | {"moe_inter_dim": 24})))


def test_ema_weights_are_others(run, folder, tmp_path):
    out = exported(run, tmp_path / "ema", "weights=ema")
    assert (out / "weights.bin").stat().st_size == (folder / "weights.bin").stat().st_size
    assert (out / "weights.bin").read_bytes() != (folder / "weights.bin").read_bytes()


def test_weights_are_stored_once(folder):
    """Graphs share them; every place is aligned, and none overlaps another."""
    import onnx

    places = set()
    for file in folder.glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {pair.key: pair.value for pair in tensor.external_data}
                places.add((int(entry["offset"]), int(entry["length"])))
    assert all(offset % 64 == 0 for offset, _ in places)
    assert all(a + length <= b for (a, length), (b, _) in pairwise(sorted(places)))
    assert sum(length for _, length in places) > 0.95 * (folder / "weights.bin").stat().st_size
