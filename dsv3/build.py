"""From a composed config to objects. The only place that instantiates configs."""

from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dsv3.callbacks import (
    EMA,
    Benchmarks,
    Guard,
    Interruption,
    MeasureQuantisation,
    Monitor,
    Pictures,
    Progress,
    Record,
    SaveCheckpoints,
    Validate,
)
from dsv3.compile import compile_parts
from dsv3.contracts import Data, MeasuresQuantisation, Tokenizer, is_precision_state
from dsv3.layers import SwiGLU
from dsv3.lightning_module import LanguageModel
from dsv3.model import Block, Decoder, init_weights
from dsv3.moe import MoE
from dsv3.planning.recipe import FORMATS
from dsv3.process import set_up_process
from dsv3.resume import prepare
from dsv3.run_folder import RunFolder, find_run, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SENT_AS = FORMATS["fp8"]
"""Formats in which a token would travel to its experts and back: the report's, whatever this run computes in."""


def build_model(config: DictConfig, *, init: bool = True) -> Decoder:
    """Assemble the decoder that the config describes, with weights drawn from `seed` (or unset: `init=False`)."""
    shapes = config.model
    torch.manual_seed(config.seed)  # what plugins draw when they are built, such as a hash table
    precision = instantiate(config.precision)
    memory, attention, router, balancing, experts, dispatch, mtp = (
        instantiate(config[kind], _convert_="all")
        for kind in ("memory", "attention", "router", "balancing", "experts", "dispatch", "mtp")
    )

    def mlp(layer: int) -> MoE | SwiGLU:
        if layer < shapes.n_dense_layers:
            return SwiGLU(dim=shapes.dim, inter_dim=shapes.inter_dim, precision=precision)
        shared = shapes.n_shared_experts * shapes.moe_inter_dim
        return MoE(
            router=router(),
            balancing=balancing(),
            dispatch=dispatch,
            experts=experts(precision=precision),
            shared_experts=SwiGLU(dim=shapes.dim, inter_dim=shared, precision=precision) if shared else None,
        )

    def block(layer: int) -> Block:
        return Block(dim=shapes.dim, norm_eps=shapes.norm_eps, attention=attention(precision=precision), mlp=mlp(layer))

    model = Decoder(
        vocab_size=shapes.vocab_size,
        dim=shapes.dim,
        n_layers=shapes.n_layers,
        norm_eps=shapes.norm_eps,
        tie_embeddings=shapes.tie_embeddings,
        isolate_documents=config.data.isolate_documents,
        memory=memory,
        block=block,
        mtp=mtp,
        precision=precision,
    )
    if init:
        init_weights(model, std=shapes.init_std, seed=config.seed)
    return model


