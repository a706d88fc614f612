"""The tiny decoder of the self-test, under the name that the tests use."""

from __future__ import annotations

from devices.tiny_decoder import CONTEXT, HEAD, KV_HEADS, LAYERS, VOCABULARY, build_model, write_bundle

__all__ = ["CONTEXT", "HEAD", "KV_HEADS", "LAYERS", "VOCABULARY", "build_model", "write_bundle"]
