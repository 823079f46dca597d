"""Rewrite a checkpoint's shards into one file per layer's dense part and one per expert, and back.

Tensor bytes never change. The way of the data: `source` reads headers, `plan` decides everything, `transfer` moves
bytes, `manifests` describes the result. No torch here.
"""
