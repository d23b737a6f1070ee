"""Ours: the Baseline with a tuned rate and the regularisers of today.

The comparison of 3DWINN with an under-trained Baseline would say little.
"""

from lib.train.classifiers import table1_model

MODEL = table1_model("tuned", lambda profile: profile.tuned)
