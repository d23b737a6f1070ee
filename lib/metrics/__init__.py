"""Metrics of generated shapes, on plain numpy arrays of features, probabilities and voxels.

Wherever both sets are arguments the order is (real, generated); in a matrix of distances the rows
are real and the columns generated. Nothing here prints or touches a global random state. Bad
input raises `lib.errors.StudyError`.
"""

from lib.metrics.anchors import bernoulli, memoriser, noise, pca_gaussian
from lib.metrics.average_precision import (
    aligned_average_precision,
    alignments,
    average_precision,
    best_alignment,
)
from lib.metrics.calibration import (
    expected_calibration_error,
    free_energy,
    reliability,
    temperature,
)
from lib.metrics.detection import detection_auroc
from lib.metrics.frechet import frechet_distance
from lib.metrics.inception import class_probability, inception_score
from lib.metrics.intervals import (
    Estimate,
    draws_without_replacement,
    mcnemar_test,
    non_inferiority_test,
    paired_permutation_test,
    student_interval,
    wilson_interval,
)
from lib.metrics.kernel import kernel_distance, overlap_distance
from lib.metrics.memorisation import memorisation
from lib.metrics.neighbours import (
    feature_distances,
    iou_matrix,
    nearest_by_feature,
    nearest_by_iou,
)
from lib.metrics.prdc import precision_recall_density_coverage
from lib.metrics.sets import (
    coverage,
    minimum_matching_distance,
    one_nearest_neighbour_accuracy,
    pairwise_diversity,
)

__all__ = [
    "Estimate",
    "aligned_average_precision",
    "alignments",
    "average_precision",
    "bernoulli",
    "best_alignment",
    "class_probability",
    "coverage",
    "detection_auroc",
    "draws_without_replacement",
    "expected_calibration_error",
    "free_energy",
    "feature_distances",
    "frechet_distance",
    "inception_score",
    "iou_matrix",
    "kernel_distance",
    "student_interval",
    "mcnemar_test",
    "memorisation",
    "memoriser",
    "minimum_matching_distance",
    "nearest_by_feature",
    "nearest_by_iou",
    "noise",
    "non_inferiority_test",
    "one_nearest_neighbour_accuracy",
    "overlap_distance",
    "paired_permutation_test",
    "pairwise_diversity",
    "pca_gaussian",
    "precision_recall_density_coverage",
    "reliability",
    "temperature",
    "wilson_interval",
]
