"""Baseline of 3DWINN (Huang et al. 2019, Table 5): its network, trained by cross-entropy alone."""

from lib.train.classifiers import table1_model

MODEL = table1_model("baseline", lambda profile: profile.baseline)
