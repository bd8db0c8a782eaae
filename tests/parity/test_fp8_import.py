"""Import of weights in the published FP8 format: E4M3 with a factor for each block."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.checkpoint.shards import from_blocks
from dsv3.tools import export, import_
from tests.parity.runs import write_run
from tests.parity.test_export import SMALL
from tests.parity.twins import configured, random_model


@pytest.fixture
def source(tmp_path):
    config = configured(**SMALL)
    return write_run(tmp_path / "run", config, random_model(config, seed=5))


def quantised(folder, block):
    """The folder's weights as DeepSeek publishes them: projections in E4M3 with a factor for each block."""
    tensors = load_file(folder / "model.safetensors")
    stored, values = {}, dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") and "eh_proj" not in name and tensor.numel():
            rows, columns = tensor.shape
            padded = torch.zeros(-(-rows // block) * block, -(-columns // block) * block)
            padded[:rows, :columns] = tensor
            blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
            factor = blocks.abs().amax((1, 3)).clamp(min=1e-4) / 448
            quotient = (blocks / factor[:, None, :, None]).to(torch.float8_e4m3fn)
            values[name] = (quotient.float() * factor[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
            stored[name] = quotient.float().flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = factor
        else:
            stored[name] = tensor
    return {name: tensor.contiguous() for name, tensor in stored.items()}, values


def fp8_folder(folder, stored, block):
    """`stored` in two files, cut where a matrix and its factors come to lie in different ones."""
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    cut = next(i for i, name in enumerate(names) if i > 9 and name.endswith("_scale_inv"))
    where = {}
    for file, held in (("a.safetensors", names[:cut]), ("b.safetensors", names[cut:])):
        save_file({name: stored[name] for name in held}, folder / file)
        where |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("block", [128, 16, 12])
def test_fp8_blocks(tmp_path, source, block):
    """12 divides neither 32 nor 16: the edge blocks are partial, as those of 128 are here."""
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf")))
    stored, values = quantised(tmp_path / "hf", block)
    fp8_folder(tmp_path / "hf", stored, block)
    import_.run(import_.Options(path=str(tmp_path / "hf"), out=str(tmp_path / "back"), precision="fp32"))
    export.run(export.Options(checkpoint=str(tmp_path / "back"), out=str(tmp_path / "again")))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == values.keys()
    assert all(torch.equal(again[name], values[name]) for name in values)


def test_blocks_of_fp8_by_hand():
    stored = torch.ones(3, 5).to(torch.float8_e4m3fn)
    expected = torch.tensor([[2, 2, 3, 3, 5], [2, 2, 3, 3, 5], [7, 7, 11, 11, 13]], dtype=torch.float32)
    assert torch.equal(from_blocks(stored, torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]]), (2, 2)), expected)
    with pytest.raises(ValueError, match=r"factors of \[1, 2\]"):
        from_blocks(stored, torch.ones(1, 2), (2, 2))
