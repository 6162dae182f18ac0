"""The latent bank: what inversion wrote and perturbation reads, as memory-mapped rows of named tensors.

A bank is a folder:

    index.json                         class names, meta, the files below with their checksums; written last
    rows-<hash>.safetensors            label, source hash and source name of every row
    shard-00000-<hash>.safetensors     the tensors of the first rows, and so on
    .bank-lock                         held while a process writes
    .bank-work/                        while writing: finished groups not yet gathered into a shard

Rows are computed in groups of fixed size and membership. A group's fingerprint hashes all that its tensors
depend on; every file lists the fingerprints it holds and is named by them. So a writer finds what is already
there after any interruption, the old bank stays whole until the new index replaces the old one, and the
finished bytes do not depend on history.
"""

from streamaug.bank.plan import BankPlan, Group
from streamaug.bank.reader import LatentBank
from streamaug.bank.writer import BankWriter, open_if_current

__all__ = ["BankPlan", "BankWriter", "Group", "LatentBank", "open_if_current"]
