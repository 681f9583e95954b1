"""Where the pictures come from: a folder, or Fashion-MNIST at half its size, which lies beside this file."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

PACKAGED = Path(__file__).parent / "fashion"
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


class ImageData(LightningDataModule):
    """Batches of square images and their classes; a tenth of the images is held out for validation.

    Args:
        data_dir: A folder with the training files of MNIST or Fashion-MNIST (`train-images-idx3-ubyte.gz`,
            `train-labels-idx1-ubyte.gz`), or with `train/CLASS/*.jpg` and `val/CLASS/*.jpg`. Without it,
            Fashion-MNIST at 14 x 14, which comes with this recipe.
        image_size: Height and width; smaller images are enlarged.
        batch_size: Images per step, of all processes together.
        num_workers: Processes that read image files; the other data are in memory.
        seed: Of the order of the training images.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        image_size: int = 28,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.training, self.validation, self.title, self.origin = load(data_dir and Path(data_dir), image_size)
        self.num_classes, self.channels = self.training.num_classes, self.training.channels
        if len(self.training) < batch_size:
            raise ValueError(f"data.batch_size={batch_size} is more than the {len(self.training)} training images")

    def train_dataloader(self) -> ResumableLoader:
        order = ShuffledBatches(len(self.training), self.batch_size, self.seed, self._share)
        return ResumableLoader(self.training, sampler=order, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        order = [batch[self._share] for batch in torch.arange(len(self.validation)).split(self.batch_size)]
        return DataLoader(self.validation, sampler=order, batch_size=None, num_workers=self.num_workers)

    @property
    def _share(self) -> slice:
        """This process's part of every batch, so that all of them together see what one would."""
        return slice(self.trainer.global_rank, None, self.trainer.world_size) if self.trainer else slice(None)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Scale and enlarge what is kept as bytes, on the device."""
        images, labels = batch
        if images.dtype is torch.uint8:
            images = (images / 255 - self.training.mean) / self.training.std
            if images.shape[-1] != self.image_size:
                images = interpolate(images, self.image_size, mode="bilinear", antialias=True)
        return images, labels


def load(data_dir: Path | None, image_size: int) -> tuple[Any, Any, str, str]:
    """Training images, validation images, what they are called, and where they come from."""
    if data_dir is not None and (data_dir / "train").is_dir() and (data_dir / "val").is_dir():
        training, validation = (FolderImages(data_dir / part, image_size, part == "train") for part in ("train", "val"))
        return training, validation, data_dir.name, f"image folder {data_dir}"
    folder = data_dir or PACKAGED
    if data_dir is not None and not all(_find(folder, name) for name in (IMAGES, LABELS)):
        raise FileNotFoundError(
            f"--data-dir {data_dir} holds neither {IMAGES}[.gz] and {LABELS}[.gz] nor folders train/ and val/"
        )
    images, labels = (read_idx(path) for name in (IMAGES, LABELS) if (path := _find(folder, name)))
    title, origin = "Fashion-MNIST at 14 x 14", "which comes with this recipe"
    if data_dir is not None:
        title, origin = data_dir.name, str(folder)
    held_out = numpy.arange(len(images)) % 10 == 9
    training, validation = (ByteImages(images[part], labels[part]) for part in (~held_out, held_out))
    return training, validation, title, origin


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def read_idx(path: Path) -> numpy.ndarray:
    """The array of bytes in an IDX file, the format of MNIST, compressed or not.

    Raises:
        ValueError: It is not such a file.
    """
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} is not an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != numpy.prod(shape):
        raise ValueError(f"{path} should hold {shape} bytes but has {len(content) - start}; it is damaged")
    return numpy.frombuffer(content, numpy.uint8, offset=start).reshape(shape)


class ByteImages(Dataset[Any]):
    """Grey images in memory; takes a list of indices and returns a batch."""

    channels = 1

    def __init__(self, images: numpy.ndarray, labels: numpy.ndarray) -> None:
        self.images = torch.tensor(images).unsqueeze(1)  # (count, 1, height, width)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.num_classes = int(self.labels.max()) + 1
        sample = self.images[::10] / 255
        self.mean, self.std = sample.mean().item(), sample.std().item()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class FolderImages(Dataset[Any]):
    """Colour images in files; takes a list of indices and returns a batch."""

    channels = 3

    def __init__(self, folder: Path, image_size: int, training: bool) -> None:
        from timm.data import ImageDataset, create_transform

        self.files = ImageDataset(str(folder), transform=create_transform(image_size, is_training=training))
        self.num_classes = len(self.files.reader.class_to_idx)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: list[int]) -> Any:
        return default_collate([self.files[int(index)] for index in indices])


class ShuffledBatches(Sampler[list[int]]):
    """Lists of indices, in an order that depends on nothing but the seed and the epoch; of each batch, a share."""

    def __init__(self, size: int, batch_size: int, seed: int, share: slice = slice(None)) -> None:
        self.size, self.batch_size, self.seed, self.share = size, batch_size, seed, share
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = torch.randperm(self.size, generator=generator).split(self.batch_size)
        return iter([batch[self.share].tolist() for batch in batches[self.start : len(self)]])


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning's checkpoints can restore in the middle of an epoch.

    It counts the batches that were handed out, since workers run ahead of the training.
    """

    sampler: ShuffledBatches

    epoch = done = 0

    def __iter__(self) -> Any:
        self.sampler.epoch, self.sampler.start = self.epoch, self.done
        for batch in super().__iter__():
            self.done += 1
            if self.done == len(self):
                self.epoch, self.done = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]
