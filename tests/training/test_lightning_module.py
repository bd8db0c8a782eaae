"""The training step against an explicit computation, and the traps that concern it."""

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dsv3.training.step
from dsv3.build import build_data, build_model
from dsv3.contracts import IGNORE, MicroBatch, Step
from dsv3.model.decoder import Decoder
from dsv3.model.load import Loads, max_violation, real_tokens
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.run import build_run
from dsv3.training.step import Sums, clip_gradients, gradients, norm_of, read
from plugins.objective.pretraining import Pretraining
from tests.synthetic import SyntheticData

Compose = Callable[..., DictConfig]


def module_of(config: DictConfig) -> LanguageModel:
    """A module in the state in which training_step finds it, with plain SGD and no Trainer loop."""
    model = build_model(config)
    module = LanguageModel(
        model,
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.0),
        schedule=lambda tokens: 0.0,
        grad_clip=1e9,
        total_tokens=config.run.tokens,
        objective=Pretraining(token_bytes_V=torch.ones(config.model.vocab_size, dtype=torch.int64)),
    )
    optimizer = module.configure_optimizers()
    module.optimizers = lambda *a, **k: optimizer  # type: ignore[method-assign]
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    optimizer.zero_grad = lambda: None  # type: ignore[method-assign,assignment]  # the gradient is looked at after the step
    return module


def step_of(config: DictConfig) -> Step:
    data = build_data(config)
    return next(iter(data.train_dataloader()))


def explicit_loss(model: Decoder, step: Step, *, alpha: float, mtp_weight: float) -> Tensor:
    """Main + MTP + auxiliary loss with full logits and plain formulas."""
    total = torch.zeros(())
    targets = sum((m.targets_BT != IGNORE).sum() for m in step.micro_batches)
    positions = sum(m.tokens_BT.numel() for m in step.micro_batches)
    for micro in step.micro_batches:
        output = model(micro, with_mtp=True)
        head = model.lm_head.weight
        main = F.cross_entropy((output.hidden_BTD @ head.T).flatten(0, 1), micro.targets_BT.flatten(), reduction="sum")
        total = total + main / targets
        for prediction in output.predictions:
            logits = (prediction.hidden_BSD @ head.T).flatten(0, 1)
            mtp = F.cross_entropy(logits, prediction.targets_BS.flatten(), reduction="sum", ignore_index=IGNORE)
            total = total + mtp_weight * mtp / positions
        for routing in output.routings.values():
            shares = routing.affinities_NE / routing.affinities_NE.sum(-1, keepdim=True)
            n_experts, k = shares.shape[1], routing.experts_NK.shape[1]
            rows = micro.tokens_BT.shape[0]
            raw_top = routing.affinities_NE.topk(k).indices
            chosen = F.one_hot(raw_top, n_experts).sum(1).float().unflatten(0, (rows, -1))
            f = chosen.mean(1) * n_experts / k
            p = shares.unflatten(0, (rows, -1)).mean(1)
            total = total + alpha * (f * p).sum(-1).mean() / len(step.micro_batches)
    return total


def test_gradient_is_that_of_the_explicit_loss(composed: Compose) -> None:
    """Main, MTP and auxiliary gradients all arrive (trap 8 as the whole model sees it), over two micro-batches."""
    config = composed("precision=fp32", "balancing.parts.sequence_aux.alpha=0.1", "mtp.document_boundary=cross")
    module, step = module_of(config), step_of(config)
    assert len(step.micro_batches) == 2
    expected = explicit_loss(module.model, step, alpha=0.1, mtp_weight=0.3)
    wanted = torch.autograd.grad(expected, list(module.model.parameters()))
    module.take_step(step)
    for (name, parameter), grad in zip(module.model.named_parameters(), wanted, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-7, msg=name)


def padded(micro: MicroBatch, rows: int) -> MicroBatch:
    """The micro-batch filled up with rows of padding."""
    wide = micro.map(lambda tensor: F.pad(tensor, (0, 0, 0, rows - len(tensor))))
    wide.targets_BT[len(micro.tokens_BT) :] = IGNORE
    return wide


