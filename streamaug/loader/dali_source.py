"""The stream as a `source` of NVIDIA DALI's external_source, on the CPU or on the GPU. Needs the extra `dali`."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from streamaug.errors import MissingExtra, UsageError
from streamaug.loader.labels import Labels

if TYPE_CHECKING:
    from streamaug.stream.stream import Stream

PixelLayout = Literal["HWC", "CHW"]


def stream_source(
    stream: "Stream",
    batch_size: int | None = None,
    *,
    layout: PixelLayout = "HWC",
    device: str | torch.device = "cpu",
    classes: Sequence[str] | None = None,
    soft_labels: bool = False,
    with_ids: bool = False,
    hold: int = 0,
) -> Callable[[], tuple]:
    """A `source` for DALI's external_source: each call takes a batch from the stream.

        images, labels = fn.external_source(source=stream_source(stream, 64), num_outputs=2)

        images, labels = fn.external_source(
            source=stream_source(stream, 64, device="cuda"), num_outputs=2, device="gpu"
        )

        source = ndd.ExternalSource(stream_source(stream, 64), num_outputs=2)   # nvidia.dali.experimental.dynamic
        images, labels = source()

    It returns DALI tensor lists on `device`, each over one contiguous tensor with its layout: images uint8
    [n, H, W, C] as DALI's decoders make them (or [n, C, H, W]), labels int32 [n, 1] as its file reader gives them
    (float32 [n, classes] with `soft_labels`, needed for recipes that mix classes) and, with `with_ids`, int64 [n, 1].
    A pipeline calls it prefetch_queue_depth batches ahead of what it delivers, so the stream's own state is ahead by
    as much; `DALIStreamLoader` counts what is delivered.

    batch_size: at most the pipeline's; None takes the stream's.
    layout: "CHW" hands on the memory that the stream delivers; "HWC" costs one pass over it, on `device`.
    device: "cpu", "cuda" or "cuda:1", which goes with external_source's device "cpu" and "gpu". Images that the stream
        delivers there are handed on where they are; others are copied there once, on a CUDA stream of the source's own.
        Not measured on a GPU yet.
    classes: names of the real labels in order, where they are ordered differently from the stream's: for the file
        reader the sorted names of the folders.
    hold: batches kept alive after they were handed on. DALI copies what it is given; with
        external_source(no_copy=True) it reads our memory, and needs hold=prefetch_queue_depth + 1.

    Raises MissingExtra without DALI, UsageError for arguments that cannot be used.
    """
    require_usable(stream)
    tensors = Tensors(layout, device)
    names = Labels(stream.class_names, classes)
    like = torch.empty(0, len(stream.class_names)) if soft_labels else torch.empty(0, dtype=torch.int32)
    count = batch_size or stream.config.batch_size
    held: deque[tuple] = deque(maxlen=hold)

    def source() -> tuple:
        with tensors.work():
            synthetic = stream.take(count)
            labels = names.encode(synthetic, like)
            columns = [labels if soft_labels else labels[:, None]]
            moved = tensors.moved(synthetic.images, *columns, *([synthetic.ids[:, None]] if with_ids else []))
        outputs = tensors.lists(moved)
        held.append(outputs)
        return outputs

    return source


class Tensors:
    """Images [n, C, H, W] and columns beside them as DALI's tensor lists; what is in place already is not copied."""

    def __init__(self, layout: PixelLayout, device: str | torch.device = "cpu"):
        if layout not in ("HWC", "CHW"):
            raise UsageError(f"layout={layout!r}: accepted are 'HWC' and 'CHW'")
        try:
            from nvidia.dali import tensors
        except ImportError:
            raise MissingExtra("NVIDIA DALI", "dali") from None
        self.layout = layout
        self.device = _device(device)
        on_gpu = self.device.type == "cuda"
        self._list = tensors.TensorListGPU if on_gpu else tensors.TensorListCPU
        # Copies on a stream of their own wait for no training step, and no training step waits for them.
        self._lane = torch.cuda.Stream(self.device) if on_gpu else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is queued for the GPU inside it has been done when it is left."""
        if self._lane is None:
            yield
            return
        with torch.cuda.stream(self._lane):
            yield
        self._lane.synchronize()

    def moved(self, images: Any, *columns: Any) -> list[torch.Tensor]:
        """Arrays or tensors as contiguous tensors on the device, images in the layout. Inside `work`."""
        pixels = self._there(images)
        if self.layout == "HWC":
            pixels = pixels.permute(0, 2, 3, 1)
        return [pixels.contiguous(), *(self._there(column).contiguous() for column in columns)]

    def lists(self, moved: list[torch.Tensor]) -> tuple:
        """DALI's lists over the memory of the tensors, which they keep alive."""
        images, *columns = moved
        return self._list(to_dlpack(images), self.layout), *(self._list(to_dlpack(column), "") for column in columns)

    def _there(self, values: Any) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
        return tensor.to(self.device, non_blocking=True)


def require_usable(stream: Any) -> None:
    """Raises UsageError for what is no stream, or one that may deliver less than a batch."""
    if not hasattr(stream, "take"):
        raise UsageError(f"a Stream is needed, got a {type(stream).__name__}")
    if stream.config.starved == "real":
        raise UsageError(
            "a DALI source delivers whole batches (stream.starved: real does not); set it to wait or reuse"
        )


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f'device={str(device)!r}: accepted are "cpu", "cuda" and "cuda:1" (DALI\'s "gpu")')
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f'device={str(device)!r}: torch finds no GPU here; device="cpu" works without one')
    return found
