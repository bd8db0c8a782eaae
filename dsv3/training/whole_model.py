"""The whole model of a run on one rank, for what only a whole model can do: decoding, with caches."""

from dsv3.build import build_model
from dsv3.distributed.agree import gathered
from dsv3.distributed.shard import whole
from dsv3.model.decoder import Decoder
from dsv3.training.lightning_module import LanguageModel


def whole_model(module: LanguageModel) -> Decoder | None:
    """The model itself in one process. With several ranks, which must call this together, rank 0 gets a model of its
    own with copies of all weights, and the others None."""
    if module.mesh is None:
        return module.model
    state = {name: whole(tensor.detach()) for name, tensor in module.model.state_dict().items()}
    if module.mesh.sizes.stages > 1:
        own = {name: tensor.cpu() for name, tensor in state.items()} if module.mesh.data_rank == 0 else {}
        for of_rank in gathered(own):
            state |= of_rank
    if not module.folder.writes:
        return None
    config = module.config.copy()
    config.parallel = {"_target_": "dsv3.distributed.parallel.OneProcess"}
    model = build_model(config, init=False).to(module.device)
    model.load_state_dict(state)
    return model
