"""The callbacks: what reacts to a training. One file for each; ``base`` tells how they are called."""

from asynccb.callbacks.backup_and_restore import BackupAndRestore
from asynccb.callbacks.base import Callback
from asynccb.callbacks.base_logger import BaseLogger
from asynccb.callbacks.csv_logger import CSVLogger
from asynccb.callbacks.early_stopping import EarlyStopping
from asynccb.callbacks.history import History
from asynccb.callbacks.lambda_callback import LambdaCallback
from asynccb.callbacks.learning_rate_scheduler import LearningRateScheduler
from asynccb.callbacks.model_checkpoint import ModelCheckpoint
from asynccb.callbacks.offload import Offload
from asynccb.callbacks.progbar_logger import ProgbarLogger
from asynccb.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from asynccb.callbacks.remote_monitor import RemoteMonitor
from asynccb.callbacks.swap_ema_weights import SwapEMAWeights
from asynccb.callbacks.tensorboard import TensorBoard
from asynccb.callbacks.terminate_on_nan import TerminateOnNaN

__all__ = [
    "BackupAndRestore",
    "BaseLogger",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "History",
    "LambdaCallback",
    "LearningRateScheduler",
    "ModelCheckpoint",
    "Offload",
    "ProgbarLogger",
    "ReduceLROnPlateau",
    "RemoteMonitor",
    "SwapEMAWeights",
    "TensorBoard",
    "TerminateOnNaN",
]
