"""Runs -> a comparison as numbers, in a table, in Markdown, and in one plain sentence. Knows no files and no figures.

The numbers are in `arms`, what they allow to say in `verdict`, how they are laid out in `tables`; `ranking` is the
leaderboard of backbones, which has a first one and compares all others with it.
"""

from __future__ import annotations

from featcache.report.arms import SCHEMA, Arm, SeedRun, choose_split, describe_arm, describe_pairs, summarise
from featcache.report.ranking import (
    compare_with_first,
    format_ranking_markdown,
    state_ranking,
    state_ranking_grounds,
    summarise_ranking,
    tabulate_ranking,
)
from featcache.report.tables import format_bytes, format_markdown, format_table, tabulate
from featcache.report.verdict import state_grounds, state_verdict

__all__ = [
    "SCHEMA",
    "Arm",
    "SeedRun",
    "choose_split",
    "compare_with_first",
    "describe_arm",
    "describe_pairs",
    "format_bytes",
    "format_markdown",
    "format_ranking_markdown",
    "format_table",
    "state_grounds",
    "state_ranking",
    "state_ranking_grounds",
    "state_verdict",
    "summarise",
    "summarise_ranking",
    "tabulate",
    "tabulate_ranking",
]