@pytest.mark.parametrize("balancing", ["sequence_aux", "batch_aux"])
def test_twelve_rows_in_micro_batches_of_eight_train_twelve_rows(composed: Compose, balancing: str) -> None:
    """Rows of padding count in no denominator, no load and no number of tokens: the last micro-batch has 4 rows."""
    config = composed("precision=fp32", f"balancing={balancing}", "balancing.alpha=0.1", "data.micro_batch_size=12")
    whole = step_of(config).micro_batches[0]
    parts = [whole.map(lambda tensor: tensor[:8]), whole.map(lambda tensor: tensor[8:])]
    found = []
    for micro_batches in ([whole], parts, [parts[0], padded(parts[1], 8)]):
        module = module_of(config)
        record = module.take_step(Step(micro_batches, 0, {}))
        found.append((module, record))
        assert record.tokens == 12 * 32
    reference = found[0] if balancing == "sequence_aux" else found[1]  # batch_aux sees a micro-batch at a time
    module, record = found[2]
    assert all(np.array_equal(record.loads[name], load_E) for name, load_E in reference[1].loads.items())
    assert record.figures == pytest.approx(reference[1].figures, rel=1e-4, nan_ok=True)
    for (name, ours), theirs in zip(module.named_parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_no_step_has_a_learning_rate_of_zero(composed: Compose, tmp_path: Any) -> None:
    """Neither the first of a warm-up from 0 nor the last of a decay to 0."""
    config = composed("schedule=wsd", f"run.dir={tmp_path}/run", "run.tokens=2048")
    run = build_run(config)
    start = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    run.trainer.fit(run.module, run.data)
    run.folder.flush(run.module.tokens_seen)
    rates = run.folder.read("metrics/train").lr
    assert len(rates) == 8
    assert (rates > 0).all()
    assert any((p != start[name]).any() for name, p in run.module.named_parameters())


def test_trap_08_auxiliary_loss_reaches_the_router(composed: Compose) -> None:
    step = step_of(composed())
    grads = []
    for alpha in (0.0, 0.1):
        module = module_of(composed("precision=fp32", f"balancing.parts.sequence_aux.alpha={alpha}"))
        module.take_step(step)
        grads.append(dict(module.model.named_parameters())["layers.1.mlp.router.weight"].grad)
    assert not torch.allclose(*grads)


def test_trap_02_mtp_router_bias_moves_too(composed: Compose) -> None:
    module = module_of(composed())
    names = [name for name, _ in module.model.moe_layers()]
    assert names == ["layers.1", "layers.2", "mtp.0"]
    module.take_step(step_of(composed()))
    for name, moe in module.model.moe_layers():
        assert moe.balancing.bias.abs().sum() > 0, name


def test_trap_03_evaluation_is_not_counted(composed: Compose) -> None:
    config = composed()
    module, data = module_of(config), build_data(config)
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    from dsv3.evaluation.held_out import answer_questions, domain_scores

    domain_scores(module.model, data.validation_batches(), data.domains, data.validation_bytes())
    answer_questions(module.model, data.questions(), data.tokenizer)
    after = module.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_trap_04_recomputation_counts_once(composed: Compose, reentrant: bool) -> None:
    """Blocks that run twice, in the forward and again in the backward pass, still count once."""
    config = composed("precision=fp32")
    step = step_of(config)
    plain = module_of(config).take_step(step)
    module = module_of(config)
    for layer in module.model.layers:
        forward = layer.forward

        def twice(*args: Any, forward: Any = forward) -> Any:
            return checkpoint(forward, *args, use_reentrant=reentrant)

        layer.forward = twice
    recomputed = module.take_step(step)
    for name, counts in plain.loads.items():
        assert np.array_equal(counts, recomputed.loads[name])
        assert counts.sum() == sum(m.tokens_BT.shape[0] for m in step.micro_batches) * 2 * (
            31 if name.startswith("mtp") else 32
        )


def test_trap_05_bias_moves_once_per_optimiser_step_by_the_load_of_all_ranks(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if three ranks had the same load; tests/distributed has real ones."""
    config = composed("precision=fp32")
    step = step_of(config)
    one, many = module_of(config), module_of(config)
    records = [one.take_step(step)]
    monkeypatch.setattr(dsv3.training.step, "sum_over_ranks", lambda values, group=None: values * 3)
    records.append(many.take_step(step))
    gamma = config.balancing.parts.loss_free.gamma.peak
    for (name, moe), (_, other) in zip(one.model.moe_layers(), many.model.moe_layers(), strict=True):
        load = torch.from_numpy(records[0].loads[name]).double()
        assert np.array_equal(records[1].loads[name], 3 * records[0].loads[name])
        expected = gamma * torch.sign(load.mean() - load)
        torch.testing.assert_close(moe.balancing.bias.double(), expected, rtol=1e-6, atol=0)
        assert torch.equal(moe.balancing.bias, other.balancing.bias)


def test_trap_06_a_cast_of_the_module_leaves_bias_and_counts(composed: Compose) -> None:
    module = module_of(composed())
    module.take_step(step_of(composed()))
    before = {k: v.clone() for k, v in module.model.state_dict().items() if "balancing" in k}
    module.to(torch.bfloat16)
    after = module.model.state_dict()
    assert {v.dtype for k, v in before.items()} == {torch.float32, torch.int64}
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())


def test_trap_07_padding_is_no_load_and_no_loss(composed: Compose) -> None:
    config = composed("precision=fp32")
    step = step_of(config)
    padded = []
    for micro in step.micro_batches:
        ids, targets = micro.document_ids_BT.clone(), micro.targets_BT.clone()
        ids[:, 20:], targets[:, 19:] = 0, IGNORE
        padded.append(micro._replace(document_ids_BT=ids, targets_BT=targets))
    record = module_of(config).take_step(step._replace(micro_batches=padded))
    rows = sum(m.tokens_BT.shape[0] for m in padded)
    for name, counts in record.loads.items():
        assert counts.sum() == rows * 2 * (19 if name.startswith("mtp") else 20), name
    other = [m._replace(tokens_BT=m.tokens_BT.index_fill(1, torch.arange(20, 32), 5)) for m in padded]
    again = module_of(config).take_step(step._replace(micro_batches=other))
    assert again.loss == record.loss
    assert all(np.array_equal(again.loads[name], counts) for name, counts in record.loads.items())


def test_trap_11_mtp_loss_divides_by_all_positions_and_stops_at_documents(composed: Compose) -> None:
    """Eq. 24: the denominator is T although only T - k positions predict; masked targets do not change it."""
    config = composed("precision=fp32")
    module, step = module_of(config), step_of(config)
    total = 0.0
    for micro in step.micro_batches:
        with torch.no_grad():
            prediction = module.model(micro, with_mtp=True).predictions[0]
        logits = (prediction.hidden_BSD @ module.model.lm_head.weight.T).flatten(0, 1)
        total += F.cross_entropy(logits, prediction.targets_BS.flatten(), ignore_index=IGNORE, reduction="sum").item()
        ids = micro.document_ids_BT
        crosses = ids[:, 2:] != ids[:, :-2]
        assert (prediction.targets_BS[:, :-1][crosses] == IGNORE).all()
        assert (prediction.targets_BS[:, :-1][~crosses] == micro.targets_BT[:, 1:-1][~crosses]).all()
    record = module.take_step(step)
    positions = sum(micro.tokens_BT.numel() for micro in step.micro_batches)
    assert math.isclose(record.figures["mtp1_loss"], total / positions, rel_tol=1e-5)


def test_trap_12_softmax_scale_is_plain_without_yarn(composed: Compose) -> None:
    config = composed()
    attention = build_model(config).layers[0].self_attn
    assert attention.scale == (config.model.qk_nope_head_dim + config.model.qk_rope_head_dim) ** -0.5


def test_trap_16_recomputed_routing_is_the_same_at_ties(composed: Compose) -> None:
    """All experts tied: the routing made in the backward pass must choose as the forward pass did."""
    config = composed("precision=bf16")
    module, step = module_of(config), step_of(config)
    chosen: list[Tensor] = []
    for _, moe in module.model.moe_layers():
        with torch.no_grad():
            moe.router.weight.mul_(1e-12)
        moe.router.register_forward_hook(lambda _m, _i, routing: chosen.append(routing.experts_NK))
    layer = module.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    module.take_step(step._replace(micro_batches=step.micro_batches[:1]))
    first, again = chosen[0], chosen[-1]
    assert len(chosen) == 4, "three layers, one of them twice"
    assert torch.equal(first, again)


def test_trap_15_every_parameter_is_a_float32_master_under_bf16(composed: Compose) -> None:
    run_config = composed("precision=bf16")
    model = build_model(run_config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    routing = model.layers[1].mlp.router(torch.randn(4, 64).bfloat16(), torch.zeros(16), torch.zeros(4).long())
    assert routing.affinities_NE.dtype == routing.gates_NK.dtype == torch.float32


def test_trap_14_loggers_get_tokens_as_the_axis_across_a_resume(composed: Compose, tmp_path: Any) -> None:
    """Two micro-batches a step and a resume: the tokens logged are those trained on, each once."""
    seen: list[float] = []
    for tokens_cap in (3, 7):
        config = composed(
            f"run.dir={tmp_path}/run", f"trainer.max_steps={tokens_cap}", "run.checkpoint_every_tokens=256"
        )
        run = build_run(config)
        logger = RecordingLogger()
        run.trainer.loggers = [logger]
        run.trainer.fit(run.module, run.data, ckpt_path=run.resume_from, weights_only=True)
        seen += [row["tokens"] for row in logger.rows if "train/loss" in row]
        del run
        gc.collect()  # gives the run folder free
    assert seen == [256 * i for i in range(1, 8)]


class RecordingLogger:
    """Just enough of a Lightning logger."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.save_dir = self.name = self.version = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def __getattr__(self, name: str) -> Any:
        if name == "experiment":
            raise AttributeError(name)
        return lambda *a, **k: None


def test_max_violation_of_a_known_load() -> None:
    assert max_violation(torch.tensor([1, 2, 3, 6])) == 1.0
    assert max_violation(torch.tensor([5, 5])) == 0.0


def test_record_of_a_step_counts_bytes_of_the_targets() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    targets = torch.tensor([[1, 2, IGNORE, 2]])
    objective = Pretraining(token_bytes_V=torch.tensor([0, 2, 3]))
    denominators = objective.denominators(Step([MicroBatch(tokens, targets, tokens, tokens + 1, tokens)], 0, {}))
    scalars = {"nll": torch.tensor(8 * math.log(2)), "tokens": torch.tensor(4.0), **denominators}
    sums = Sums(Loads.zeros({}, torch.device("cpu")), {}, scalars)
    by_name, figures, _, _ = read(objective.statistics, sums, torch.tensor(1.0), {})
    assert by_name["tokens"] == 4
    assert figures["bpb"] == pytest.approx(1.0)
    assert figures["loss"] == pytest.approx(8 * math.log(2) / 3)


def test_real_tokens_align_with_mtp_positions() -> None:
    ids = torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]])
    batch = MicroBatch(ids, ids, ids, ids, ids)

    class Routed:
        experts_NK = torch.zeros(6, 1)

    assert real_tokens(batch, Routed()).tolist() == [[True, True, False], [True, True, True]]  # type: ignore[arg-type]


