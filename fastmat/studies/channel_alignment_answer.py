"""The answer in two sentences, worded by the numbers: does it help, and must it depend on the input?

What counts is the worst of all attacks, mean recall (R@1 and R@10, both ways), as a change on the same images. A
correction helps a model where the whole 95 % interval of that change is above 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastmat.studies.channel_alignment_results import AlignmentResults, Estimate, Row

METRIC = "mean"


def answer(results: AlignmentResults) -> list[str]:
    """Two sentences; none where no attack met every image, or neither a static nor a dynamic correction is there."""
    changes = headline(results)
    if not changes:
        return []
    return [helps(results, changes), depends(results, changes)]


def headline(results: AlignmentResults) -> list[tuple[Row, str]]:
    """Of every model the static correction that calibration chose and the dynamic one, under the worst attack; with
    what each is called."""
    found = []
    for row in results.rows:
        if row.attack != "worst" or not row.change.get(METRIC):
            continue
        if row.correction in (results.chosen.get(row.model), results.dynamic):
            found.append((row, f"{named(row.correction)} on {row.model}"))
    return found


def helps(results: AlignmentResults, changes: Sequence[tuple[Row, str]]) -> str:
    told = [(change_of(row), name) for row, name in changes]
    up = [f"{name} {points(change)}" for change, name in told if change[1] > 0]
    down = [f"{name} {points(change)}" for change, name in told if change[2] < 0]
    best, best_name = max(told, key=lambda pair: pair[0][0])
    said = shift(results)
    if up:
        verdict = f"It helps in {len(up)} of {len(told)} cases: under the worst of all attacks mean recall changes by "
        verdict += listed(up)
        rest = len(told) - len(up) - len(down)
        verdict += f", and stays within its interval in {rest}" if rest else ""
        verdict += f", but falls with {listed(down)}" if down else ""
    else:
        verdict = (
            "It does not help: under the worst of all attacks, through the correction included, neither a static nor "
            f"the dynamic correction raises mean recall above its interval ({count(results)}; the most is {best_name}, "
            f"{points(best)})"
        )
        verdict += f", and it falls with {listed(down)}" if down else ""
    return f"{verdict}; {said}{cost(results, changes)}."


def shift(results: AlignmentResults) -> str:
    """What a constant explains at the projections where corrections may stand."""
    found = [
        layer.explained_by_shift[0]
        for layer in results.misalignment
        if layer.layer in ("projection output", "tokens to fusion") and layer.explained_by_shift
    ]
    if not found:
        return "the shift was not measured"
    return f"one constant vector explains {span([100 * share for share in found])} % of the shift where they stand"


def cost(results: AlignmentResults, changes: Sequence[tuple[Row, str]]) -> str:
    """Of the clean recall."""
    same = {(row.model, row.correction) for row, _ in changes}
    clean = [change_of(row)[0] for row in results.rows if row.attack == "none" and (row.model, row.correction) in same]
    return f", and clean mean recall changes by {span(clean, sign=True)} points"


def depends(results: AlignmentResults, changes: Sequence[tuple[Row, str]]) -> str:
    kinds = {label: choice.get("kind") for label, choice in results.config["corrections"].items()}
    control = next((label for label, kind in kinds.items() if kind == "constant_gate"), None)
    pairs = [
        (versus.model, versus.values[METRIC])
        for versus in results.versus
        if versus.attack == "worst" and versus.other == (control or results.chosen.get(versus.model))
    ]
    against = "the same gate with a constant input, a static map with as many trained parameters" if control else "it"
    told = [(model, value) for model, value in pairs if value is not None]
    if not told:
        return "Whether it must depend on the input was not asked: a gate and a static correction are both needed."
    better = [f"{points(value)} on {model}" for model, value in told if value[1] > 0]
    worse = [f"{points(value)} on {model}" for model, value in told if value[2] < 0]
    warning = not_adaptive(results)
    if better and any(change_of(row)[1] > 0 and row.correction == results.dynamic for row, _ in changes):
        said = f"It must depend on the input there: the dynamic correction beats {against} by {listed(better)}"
    elif better:
        said = (
            f"The input makes a difference, the dynamic correction beats {against} by {listed(better)}, but none that "
            "lifts it above the model without a correction on its own"
        )
    else:
        most = max(told, key=lambda pair: pair[1][0])
        said = (
            f"It need not depend on the input: the dynamic correction is no better than {against} (the most is "
            f"{points(most[1])} on {most[0]})"
        )
        said += f", and worse by {listed(worse)}" if worse else ""
    return f"{said}{warning}."


def not_adaptive(results: AlignmentResults) -> str:
    """What attacks that do not know of the dynamic correction would have shown, beside those that do."""
    changes = {
        (row.attack, row.model, row.made_on): change_of(row)
        for row in results.rows
        if row.correction == results.dynamic and row.made_on in ("uncorrected", "corrected")
    }
    found = {key: change for key, change in changes.items() if key[2] == "uncorrected"}
    if not found:
        return ""
    attack, model, _ = max(found, key=lambda key: found[key][0])
    same = found[attack, model, "uncorrected"]
    told = f"; made without it, {attack.upper()} would have shown {points(same)} on {model}"
    adaptive = changes.get((attack, model, "corrected"))
    return told + (f", made through it {points(adaptive)}" if adaptive else "")


def change_of(row: Row) -> Estimate:
    return row.change.get(METRIC) or (0.0, 0.0, 0.0)


def count(results: AlignmentResults) -> str:
    models = len({row.model for row in results.rows})
    return f"{models} models" if models > 1 else "1 model"


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
