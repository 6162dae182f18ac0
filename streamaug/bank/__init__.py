"""The latent bank: what inversion wrote and perturbation reads, as memory-mapped rows of named tensors.

A bank is a folder:

    index.json                         class names, meta, parts, the files below with their checksums; written last
    rows-<hash>.safetensors            label, source hash and source name of every row
    encode-00000-<hash>.safetensors    the tensors that method `encode` made for the first rows, and so on
    ddim-00000-<hash>.safetensors      each method has files of its own
    .bank-lock                         held while a process writes
    .bank-work/                        while writing: groups not yet gathered into a shard, and checkpoints

What one method stores is a part. Its rows are computed in groups of fixed size and membership. A group's fingerprint
hashes all that its tensors depend on; every file lists the fingerprints it holds and is named by them. So a writer
finds what is already there after any interruption, a changed setting redoes one part and no other, the old bank stays
whole until the new index replaces the old one, and the finished bytes do not depend on history.
"""

from typing import TYPE_CHECKING

from streamaug.lazy import lazily

if TYPE_CHECKING:
    from streamaug.bank.checkpoint import Checkpoint as Checkpoint
    from streamaug.bank.plan import BankPlan as BankPlan
    from streamaug.bank.plan import Group as Group
    from streamaug.bank.plan import Part as Part
    from streamaug.bank.reader import LatentBank as LatentBank
    from streamaug.bank.writer import BankWriter as BankWriter
    from streamaug.bank.writer import open_if_current as open_if_current

# Imported when first used: they need torch, the command line's --help does not.
_PUBLIC = {
    "BankPlan": "streamaug.bank.plan",
    "BankWriter": "streamaug.bank.writer",
    "Checkpoint": "streamaug.bank.checkpoint",
    "Group": "streamaug.bank.plan",
    "LatentBank": "streamaug.bank.reader",
    "Part": "streamaug.bank.plan",
    "open_if_current": "streamaug.bank.writer",
}
__all__ = sorted(_PUBLIC)
__getattr__ = lazily(__name__, _PUBLIC)