def test_synthetic_data_satisfies_resume() -> None:
    settings: dict[str, Any] = {
        "tokenizer": lambda: None, "cache_dir": None, "seed": 1, "sequence_length": 8, "total_tokens": 256,
        "micro_batch_size": 2, "micro_batches": 2, "isolate_documents": False, "fim": {},
    }  # fmt: skip
    steps = list(SyntheticData(**settings).train_dataloader())
    resumed = SyntheticData(**settings)
    resumed.restore(steps[2].state_after)
    assert torch.equal(
        next(iter(resumed.train_dataloader())).micro_batches[1].tokens_BT, steps[3].micro_batches[1].tokens_BT
    )


def test_clipping_takes_sparse_gradients_for_what_they_add_up_to():
    norms, found = [], []
    for sparse in (False, True):
        table, matrix = torch.nn.Embedding(9, 4, sparse=sparse), torch.nn.Linear(4, 3, bias=False)
        table.load_state_dict({"weight": torch.arange(36.0).view(9, 4)})
        torch.nn.init.ones_(matrix.weight)
        model = torch.nn.Sequential(table, matrix)
        for ids in ([1, 1, 5], [5, 8, 1]):  # rows come again, within a pass and in the next
            model(torch.tensor(ids)).square().sum().backward()
        taken = gradients(model)
        norms.append(norm_of(taken))
        clip_gradients(taken, norms[-1], 0.5)
        gradient = table.weight.grad
        found.append([gradient.to_dense() if sparse else gradient, matrix.weight.grad])
    assert norms[0] > 0.5
    torch.testing.assert_close(norms[1], norms[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(g.square().sum() for g in found[1]).sqrt() == pytest.approx(0.5, rel=1e-4)
