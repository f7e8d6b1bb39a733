"""The one loop that trains by gradient steps, whatever a batch holds: images through a network, or features to a head.

===========  ==========================================================================================================
module       what it has
===========  ==========================================================================================================
recipe       what is decided beforehand: stages, loss, averaging, which epoch's weights are kept, when to stop
parameters   which parameters learn how fast: head and backbone, layer by layer, no decay on norms and biases
schedules    how the learning rate goes: step, cosine, one-cycle, with warm-up
loop         the steps and epochs, which can be left at any step and taken up again
checkpoints  a training that was left, on the disk: safetensors and JSON, whole or not there
batches      batches from tensors in memory
===========  ==========================================================================================================

Knows batches, losses and epochs; nothing of images, data sets or what the numbers are for.
"""

from __future__ import annotations

from featcache.training.batches import Batches, Position, TensorBatches
from featcache.training.checkpoints import NAME as CHECKPOINT
from featcache.training.checkpoints import Checkpoints, keep_if_due, removing
from featcache.training.loop import Epoch, State, Trainer, Training, evaluate, train
from featcache.training.parameters import group_parameters, list_layers
from featcache.training.recipe import (
    Recipe,
    Stage,
    set_mode_all,
    set_mode_fixed_batch_norm,
    set_mode_frozen,
    weigh_classes,
)
from featcache.training.schedules import make_scheduler

__all__ = [
    "CHECKPOINT",
    "Batches",
    "Checkpoints",
    "Epoch",
    "Position",
    "Recipe",
    "Stage",
    "State",
    "TensorBatches",
    "Trainer",
    "Training",
    "evaluate",
    "group_parameters",
    "keep_if_due",
    "list_layers",
    "make_scheduler",
    "removing",
    "set_mode_all",
    "set_mode_fixed_batch_norm",
    "set_mode_frozen",
    "train",
    "weigh_classes",
]
