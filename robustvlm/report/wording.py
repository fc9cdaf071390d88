"""Numbers and findings in plain words; the terminal and the HTML report say the same things with these."""

from __future__ import annotations

import unicodedata

from robustvlm.certify.rounding import floor_to
from robustvlm.report.goal_words import GoalWords, goal_words
from robustvlm.runs.summary import EpsSummary, Estimate, Summary
from robustvlm.stats import Mean, Rate

NORMS = {"Linf": "L∞", "L2": "L₂"}

DASH = "\N{EM DASH}"
RANGE = "\N{EN DASH}"


def plain(text: object, limit: int = 200) -> str:
    """Return `text` on one line without control or direction-changing characters, cut to `limit` characters.

    Class names, paths and model specs come from outside; they must not move the cursor or reverse a line.

    Example:
        >>> plain("a\\x1b[31m\\nb")
        'a [31m b'
        >>> plain("abcdef", limit=4)
        'abc…'
    """
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in str(text))
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def sentence(text: str) -> str:
    """Return `text` with a capital first letter.

    Example:
        >>> sentence("not seen as Big Ben")
        'Not seen as Big Ben'
    """
    return text[:1].upper() + text[1:]


def percent(value: float | None) -> str:
    """Return a share in [0, 1] as a percentage with one decimal, or a dash for none.

    Example:
        >>> (percent(0.8264), percent(1.0), percent(None))
        ('82.6%', '100%', '—')
    """
    if value is None:
        return DASH
    return "0%" if value == 0 else "100%" if value == 1 else f"{100 * value:.1f}%"


def interval(rate: Rate) -> str:
    """Return the interval of a rate as percentages, rounded outwards: what is printed covers what was computed.

    Example:
        >>> interval(Rate(successes=8, total=10, value=0.8, low=0.4439, high=0.9748)).replace(RANGE, " to ")
        '44.3 to 97.5%'
    """
    low, high = floor_to(rate.low), -floor_to(-rate.high)
    return f"{percent(low).removesuffix('%')}{RANGE}{percent(high)}"


def norm_name(norm: str) -> str:
    """Return the written form of a norm: L∞ for "Linf"."""
    return NORMS.get(norm, plain(norm))


def ball(norm: str, eps_text: str) -> str:
    """Say in words which perturbations are allowed.

    Example:
        >>> ball("Linf", "2/255")
        'A change of at most 2/255 in every colour value (L∞)'
    """
    eps = plain(eps_text)
    if norm == "Linf":
        return f"A change of at most {eps} in every colour value (L∞)"
    if norm == "L2":
        return f"A change of Euclidean length at most {eps} over the image (L₂)"
    return f"A change of {norm_name(norm)} size at most {eps}"


def duration(seconds: float) -> str:
    """Return a time span as a person would say it.

    Example:
        >>> [duration(s) for s in (0.234, 12.34, 125, 7384)]
        ['0.23 s', '12.3 s', '2 min 5 s', '2 h 3 min']
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(iso: str) -> str:
    """Return an ISO time as a person would write it.

    Example:
        >>> moment("2025-01-31T12:00:05+00:00")
        '2025-01-31 12:00:05 UTC'
    """
    return plain(iso, 40).replace("T", " ").replace("+00:00", " UTC")


def headline(summary: Summary) -> EpsSummary | None:
    """Return the largest eps, the one the verdict speaks of; None when no eps was run."""
    return summary.per_eps[-1] if summary.per_eps else None


def words_of(summary: Summary) -> GoalWords:
    """Return the words of the run's goal."""
    return goal_words(plain(summary.goal, 80), can_reject=summary.can_reject, min_cos=summary.min_cos)


def verdict(summary: Summary) -> str:
    """Return the outcome of a run in one plain sentence, with its interval."""
    at = headline(summary)
    if summary.unfinished:
        return unfinished(summary)
    if summary.images.evaluated == 0 or at is None:
        return "No image was evaluated, so nothing can be said."
    words, rate = words_of(summary), at.attack_success_rate
    if at.fooled + at.robust + at.undecided == 0:
        return words.nothing
    if rate.total == 0:
        return "The attacks broke on every image, so nothing is known about the model's robustness."
    start, worst = ball(summary.norm, at.eps_text), _worst_case(len(at.per_attack))
    if rate.successes == 0:
        whom = words.whom if words.whom != "images" else "images of this run"
        return (
            f"No attack found {start[0].lower()}{start[1:]} to {words.effect} any of the {rate.total:,} {whom}"
            f" ({worst}95% interval of the success rate {interval(rate)})."
        )
    return (
        f"{start} is enough to {words.effect} {percent(rate.value)} of the {words.whom}"
        f" ({rate.successes:,} of {rate.total:,}; {worst}95% interval {interval(rate)})."
    )


def _worst_case(attacks: int) -> str:
    return f"worst case over {attacks} attacks per image; " if attacks > 1 else ""


def cosines(at: EpsSummary, goal: str, *, unfinished: bool = False) -> str:
    """Say what became of the cosine that a feature goal is about, or has so far; "" for other goals."""
    if at.cosine is None:
        return ""
    what = "to the target" if goal.partition(":")[2] else "to the clean feature (FCS)"
    return (
        f"{'So far, mean' if unfinished else 'Mean'} cosine {what}: {number(at.cosine.clean)} unperturbed,"
        f" {number(at.cosine.attacked)} under attack at"
        f" {plain(at.eps_text, 20)} (95% intervals by Student's t over {at.cosine.attacked.total:,} images)."
    )


