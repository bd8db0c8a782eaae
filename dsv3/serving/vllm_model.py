"""A run served by vLLM: exported, started, and put behind the same prompts and scheduler."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

import torch

from dsv3.build import load_tokenizer
from dsv3.checkpoint.huggingface import export_run
from dsv3.checkpoint.loading import is_hf_checkpoint
from dsv3.checkpoint.onnx.onnx_manifest import is_onnx_export
from dsv3.checkpoint.run_folder import find_run
from dsv3.evaluation.benchmarks.models import TextModel
from dsv3.runtime import device_named
from dsv3.serving.json_grammar import JSONGrammars
from dsv3.serving.scheduler import Limits, Scheduler
from dsv3.serving.served_model import ModelSettings, NativePrompts, Served, name_of
from dsv3.serving.vllm_engine import VLLMEngine
from dsv3.serving.vllm_process import MODEL, VLLMProcess, private_folder, python

STARTS_WITHIN = 900.0
"""Seconds; vLLM compiles the model first."""
LACKS = ("logprobs", "response_format")
SHARD_BYTES = 5 * 10**9


def open_vllm(
    checkpoint: str, settings: ModelSettings, limits: Limits, wake: Callable[[], None], flags: Sequence[str]
) -> Served:
    """Start vLLM for a run and wait until it answers. `flags`: further ones of vLLM's server.

    Raises:
        ValueError: vLLM is not installed, or Hugging Face's format cannot hold the model.
        FileNotFoundError: `checkpoint` is not a run's. RuntimeError: vLLM ends or does not answer.
    """
    python()
    if is_hf_checkpoint(checkpoint) or is_onnx_export(checkpoint):
        raise ValueError(f"engine=vllm: checkpoint={checkpoint}: must be a run; it is exported for vLLM")
    run, _ = find_run(checkpoint)
    config, cpu = run.config(), device_named(settings.device).type == "cpu"
    tokenizer, length = load_tokenizer(run.tokenizer_path), config.data.sequence_length
    model = TextModel(
        tokenizer, name=name_of(checkpoint), max_length=length, fim_order=config.data.fim.order, chat=False
    )
    with ExitStack() as undone:
        folder = private_folder()
        undone.callback(shutil.rmtree, folder, ignore_errors=True)
        export_run(
            checkpoint,
            folder / MODEL,
            weights="ema" if settings.weights == "ema" else "live",
            mtp=False,
            dtype=torch.float32,
            max_shard_bytes=SHARD_BYTES,
        )
        process = VLLMProcess(
            folder,
            length=length,
            texts=limits.slots,
            dtype="float32" if cpu else "bfloat16",
            threads=torch.get_num_threads(),
            flags=flags,
        )
        undone.callback(process.close)
        process.wait(STARTS_WITHIN)
        undone.pop_all()
    engine = VLLMEngine(process, decode=model.decode)
    return Served(
        name=model.name,
        model=model,
        steady=nullcontext(),
        prompts=NativePrompts(model),
        backend=None,
        scheduler=Scheduler(engine, limits, wake=wake),
        grammars=JSONGrammars(
            run.tokenizer_path / "tokenizer.json", vocabulary=config.model.vocab_size, eos=tokenizer.eos
        ),
        vocabulary=config.model.vocab_size,
        drafts=0,
        most_drafts=0,
        lacks=LACKS,
        close=engine.close,
    )
