"""The whole model of a run on one rank, for what only a whole model can do: decoding, with caches."""

from dsv3.build import build_model
from dsv3.model.decoder import Decoder
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.strategy import SeveralRanks


def whole_model(module: LanguageModel) -> Decoder | None:
    """The model itself in one process. With several ranks, which must call this together, rank 0 gets a model of its
    own with copies of all weights, and the others None."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, SeveralRanks):
        return module.model
    state = strategy.whole_on_rank_zero(module.model.state_dict())
    if not strategy.is_global_zero:
        return None
    model = build_model(module.config, init=False).to(module.device)
    model.load_state_dict(state)
    return model
