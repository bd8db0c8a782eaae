"""A model that our trainer made, exported, gives transformers the same validation loss and the same greedy text."""

import torch
from transformers import AutoModelForCausalLM

from dsv3.build import build_run, load_run
from dsv3.generation import generate
from dsv3.tools.export import Options, run
from tests.parity.twins import our_loss


@torch.no_grad()
def validation_losses(ours, theirs, batches):
    for batch in batches:
        logits = theirs(batch.tokens_BT).logits.flatten(0, 1)
        yield our_loss(ours, batch)[0], torch.nn.functional.cross_entropy(logits, batch.targets_BT.flatten())


def test_trained_model_in_transformers(composed, tmp_path):
    keys = ("precision=fp32", "router.group_score_top=2", "run.tokens=2560", "schedule.peak=1e-2")
    made = build_run(composed(f"run.dir={tmp_path / 'run'}", *keys))
    made.trainer.fit(made.module, made.data)
    run(Options(checkpoint=str(tmp_path / "run"), out=str(tmp_path / "out")))
    ours, theirs = load_run(tmp_path / "run").model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(moe.balancing.bias.any() for _, moe in ours.moe_layers())  # it was trained
    for mine, other in validation_losses(ours, theirs, made.data.validation_batches()):
        assert abs(mine - other) <= 1e-4
    prompt = torch.tensor([list(b"abcdef")])
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    assert list(generate(ours, prompt[0].tolist(), max_tokens=12, stop=-1)) == expected
