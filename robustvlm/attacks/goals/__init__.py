"""Goals: what the attacker wants, a kind or two a file: its class, how it is written, and what it is called."""

from robustvlm.attacks.goals.answers import Match, Reword
from robustvlm.attacks.goals.base import (
    CLEAN,
    GOALS,
    REJECTED,
    Case,
    Goal,
    GoalKind,
    GoalWords,
    Known,
    goal_words,
    read_goals,
    split_goal,
)
from robustvlm.attacks.goals.classes import (
    AcceptedMistake,
    Deny,
    Intrude,
    Misclassify,
    Refusable,
    Superclass,
    SuperclassAll,
    Targeted,
)
from robustvlm.attacks.goals.feature import FeatureAway, FeatureGoal, FeatureTo
from robustvlm.attacks.goals.words import Say, Unsay, WordsGoal

__all__ = [
    "CLEAN", "GOALS", "REJECTED", "AcceptedMistake", "Case", "Deny", "FeatureAway", "FeatureGoal", "FeatureTo", "Goal",
    "GoalKind", "GoalWords", "Intrude", "Known", "Match", "Misclassify", "Refusable", "Reword", "Say", "Superclass",
    "SuperclassAll", "Targeted", "Unsay", "WordsGoal", "goal_words", "read_goals", "split_goal",
]  # fmt: skip
