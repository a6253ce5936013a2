"""The model that a public name stands for, also where it stands for several.

Owns: finding it, and choosing among `targets`: the model, with its best mode, of the greatest expected quality less
`lambda_per_usd` times expected cost at current prices and load, above the key's quality floor. Does not own: what
models are worth (gateway/judge.py, router/utility.py), the mode of the one chosen (router/mode.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from gateway.auth import Key, check_model
from gateway.edge.extension import TargetArmReport, TargetReport
from gateway.errors import InvalidRequest, ModelNotFound
from router.utility import best_target

if TYPE_CHECKING:
    from gateway.ask.hear import Heard
    from gateway.config.schema import Config
    from gateway.models import Model


def find_model(name: str, models: Mapping[str, Model], key: Key, config: Config) -> Model:
    """The model of a public name that stands for one. Raises: ModelNotFound, PermissionDenied, InvalidRequest."""
    model = models.get(name)
    if model is None:
        behind = config.behind(name)
        if behind != [name]:
            check_model(key, name)
            raise InvalidRequest(f"{name!r} stands for several models here: name one of {behind}.", param="model")
        raise ModelNotFound(f"The model {name!r} does not exist; GET /v1/models lists those that do.", param="model")
    check_model(key, name)
    return model


def find_target(
    heard: Heard, models: Mapping[str, Model], key: Key, config: Config
) -> tuple[Heard, Model, TargetReport | None]:
    """The model of a request, what it says with that model's name, and why it is that one where there are several.

    Who may use the public name may use what it stands for. Raises: ModelNotFound, PermissionDenied.
    """
    ask = heard.ask
    if ask.named is not None:  # chosen before, and decided again
        return heard, models[ask.model], None
    names = config.behind(ask.model)
    if names == [ask.model]:
        return heard, find_model(ask.model, models, key, config), None
    check_model(key, ask.model)
    every = [models[name] for name in names]
    up = [model for model in every if any(slot.is_up for slot in model.slots)] or every
    told = _chosen(heard, up, key)
    return heard._replace(ask=replace(ask, model=told.model, named=ask.model)), models[told.model], told


def _chosen(heard: Heard, models: list[Model], key: Key) -> TargetReport:
    ask = heard.ask
    if len(models) == 1 or heard.pick is None:
        reason = "the only one that is up" if len(models) == 1 else "the first: nothing is known of the others"
        return TargetReport(name=ask.model, model=models[0].name, reason=reason, arms=())
    arms = heard.pick(key, models, None if ask.mode == "auto" else ask.mode)
    if not arms:  # a key that may use no mode: that is refused next
        return TargetReport(name=ask.model, model=models[0].name, reason="no mode is allowed", arms=())
    chosen = best_target(arms, key.quality_floor)
    weighs = key.lambda_per_usd or key.quality_floor
    return TargetReport(
        name=ask.model,
        model=chosen.model,
        reason="the best of quality less cost" if weighs else f"the best in {chosen.arm.mode} mode",
        arms=tuple(TargetArmReport(model=one.model, **one.arm._asdict()) for one in arms),
    )