def build_data(config: DictConfig, *, tokenizer: Tokenizer | None = None) -> Data:
    """The datamodule, set up; with the tokenizer that is given (a trained model's own), or else the config's."""
    factory = instantiate(config.tokenizer, _convert_="all") if tokenizer is None else lambda **_: tokenizer
    data = instantiate(config.data, _convert_="all")(tokenizer=factory)
    data.setup("fit")
    return data


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Bytes that each token stands for, 0 for special and unused ones, int64 [V]."""
    lengths = [len(tokenizer.decode_bytes([i])) if i < tokenizer.vocab_size else 0 for i in range(vocab_size)]
    return torch.tensor(lengths)


@dataclass
class Run:
    """All that training needs, ready to fit."""

    config: DictConfig
    folder: RunFolder
    data: Data
    module: LanguageModel
    trainer: lightning.Trainer
    interruption: Interruption
    resume_from: Path | None


def build_run(config: DictConfig) -> Run:
    """Prepare the run folder (see `dsv3.resume`) and assemble data, model, callbacks and Trainer."""
    from dsv3.watch.facts import write_facts  # which builds models on the meta device, by this module

    set_up_process()
    if config.trainer.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda: torch sees no GPU here; trainer.accelerator=cpu trains without one")
    problems = instantiate(config.precision).check(torch.device(config.trainer.accelerator))
    if problems:
        raise ValueError("; ".join(problems))
    with torch.device("meta"):  # a part that cannot be built says so before anything is read or written
        build_model(config, init=False)
    folder = RunFolder(config.run.dir)
    resume_from = prepare(config, folder)
    start = load_run(config.run.weights_from) if config.run.weights_from else None
    data = build_data(config, tokenizer=start.tokenizer() if start else None)
    data.tokenizer.save(str(folder.tokenizer_path))
    model = build_model(config)
    write_facts(config, model, folder)
    if config.compile:
        compile_parts(model)
    if start:
        begin_with(model, start)
    module = LanguageModel(
        model,
        optimizer=instantiate(config.optimizer, _convert_="all"),
        schedule=instantiate(config.schedule, _convert_="all"),
        grad_clip=config.grad_clip,
        total_tokens=config.run.tokens,
        token_bytes_V=token_bytes(data.tokenizer, config.model.vocab_size),
        recompute=config.recompute,
    )
    if resume_from is not None:
        data.restore(load_checkpoint(resume_from)["dsv3"]["data_state"])
    interruption = Interruption()
    trainer = lightning.Trainer(
        **instantiate(config.trainer, _convert_="all"),
        max_epochs=1,
        default_root_dir=folder.path,
        callbacks=build_callbacks(config, model, folder, interruption),
        logger=instantiate(config.logger)(save_dir=folder.path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    return Run(config, folder, data, module, trainer, interruption, resume_from)


def build_callbacks(
    config: DictConfig, model: Decoder, folder: RunFolder, interruption: Interruption
) -> list[lightning.Callback]:
    """In the order in which they act."""
    ema, record = EMA(decay=config.ema.decay), Record(folder=folder)
    validate = Validate(every_tokens=config.run.validation_tokens, folder=folder, ema=ema)
    monitor = Monitor(
        every_tokens=config.monitor.every_tokens,
        long_tokens=config.run.checkpoint_tokens,
        n_groups=config.model.n_groups,
        dispatch_bytes=config.model.dim * (SENT_AS.dispatch + SENT_AS.combine),
        folder=folder,
    )
    save = SaveCheckpoints(
        every_tokens=config.run.checkpoint_tokens,
        flush_tokens=config.monitor.every_tokens,
        keep=config.run.keep_checkpoints,
        folder=folder,
        interruption=interruption,
    )
    return [
        interruption,
        Guard(**config.guard, folder=folder),
        ema,
        record,
        monitor,
        *quantisation(config, model, folder),
        validate,
        Benchmarks(config=config, folder=folder),
        save,
        Pictures(every_tokens=config.run.checkpoint_tokens, folder=folder),
        Progress(total_tokens=config.run.tokens, record=record, validate=validate),
    ]


def quantisation(config: DictConfig, model: Decoder, folder: RunFolder) -> list[MeasureQuantisation]:
    """The callback that measures what number formats lose, where it is asked for.

    Raises:
        ValueError: the precision has nothing to measure.
    """
    every = config.diagnostics.quantisation_tokens
    if not every:
        return []
    if not isinstance(model.precision, MeasuresQuantisation):
        raise ValueError(
            f"diagnostics.quantisation_tokens={every}: {config.precision._target_} does not measure what it quantises"
        )
    return [MeasureQuantisation(every_tokens=every, folder=folder, precision=model.precision)]


def begin_with(model: Decoder, start: "Loaded") -> None:
    """Take over the weights and the routing state of a trained model. What its precision remembered is left behind.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if is_precision_state(name)}
    taken = {name: tensor for name, tensor in start.model.state_dict().items() if not is_precision_state(name)}
    try:
        model.load_state_dict(taken | own)
    except RuntimeError as error:
        raise ValueError(f"run.weights_from={start.file}: another model: {error}") from None


@dataclass
class Loaded:
    """A trained model read back from its run folder."""

    config: DictConfig
    folder: RunFolder
    file: Path
    model: Decoder
    tokens: int
    ema_weights: dict[str, Tensor]

    def tokenizer(self) -> Tokenizer:
        """The one that the run was trained with, from its folder."""
        loader = OmegaConf.load(ROOT / "conf" / "saved_tokenizer.yaml")
        return instantiate(loader, directory=str(self.folder.tokenizer_path))


def load_run(checkpoint: str | Path) -> Loaded:
    """Build the model of a run folder, or of one checkpoint file in it, with its live weights, for inference."""
    folder, file = find_run(checkpoint)
    config = OmegaConf.load(folder.config_path)
    assert isinstance(config, DictConfig)
    state = load_checkpoint(file)
    model = build_model(config, init=False)
    prefix = "model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state["state_dict"].items() if k.startswith(prefix)})
    return Loaded(
        config, folder, file, model.eval(), state["dsv3"]["tokens_seen"], state["callbacks"]["EMA"]["weights"]
    )
