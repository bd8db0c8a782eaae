"""The models that an objective may ask before a step."""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dsv3.build import build_model
from dsv3.checkpoint.loading import Loaded, load_run
from dsv3.config.known_parts import allowed
from dsv3.contracts import MicroBatch, Prompt, ReplaysRouting, Rollout, Tokenizer, Turn
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.shard import whole
from dsv3.inference.engines import source_of
from dsv3.model.decoder import Decoder
from dsv3.model.losses import token_losses
from dsv3.rollout.sampler import sample
from dsv3.rollout.turns import rollouts_of


class RunModels:
    """Of a run: its policy, the model that it began with, and teachers. Satisfies `dsv3.contracts.Models`.

    Every rank has whole copies of the frozen ones, and for sampling a whole copy of the policy.
    """

    def __init__(self, config: DictConfig, policy: Decoder, tokenizer: Tokenizer, mesh: Mesh | None = None) -> None:
        """`mesh`: the ranks that train together; None: one process."""
        self.config, self.policy, self.tokenizer, self.mesh = config, policy, tokenizer, mesh
        self._frozen: dict[str, Decoder] = {}
        self._copy: Decoder | None = None

    def reference(self) -> Decoder:
        """The policy as training began, frozen.

        Raises:
            ValueError: the run began with random weights.
        """
        start = self.config.run.init_from
        if start is None:
            raise ValueError(
                "run.init_from=null: this objective compares the model with the one that training begins with; "
                "run.init_from=RUN names it"
            )
        return self._loaded(start, key="run.init_from")

    def teacher(self, run: str) -> Decoder:
        """Another trained model, frozen.

        Raises:
            ValueError: its tokenizer is another one.
        """
        return self._loaded(run, key="objective.teachers")

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, max_tokens: int, temperature: float, experts: bool
    ) -> list[Rollout]:
        """See `dsv3.contracts.Models`. All ranks call this together.

        Raises:
            ValueError: as said there, or an episode's observation has no room.
        """
        if experts:
            self._refuse_routers_without_replay()
        source = source_of(self._whole_policy(), self.config, self.config.engine)

        def reply(asked: Sequence[Sequence[int]], drawn_by: Sequence[int]) -> list[Turn]:
            return sample(
                source,
                self.tokenizer,
                asked,
                drawn_by,
                max_tokens=max_tokens,
                temperature=temperature,
                experts=experts,
            )

        room = self.config.data.sequence_length + 1 - max_tokens
        return rollouts_of(prompts, seeds, reply, self.tokenizer, room=room)

    @torch.no_grad()
    def log_probs(self, model: nn.Module, micro: MicroBatch, *, temperature: float = 1.0) -> Tensor:
        """ln p of each target under softmax(logits / temperature), float32 [B, T]."""
        decoder: Any = model
        hidden_ND = decoder(micro, with_mtp=False).hidden_BTD.flatten(0, 1) / temperature
        losses_N = token_losses(hidden_ND, decoder.cast_head(), micro.targets_BT.flatten())
        return -losses_N.view_as(micro.targets_BT).float()

    def _loaded(self, run: str, *, key: str) -> Decoder:
        if run not in self._frozen:
            loaded = load_run(run, device=self.policy.device, allow=allowed(self.config))
            self._refuse_other_tokenizer(loaded, f"{key}={run}")
            self._frozen[run] = loaded.model.requires_grad_(False)
        return self._frozen[run]

    def _refuse_other_tokenizer(self, loaded: Loaded, where: str) -> None:
        if loaded.tokenizer().identity() != self.tokenizer.identity():
            raise ValueError(f"{where}: its tokenizer is another one, so that its probabilities are of other tokens")

    def _refuse_routers_without_replay(self) -> None:
        for name, moe in self.policy.moe_layers():
            if not isinstance(moe.router, ReplaysRouting):
                raise ValueError(
                    f"objective.replay_routing=true: the router of {name}, {type(moe.router).__name__}, has no `gates` "
                    "and cannot use recorded experts"
                )

    def _whole_policy(self) -> Decoder:
        """The policy itself in one process; with several ranks, a copy with all weights as they are now."""
        if self.mesh is None:
            return self.policy
        if self.mesh.sizes.stages > 1:
            raise ValueError(
                f"parallel.stages={self.mesh.sizes.stages}: must be 1; this objective samples text, which the stages "
                "of a pipeline cannot"
            )
        if self._copy is None:
            self._copy = build_model(self.config, init=False).to(self.policy.device)
        with torch.no_grad():
            own = self._copy.state_dict()
            for name, tensor in self.policy.state_dict().items():
                own[name].copy_(whole(tensor.detach()))
        return self._copy
