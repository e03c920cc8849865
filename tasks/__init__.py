"""SeqIO tasks of basemt_jax; importing this registers those that ship."""

from tasks import cldr as cldr
