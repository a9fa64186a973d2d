"""LightningDataModules, one per data set; README.md beside this file shows the folder layout of each."""

from datamodules.base import ImageDataModule
from datamodules.cub import CUB
from datamodules.folder import ImageFolder
from datamodules.idrid import IDRiD
from datamodules.imagenet import ImageNet
from datamodules.io.transforms import Augmentation
from datamodules.magnetogram import Columns, Magnetogram
from datamodules.relations import SyntheticRelations
from datamodules.synthetic import SyntheticFundus
from datamodules.tar_shards import TarShards
from datamodules.voc import VOC

__all__ = [
    "CUB",
    "VOC",
    "Augmentation",
    "Columns",
    "IDRiD",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "Magnetogram",
    "SyntheticFundus",
    "SyntheticRelations",
    "TarShards",
]
