"""SeqIO tasks of basemt_jax; importing this registers those that ship."""

from tasks import cldr as cldr
from tasks import ml50 as ml50
from tasks import opus100 as opus100
from tasks import wmt15 as wmt15
