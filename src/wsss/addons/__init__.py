"""Add-ons: losses that go on top of any method."""

from wsss.addons.affinity import Affinity
from wsss.addons.base import AddOn, Step, View
from wsss.addons.distribution import Distribution
from wsss.addons.feature_similarity import FeatureSimilarity
from wsss.addons.importance_sampling import ImportanceSampling

__all__ = [
    "AddOn",
    "Affinity",
    "Distribution",
    "FeatureSimilarity",
    "ImportanceSampling",
    "Step",
    "View",
]
