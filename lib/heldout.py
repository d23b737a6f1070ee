"""The test split. Evaluation imports this module; training code must not (a test asserts it)."""

from lib import config, data


def load_test(settings: config.Data) -> data.Split:
    """The test split, empty grids included: a classifier must answer for every test shape."""
    return data.load_split(settings, "test")


def reference(settings: config.Data, category: str) -> data.Split:
    """Test shapes that generated ones are compared with: one category, empty grids left out."""
    split = load_test(settings).category(category)
    return split.where(split.voxels.any((1, 2, 3)))
