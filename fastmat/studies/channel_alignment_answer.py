"""The answer in two sentences, worded by the numbers: does it help, and must it depend on the input?

What counts is a change of mean recall (R@1 and R@10, both ways) on the same images, of the static correction that the
calibration pairs choose and of the dynamic one. A correction helps a model where the whole 95 % interval is above 0
under the worst of all attacks there are; where it is under the worst of those on all images alone, it helps against
weaker attacks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastmat.studies.channel_alignment_results import AlignmentResults, Estimate

METRIC = "mean"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A correction of a model. worst: its change under the worst attack on all images; all: of all attacks, None: they
    are the same, or not every attack was made; clean: on clean data."""

    model: str
    correction: str
    worst: Estimate
    all: Estimate | None
    clean: Estimate
    tried: bool

    @property
    def name(self) -> str:
        return f"{named(self.correction)} on {self.model}"

    @property
    def weakly(self) -> bool:
        return self.worst[1] > 0

    @property
    def helps(self) -> bool:
        return self.weakly and self.tried and (self.all is None or self.all[1] > 0)


def answer(results: AlignmentResults) -> list[str]:
    """Two sentences; none where no attack met every image, or neither a static nor a dynamic correction is there."""
    cases = headline(results)
    return [helps(results, cases), depends(results, cases)] if cases else []


def headline(results: AlignmentResults) -> list[Case]:
    """Of every model the static correction that calibration chose, and the dynamic one."""
    change = {
        (row.model, row.correction, row.attack): row.change[METRIC]
        for row in results.rows
        if row.made_on == "" and row.change.get(METRIC)
    }
    several = any(row.attack == "all" for row in results.rows)
    found = []
    for model, correction, attack in change:
        if attack != "worst" or correction not in (results.chosen.get(model), results.dynamic):
            continue
        worst, clean = change[model, correction, "worst"], change[model, correction, "none"]
        whole = change.get((model, correction, "all"))
        assert worst is not None and clean is not None
        tried = whole is not None or not several
        found.append(Case(model=model, correction=correction, worst=worst, all=whole, clean=clean, tried=tried))
    return found


def helps(results: AlignmentResults, cases: Sequence[Case]) -> str:
    strong = [case for case in cases if case.helps]
    weak = [case for case in cases if case.weakly and not case.helps]
    down = [f"{case.name} ({points(case.worst)})" for case in cases if case.worst[2] < 0]
    both = len({case.correction == results.dynamic for case in cases}) == 2
    who = "neither the chosen static nor the dynamic correction" if both else "no correction"
    if strong:
        said = (
            f"It helps in {len(strong)} of {len(cases)} cases: under the worst of all attacks mean recall changes by "
        )
        said += listed([f"{points(case.all or case.worst)} ({case.name})" for case in strong])
        said += f"; against weaker attacks alone with {weaker(weak)}" if weak else ""
    elif weak:
        said = (
            f"It helps in {len(weak)} of {len(cases)} cases, and against weaker attacks only: under the worst of those "
            f"on all images mean recall changes by {weaker(weak)}"
        )
    else:
        most = max(cases, key=lambda case: case.worst[0])
        said = (
            f"It does not help: under the worst attack, made through the correction, without it or elsewhere, {who} "
            f"raises mean recall above its interval (the most: {points(most.worst)}, {most.name})"
        )
    said += f"; it falls with {listed(down)}" if down else ""
    clean = span([case.clean[0] for case in cases], sign=True)
    return f"{said}; {shift(results)}, and clean mean recall changes by {clean} points."


def weaker(cases: Sequence[Case]) -> str:
    """What the worst on all images shows, and what is left of it under all attacks."""
    return listed(
        [
            f"{points(case.worst)} ({case.name}; of all attacks together: "
            f"{points(case.all) if case.all is not None else 'not tried'})"
            for case in cases
        ]
    )


