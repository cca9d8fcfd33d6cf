"""Data sets as tensors, three disjoint splits each."""

from topotune.data.load import load_splits
from topotune.data.splits import SplitPlan, Splits, TensorPair, stratified_splits

__all__ = ["SplitPlan", "Splits", "TensorPair", "load_splits", "stratified_splits"]
