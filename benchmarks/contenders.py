"""Who is compared, and at which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.ours import OURS, SCHEMES, Own
from benchmarks.peers.table import NOT_RUN, PEERS, Format, Peer
from benchmarks.results import Outcome
from boa_edge.errors import UsageError
from toolchain.loading import SourceModel
from toolchain.recipe import load_recipe

_PLAIN = "it quantizes weights only; see the table without quantized activations"
OURS_PREFIX = "boa-edge "


@dataclass(frozen=True)
class Setting:
    """A format with the name it goes by; `asked` is the name before a group size that does not divide was halved.

    Attributes:
        schemes: how activations are quantized when it is evaluated, each a table of its own; None: not at all.
    """

    name: str
    asked: str
    format: Format
    schemes: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class Contender:
    """One line of the table: a peer, or a variant of ours (`peer` None)."""

    label: str
    variant: str
    peer: Peer | None
    calibrated: bool

    def refuses(self, setting: Setting) -> str | None:
        """Why the method has no such format, or None."""
        if self.peer is None:
            return None
        if self.peer.quantizes_activations != (setting.schemes != (None,)):
            return (
                "it is in the other tables: with quantized activations" if self.peer.quantizes_activations else _PLAIN
            )
        return self.peer.refuses(setting.format)


def own_contenders(table: Mapping[str, Own]) -> list[Contender]:
    """This project's methods."""
    return [Contender(OURS_PREFIX + variant, variant, None, own.calibrated) for variant, own in table.items()]


def contenders() -> list[Contender]:
    """All methods, ours first."""
    return own_contenders(OURS) + [
        Contender(label, peer.variant, peer, peer.calibrated) for label, peer in PEERS.items()
    ]


def fitting(name: str, source: SourceModel) -> Setting:
    """A setting by name, its group halved until it divides every linear's inputs."""
    recipe = load_recipe(f"{name}-rtn")
    weights = recipe.weights
    columns = {source.model.get_parameter(f"{module}.weight").shape[1] for module in source.spec.linear_inputs()}
    group = weights.group_size
    while group is not None and any(count % group for count in columns):
        group //= 2
    found = name if group is None else name.replace(f"g{weights.group_size}", f"g{group}")
    # Raises where not even the smallest group of a recipe divides.
    weights = load_recipe(f"{found}-rtn").weights
    assert weights.bits != "auto"
    schemes: tuple[str | None, ...] = (None,) if recipe.activations is None else SCHEMES
    return Setting(found, name, Format(weights.bits, weights.group_size, weights.symmetric), schemes)


def chosen(words: str) -> list[Contender]:
    """The methods that a filter leaves: those that have one of its words in their names, or the one that has it for its
    name. UsageError where a word matches none.
    """
    found = contenders()
    labels = [contender.label.lower() for contender in found]
    wanted: set[str] = set()
    for word in [word.strip().lower() for word in words.split(",") if word.strip()]:
        matching = {word} if word in labels else {label for label in labels if word in label}
        if not matching:
            raise UsageError(f"no method {word!r}", fix=f"There are: {', '.join(one.label for one in found)}")
        wanted |= matching
    return [one for one in found if not wanted or one.label.lower() in wanted]


def not_run(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Why others are in no table: what cannot run at all, then the peers that no run has asked for, and where. What was
    asked for and failed stands in the tables.
    """
    missing: dict[str, list[str]] = {}
    for title, facts in {outcome.title: outcome.facts for outcome in outcomes}.items():
        scheme = facts["activations"]
        form = Format(facts["bits"], facts["group_size"], facts["symmetric"])
        setting = Setting(facts["setting"], facts["asked"], form, (None,) if scheme is None else SCHEMES)
        there = {outcome.method for outcome in outcomes if outcome.title == title}
        for one in contenders():
            if one.peer and one.label not in there and one.refuses(setting) is None:
                missing.setdefault(one.label, []).append(title)
    return NOT_RUN | {f"{label} at {', '.join(titles)}": "no run of it there yet" for label, titles in missing.items()}