def number(mean: Mean) -> str:
    """Return a mean with its interval.

    Example:
        >>> number(Mean(total=9, value=0.5, low=0.4, high=0.6)).replace(RANGE, " to ")
        '0.500 (0.400 to 0.600)'
    """
    if mean.value is None:
        return DASH
    reach = "" if mean.low is None or mean.high is None else f" ({mean.low:.3f}{RANGE}{mean.high:.3f})"
    return f"{mean.value:.3f}{reach}"


def acceptances(at: EpsSummary, *, unfinished: bool = False) -> str:
    """Say how many images a model that may refuse accepted and rejected, before and under attack; "" for others."""
    if at.acceptance is None:
        return ""
    found = at.acceptance
    return (
        f"{'So far accepted' if unfinished else 'Accepted'} and rejected: {found.clean_accepted:,} and"
        f" {found.clean_rejected:,} images unperturbed,"
        f" {found.accepted:,} and {found.rejected:,} under attack at {plain(at.eps_text, 20)}."
    )


def unfinished(summary: Summary) -> str:
    """Say that a run stopped early, why, and what is known all the same; "" of a run that came to its end."""
    if not summary.unfinished:
        return ""
    at, parts = headline(summary), [f"Stopped early: {plain(summary.unfinished)}."]
    if at is not None and at.undecided:
        parts.append(
            f"{at.undecided:,} of {at.robust_accuracy.total:,} images are undecided, so {_held(summary)} at "
            f"{plain(at.eps_text, 20)} lies between {robust_bounds(at).replace(f' {RANGE} ', ' and ')}."
        )
    return " ".join([*parts, "The same command with a larger budget, or none, goes on from here."])


def _held(summary: Summary) -> str:
    """Name the share of images on which the goal is not reached, inside a sentence."""
    words = words_of(summary)
    return words.held if words.held.endswith("accuracy") else f'the share "{words.held}"'


def bounds(least: Rate, most: Rate | None) -> str:
    """Return a share that lies between two rates, as "a - b".

    Example:
        >>> from robustvlm.stats import rate
        >>> bounds(rate(1, 4), rate(3, 4)).replace(RANGE, "to")
        '25.0% to 75.0%'
    """
    return f"{percent(least.value)} {RANGE} {percent((most or least).value)}"


def open_ended(summary: Summary, least: Rate, most: Rate | None) -> bool:
    """Whether a rate of a run that stopped early is only known between two bounds."""
    return bool(summary.unfinished) and most is not None and most.successes > least.successes


def share(summary: Summary, least: Rate, most: Rate | None) -> str:
    """Return a rate with its interval; as bounds where a run that stopped early does not know it yet."""
    if open_ended(summary, least, most):
        return bounds(least, most)
    return f"{percent(least.value)} ({interval(least)})" if least.total else DASH


def robust_bounds(at: EpsSummary) -> str:
    """Return robust accuracy if no undecided image were robust, and if all of them were, as "a - b"."""
    return bounds(at.robust_accuracy, at.robust_accuracy_at_most)


def success_bounds(at: EpsSummary) -> str:
    """Return the success rate if no undecided image fell, and if all of them did, as "a - b"."""
    total = at.fooled + at.robust + at.undecided
    low, high = (count / total if total else None for count in (at.fooled, at.fooled + at.undecided))
    return f"{percent(low)} {RANGE} {percent(high)}"


def forecast(estimate: Estimate) -> str:
    """Say what the attacks will cost, in one sentence.

    Example:
        >>> forecast(Estimate(images=80, passes_least=160, passes_most=16160, seconds_least=0.4, seconds_most=41))
        '80 images to attack: at most 16,160 encoder passes (about 41.0 s), at least 160 (0.40 s).'
        >>> forecast(Estimate(images=0, passes_least=0, passes_most=0, seconds_least=0, seconds_most=0))
        'Nothing is left to attack.'
    """
    if not estimate.images:
        return "Nothing is left to attack."
    others = f"; on top of it {', '.join(map(plain, estimate.unknown))}, of unknown cost" if estimate.unknown else ""
    return (
        f"{estimate.images:,} image{'s' if estimate.images > 1 else ''} to attack: at most {estimate.passes_most:,} "
        f"encoder passes (about {duration(estimate.seconds_most)}), at least {estimate.passes_least:,} "
        f"({duration(estimate.seconds_least)}){others}."
    )


def each_attack_on(words: GoalWords) -> str:
    """Say which images each attack of a run was made on."""
    return "the images that the ones before left standing" if words.leave else "all images"


def first_goal(summary: Summary) -> str:
    """Say which of several goals the counts by attack are of; "" where there is one."""
    return "for level 0, the classes" if summary.goal.rpartition("/")[2].endswith("matrix") else ""


def how_many_attacks(n: int) -> str:
    """Return "the attack", "both attacks" or "all n attacks"."""
    return {1: "the attack", 2: "both attacks"}.get(n, f"all {n} attacks")


def smaller_eps(summary: Summary) -> str:
    """Return what already happens at the smallest eps, or "" when there is only one."""
    if len(summary.per_eps) < 2 or summary.per_eps[0].attack_success_rate.total == 0:
        return ""
    at = summary.per_eps[0]
    if summary.unfinished and at.undecided:
        between = success_bounds(at).replace(f" {RANGE} ", " and ")
        return f"At {plain(at.eps_text)} the attack success rate lies between {between}."
    rate = at.attack_success_rate
    return f"At {plain(at.eps_text)} the attack success rate is {percent(rate.value)} (95% interval {interval(rate)})."
