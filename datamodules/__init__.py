"""LightningDataModules, one per data set."""

from datamodules.base import ImageDataModule
from datamodules.idrid import IDRiD
from datamodules.transforms import Augmentation

__all__ = ["Augmentation", "IDRiD", "ImageDataModule"]
