"""What a comparison shows, in plain words, and never more than the test allows: a sentence, and its grounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featcache.config import is_imported
from featcache.wording import format_p_value, format_points, format_seconds

ArmNumbers = Mapping[str, Any]
PairNumbers = Mapping[str, Any]


def state_verdict(arms: Sequence[ArmNumbers], pairs: Sequence[PairNumbers]) -> str:
    """The comparison in one sentence: what is better, if anything is, and what the cheap way saves."""
    images = f"{arms[0]['images']:,} images"
    if not pairs:
        return f"{arms[0]['name']}: {say_share(arms[0])} of {images} are right; there is nothing to compare it with."
    called = {arm["name"]: arm["name"] + (" (cut short)" if arm["cut_short"] else "") for arm in arms}
    beaten = list_beaten(pairs)
    flattered = [pair for pair in pairs if pair["flattered"]]
    if beaten:
        claims = "; ".join(
            f"{called[name]} is better than {join_words([called[one] for one in worse])}"
            for name, worse in beaten.items()
        )
        by = f", by {say_size(pairs[0]['difference'])}" if len(arms) == 2 else ""
        return f"{claims} on these {images}{by}{say_saving(arms, pairs)}."
    if flattered:
        winner = flattered[0]["first"] if flattered[0]["difference"] > 0 else flattered[0]["second"]
        names = join_words([arm["name"] for arm in arms])
        why = "was chosen on the very images that are reported, which flatters it"
        return f"Nothing can be said of {names}: {winner} {why}."
    which = join_words(list(called.values())) if len(arms) == 2 else f"any of the {len(arms)} ways"
    if any(is_hidden_by_seeds(pair) for pair in pairs):
        n = min(len(arm["runs"]) for arm in arms)
        claim = f"With {n} seeds each no difference between {which} can be shown"
        return f"{claim}, though the {images} alone would show one: more seeds can tell."
    return f"No difference between {which} can be shown on {images}{say_saving(arms, pairs)}."


def state_grounds(arms: Sequence[ArmNumbers], pairs: Sequence[PairNumbers]) -> str:
    """The numbers behind the verdict, in a few sentences."""
    costs = state_costs(arms)
    if not pairs:
        return costs
    return f"{state_pair(arms, pairs[0]) if len(arms) == 2 else state_several(arms, pairs)} {costs}"


def state_pair(arms: Sequence[ArmNumbers], pair: PairNumbers) -> str:
    """Of two arms."""
    limit = "" if pair["claim"] != "none" else f" {say_limit(pair, arms)}"
    return (
        f"{say_share(arms[0])} and {say_share(arms[1])} are right{say_seeds(arms)}, a difference of "
        f"{format_points(pair['difference'])} (95 % interval {say_interval(pair)}; {say_test(pair)}).{limit}"
    )


def state_several(arms: Sequence[ArmNumbers], pairs: Sequence[PairNumbers]) -> str:
    """Of more than two."""
    best = max(arms, key=lambda arm: float(arm["accuracy"]))
    least = format_p_value(min(pair["p_adjusted"] for pair in pairs))
    shown = sum(pair["claim"] != "none" for pair in pairs)
    found = (
        f"a difference is shown of {shown} of {len(pairs)} pairs" if shown else f"of {len(pairs)} pairs none differs"
    )
    return (
        f"{best['name']} has the most right, {say_share(best)}{say_seeds(arms)}; {found} (smallest p-value, adjusted "
        f"by Holm for the number of pairs: {least})."
    )


def state_costs(arms: Sequence[ArmNumbers]) -> str:
    """What the ways took."""
    told = ", ".join(
        f"{arm['name']} {'took ' if not i else ''}{format_seconds(total(arm))}" for i, arm in enumerate(arms)
    )
    unknown = [arm["name"] for arm in arms if is_imported(arm["backbone"])]
    left_out = f", without what it took to make the features of {join_words(unknown)}" if unknown else ""
    return f"{told}{left_out}."


def list_beaten(pairs: Sequence[PairNumbers]) -> dict[str, list[str]]:
    """Who is shown to be better than whom."""
    beaten: dict[str, list[str]] = {}
    for pair in pairs:
        if pair["claim"] != "none":
            better, worse = ("first", "second") if pair["claim"] == "first" else ("second", "first")
            beaten.setdefault(pair[better], []).append(pair[worse])
    return beaten


def say_saving(arms: Sequence[ArmNumbers], pairs: Sequence[PairNumbers]) -> str:
    """What the cheapest way that none is shown to beat saves; or, where it is beaten, what the cheap one would."""
    if any(is_imported(arm["backbone"]) for arm in arms):
        return ""
    worse = {name for beaten in list_beaten(pairs).values() for name in beaten}
    candidates = arms if len(arms) == 2 else [arm for arm in arms if arm["name"] not in worse]
    cheap, dear = min(candidates, key=total), max(arms, key=total)
    if cheap is dear or not total(cheap) or total(dear) / total(cheap) < 1.2:
        return ""
    ratio = total(dear) / total(cheap)
    part = f"{1 / ratio:.0%}" if ratio < 10 else f"1/{ratio:,.0f}"
    share = f"{cheap['name']} took {part} of the time"
    return f"; {share}" if len(arms) == 2 else f"; {share} of {dear['name']}"


def say_test(pair: PairNumbers) -> str:
    """The test that decided, with its p-value."""
    p_value = format_p_value(pair["p_adjusted"])
    equal = p_value if p_value.startswith("<") else f"= {p_value}"
    if pair["p_seeds"] is None:
        one = pair["mcnemar"][0]
        if not one["only_first_right"] and not one["only_second_right"]:
            return f"they are right about the same images; exact McNemar p {equal}"
        only = f"{one['only_first_right']} images only {pair['first']} gets right, {one['only_second_right']} only"
        return f"{only} {pair['second']}; exact McNemar p {equal}"
    return f"p {equal} for images and seeds together"


def is_hidden_by_seeds(pair: PairNumbers) -> bool:
    """Whether the images alone would show a difference, and too few or too different seeds do not."""
    return pair["claim"] == "none" and pair["p_seeds"] is not None and pair["p_images"] < 0.05 <= pair["p_seeds"]


def say_interval(pair: PairNumbers) -> str:
    """The interval of a difference, with the seeds in it where there are several."""
    with_seeds = pair["interval_with_seeds"]
    low, high = (format_points(bound, unit=False) for bound in with_seeds or pair["interval"])
    return f"{low} to {high}"


def say_limit(pair: PairNumbers, arms: Sequence[ArmNumbers]) -> str:
    """What could have been shown."""
    n_seeds = min(len(arm["runs"]) for arm in arms)
    what = f"{arms[0]['images']:,} images" + (f" and {n_seeds} seeds each" if pair["p_seeds"] is not None else "")
    if pair["detectable_difference"] is None:
        return f"With {what}, no difference at all would be found."
    return f"With {what}, a difference of {say_size(pair['detectable_difference'])} or more would mostly be found."


def say_share(arm: ArmNumbers) -> str:
    """An accuracy."""
    return f"{arm['accuracy']:.1%}"


def say_size(difference: float) -> str:
    """A difference without its sign."""
    return format_points(abs(difference)).lstrip("+")


def say_seeds(arms: Sequence[ArmNumbers]) -> str:
    """How many seeds there are, if there are several."""
    counts = [len(arm["runs"]) for arm in arms]
    if max(counts) == 1:
        return ""
    if len(set(counts)) == 1:
        return f" on average over {counts[0]} seeds"
    return f" on average over {min(counts)} to {max(counts)} seeds"


def total(arm: ArmNumbers) -> float:
    """Seconds that it took, extraction included."""
    return float(arm["cost"]["seconds"]["total"])


def join_words(names: Sequence[str]) -> str:
    """Names as a sentence has them.

    >>> join_words(["a"]), join_words(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
