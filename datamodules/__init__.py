"""LightningDataModules, one per data set."""

from datamodules.base import ImageDataModule
from datamodules.folder import ImageFolder
from datamodules.idrid import IDRiD
from datamodules.imagenet import ImageNet
from datamodules.synthetic import SyntheticFundus
from datamodules.transforms import Augmentation

__all__ = ["Augmentation", "IDRiD", "ImageDataModule", "ImageFolder", "ImageNet", "SyntheticFundus"]
