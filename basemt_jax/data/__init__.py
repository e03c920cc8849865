"""From lines of text to batches: vocabulary, packing, row store, SeqIO."""
