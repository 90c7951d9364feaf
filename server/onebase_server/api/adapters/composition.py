"""Several adapters for one request: their texts are put together here, their weights by the engine."""

import hashlib
from collections.abc import Sequence

from onebase_adapters.errors import AdapterError
from onebase_engine.engine_info import TemplateInfo
from onebase_engine.request import Part
from onebase_server.api.adapters.directory import AdapterDirectory, Target
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.body import AdapterPart, Targeted


def target_of(adapters: AdapterDirectory, body: Targeted) -> Target:
    """Return the target that a body's `model` or `adapters` name. Raises AdapterError or InvalidRequestError."""
    base = adapters.resolve(None)
    if body.adapters is None:
        return adapters.resolve(body.model)
    if adapters.resolve(body.model) != base:
        raise InvalidRequestError(
            f"With adapters, model is the base, {base.name!r}; give all the adapters' names in adapters.",
            field="model",
        )
    found = [_find(adapters, base, part, f"adapters[{index}]") for index, part in enumerate(body.adapters)]
    for index, target in enumerate(found):
        for earlier in found[:index]:
            if earlier.adapter == target.adapter:
                raise InvalidRequestError(
                    f"{target.name!r} and {earlier.name!r} are the same adapter: name it once, with one weight.",
                    field=f"adapters[{index}].name",
                )
    weights = [part.weight for part in body.adapters]
    return found[0] if len(found) == 1 and weights[0] == 1 else _together(base, found, weights)


def _find(adapters: AdapterDirectory, base: Target, part: AdapterPart, field: str) -> Target:
    try:
        target = adapters.resolve(part.name)
    except AdapterError as error:
        error.field = f"{field}.name"
        raise
    if target == base:
        raise InvalidRequestError(f"{part.name!r} is the base, to which adapters are added.", field=f"{field}.name")
    if not part.weight:
        raise InvalidRequestError(f"{part.name!r} has no weight: leave it out.", field=f"{field}.weight")
    if target.template is not None and part.weight != 1:
        raise InvalidRequestError(
            f"{part.name!r} is a text, which has no weight: its weight can only be 1.", field=f"{field}.weight"
        )
    return target


def _together(base: Target, targets: Sequence[Target], weights: Sequence[float]) -> Target:
    """Texts are nested, the first outermost, and are in the prompt before the engine sees it: its parts are the
    others. A single one of these that is left as it is needs no composition."""
    texts = [target.template for target in targets if target.template is not None]
    parts = tuple(
        Part(target.adapter or "", weight, target.name)
        for target, weight in zip(targets, weights, strict=True)
        if target.template is None
    )
    chats = {target.chat_template for target in targets} - {None}
    if len(chats) > 1:
        raise InvalidRequestError(
            "These adapters bring different chat templates: no prompt suits them all.", field="adapters"
        )
    alone = len(parts) == 1 and parts[0].weight == 1
    return Target(
        " + ".join(
            target.name if weight == 1 else f"{weight:g} {target.name}"
            for target, weight in zip(targets, weights, strict=True)
        ),
        (parts[0].digest if alone else _digest(parts)) if parts else base.adapter,
        sum(target.virtual_tokens for target in targets),
        _nested(texts) if texts else None,
        next((target.head for target in targets if target.head is not None), None),
        next(iter(chats), None),
        composed=True,
        parts=() if alone else parts,
    )


def _nested(texts: Sequence[TemplateInfo]) -> TemplateInfo:
    return TemplateInfo(
        "".join(text.before for text in texts),
        "".join(text.after for text in reversed(texts)),
        tuple(turn for text in texts for turn in text.messages),
        tuple(dict.fromkeys(stop for text in texts for stop in text.stop)),
    )


def _digest(parts: Sequence[Part]) -> str:
    """Names a composition after what it is made of, so that all its requests share slot and pages."""
    content = "".join(f"{part.digest} {part.weight.hex()}\n" for part in parts)
    return hashlib.sha256(b"composition\n" + content.encode()).hexdigest()