def shift(results: AlignmentResults) -> str:
    """What a constant explains where corrections stand."""
    layers = {"image": ("image", "projection output"), "text": ("text", "projection output")}
    places = [layers.get(site, ("image", "tokens to fusion")) for site in results.config["sites"]]
    found = [
        layer.explained_by_shift[0]
        for layer in results.misalignment
        if (layer.encoder, layer.layer) in places and layer.explained_by_shift
    ]
    if not found:
        return "the shift was not measured"
    return f"one constant vector explains {span([100 * share for share in found])} % of the shift there"


def depends(results: AlignmentResults, cases: Sequence[Case]) -> str:
    kinds = {label: choice.get("kind") for label, choice in results.config["corrections"].items()}
    control = next((label for label, kind in kinds.items() if kind == "constant_gate"), None)
    found: Mapping[str, dict[str, Estimate]] = {"worst": {}, "all": {}}
    for versus in results.versus:
        value = versus.values.get(METRIC)
        if versus.attack in found and versus.other == (control or results.chosen.get(versus.model)) and value:
            found[versus.attack][versus.model] = value
    if not found["worst"]:
        return "Whether it must depend on the input was not asked: a gate and a static correction are both needed."
    against = "its constant-input control, a static map with as many trained parameters" if control else "it"
    better = {model: value for model, value in found["worst"].items() if value[1] > 0}
    stays = {model: value for model, value in found["all"].items() if value[1] > 0}
    helped = [case.model for case in cases if case.helps and case.correction == results.dynamic]
    if better and set(helped) & (set(stays) if found["all"] else set(better)):
        said = f"It must depend on the input there: the dynamic correction beats {against} by {per_model(better)}"
    elif better:
        said = f"What there is of it needs the input: the dynamic correction beats {against} by {per_model(better)}"
        if found["all"]:
            said += f" under the worst attack on all images, by {per_model(found['all'])} under all attacks together"
    else:
        model, most = max(found["worst"].items(), key=lambda item: item[1][0])
        first = "It need not depend" if any(case.weakly for case in cases) else "Nor does it help to depend"
        said = (
            f"{first} on the input: the dynamic correction is no better than {against} (the most: "
            f"{points(most)} on {model})"
        )
    return f"{said}{not_adaptive(results)}."


def per_model(values: Mapping[str, Estimate]) -> str:
    return listed([f"{points(value)} on {model}" for model, value in values.items()])


def not_adaptive(results: AlignmentResults) -> str:
    """What attacks that do not know of the dynamic correction would have shown, beside those that do."""
    changes = {
        (row.attack, row.model, row.made_on): row.change[METRIC]
        for row in results.rows
        if row.correction == results.dynamic and row.change.get(METRIC)
    }
    pairs = [
        (without, through, attack, model)
        for (attack, model, made_on), without in changes.items()
        if made_on == "uncorrected" and without and (through := changes.get((attack, model, "corrected")))
    ]
    if not pairs:
        return ""
    without, through, attack, model = max(pairs, key=lambda pair: pair[0][0] - pair[1][0])
    return (
        f"; made without it, {attack.upper()} would have shown {points(without)} on {model}, made through it "
        f"{points(through)}"
    )


def named(label: str) -> str:
    return label.replace("_", " ")


def points(estimate: Estimate) -> str:
    """
    >>> points((1.25, -0.5, 3.0))
    '+1.2 points [-0.5, 3.0]'
    """
    value, low, high = estimate
    return f"{value:+.1f} points [{low:.1f}, {high:.1f}]"


def span(values: Sequence[float], *, sign: bool = False) -> str:
    """
    >>> span([3.0, 1.0]), span([1.0, -1.0], sign=True), span([2.0])
    ('1.0 to 3.0', '-1.0 to +1.0', '2.0')
    """
    texts = [f"{value:+.1f}" if sign else f"{value:.1f}" for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def listed(parts: Sequence[str]) -> str:
    """
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
