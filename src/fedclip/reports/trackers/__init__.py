"""Trackers: a run's figures in TensorBoard, MLflow or Weights & Biases, or in one of yours.

`tracking` listens to a run and hands its figures on; `tracker` is what a tracker has to be. Their
packages are imported for a run that names them, and for no other.
"""

from fedclip.reports.trackers.tracker import Tracker

__all__ = ["Tracker"]
