"""What Accelerate, Lightning and the Hugging Face Trainer need beyond `StreamLoader`. Each is imported when used.

    accelerator.prepare(model, optimizer, loader)               # a StreamLoader is prepared like a DataLoader
    Trainer(callbacks=[StreamCallback()])                       # Lightning
    add_stream(trainer, stream, ratio=0.5)                      # Hugging Face
    class MyTrainer(StreamTrainerMixin, Trainer): ...           # the same, for a class of your own

timm's `create_loader(..., use_prefetcher=False)` gives a DataLoader that is wrapped as it is; of the one with a
prefetcher wrap what it fetches from: `loader.loader = sa.StreamLoader(loader.loader, stream, ratio=0.5)`. Both
ways, synthetic images go through the transform that timm made.

Without a framework, `gather_state` makes one state of all ranks'. What each framework needs, and where it ends, is in
docs/frameworks.md.
"""

from typing import TYPE_CHECKING

from streamaug.lazy import lazily

if TYPE_CHECKING:
    from streamaug.integrations.lightning import StreamCallback as StreamCallback
    from streamaug.integrations.transformers import StreamTrainerMixin as StreamTrainerMixin
    from streamaug.integrations.transformers import add_stream as add_stream
    from streamaug.loader.ranks import gather_state as gather_state

_PUBLIC = {
    "StreamCallback": "streamaug.integrations.lightning",
    "StreamTrainerMixin": "streamaug.integrations.transformers",
    "add_stream": "streamaug.integrations.transformers",
    "gather_state": "streamaug.loader.ranks",
}
__all__ = sorted(_PUBLIC)
__getattr__ = lazily(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
