"""Relations of a run with several ranks: how they are divided, and how many micro-batches each of them gets."""

from collections.abc import Iterator

from dsv3.config.facts import MODEL_EXPERTS, Facts, Number
from dsv3.config.micro_batches import Dealt, rows_of_steps
from dsv3.config.problems import Problem


def several_devices(facts: Facts) -> Iterator[Problem]:
    for key in ("trainer.devices", "trainer.num_nodes"):
        if (number := facts.number(key)) and number.value < 1:
            yield Problem(*number, "must be at least 1")
        elif number and number.value > 1 and facts.view.choices.get("parallel") == "none":
            yield Problem(*number, "must be 1 with parallel=none: choose parallel=sharded, experts or pipeline")


def world_of(facts: Facts) -> int:
    """Ranks of the run, as far as the keys are numbers."""
    devices, nodes = facts.number("trainer.devices"), facts.number("trainer.num_nodes")
    return int((devices.value if devices else 1) * (nodes.value if nodes else 1))


def ranks_divide(facts: Facts) -> Iterator[Problem]:
    """world = stages x replicas x experts; experts = nodes x local (dsv3.distributed.parallel)."""
    world = world_of(facts)
    stages, experts = facts.number("parallel.stages"), facts.number("parallel.experts")
    if world < 1 or (stages and stages.value < 1) or (experts and experts.value < 1):
        return
    if stages and world % stages.value:
        yield Problem(*stages, f"must divide the number of devices, {world}")
        return
    data = world // (stages.value if stages else world)
    if experts and data % experts.value:
        yield Problem(*experts, f"must divide the {data:.0f} devices of a stage")
        return
    sharing = experts.value if experts else data
    if (nodes := facts.number("parallel.nodes")) and nodes.value > 0 and sharing % nodes.value:
        yield Problem(*nodes, f"must divide the {sharing:.0f} devices that share the experts")
    if (count := facts.number(MODEL_EXPERTS)) and count.value % sharing:
        share = f"must divide {count.key}={count.value} among the {sharing:.0f} devices that share the experts"
        yield Problem(*(experts or Number("parallel.experts", sharing)), share)


def micro_batches_run(facts: Facts) -> Iterator[Problem]:
    """Every step gives a pipeline as many micro-batches as its schedule can run."""
    size, schedule = facts.number("data.micro_batch_size"), facts.value("parallel.schedule")
    world, stages = world_of(facts), facts.number("parallel.stages")
    ranks = int(stages.value) if stages else world
    batch = "data.global_batch_size"
    if not size or size.value < 1 or not isinstance(schedule, str) or any(key.startswith(batch) for key in facts.skip):
        return
    if ranks < 1 or world < ranks or world % ranks:
        return
    dealt = Dealt(rows_of_steps(facts.view.value(batch)), world // ranks, ranks, schedule)
    if not (refused := dealt.refused(int(size.value))):
        return
    rows, why = refused
    better = dealt.best(int(size.value))
    remedy = f"write {size.key}={better}" if better else f"raise {batch}.peak, or write parallel.schedule=zbv"
    yield Problem(*size, f"in a step of {rows} rows, parallel.schedule={schedule} {why}: {remedy}")
