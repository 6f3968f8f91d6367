"""Ablations: variants of a training run on one dataset, with several seeds each, in one table."""

from pmf.ablation.report import decimals, judge_orderings, summarise, write_report
from pmf.ablation.study import CLASSIFIER, Study
from pmf.ablation.suites import SUITES, Growth, Ordering, Suite
from pmf.ablation.variants import Variant, why_unread_in_studies

__all__ = [
    "CLASSIFIER",
    "SUITES",
    "Growth",
    "Ordering",
    "Study",
    "Suite",
    "Variant",
    "decimals",
    "judge_orderings",
    "summarise",
    "why_unread_in_studies",
    "write_report",
]
